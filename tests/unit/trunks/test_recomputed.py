"""Trunks that wrap the modules of others, as the page about trunks shows them, under the laws of every trunk."""

import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_modules import AutoregressiveDecoder, MTPModel, MultiTokenLoss, RecurrentHeads, SpeculativeDecoder, Trunk
from mtp_modules.decoders import SamplingParams
from mtp_modules.trunks import RecomputedTrunk, RecurrentTrunk
from tests.architecture.imports import ROOT
from tests.helpers import VOCAB, WIDTH, assert_same, float64, random_tokens, randomise
from tests.reference import transformer as naive

SIZES = {"vocab_size": VOCAB, "d_model": WIDTH, "max_positions": 24}


def shown(name: str) -> dict[str, Any]:
    """Run the code of the page up to the class with a name, and return what it defines."""
    page = (ROOT / "docs/trunks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    names: dict[str, Any] = {}
    for block in blocks[1:]:
        if f"class {name}" in block or "class XTransformersTrunk" in block:
            exec(compile(block, "trunks.md", "exec"), names)
    return names


class FixedWindow(RecomputedTrunk):
    """The mean of the embeddings of the last three tokens: what a trunk may be at its simplest."""

    def __init__(self, *, vocab_size: int, d_model: int, max_positions: int) -> None:
        super().__init__()
        self.vocab_size, self.d_model, self.embedding_width = vocab_size, d_model, d_model
        self.max_positions = max_positions
        self.embedding = torch.nn.Embedding(vocab_size, d_model)
        self.mix = torch.nn.Linear(d_model, d_model)

    def hidden_states(self, tokens: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(self.embedding(tokens), (0, 0, 2, 0))
        return self.mix(padded.unfold(1, 3, 1).mean(dim=-1))


def _litgpt() -> Trunk:
    if find_spec("litgpt") is None:
        pytest.skip("needs litgpt: pip install --no-deps litgpt==0.5.13")
    sizes = {"n_layer": 2, "n_embd": WIDTH, "n_head": 2, "padded_vocab_size": VOCAB, "block_size": 24}
    return shown("LitGPTTrunk")["LitGPTTrunk"](config=sizes)


TRUNKS: dict[str, Callable[[], Trunk]] = {
    "window": lambda: FixedWindow(**SIZES),
    "x_transformers": lambda: shown("XTransformersTrunk")["XTransformersTrunk"](**SIZES, depth=2, num_heads=2),
    "litgpt": _litgpt,
}


@pytest.fixture(params=TRUNKS)
def trunk(request: pytest.FixtureRequest) -> Trunk:
    with float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # x-transformers scripts a function as it is imported
        made = TRUNKS[request.param]()
    randomise(made)
    return made.eval()


def make_model(trunk: Trunk) -> MTPModel:
    with float64():
        heads = RecurrentHeads(d_model=WIDTH, num_horizons=3)
    randomise(heads)
    model = MTPModel(trunk=trunk, heads=heads).eval()
    return model.eval()


def test_every_keep_equals_a_fresh_prefill(trunk: Trunk) -> None:
    for keep in ([0, 3], [2, 1], [3, 3]):
        state, kept = trunk.new_state(2, 12), [[], []]
        for place, (length, count) in enumerate(((4, [4, 2]), (3, keep), (2, [0, 2]))):
            chunk = random_tokens(2, length, seed=place)
            hidden = trunk(chunk, state=state).hidden
            for b, row in enumerate(kept):
                whole = torch.tensor([row + chunk[b].tolist()])
                assert_same(hidden[b], trunk(whole).hidden[0, len(row) :], 1e-6)
            state.commit(count)
            kept = [row + tokens[:some] for row, tokens, some in zip(kept, chunk.tolist(), count, strict=True)]
        state.select([1, 1])
        assert state.lengths == [len(kept[1])] * 2


def test_packed_documents_equal_forward_passes_of_their_own(trunk: Trunk) -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [2, 1, 1, 1, 1, 2, 2]])
    tokens = random_tokens(*ids.shape)
    assert_same(trunk(tokens, document_ids=ids).hidden, naive.by_document(trunk, tokens, ids), 1e-6)


def test_speculative_decoding_equals_plain_decoding(trunk: Trunk) -> None:
    model, prompts = make_model(trunk), [[1, 2, 3, 4], [7]]
    how = {"max_new_tokens": [6, 8], "sampling": [SamplingParams(temperature=0.0), SamplingParams()], "seed": [1, 2]}
    plain = AutoregressiveDecoder().generate(model, prompts, **how)
    assert SpeculativeDecoder().generate(model, prompts, **how).tokens == plain.tokens
    text = torch.tensor([[*prompts[0], *plain.tokens[0]]])
    likeliest = model.unembedding.logits(trunk(text).hidden).argmax(dim=-1)[0]
    assert plain.tokens[0] == likeliest[len(prompts[0]) - 1 : -1].tolist()


def test_a_training_step_reaches_every_parameter(trunk: Trunk) -> None:
    model = make_model(trunk).train()
    MultiTokenLoss()(model, random_tokens(2, 12)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_it_is_saved_and_comes_back(tmp_path: Path) -> None:
    with float64():
        model = make_model(FixedWindow(**SIZES))
    model.save_pretrained(tmp_path)
    again, _ = MTPModel.from_pretrained(tmp_path, trusted=("mtp_modules", FixedWindow.__module__.partition(".")[0]))
    assert_same(again(random_tokens(1, 9))[2], model(random_tokens(1, 9))[2])


def test_what_is_refused() -> None:
    trunk, tokens = FixedWindow(**SIZES), random_tokens(1, 3)
    with pytest.raises(
        ValueError, match=r"^FixedWindow: document_ids cannot be combined with a state; decode one document per row"
    ):
        trunk(tokens, document_ids=tokens, state=trunk.new_state(1, 6))
    with pytest.raises(
        ValueError, match=r"^FixedWindow: state must come from this trunk's new_state, got RecurrentState"
    ):
        trunk(tokens, state=RecurrentTrunk(vocab_size=VOCAB, d_model=WIDTH).new_state(1, 6))
    with pytest.raises(ValueError, match=r"^FixedWindow: a sequence of 25 tokens is longer than max_positions=24"):
        trunk(random_tokens(1, 25))
    with pytest.raises(ValueError, match=r"^ReplayState: can hold no tree of drafts"):
        trunk.new_state(1, 6).expect_tree(torch.tensor([[-1]]), 0)
    assert trunk.flops(5) == 2 * 5 * WIDTH * WIDTH
