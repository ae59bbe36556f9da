"""Reading a checkpoint to decode needs no Lightning."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mtp_modules.data
from mtp_modules import LinearHeads, MultiTokenLoss, RecurrentTrunk
from mtp_modules.data import ByteTokenizer, TextDataModule
from mtp_modules.training import MTPModule
from tests.architecture.imports import PACKAGE, ROOT
from tests.unit.training.running import trainer

READ = f"""
import json, sys
for name in json.loads(sys.argv[2]):
    sys.modules[name] = None  # whatever imports it fails
from {PACKAGE}.commands.generate import generate
from {PACKAGE} import load_model
model, tokenizer = load_model(sys.argv[1])
generate(sys.argv[1], prompt="ab", max_new_tokens=3)
loaded = [name for name in ("lightning", "pytorch_lightning") if sys.modules.get(name) is not None]
print(json.dumps([type(model).__name__, type(tokenizer).__name__, loaded]))
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint of a run, and a folder of ``save_pretrained``."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "text.py").write_text("abc " * 100)
    sizes = {"window": 8, "lookahead": 2, "batch_size": 2, "val_share": 0.0, "test_share": 0.0}
    data = TextDataModule(sources=[str(folder / "text.py")], **sizes)
    trunk, heads = RecurrentTrunk(vocab_size=256, d_model=16), LinearHeads(d_model=16, num_horizons=2)
    module = MTPModule(trunk=trunk, heads=heads, loss=MultiTokenLoss())
    run = trainer(folder, max_steps=1, max_epochs=-1, limit_val_batches=0)
    run.fit(module, data)
    run.save_checkpoint(folder / "last.ckpt")
    module.model.save_pretrained(folder / "saved", tokenizer=ByteTokenizer())
    return folder


@pytest.mark.parametrize("blocked", [[], ["lightning", "pytorch_lightning"]], ids=["not imported", "not there"])
@pytest.mark.parametrize("place", ["last.ckpt", "saved"])
def test_a_checkpoint_is_read_and_decoded_without_lightning(kept: Path, place: str, blocked: list[str]) -> None:
    command = [sys.executable, "-c", READ, str(kept / place), json.dumps(blocked)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == ["MTPModel", "ByteTokenizer", []]


def test_what_data_does_not_have_is_not_there() -> None:
    assert mtp_modules.data.TextDataModule is TextDataModule
    with pytest.raises(AttributeError, match=r"^module 'mtp_modules\.data' has no attribute 'NoSuchModule'$"):
        mtp_modules.data.NoSuchModule  # noqa: B018
