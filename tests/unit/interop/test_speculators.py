"""speculators reads our heads and says what we say; run where it is installed, which no extra asks for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_modules import MTPModel, ResidualHeads
from mtp_modules.interop import export_model, import_model
from tests import interop
from tests.interop import POSITIONS, D, F, V, all_logits, make, some_tokens, stored

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


def written_by_speculators(name: str, folder: Path) -> None:
    """Save a drafter of speculators with random weights, which reads layers 1 and 2 of a trunk of two."""
    pytest.importorskip("speculators", reason="speculators is not installed")
    import importlib

    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig, Qwen3Config

    classes = importlib.import_module(f"speculators.models.{name}")
    kind = {"eagle3": "Eagle3", "dflash": "DFlash", "dspark": "DSpark"}[name]
    sizes = {
        "hidden_size": D, "intermediate_size": F, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
        "vocab_size": V, "max_position_embeddings": POSITIONS, "num_hidden_layers": 1 if name == "eagle3" else 2,
    }  # fmt: skip
    proposal = GreedyTokenProposalConfig(speculative_tokens=3)
    config: dict[str, Any] = {
        "transformer_layer_config": LlamaConfig(**sizes) if name == "eagle3" else Qwen3Config(**sizes),
        "draft_vocab_size": V,
        "speculators_config": SpeculatorsConfig(
            algorithm=name,
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
    }
    if name == "eagle3":
        config |= {"eagle_aux_hidden_state_layer_ids": [1, 2], "norm_before_residual": True}
    else:
        config |= {"aux_hidden_state_layer_ids": [1, 2], "mask_token_id": 7, "block_size": 4}
    if name == "dspark":
        config |= {"markov_rank": 3, "enable_confidence_head": True, "confidence_head_with_markov": True}
    theirs = getattr(classes, f"{kind}DraftModel")(getattr(classes, f"{kind}SpeculatorConfig")(**config))
    for value in theirs.parameters():
        torch.nn.init.normal_(value)
    theirs.save_pretrained(folder)


@pytest.mark.parametrize("name", ["eagle3", "dflash", "dspark"])
def test_drafters_that_it_saves_are_read_whole(name: str, tmp_path: Path) -> None:
    written_by_speculators(name, tmp_path / "theirs")
    theirs = stored(tmp_path / "theirs" / "model.safetensors")
    base = make(ResidualHeads(d_model=D, num_horizons=2), tie_embeddings=False)
    if "embed_tokens.weight" in theirs:
        base.trunk.embedding.weight.data.copy_(theirs.pop("embed_tokens.weight"))
    back = import_model(tmp_path / "theirs", format=name, trunk=base)
    assert back.trunk.feature_layers == (0, 1)
    assert len(back.horizons) == (5 if name == "dspark" else 4)  # its anchor predicts too
    export_model(back, tmp_path / "ours", format=name)
    ours = stored(tmp_path / "ours" / "model.safetensors")
    assert {n.replace("midlayer", "layers.0") for n in ours} == theirs.keys()
    assert all(torch.equal(value, theirs[n.replace("midlayer", "layers.0")]) for n, value in ours.items())
