"""A token that is not allowed, or that the model gives no chance, is never emitted."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_modules import AutoregressiveDecoder, MTPModel, SpeculativeDecoder
from mtp_modules.core.checks import InputError
from mtp_modules.decoders import (
    Acceptance,
    BeamDecoder,
    BlockVerification,
    Decoder,
    DraftedBeamDecoder,
    ExactMatch,
    LookupOrHeads,
    PromptLookup,
    RejectionSampling,
    SamplingParams,
    StaticTree,
    TopKAcceptance,
    TypicalAcceptance,
)
from tests.helpers import VOCAB, make_model

RULES: list[Acceptance] = [
    ExactMatch(),
    RejectionSampling(),
    BlockVerification(),
    TypicalAcceptance(),
    TopKAcceptance(top_k=VOCAB),
]
DECODERS: list[Decoder] = [
    AutoregressiveDecoder(),
    *(SpeculativeDecoder(acceptance=rule) for rule in RULES),
    *(SpeculativeDecoder(acceptance=rule, drafter=LookupOrHeads(longest=2, shortest=1)) for rule in RULES),
    SpeculativeDecoder(drafter=PromptLookup(num_drafts=3)),
    SpeculativeDecoder(tree=StaticTree(widths=[3, 2])),
]
DISTRIBUTION = (
    r"^generate: the model's logits give no distribution \(NaN, infinity, or minus infinity for every allowed"
)


def biased(bias: dict[int, float]) -> MTPModel:
    """Return a model whose unembedding adds numbers to some logits, those of drafts too."""
    model = make_model("transformer", "linear", 4, bias=True)
    with torch.no_grad():
        for token, value in bias.items():
            model.unembedding.bias[token] = value
    return model


def emitted(decoder: Decoder, model: MTPModel, **options: Any) -> tuple[set[int], bool]:
    """Return all tokens that come out, and whether the run ends by an error."""
    tokens: set[int] = set()
    try:
        for done in decoder.stream(model, [[1, 2, 1, 2], [3]], max_new_tokens=9, **options):
            tokens |= {token for text in done.tokens for token in text}
    except InputError:
        return tokens, True
    return tokens, False


@settings(max_examples=2 * settings.default.max_examples)
@given(
    decoder=st.sampled_from(DECODERS),
    temperature=st.sampled_from([0.0, 5e-324, 1e-310, 1e-300, 1e-30, 1e-3, 0.7, 1.0, 30.0, 1e30, 1e300]),
    allowed=st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-math.inf, -1e300, 1e300, 30.0])),
    penalty=st.sampled_from([(1.0, 0.0), (1e300, 0.0), (0.5, 1e300), (1.0, -1e300)]),
    top=st.sampled_from([(None, 1.0, 0.0), (1, 1.0, 0.0), (None, 1e-12, 0.0), (3, 0.5, 1.0)]),
    seed=st.integers(0, 99),
)
def test_only_possible_and_allowed_tokens_come_out(
    decoder: Decoder,
    temperature: float,
    allowed: set[int] | None,
    bias: dict[int, float],
    penalty: tuple[float, float],
    top: tuple[int | None, float, float],
    seed: int,
) -> None:
    params = SamplingParams(
        temperature=temperature,
        allowed_tokens=None if allowed is None else sorted(allowed),
        top_k=top[0],
        top_p=top[1],
        min_p=top[2],
        repetition_penalty=penalty[0],
        presence_penalty=penalty[1],
    )
    possible = {token for token in allowed or range(VOCAB) if bias.get(token) != -math.inf}
    overflows = max(abs(value) for value in (*penalty, *bias.values(), 0)) >= 1e300
    tokens, refused = emitted(decoder, biased(bias), sampling=params, seed=seed)
    assert tokens <= possible
    if not possible:
        assert refused
    if refused:
        assert not possible or overflows


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: f"{type(decoder).__name__}")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("bias", "allowed"),
    [({3: math.inf}, None), ({7: -math.inf, 9: -math.inf}, [7, 9]), ({3: math.nan}, None), ({3: math.inf}, [3, 4])],
    ids=["infinite", "nothing allowed is possible", "not a number", "infinite and allowed"],
)
def test_what_is_no_distribution_is_refused_before_a_token_is_emitted(
    decoder: Decoder, temperature: float, bias: dict[int, float], allowed: list[int] | None
) -> None:
    params = SamplingParams(temperature=temperature, allowed_tokens=allowed)
    with pytest.raises(ValueError, match=DISTRIBUTION):
        next(decoder.stream(biased(bias), [[1, 2], [4]], max_new_tokens=4, sampling=params))


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300, 1e-100, 1e-12])
def test_a_temperature_too_small_to_divide_by_takes_the_argmax(temperature: float) -> None:
    model = make_model("gru", "recurrent", 4)
    wanted = AutoregressiveDecoder().generate(model, [[1, 2], [3]], max_new_tokens=20).tokens
    for decoder in DECODERS[:4]:
        params = SamplingParams(temperature=temperature)
        assert decoder.generate(model, [[1, 2], [3]], max_new_tokens=20, sampling=params).tokens == wanted


@pytest.mark.parametrize("beams", [BeamDecoder(num_beams=2), DraftedBeamDecoder(num_beams=2)], ids=["plain", "drafted"])
def test_beams_are_made_of_possible_tokens(beams: Decoder) -> None:
    model, params = biased({7: -math.inf}), SamplingParams(allowed_tokens=[5, 7, 9])
    tokens = beams.generate(model, [[1, 2], [4]], max_new_tokens=4, sampling=params).tokens
    assert {token for text in tokens for token in text} <= {5, 9}
