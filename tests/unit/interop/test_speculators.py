"""speculators reads our heads and says what we say; run where it is installed, which no extra asks for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_modules import MTPModel
from mtp_modules.interop import export_model, import_model
from tests import interop
from tests.interop import all_logits, some_tokens

pytestmark = pytest.mark.filterwarnings("default")  # those of a package that is not ours


def load(folder: Path, model: MTPModel) -> Any:
    """Load a draft model, and give it the verifier's embedding and output matrix, as speculators does itself."""
    mtp = pytest.importorskip("speculators.models.mtp", reason="speculators is not installed")
    theirs = mtp.MTPDraftModel.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs.embed_tokens.weight.copy_(model.trunk.embedding.weight)
        theirs.lm_head.weight.copy_(model.unembedding.weight)
    return theirs


def agree(theirs: Any, model: MTPModel) -> None:
    """Compare the logits of all horizons beyond the first."""
    tokens = some_tokens(1, 16)
    with torch.no_grad():
        logits, _, _ = theirs(tokens, model.trunk(tokens).hidden)
    ours = all_logits(model, tokens)[1:]
    assert len(logits) == len(ours)
    for own, other in zip(ours, logits, strict=True):
        torch.testing.assert_close(other[:, : own.shape[1]], own, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("num_horizons", [2, 4])
def test_a_draft_model_of_ours_says_the_same(num_horizons: int, tmp_path: Path) -> None:
    model = interop.qwen(num_horizons)
    export_model(model, tmp_path, format="speculators")
    agree(load(tmp_path, model), model)


def test_what_it_saves_itself_is_read(tmp_path: Path) -> None:
    model = interop.qwen(3)
    export_model(model, tmp_path / "ours", format="speculators")
    theirs = load(tmp_path / "ours", model)
    with torch.no_grad():
        for value in theirs.mtp_layers.parameters():
            value.add_(0.1 * torch.randn_like(value))
    theirs.save_pretrained(tmp_path / "theirs")
    agree(theirs, import_model(tmp_path / "theirs", format="speculators", trunk=model))


def test_its_converter_finds_the_module_in_our_qwen(tmp_path: Path) -> None:
    pytest.importorskip("speculators", reason="speculators is not installed")
    from speculators.convert.mtp import MTPConverter

    model = interop.qwen()
    export_model(model, tmp_path / "qwen", format="qwen")
    MTPConverter().convert(
        tmp_path / "qwen", tmp_path / "out", str(tmp_path / "qwen"), num_speculative_steps=1, validate=False
    )
    agree(load(tmp_path / "out", model), model)
