"""The command line: what it refuses, in one sentence before any training, and how it stops."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mtp_modules.heads
from mtp_modules import LinearHeads, MTPModel, RecurrentTrunk, TransformerTrunk
from mtp_modules.commands.catalogue import OWN, TRAINER
from mtp_modules.data.tokenizers import ByteTokenizer
from mtp_modules.loading import load_model
from mtp_modules.training import MTPModule, draft_tokens
from tests.command_line import ROOT, refusal, run
from tests.helpers import assert_same
from tests.unit.training.running import data, module, trainer

NOTEBOOK, QUICKSTART = ROOT / "configs" / "notebook.yaml", ROOT / "configs" / "quickstart.yaml"
COMMANDS = ", ".join([*TRAINER, *OWN])


def fit(config: Path, *arguments: str | Path) -> str:
    """Return the sentence with which training is refused."""
    return refusal("fit", "--config", config, "--trainer.logger=false", "--trainer.accelerator=cpu", *arguments)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `numbers.ckpt` (no tokenizer) and `bytes` (a pretrained folder, at most 32 positions)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    saver = trainer(folder, max_steps=1, max_epochs=-1)
    saver.fit(module(), data())
    saver.save_checkpoint(folder / "numbers.ckpt")
    trunk = TransformerTrunk(vocab_size=256, d_model=8, num_layers=1, num_heads=2, max_positions=32)
    model = MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=2))
    model.save_pretrained(folder / "bytes", tokenizer=ByteTokenizer())
    plain = MTPModel(trunk=RecurrentTrunk(vocab_size=9, d_model=8), heads=LinearHeads(d_model=8, num_horizons=1))
    plain.save_pretrained(folder / "plain")
    (folder / "bad.ckpt").write_text("hello, I am no checkpoint", encoding="utf-8")
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    return folder


# What is said twice.


def test_a_width_that_contradicts_the_trunk() -> None:
    assert fit(NOTEBOOK, "--model.heads.init_args.d_model=32") == (
        "model.heads.init_args.d_model: is 32 here, but model.trunk.d_model is 64; leave it out, it is filled in."
    )


def test_an_embedding_width_that_contradicts_the_trunk() -> None:
    assert fit(QUICKSTART, "--model.heads.init_args.embedding_width=32") == (
        "model.heads.init_args.embedding_width: is 32 here, but model.trunk.embedding_width is 160; "
        "leave it out, it is filled in."
    )


def test_a_vocabulary_that_contradicts_the_model() -> None:
    assert fit(NOTEBOOK, "--data.init_args.vocab_size=60") == (
        "data.init_args.vocab_size: is 60 here, but model.vocab_size is 50; leave it out, it is filled in."
    )


def test_a_lookahead_that_contradicts_the_heads() -> None:
    assert fit(NOTEBOOK, "--data.init_args.lookahead=4") == (
        "data.init_args.lookahead: is 4 here, but model.lookahead is 3; leave it out, it is filled in."
    )


def test_saying_the_same_twice_is_fine(tmp_path: Path) -> None:
    run(
        *("fit", "--config", NOTEBOOK, "--data.init_args.lookahead=3", "--model.heads.init_args.d_model=64"),
        *("--trainer.logger=false", "--trainer.fast_dev_run=1", f"--trainer.default_root_dir={tmp_path}"),
    )


def test_a_vocabulary_smaller_than_the_tokenizers() -> None:
    assert fit(QUICKSTART, "--model.trunk.init_args.vocab_size=100") == (
        "model.trunk.vocab_size: is 100, but the data has 256 token ids; make it at least 256."
    )


# Data.


def sources(path: Path) -> str:
    return f"--data.init_args.sources=[{path}]"


def test_a_missing_path(tmp_path: Path) -> None:
    assert fit(QUICKSTART, sources(tmp_path / "gone")) == (
        f"TextFiles: source '{tmp_path / 'gone'}' does not exist; give a file, a folder, a pattern, or 'stdlib'."
    )


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert fit(QUICKSTART, sources(tmp_path / "empty")) == (
        f"TextFiles: source '{tmp_path / 'empty'}' holds no file; name other files or suffixes."
    )


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("x = 1\n", 7)])
def test_text_shorter_than_the_window(tmp_path: Path, text: str, tokens: int) -> None:
    (tmp_path / "short.py").write_text(text, encoding="utf-8")
    alone = ["--data.init_args.val_share=0", "--data.init_args.test_share=0"]
    assert fit(QUICKSTART, sources(tmp_path / "short.py"), *alone) == (
        f"WindowDataset: the text of the train split has {tokens} tokens, a row needs window + lookahead = 256 + 8; "
        "give more text or a smaller window."
    )


@pytest.mark.parametrize("window", [7, 8])
def test_horizons_not_below_the_window(window: int) -> None:
    assert fit(QUICKSTART, f"--data.init_args.window={window}") == (
        f"TextDataModule: the largest horizon must be below the window, got lookahead 8 and window {window}; "
        "take a longer window or fewer horizons."
    )


# Classes and arguments.


def edited(tmp_path: Path, keys: str, value: Any) -> Path:
    """Write the notebook's configuration with one entry changed or added."""
    config = yaml.safe_load(NOTEBOOK.read_text(encoding="utf-8"))
    *path, last = keys.split("/")
    place = config
    for key in path:
        place = place[key]
    place[last] = value
    (tmp_path / "edited.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return tmp_path / "edited.yaml"


def own(names: str) -> str:
    return f" Known: {names}. Name a class of your own by its import path, package.module.Class."


WEIGHTS = (
    "AuxiliaryWeights, ExplicitWeights, GeometricWeights, HeadCurriculum, LinearWeightSchedule, "
    "StepwiseWeightSchedule, UniformWeights"
)
UNKNOWN: dict[str, tuple[str, Any, str]] = {
    "heads": (
        *("model/heads/class_path", "LinearHead"),
        "model.heads: unknown class 'LinearHead'; did you mean LinearHeads?"
        + own(", ".join(sorted(mtp_modules.heads.__all__))),
    ),
    "trunk": (
        *("model/trunk/class_path", "Transformer"),
        "model.trunk: unknown class 'Transformer'; did you mean TransformerTrunk?"
        + own("HuggingFaceTrunk, RecurrentTrunk, TransformerTrunk"),
    ),
    "weights": (
        *("model/loss/init_args/weights/class_path", "Uniform"),
        "model.loss.weights: unknown class 'Uniform'; did you mean UniformWeights?" + own(WEIGHTS),
    ),
    "data": (
        *("data/class_path", "ProgressionsDataModule"),
        "data: unknown class 'ProgressionsDataModule'; did you mean ProgressionDataModule?"
        + own("ProgressionDataModule, StreamedDataModule, TaskDataModule, TextDataModule"),
    ),
    "data by its import path": (
        *("data/class_path", "mtp_modules.data.ProgresionDataModule"),
        "data: mtp_modules.data has no class 'ProgresionDataModule'; did you mean "
        "mtp_modules.data.ProgressionDataModule?",
    ),
    "data of no package": (
        *("data/class_path", "nopackage.Data"),
        "data: 'nopackage.Data' cannot be imported (No module named 'nopackage'); check its spelling, or install its "
        "package.",
    ),
    "argument of heads": (
        *("model/heads/init_args/num_horizon", 3),
        "model.heads: LinearHeads has no argument 'num_horizon'. Known: d_model, num_horizons, stride.",
    ),
    "argument of weights": (
        *("model/loss/init_args/weights/init_args", {"gamma": 0.5}),
        "model.loss.weights: UniformWeights has no argument 'gamma'. Known: preserve_total.",
    ),
    "argument of the loss": (
        *("model/loss/init_args/wieghts", 3),
        "model.loss: MultiTokenLoss has no argument 'wieghts'. "
        "Known: weights, backend, share_of_positions, distillation, total_variation, log_acceptance, lk_eta, "
        "detach, label_smoothing, z_loss, balance, confidence_target.",
    ),
    "argument of data": (
        *("data/init_args/lenght", 20),
        "data: ProgressionDataModule has no argument 'lenght'. Known: batch_size, lookahead, vocab_size, length, "
        "steps, num_train, num_val, num_test, augmentation, held_out_share, max_lookahead, seed, num_workers.",
    ),
    "argument of the schedule": (
        *("model/lr_schedule/init_args/warmup", 20),
        "model.lr_schedule: WarmupDecay has no argument 'warmup'. Known: warmup_steps, decay_share, final, shape.",
    ),
    "argument of the model": (
        *("model/tie_embedding", True),
        "model has no argument 'tie_embedding'. Known: trunk, heads, loss, optimizer, lr_schedule, tie_embeddings, "
        "own_unembeddings, output_bias, freeze, lr_scales, activation_checkpointing, compile_blocks, sharding, "
        "teacher, num_draft_tokens, skip_non_finite, objectives.",
    ),
    "section": (
        *("modle", 3),
        "unknown argument 'modle'. Known: seed_everything, trainer, model, data, ckpt_path.",
    ),
}


@pytest.mark.parametrize(("keys", "value", "sentence"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_names_are_answered_with_the_known(tmp_path: Path, keys: str, value: Any, sentence: str) -> None:
    assert fit(edited(tmp_path, keys, value)) == sentence


@pytest.mark.parametrize(
    ("argument", "start"),
    [
        (
            "--model.loss.init_args.weights=Uniform",
            "model.loss.weights: unknown class 'Uniform'; did you mean UniformWeights? Known: Auxiliary",
        ),
        (
            "--model.loss.init_args.weights.init_args.gama=1",
            "model.loss.weights: UniformWeights has no argument 'gama'.",
        ),
        ("--trainer.epochs=3", "trainer has no argument 'epochs'; did you mean min_epochs? Known: accelerator, "),
        (
            "--modle.x=3",
            "unknown argument 'modle.x'; did you mean model? Known: seed_everything, trainer, model, data, ckpt_path, "
            "init_from.",
        ),
        ("--model.heads.init_args.num_horizons=three", "model.heads.num_horizons: must be of type int, got three."),
    ],
)
def test_unknown_names_on_the_command_line(argument: str, start: str) -> None:
    assert fit(NOTEBOOK, argument).startswith(start)


def test_an_optimizer_that_is_not_there_lists_ours_too(tmp_path: Path) -> None:
    sentence = fit(edited(tmp_path, "model/optimizer/class_path", "Muon2"))
    assert sentence.startswith("model.optimizer: unknown class 'Muon2'. Known: ")
    assert {"AdamW", "MuonWithAdamW", "SGD"} <= set(re.split(r"[ ,.]+", sentence))


@pytest.mark.parametrize("content", ["model: [1, 2\n  x: {", "just text"])
def test_a_configuration_that_is_no_yaml(tmp_path: Path, content: str) -> None:
    (tmp_path / "broken.yaml").write_text(content, encoding="utf-8")
    assert fit(tmp_path / "broken.yaml")


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    assert fit(tmp_path / "gone.yaml") == f"config: {tmp_path / 'gone.yaml'} does not exist; give a YAML file."


@pytest.mark.parametrize("command", [[], ["fti"], ["config.yaml"]], ids=str)
def test_an_unknown_command_is_answered_with_the_known(command: list[str]) -> None:
    meant = {"fti": "; did you mean fit?", "config.yaml": "; did you mean configs?"}
    said = f"{command[0]!r} is unknown{meant[command[0]]}" if command else "none given."
    assert refusal(*command) == f"command: {said} Known: {COMMANDS}."


# Numbers.

NUMBERS = {
    "negative gamma": ("GeometricWeights", {"gamma": -1.0}, "gamma must be a finite number of at least 0, got -1.0."),
    "NaN gamma": ("GeometricWeights", {"gamma": float("nan")}, "gamma must be a finite number of at least 0, got nan."),
    "negative": (
        "ExplicitWeights",
        {"values": [1.0, -0.5, 1.0]},
        "values[1] must be a finite number of at least 0, got -0.5.",
    ),
    "NaN": (
        "ExplicitWeights",
        {"values": [1.0, 1.0, float("nan")]},
        "values[2] must be a finite number of at least 0, got nan.",
    ),
    "infinite": (
        "ExplicitWeights",
        {"values": [1.0, 1.0, float("inf")]},
        "values[2] must be a finite number of at least 0, got inf.",
    ),
    "too few": ("ExplicitWeights", {"values": [1.0]}, "values holds 1 weights for 3 horizons; give one per horizon."),
}


@pytest.mark.parametrize(("name", "arguments", "sentence"), NUMBERS.values(), ids=NUMBERS)
def test_weights_that_make_no_sense(tmp_path: Path, name: str, arguments: dict[str, Any], sentence: str) -> None:
    weights = {"class_path": name, "init_args": arguments}
    assert fit(edited(tmp_path, "model/loss/init_args/weights", weights)) == f"{name}: {sentence}"


def test_a_nan_as_yaml_spells_it(tmp_path: Path) -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    new = "{class_path: GeometricWeights, init_args: {gamma: .nan}}"
    (tmp_path / "nan.yaml").write_text(text.replace("{class_path: UniformWeights}", new), encoding="utf-8")
    assert fit(tmp_path / "nan.yaml") == "GeometricWeights: gamma must be a finite number of at least 0, got nan."


REFUSED: dict[str, tuple[list[str], str]] = {
    "seed": ([f"--seed_everything={2**64}"], f"seed_everything: must lie in 0..2**32 - 1, got {2**64}."),
    "steps": (["--trainer.max_steps=-5"], "trainer: max_steps must be at least -1, got -5."),
    "clipping": (
        ["--trainer.gradient_clip_val=-1"],
        "trainer: gradient_clip_val must be a finite number of at least 0, got -1.",
    ),
    "learning rate": (
        ["--model.optimizer.init_args.lr=-0.1"],
        "model.optimizer: Invalid learning rate: -0.1; see the documentation of the optimizer for its range.",
    ),
    "validation": (
        ["--trainer.val_check_interval=5000"],
        r"trainer.val_check_interval: is 5000, but an epoch has \d+ training batches; lower it, or set "
        "check_val_every_n_epoch to null to count batches over all epochs.",
    ),
    "logger": (
        ["--trainer.logger=MLFlowLogger"],
        r"trainer.logger: needs (mlflow\S+), which is not installed; install it with: pip install '\1'.",
    ),
}


def test_what_a_user_gets_wrong_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (arguments, sentence) in REFUSED.items():
        said = fit(NOTEBOOK, *arguments)
        assert said == sentence or re.fullmatch(sentence, said), f"{name}: {said}"
    with pytest.raises(ValueError, match=r"^trainer: max_steps must be"):
        run("fit", "--debug", "--config", NOTEBOOK, "--trainer.max_steps=-5")
    quiet = ("--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
    assert refusal("predict", "--config", NOTEBOOK, *quiet, "--trainer.limit_predict_batches=0") == (
        "predict: the data has no batch to predict; give it a test split, or another limit_predict_batches."
    )


# Checkpoints.

BAD_CHECKPOINTS = {
    "bad.ckpt": "{} is not a checkpoint, or is damaged; the newest one that is whole is ",
    "foreign.ckpt": "{} was not written by this package: it does not describe its model.",
    "gone.ckpt": "{} does not exist; give a checkpoint file, or the folder of a run.",
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
@pytest.mark.parametrize("command", ["fit", "generate"])
def test_what_is_no_checkpoint(checkpoints: Path, command: str, name: str) -> None:
    config = [] if command == "generate" else ["--config", NOTEBOOK]
    sentence = refusal(command, *config, "--ckpt_path", checkpoints / name)
    assert sentence.startswith(f"ckpt_path: {BAD_CHECKPOINTS[name].format(checkpoints / name)}")


def test_a_checkpoint_of_another_model(checkpoints: Path) -> None:
    sentence = refusal(
        *("validate", "--config", NOTEBOOK, "--trainer.logger=false", "--trainer.accelerator=cpu"),
        *("--ckpt_path", checkpoints / "numbers.ckpt"),
    )
    assert sentence.startswith("ckpt_path: model.trunk.vocab_size is 50 here, but the checkpoint was trained with 24; ")


SMALL_RUN = (
    *("--config", NOTEBOOK, "--trainer.logger=false", "--trainer.enable_progress_bar=false"),
    *("--trainer.enable_model_summary=false", "--model.num_draft_tokens=5"),
    *("--data.init_args.num_train=64", "--data.init_args.num_val=32", "--data.init_args.num_test=32"),
)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of files that ``torch.load`` reads from now on."""
    found: list[str] = []
    load = torch.load

    def noted(file: Any, *arguments: Any, **options: Any) -> Any:
        found.append(Path(str(getattr(file, "name", file))).name)
        return load(file, *arguments, **options)

    monkeypatch.setattr(torch, "load", noted)
    return found


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_reads_its_checkpoint_once_and_chooses_no_drafts(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("fit", *SMALL_RUN, "--trainer.max_epochs=1")
    (last,) = tmp_path.rglob("last.ckpt")
    start = torch.load(last, weights_only=True)
    assert reads == ["best.ckpt", "last.ckpt"]  # the first run tests its best; the second was read here
    reads.clear()

    def counts(*_: object, **__: object) -> list[int]:
        raise AssertionError("the data was counted")

    monkeypatch.setattr(draft_tokens, "frequent_tokens", counts)
    elsewhere = f"--trainer.default_root_dir={tmp_path / 'second'}"
    run("fit", *SMALL_RUN, elsewhere, "--trainer.max_epochs=2", "--ckpt_path", last)
    assert [name for name in reads if name.startswith("last")] == ["last.ckpt"]
    (again,) = (tmp_path / "second").rglob("last.ckpt")
    end = torch.load(again, weights_only=True)
    assert end["global_step"] == 2 * start["global_step"] > 0
    chosen = "model.unembedding.draft_tokens"
    assert end["state_dict"][chosen].tolist() == start["state_dict"][chosen].tolist() != [0, 1, 2, 3, 4]
    for command in ("validate", "test"):
        reads.clear()
        run(command, *SMALL_RUN, "--ckpt_path", last)
        assert reads == ["last.ckpt"]


def test_a_model_without_its_training_does_not_resume(checkpoints: Path) -> None:
    assert refusal("fit", "--config", NOTEBOOK, "--ckpt_path", checkpoints / "bytes") == (
        f"ckpt_path: {checkpoints / 'bytes'} holds a model without the state of its training; start a new run from it "
        f"with --init_from {checkpoints / 'bytes'}, or give a .ckpt file."
    )
    assert refusal("validate", "--config", NOTEBOOK, "--ckpt_path", checkpoints / "bytes") == (
        f"ckpt_path: {checkpoints / 'bytes'} holds a model without the state of its training; give a .ckpt file."
    )


def test_a_run_without_checkpoint_callbacks_keeps_its_last_step(tmp_path: Path) -> None:
    """Lightning's own callback saves after validations alone, of which a short run has none."""
    steps = ("--trainer.max_steps=3", "--trainer.val_check_interval=5", "--trainer.check_val_every_n_epoch=null")
    run("fit", *SMALL_RUN, "--config", "trainer: {callbacks: null}", *steps)
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 3


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(tmp_path: Path) -> None:
    """So the next one has the folder that the configuration names."""
    logger = f"--trainer.logger={{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}, name: run, version: ''}}}}"
    said = refusal("fit", *SMALL_RUN, logger, "--trainer.val_check_interval=1000")
    assert said.startswith("trainer.val_check_interval: is 1000")
    assert not (tmp_path / "run").exists()
    run(
        "fit",
        *SMALL_RUN,
        logger,
        "--trainer.max_steps=1",
        "--trainer.log_every_n_steps=1",
        "--trainer.val_check_interval=1",
    )
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_a_new_run_starts_from_the_weights_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a run's folder, a file of weights alone and a pretrained folder; another optimizer, step 0."""
    run("fit", *SMALL_RUN, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path / 'first'}")
    (best,) = (tmp_path / "first").rglob("best.ckpt")
    checkpoint = torch.load(best, weights_only=True)
    (tmp_path / "alone").mkdir()
    kept = {key: checkpoint[key] for key in ("mtp_modules", "state_dict", "loops", "pytorch-lightning_version")}
    torch.save(kept, tmp_path / "alone" / "weights.ckpt")
    load_model(best)[0].save_pretrained(tmp_path / "pretrained")
    assert refusal("fit", *SMALL_RUN, "--ckpt_path", tmp_path / "alone") == (
        "ckpt_path: the checkpoint holds weights without the state of their training; start a new run from them with "
        "--init_from (mtp_modules.training.init_from in a script)."
    )
    prefix, seen = "model.", list[tuple[int, dict[str, torch.Tensor]]]()
    stored = checkpoint["state_dict"].items()
    trained = {name.removeprefix(prefix): value for name, value in stored if name.startswith(prefix)}
    more = (
        *("--trainer.max_epochs=1", "--data.init_args.seed=5"),
        *("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"),
    )

    def at_start(self: MTPModule, *_: object) -> None:
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        seen.append((self.trainer.global_step, weights))

    monkeypatch.setattr(MTPModule, "on_train_epoch_start", at_start)
    for start in (best.parents[1], tmp_path / "alone", tmp_path / "pretrained"):
        elsewhere = f"--trainer.default_root_dir={tmp_path / 'second' / start.name}"
        run("fit", *SMALL_RUN, *more, elsewhere, "--init_from", start)
        step, weights = seen.pop()
        assert step == 0
        assert_same(weights, trained, tolerance=0)


def test_what_no_run_starts_from(checkpoints: Path) -> None:
    def sentence(*more: object) -> str:
        return refusal("fit", "--config", NOTEBOOK, "--trainer.logger=false", *map(str, more))

    numbers = checkpoints / "numbers.ckpt"
    assert sentence("--init_from", numbers, "--ckpt_path", numbers) == (
        "init_from: starts a new run, and ckpt_path continues one; leave one of them out (null)."
    )
    assert sentence("--init_from", checkpoints / "gone") == (
        f"init_from: {checkpoints / 'gone'} does not exist; give a checkpoint file, or the folder of a run."
    )
    for name, other in (("numbers.ckpt", "model.trunk.vocab_size is"), ("bytes", "model.trunk is")):
        assert sentence("--init_from", checkpoints / name).startswith(f"init_from: {other}")
    assert refusal("validate", "--config", NOTEBOOK, "--init_from", numbers) == (
        "init_from: is for fit; name the model's checkpoint by ckpt_path."
    )


# Prompts.

PROMPTS: dict[str, tuple[str, list[str], str]] = {
    "too long": (
        *("bytes", ["--prompt", "x" * 33]),
        "generate: prompt 0 has 33 tokens, the trunk reads at most max_positions=32; shorten the prompt.",
    ),
    "outside": (
        *("numbers.ckpt", ["--prompt", "1 2 99"]),
        "generate: token 99 is outside the vocabulary 0..23; "
        "encode the text with the tokenizer that the model was trained with.",
    ),
    "text for numbers": (
        *("numbers.ckpt", ["--prompt", "def "]),
        "prompt: this model has no tokenizer, so the prompt must be numbers with spaces between, got 'def '.",
    ),
    "not UTF-8": (
        *("bytes", ["--prompt", "caf\udce9"]),
        r"prompt: holds bytes that are not UTF-8, 'caf\udce9'; convert it, or set the locale of the terminal.",
    ),
    "seed": (
        *("bytes", ["--prompt", "a", "--seed", str(2**64)]),
        f"generate: the seed of every row must lie in -2**63..2**64-1, got {2**64}; take it modulo 2**64.",
    ),
    "empty": ("bytes", ["--prompt", ""], "generate: prompt 0 is empty; give at least one token."),
    "no budget": ("bytes", ["--max_new_tokens", "0"], "generate: max_new_tokens must be at least 1, got 0."),
    "no repeats": ("bytes", ["--repeats", "0"], "generate: repeats must be at least 1, got 0."),
    "drafts": (
        *("bytes", ["--num_drafts", "3"]),
        "SpeculativeDecoder: num_drafts=3 is more than the 1 that LinearHeads can draft; lower it.",
    ),
    "type": ("bytes", ["--max_new_tokens", "many"], "max_new_tokens: must be of type int, got many."),
    "type or null": ("bytes", ["--num_drafts", "many"], "num_drafts: must be of type int or null, got many."),
    "argument": (
        *("bytes", ["--promt", "x"]),
        "unknown argument 'promt'; did you mean prompt? Known: ckpt_path, prompt, max_new_tokens, num_drafts, "
        "temperature, top_k, top_p, seed, stop, decoder, sampling, compare, repeats, compile, device.",
    ),
    "compare": (
        *("plain", ["--prompt", "1", "--compare", "true"]),
        "compare: LinearHeads with one horizon cannot draft; omit compare.",
    ),
}


@pytest.mark.parametrize(("name", "arguments", "sentence"), PROMPTS.values(), ids=PROMPTS)
def test_what_generate_refuses(checkpoints: Path, name: str, arguments: list[str], sentence: str) -> None:
    assert refusal("generate", "--ckpt_path", checkpoints / name, *arguments) == sentence


def test_a_device_that_is_not_there(checkpoints: Path) -> None:
    sentence = refusal("generate", "--ckpt_path", checkpoints / "bytes", "--device", "abacus")
    assert re.fullmatch(r"device: cannot use 'abacus' here \(.*\); try cpu\.", sentence)


def test_generate_wants_a_checkpoint() -> None:
    assert "ckpt_path" in refusal("generate")


# The real process.


def start(*arguments: str | Path, folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mtp_modules", *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_a_refusal_is_one_line_on_stderr_and_a_status(tmp_path: Path) -> None:
    process = start("generate", "--ckpt_path", "gone", folder=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == b""
    assert err == b"error: ckpt_path: gone does not exist; give a checkpoint file, or the folder of a run.\n"


@pytest.mark.slow  # those of tests/faults are forked from a server, which takes less
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_usable_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    process = start(
        *("fit", "--config", NOTEBOOK, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"),
        "--trainer.max_epochs=100000",
        folder=tmp_path,
    )
    assert process.stdout is not None
    try:
        shown = b""
        while b"tok/s" not in shown:  # the bar shows figures after the first steps
            read = os.read(process.stdout.fileno(), 4096)
            assert read, "the run ended by itself"
            shown += read
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert b"Traceback" not in err
    saved = tmp_path / "checkpoints" / "last.ckpt"
    assert f"the checkpoint is {saved}" in err.decode()
    model, _ = load_model(saved)
    assert model.trunk.vocab_size == 50
