"""A checkpoint is all that decoding needs; what is none is refused in a sentence."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_modules import MTPModel, MultiTokenLoss, RecurrentHeads, RecurrentTrunk
from mtp_modules.data import TextDataModule
from mtp_modules.data.tokenizers import ByteTokenizer
from mtp_modules.loading import find_checkpoint, load_model, read_checkpoint
from mtp_modules.training import MTPModule
from mtp_modules.training.checkpoint_io import AtomicCheckpointIO, write_atomically
from tests.helpers import assert_same
from tests.unit.training.running import SaveAt, data, module, trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MTPModel]:
    """Return the folder of a run with `last.ckpt`, and its model."""
    folder = tmp_path_factory.mktemp("run")
    model = module("recurrent")
    trainer(folder, SaveAt(folder / "checkpoints" / "last.ckpt", 2), max_steps=2, max_epochs=-1).fit(model, data())
    return folder, model.model.eval()


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/last.ckpt"])
def test_a_checkpoint_describes_its_model(saved: tuple[Path, MTPModel], place: str) -> None:
    folder, model = saved
    loaded, tokenizer = load_model(folder / place)
    assert tokenizer is None
    assert not loaded.training
    assert_same(loaded.state_dict(), model.state_dict(), tolerance=0)
    tokens = torch.arange(9)[None]
    assert_same(loaded(tokens), model(tokens), tolerance=0)


def test_a_checkpoint_knows_its_tokenizer(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"file{number}.py").write_text("x = 1\n" * 9, encoding="utf-8")
    model = MTPModule(
        trunk=RecurrentTrunk(vocab_size=256, d_model=8),
        heads=RecurrentHeads(d_model=8, num_horizons=2),
        loss=MultiTokenLoss(),
    )
    rows = TextDataModule(sources=[str(tmp_path)], window=8, lookahead=2, batch_size=2, val_share=0.2, test_share=0.2)
    run = trainer(tmp_path, max_steps=1, max_epochs=-1)
    run.fit(model, rows)
    run.save_checkpoint(tmp_path / "text.ckpt")
    _, tokenizer = load_model(tmp_path / "text.ckpt")
    assert isinstance(tokenizer, ByteTokenizer)


def test_what_save_pretrained_wrote_loads_too(saved: tuple[Path, MTPModel], tmp_path: Path) -> None:
    saved[1].save_pretrained(tmp_path, tokenizer=ByteTokenizer())
    loaded, tokenizer = load_model(tmp_path)
    assert_same(loaded.state_dict(), saved[1].state_dict(), tolerance=0)
    assert isinstance(tokenizer, ByteTokenizer)


def touch(folder: Path, *names: str) -> None:
    """Make files, each newer than the one before."""
    for age, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (1e9 + age, 1e9 + age))


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["best.ckpt", "last.ckpt", "other.ckpt"], "best.ckpt"),
        (["last.ckpt", "other.ckpt"], "last.ckpt"),
        (["old.ckpt", "new.ckpt"], "new.ckpt"),
        (["checkpoints/best.ckpt", "last.ckpt"], "checkpoints/best.ckpt"),
        (["checkpoints/a.ckpt", "notes.txt"], "checkpoints/a.ckpt"),
    ],
    ids=str,
)
def test_a_folder_means_its_best_checkpoint(tmp_path: Path, files: list[str], found: str) -> None:
    touch(tmp_path, *files)
    assert find_checkpoint(str(tmp_path)) == tmp_path / found
    assert find_checkpoint(tmp_path / found) == tmp_path / found


def test_a_folder_may_mean_its_last_checkpoint(tmp_path: Path) -> None:
    touch(tmp_path, "best.ckpt", "last.ckpt")
    assert find_checkpoint(tmp_path, preferred=("last.ckpt", "best.ckpt")) == tmp_path / "last.ckpt"


def test_a_pretrained_folder_is_itself(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors", "best.ckpt")
    assert find_checkpoint(tmp_path) == tmp_path


NOT_ONE = "is not a checkpoint, or is damaged; give a .ckpt file of a finished save."
NOT_OURS = "was not written by this package: it does not describe its model."


class Stranger:
    """A class that a checkpoint must not be able to name."""


BAD_FILES: dict[str, tuple[Any, str]] = {
    "text": (b"hello, I am no checkpoint", NOT_ONE),
    "nothing": (b"", NOT_ONE),
    "zip": (b"PK\x03\x04 and no more", NOT_ONE),
    "random bytes": (bytes(range(256)), NOT_ONE),
    "a pickle": (pickle.dumps({"state_dict": {}}), NOT_ONE),
    "a tensor": (torch.zeros(3), NOT_OURS),
    "a foreign checkpoint": ({"state_dict": {"weight": torch.zeros(3)}}, NOT_OURS),
    "an old layout": (
        {"mtp_modules": {"format": 1}, "state_dict": {}},
        "holds weights of format 1, this version reads format 2; "
        "use the version of mtp_modules that wrote it, or train again.",
    ),
    "a pickled object": (
        {"mtp_modules": Stranger()},
        f"names {Stranger.__module__}.Stranger, and only tensors and plain values are loaded; load it where it was "
        "made, and save its tensors with torch.save.",
    ),
}


@pytest.mark.parametrize(("content", "sentence"), BAD_FILES.values(), ids=BAD_FILES)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: Any, sentence: str) -> None:
    path = tmp_path / "bad.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"^{re.escape(f'ckpt_path: {path} {sentence}')}$"):
        load_model(path)


def test_a_torn_checkpoint_is_refused(saved: tuple[Path, MTPModel], tmp_path: Path) -> None:
    whole = (saved[0] / "checkpoints" / "last.ckpt").read_bytes()
    path = tmp_path / "torn.ckpt"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=re.escape(NOT_ONE)):
        load_model(path)


@pytest.mark.parametrize("name", ["gone", "empty"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    said = {"gone": "does not exist", "empty": "holds no checkpoint"}[name]
    sentence = f"ckpt_path: {tmp_path / name} {said}; give a checkpoint file, or the folder of a run."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        load_model(tmp_path / name)


def test_a_file_may_be_read_where_it_lies(saved: tuple[Path, MTPModel]) -> None:
    path = saved[0] / "checkpoints" / "last.ckpt"
    whole, mapped = read_checkpoint(path), read_checkpoint(path, mapped=True)
    assert mapped["mtp_modules"]["model"] == whole["mtp_modules"]["model"]
    assert_same(dict(mapped["state_dict"]), dict(whole["state_dict"]), tolerance=0)


def test_a_held_checkpoint_is_given_once(saved: tuple[Path, MTPModel], tmp_path: Path) -> None:
    path, run = saved[0] / "checkpoints" / "last.ckpt", trainer(tmp_path)
    checkpoint = read_checkpoint(path)
    write_atomically(run, path, checkpoint)
    assert type(run.strategy.checkpoint_io) is AtomicCheckpointIO
    other = tmp_path / "other.ckpt"
    run.strategy.checkpoint_io.save_checkpoint({**checkpoint, "place": 3}, other)
    assert run.strategy.load_checkpoint(other)["place"] == 3
    assert run.strategy.load_checkpoint(str(path)) is checkpoint
    again = run.strategy.load_checkpoint(str(path), weights_only=True)
    assert again is not checkpoint
    assert_same(dict(again["state_dict"]), dict(checkpoint["state_dict"]), tolerance=0)
    run.strategy.checkpoint_io.remove_checkpoint(other)
    assert not other.exists()


def edited(saved: tuple[Path, MTPModel], tmp_path: Path, edit: Any) -> Path:
    checkpoint = torch.load(saved[0] / "checkpoints" / "last.ckpt", weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, tmp_path / "edited.ckpt")
    return tmp_path / "edited.ckpt"


WRONG_WEIGHTS = {
    "missing": (
        lambda state: state.pop("model.heads.depth_bias"),
        r"heads\.depth_bias is nothing, the model has \(2, 16\)\.",
    ),
    "unknown": (
        lambda state: state.update({"model.more": torch.zeros(1)}),
        r"more is \(1,\), the model has nothing\.",
    ),
    "shape": (
        lambda state: state.update({"model.heads.depth_bias": torch.zeros(3, 16)}),
        r"heads\.depth_bias is \(3, 16\), the model has \(2, 16\)\.",
    ),
}


@pytest.mark.parametrize(("edit", "sentence"), WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_weights_that_do_not_fit(saved: tuple[Path, MTPModel], tmp_path: Path, edit: Any, sentence: str) -> None:
    path = edited(saved, tmp_path, lambda checkpoint: edit(checkpoint["state_dict"]))
    with pytest.raises(ValueError, match=rf"^ckpt_path: the weights in .* do not fit the model: {sentence}$"):
        load_model(path)


def test_a_class_of_a_stranger_is_not_imported(saved: tuple[Path, MTPModel], tmp_path: Path) -> None:
    def rename(checkpoint: dict[str, Any]) -> None:
        checkpoint["mtp_modules"]["model"]["init_args"]["heads"]["class_path"] = "os.system"

    with pytest.raises(
        ValueError,
        match=r"^build: class 'os\.system' is not from a trusted package \(mtp_modules\); pass trusted=\(\.\.\.\) if",
    ):
        load_model(edited(saved, tmp_path, rename))
