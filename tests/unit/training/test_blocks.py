"""Recomputing activations changes what is kept, never what comes out."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_modules import LinearHeads, MTPModel, MultiTokenLoss, RecurrentTrunk
from mtp_modules.training import blocks, checkpoint_blocks, compile_blocks, prepare_blocks
from tests.helpers import assert_same, gradients, make_model, random_tokens


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def model_and_loss(mode: str | None) -> tuple[MTPModel, torch.Tensor]:
    model = make_model("transformer_grouped", "parallel")
    prepare_blocks(model, activation_checkpointing=mode)
    torch.manual_seed(0)
    loss = MultiTokenLoss(share_of_positions=0.5)
    return model, loss(model, random_tokens(2, 9)).loss


@pytest.mark.parametrize("mode", blocks.MODES)
def test_loss_gradients_and_names_stay_the_same(mode: str) -> None:
    plain, recomputed = model_and_loss(None), model_and_loss(mode)
    assert_same(recomputed[1], plain[1])
    assert_same(gradients(*recomputed), gradients(*plain))
    assert recomputed[0].state_dict().keys() == plain[0].state_dict().keys()


def backward_operations(mode: str | None) -> Counter[str]:
    _, loss = model_and_loss(mode)
    with Operations() as seen:
        loss.backward()
    return seen.counts


def test_full_computes_everything_again_and_selective_only_what_is_cheap() -> None:
    plain, full, selective = (backward_operations(mode) for mode in (None, "full", "selective"))
    assert full["mm"] > plain["mm"]
    assert selective["mm"] == plain["mm"]
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert full[attention] > plain[attention] == selective[attention] == 0
    assert full["silu"] == selective["silu"] > plain["silu"]


def test_evaluation_and_decoding_are_left_alone() -> None:
    model, _ = model_and_loss("selective")
    with torch.no_grad(), Operations() as seen:
        model(random_tokens(2, 9))
        model.trunk(random_tokens(2, 3), state=model.trunk.new_state(2, 4))
    with torch.no_grad(), Operations() as plain:
        twin, _ = model_and_loss(None)
        plain.counts.clear()
        twin(random_tokens(2, 9))
        twin.trunk(random_tokens(2, 3), state=twin.trunk.new_state(2, 4))
    assert seen.counts["mm"] == plain.counts["mm"]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^activation_checkpointing: must be one of full, selective, got 'some'\.$"):
        checkpoint_blocks([], "some")


@pytest.mark.parametrize("option", ["activation_checkpointing", "compile_blocks"])
def test_a_model_without_blocks_is_refused(option: str) -> None:
    model = MTPModel(trunk=RecurrentTrunk(vocab_size=9, d_model=8), heads=LinearHeads(d_model=8, num_horizons=2))
    asked = {"activation_checkpointing": "full"} if option == "activation_checkpointing" else {"compiled": True}
    with pytest.raises(
        ValueError,
        match=rf"^{option}: must be left out for RecurrentTrunk and LinearHeads, which have no blocks; "
        r"TransformerTrunk has\.$",
    ):
        prepare_blocks(model, **asked)


def test_every_block_is_compiled_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("transformer", "parallel")
    asked: list[tuple[Any, dict[str, Any]]] = []
    for block in (*model.trunk.blocks, *model.heads.blocks):
        monkeypatch.setattr(block, "compile", lambda block=block, **options: asked.append((block, options)))
    prepare_blocks(model, compiled=True)
    assert [block for block, _ in asked] == [*model.trunk.layers, *model.heads.layers]
    assert all(options == {"fullgraph": True, "backend": "inductor"} for _, options in asked)


def test_compile_takes_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    (block, _) = make_model("transformer").trunk.blocks
    asked: list[str] = []
    monkeypatch.setattr(block, "compile", lambda *, fullgraph, backend: asked.append(backend))
    compile_blocks([block], backend="eager")
    assert asked == ["eager"]
