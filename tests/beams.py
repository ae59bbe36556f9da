"""For tests of beam search: decoders, how results are compared, and a model whose probabilities a test writes down."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mtp_modules import MTPModel, RecurrentHeads, Tokenizer, TransformerTrunk
from mtp_modules.decoders import Beam, BeamDecoder, DraftedBeamDecoder, JointBeamDecoder
from tests.helpers import VOCAB, float64
from tests.reference.beam import Text

DECODERS = [
    pytest.param(BeamDecoder(num_beams=3), id="plain"),
    pytest.param(DraftedBeamDecoder(num_beams=3, num_paths=5), id="drafted"),
    pytest.param(JointBeamDecoder(num_beams=3), id="joint"),
]


class Letters(Tokenizer):
    """Token 0 is "a", token 1 is "b", and so on."""

    vocab_size, end_token = VOCAB, None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in tokens)


def assert_same_beams(found: Sequence[Beam], expected: Sequence[Beam | Text]) -> None:
    assert [tuple(beam.tokens) for beam in found] == [tuple(beam.tokens) for beam in expected]
    pairs = list(zip(found, expected, strict=True))
    assert [beam.finish_reason for beam, _ in pairs] == [
        other.finish_reason if isinstance(other, Beam) else other.reason for _, other in pairs
    ]
    for beam, other in pairs:
        assert math.isclose(beam.log_probability, other.log_probability, rel_tol=1e-10, abs_tol=1e-10)


def bigrams(logits: Tensor, num_horizons: int = 2) -> MTPModel:
    """Build a real model whose next token depends on the last one alone, and whose heads predict the same.

    ``logits[a, b]`` is for token ``b`` after token ``a``.
    """
    width = VOCAB + 1  # even
    with float64():
        trunk = TransformerTrunk(vocab_size=VOCAB, d_model=width, num_layers=1, num_heads=1, max_positions=64)
        heads = RecurrentHeads(d_model=width, num_horizons=num_horizons, width=2 * width)
        model = MTPModel(trunk=trunk, heads=heads, tie_embeddings=False).eval()
    eye = torch.eye(width, dtype=torch.float64)
    with torch.no_grad():
        trunk.embedding.weight.copy_(eye[:VOCAB])
        model.unembedding.weight.zero_()
        model.unembedding.weight[:, :VOCAB] = logits.T / math.sqrt(width)  # the last norm makes the states that long
        for name, parameter in trunk.layers.named_parameters():
            if name.rpartition(".")[0].endswith(("out", "down")):
                parameter.zero_()
        # silu(x) - silu(-x) = x, so the step adds the token's embedding, so large that nothing else is left.
        heads.from_state.weight.zero_()
        heads.from_token.weight.copy_(torch.cat((eye, -eye)) * 1e6)
        heads.out.weight.copy_(torch.cat((eye, -eye), dim=1))
    return model


def noise(scale: float) -> Tensor:
    """Return logits for :func:`bigrams`."""
    return scale * torch.randn(VOCAB, VOCAB, dtype=torch.float64)
