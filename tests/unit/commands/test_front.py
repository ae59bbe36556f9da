"""What is answered at once: help, a wrong word, the shipped configurations."""

import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from mtp_modules.commands.catalogue import OWN, TRAINER
from mtp_modules.commands.front import overview, own_help
from mtp_modules.commands.running import function_of, parser_of
from mtp_modules.commands.signatures import signature_of
from mtp_modules.commands.trainer import trainer_parsers
from mtp_modules.commands.trainer_help import trainer_help
from mtp_modules.commands.words import wrong_word
from mtp_modules.configuration.parser import ROLES, known_classes
from tests.command_line import ROOT, refusal, run

SCREEN = 24


def process(*arguments: str, folder: Path, extra: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *extra, "-m", "mtp_modules", *arguments]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "status"),
    [(["--help"], 0), (["fit", "--help"], 0), (["generate", "--help"], 0), (["fti"], 1), ([], 1), (["configs"], 0)]
    + [
        (words.split(), 1)
        for words in ("generate --promt a", "chat", "fit --config none.yaml", "fit --trainer.max_step 3")
    ],
    ids=str,
)
def test_text_is_answered_within_two_seconds_of_processor_time(tmp_path: Path, words: list[str], status: int) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = process(*words, folder=tmp_path, extra=("-X", "importtime"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == status
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "mtp_modules.commands.front" in imported
    assert imported.isdisjoint({"torch", "numpy", "lightning", "jsonargparse"})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("generate --promt a", "unknown argument 'promt'; did you mean prompt? Known: ckpt_path, prompt, "),
        (
            "generate a.ckpt --decoder.drafter=X --topp=3",
            "unknown argument 'topp'; did you mean top_p? Known: ckpt_path, ",
        ),
        ("chat --system=x", "ckpt_path: is missing. A checkpoint file, the folder of a run, "),
        ("fit --model.headz x", "model has no argument 'headz'; did you mean heads? Known: trunk, heads, loss, "),
        (
            "test --trainer.max_step 3",
            "trainer has no argument 'max_step'; did you mean max_steps? Known: accelerator, ",
        ),
        ("fit --config=none.yaml", "config: none.yaml does not exist; give a YAML file."),
        ("fit --modle.x=3", "unknown argument 'modle.x'; did you mean model? Known: seed_everything, trainer, "),
        ("validat", "command: 'validat' is unknown; did you mean validate? Known: fit, validate, "),
    ],
)
def test_a_wrong_word_is_a_sentence(words: str, sentence: str) -> None:
    assert refusal(*words.split()).startswith(sentence)


def test_no_word_that_a_parser_takes_is_wrong() -> None:
    parsers = {**trainer_parsers(), **{command: parser_of(command, function_of(command)) for command in OWN}}
    assert parsers.keys() == {*TRAINER, *OWN}
    tried = 0
    for command, parser in parsers.items():
        options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        tried += len(options)
        for option in options:
            said = wrong_word(command, [f"{option}=1"])
            assert said is None or ": is missing. " in said or "does not exist" in said, said
        assert wrong_word(command, []) is None or ": is missing. " in str(wrong_word(command, []))
    assert tried > 200


def test_the_help_names_every_command_with_a_sentence() -> None:
    said = " ".join(overview().split())
    for command in [*TRAINER, *OWN]:
        sentence = TRAINER.get(command) or signature_of(command).sentence
        assert f" {command} {sentence} " in said
        assert sentence.endswith(".")
        assert sentence[0].isupper()


@pytest.mark.parametrize("command", OWN)
def test_the_help_of_a_command_says_everything_once(command: str) -> None:
    """The help that is read from the source has the options of the parser that is made of the function."""
    said, parser = " ".join(own_help(command).split()), parser_of(command, function_of(command))
    long = parser.format_help()
    options = {action.dest for action in parser._actions if not action.dest.endswith("help")} - {"print_shtab"}
    assert {argument.name for argument in signature_of(command).arguments} == options
    for argument in signature_of(command).arguments:
        line = f" --{argument.name} {argument.meaning} ("
        assert said.count(line) == said.count(f" --{argument.name} ") == 1
    assert "Args:" not in said + long


@pytest.fixture(scope="module")
def parsers() -> dict[str, ArgumentParser]:
    return trainer_parsers()


@pytest.mark.parametrize("command", TRAINER)
def test_the_short_help_ends_within_two_screens_and_names_real_options(
    command: str, parsers: dict[str, ArgumentParser]
) -> None:
    lines = trainer_help(command).splitlines()
    assert len(lines) <= 2 * SCREEN
    assert max(map(len, lines)) <= 88
    named = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(named) == len(set(named)) > 10
    known = {option for action in parsers[command]._actions for option in action.option_strings}
    for option in named:
        if option not in known:  # an argument of a class that another option names
            owner, _, argument = option.rpartition(".")
            assert owner in known
            role = ROLES[owner.removeprefix("--").rpartition(".")[2]]
            assert any(argument in cls.__init__.__annotations__ for cls in known_classes(role).values()) or (
                (role.__name__, argument) in {("Optimizer", "lr"), ("MultiTokenLoss", "weights")}
            )


def test_all_options_are_behind_help_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("fit", "--help.all")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--trainer.num_sanity_val_steps" in said
    assert "--model.own_unembeddings" in said
    with pytest.raises(SystemExit):
        run("generate", "--help.all")
    assert "type: int" in capsys.readouterr().out


def test_shipped_configurations_are_listed_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run("configs")
    listed = capsys.readouterr().out.splitlines()
    files = {file.relative_to(ROOT / "configs").with_suffix("").as_posix() for file in ROOT.glob("configs/**/*.yaml")}
    assert {line.split()[0] for line in listed if line} - {"Copy"} == files
    run("configs", "copy", "notebook")
    assert Path("notebook.yaml").read_bytes() == (ROOT / "configs/notebook.yaml").read_bytes()
    assert "Next: python -m mtp_modules fit --config notebook.yaml" in capsys.readouterr().out
    run("configs", "copy", "overlays/ddp", "--to", "many.yaml")
    assert yaml.safe_load(Path("many.yaml").read_text(encoding="utf-8"))["trainer"]["strategy"] == "ddp"
    assert refusal("configs", "copy", "notebook") == (
        "configs: notebook.yaml exists and is kept; give another file with --to."
    )
    assert refusal("configs", "copy", "notes").startswith("configs: name 'notes' is unknown. Known: notebook, ")
    assert refusal("configs", "copy", "notebook", "--to", "no/where.yaml").startswith("configs: no/where.yaml cannot")
    assert refusal("configs", "move").startswith("configs: argument action: invalid choice: 'move'")


def test_the_wheel_has_the_configurations() -> None:
    """Where they are looked for is where the build puts them."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["force-include"] == {"configs": "mtp_modules/configs"}


CASES = {
    ("ge",): {"generate"},
    ("fit", "--trainer.max_s"): {"--trainer.max_steps"},
    ("fit", "--model.heads", "Re"): {"RecurrentHeads", "ResidualHeads"},
    ("fit", "--model.heads", "=", "Rec"): {"RecurrentHeads"},
    ("fit", "--model.heads.num_ho"): {"--model.heads.num_horizons"},
    ("generate", "--max"): {"--max_new_tokens"},
    ("configs", "copy", "q"): {"quickstart"},
    ("fit", "--config", "ho"): {"home.yaml"},
}


def test_bash_completes_commands_options_classes_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("completion")
    (tmp_path / "completion").write_text(capsys.readouterr().out, encoding="utf-8")
    (tmp_path / "home.yaml").touch()
    tries = [
        f"COMP_WORDS=(mtp_modules {' '.join(words)}) COMP_CWORD={len(words)}; _mtp_modules; echo ${{COMPREPLY[*]}}"
        for words in CASES
    ]
    script = "\n".join(["source completion", *tries])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert [set(line.split()) for line in done.stdout.splitlines()] == list(CASES.values())
