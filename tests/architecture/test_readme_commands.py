"""The two commands of the README are the ones that are run and tested."""

import re
import subprocess
import tomllib
from itertools import chain

import pytest
from packaging.requirements import Requirement

from tests.architecture.imports import ROOT

README = ROOT / "README.md"


def _command(name: str) -> str:
    """Return the one line of the block after `<!-- command: name -->`."""
    pattern = rf"^<!-- command: {name} -->\n```bash\n(.*?)\n```$"
    blocks = re.findall(pattern, README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"README.md must have one bash block after '<!-- command: {name} -->', has {len(blocks)}"
    assert "\n" not in blocks[0], f"the command {name!r} of README.md must be one line"
    return blocks[0]


@pytest.mark.parametrize("name", ["quickstart", "tests"])
def test_the_readme_has_the_command(name: str) -> None:
    assert _command(name).startswith("python3 -m venv .venv && ")


def test_continuous_integration_runs_the_test_command_verbatim() -> None:
    script = ROOT / ".ci" / "run"
    printed = subprocess.run(["bash", str(script), "--print"], capture_output=True, text=True, check=True)
    assert printed.stdout == _command("tests") + "\n"


def test_the_commands_install_at_the_constraints() -> None:
    for name in ("quickstart", "tests"):
        (constraints,) = re.findall(r"pip install -c (\S+)", _command(name))
        assert (ROOT / constraints).is_file()


def test_the_quickstart_trains_with_a_config_that_exists() -> None:
    command = _command("quickstart")
    assert " -m mtp_modules fit " in command
    (config,) = re.findall(r"--config[ =](\S+)", command)
    assert (ROOT / config).is_file()


def test_the_test_command_runs_the_test_session() -> None:
    command = _command("tests")
    assert re.search(r"nox -s tests$", command)
    assert "def tests(session" in (ROOT / "noxfile.py").read_text(encoding="utf-8")


def test_every_declared_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    lines = (ROOT / ".constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    names = {re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in requirements}
    assert names - {project["name"]} <= pinned


def test_the_locked_versions_are_those_of_the_constraints() -> None:
    """`nox -s lock` was run since the constraints or the dependencies changed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (project["optional-dependencies"][extra] for extra in ("data", "hf", "hub", "studies"))
    requirements = map(Requirement, chain(project["dependencies"], *extras))
    names = {requirement.name.lower().replace("_", "-") for requirement in requirements}
    pinned = {
        name.lower().replace("_", "-"): version
        for name, _, version in (
            line.partition("==") for line in (ROOT / ".constraints.txt").read_text(encoding="utf-8").splitlines()
        )
        if version
    }
    text = (ROOT / ".requirements.lock").read_text(encoding="utf-8")
    blocks = re.findall(r"^([\w.-]+)==(\S+).*((?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?)+)", text, flags=re.MULTILINE)
    locked = {name: version for name, version, _ in blocks}
    assert {name: locked.get(name) for name in names} == {name: pinned[name] for name in names}
    assert len(blocks) == len(re.findall("^[a-z]", text, flags=re.MULTILINE))
