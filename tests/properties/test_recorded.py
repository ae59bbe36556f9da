"""Recordings that many texts have gone through give each of them what the model itself gives."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_modules import AutoregressiveDecoder, MTPModel, SpeculativeDecoder
from mtp_modules.decoders import (
    BlockVerification,
    ConfidentDepth,
    Decoder,
    DynamicTree,
    ExactMatch,
    LookupOrHeads,
    PromptLookup,
    RecordedModel,
    RejectionSampling,
    SamplingLaw,
    StopRule,
    record_for_decoding,
)
from mtp_modules.layers import cache as slots
from tests.helpers import MAX_POSITIONS, VOCAB, make_model

TOKENS = st.integers(0, VOCAB - 1)
PROMPTS = st.lists(st.lists(TOKENS, min_size=1, max_size=20), min_size=1, max_size=5)
LAWS = st.one_of(
    st.just({"temperature": 0.0}),
    st.fixed_dictionaries({"temperature": st.floats(0.3, 2.0)}),
    st.fixed_dictionaries({"temperature": st.just(0.0), "presence_penalty": st.floats(-1.0, 1.0)}),
    st.fixed_dictionaries(
        {
            "temperature": st.floats(0.3, 2.0),
            "top_k": st.integers(2, VOCAB),
            "top_p": st.floats(0.5, 1.0),
            "repetition_penalty": st.floats(0.5, 2.0),
            "allowed_tokens": st.sets(TOKENS, min_size=1).map(sorted),
        }
    ),
)
RULES = [ExactMatch(), RejectionSampling(), BlockVerification()]
MIXED = LookupOrHeads(num_drafts=2, longest=2, shortest=1)
DECODERS: list[Decoder] = [
    AutoregressiveDecoder(),
    *(SpeculativeDecoder(num_drafts=drafts, acceptance=rule) for drafts in (1, 2, 3) for rule in RULES),
    *(SpeculativeDecoder(policy=ConfidentDepth(threshold=share), acceptance=RULES[1]) for share in (0.05, 0.2)),
    *(
        SpeculativeDecoder(drafter=LookupOrHeads(num_drafts=2, longest=2, shortest=1), acceptance=rule)
        for rule in RULES
    ),
    SpeculativeDecoder(drafter=PromptLookup(num_drafts=3, longest=2, shortest=1)),
    SpeculativeDecoder(tree=DynamicTree(depth=3, width=2, nodes=6)),
]


@cache
def recorded(trunk: str, heads: str, positions: int) -> tuple[MTPModel, RecordedModel]:
    """Return a model and its recordings, the same for all examples."""
    model = make_model(trunk, heads, 4).eval()
    model.trunk.max_positions = positions
    return model, record_for_decoding(model, batch_sizes=(1, 2, 4))


@pytest.mark.parametrize(
    ("trunk", "heads"),
    [("transformer_previous", "recurrent"), ("transformer_grouped", "parallel"), ("transformer", "sequential")],
)
@settings(max_examples=settings.default.max_examples * 2)
@given(data=st.data())
def test_recorded_rounds_equal_rounds(trunk: str, heads: str, data: st.DataObject) -> None:
    model, fast = recorded(trunk, heads, data.draw(st.sampled_from([MAX_POSITIONS, 31, 24]), label="positions"))
    prompts = data.draw(PROMPTS, label="prompts")
    decoder = data.draw(st.sampled_from(DECODERS), label="decoder")
    asked = {
        "max_new_tokens": data.draw(st.lists(st.integers(1, 20), min_size=len(prompts), max_size=len(prompts))),
        "sampling": SamplingLaw(**data.draw(LAWS, label="law")),
        "seed": data.draw(st.integers(0, 9), label="seed"),
        "stop": StopRule(tokens=data.draw(st.lists(TOKENS, max_size=1), label="stop")),
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(slots, "bucket_of", lambda length: 8 * -(-length // 8))
        wanted, found = decoder.generate(model, prompts, **asked), decoder.generate(fast, prompts, **asked)
    assert found.tokens == wanted.tokens
    assert found.finish_reasons == wanted.finish_reasons
    assert (found.stats.drafted, found.stats.accepted) == (wanted.stats.drafted, wanted.stats.accepted)
