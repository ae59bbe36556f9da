"""A conversation decodes what the model itself would, and reads only what is new."""

from collections.abc import Callable

import pytest

from mtp_modules import (
    AutoregressiveDecoder,
    ConditionedHeads,
    LinearHeads,
    MTPModel,
    RecurrentHeads,
    RecurrentTrunk,
    SequentialHeads,
    SpeculativeDecoder,
    TransformerTrunk,
)
from mtp_modules.core import Heads
from mtp_modules.decoders import ContinuedExecutor, Decoder, LookupOrHeads, SamplingParams, StaticTree, StopRule

TURNS = ([1, 2, 3], [7, 5], [4, 9, 1])


def transformer(heads: Heads) -> MTPModel:
    trunk = TransformerTrunk(vocab_size=11, d_model=8, num_layers=2, num_heads=2, max_positions=64)
    return MTPModel(trunk=trunk, heads=heads).double().eval()


def recurrent(heads: Heads) -> MTPModel:
    return MTPModel(trunk=RecurrentTrunk(vocab_size=11, d_model=8), heads=heads).double().eval()


def converse(model: MTPModel, decoder: Decoder, **options: object) -> None:
    """Check every turn of a conversation, and that it reads its own tokens and at most one more."""
    conversation, text, grown = ContinuedExecutor(model), list[int](), 0
    for turn, new in enumerate(TURNS):
        text += new
        given = {"max_new_tokens": 6, "seed": turn, **options}
        found = decoder.generate(conversation, [text], **given)
        wanted = decoder.generate(model, [text], **given)
        assert found.tokens == wanted.tokens
        assert conversation.num_read + conversation.num_reused == len(text)
        if conversation.num_reused:
            assert conversation.num_read <= len(new) + 1  # the last token that was emitted was not read
        else:
            grown += 1  # the states were too small for the turn
        text = [*text, *found.tokens[0]]
    assert 1 <= grown <= 2


MODELS: list[tuple[Callable[[], MTPModel], Decoder]] = [
    (lambda: recurrent(LinearHeads(d_model=8, num_horizons=4)), AutoregressiveDecoder()),
    (lambda: recurrent(SequentialHeads(d_model=8, num_horizons=3, num_heads=2)), SpeculativeDecoder()),
    (lambda: transformer(RecurrentHeads(d_model=8, embedding_width=8, num_horizons=4)), SpeculativeDecoder()),
    (lambda: transformer(LinearHeads(d_model=8, num_horizons=4)), SpeculativeDecoder(drafter=LookupOrHeads())),
]


@pytest.mark.parametrize(("make", "decoder"), MODELS)
def test_a_turn_reads_only_its_own_tokens_and_the_one_before(make: Callable[[], MTPModel], decoder: Decoder) -> None:
    converse(make(), decoder, sampling=SamplingParams(temperature=0.8))


def test_tokens_behind_a_stop_are_forgotten() -> None:
    model = transformer(LinearHeads(d_model=8, num_horizons=4))
    stop = StopRule(tokens=[0, 2, 4, 6, 8])
    converse(model, SpeculativeDecoder(), sampling=SamplingParams(temperature=1.5), stop=stop)


def test_trees_go_on_too() -> None:
    model = transformer(ConditionedHeads(d_model=8, embedding_width=8, num_horizons=4))
    converse(model, SpeculativeDecoder(tree=StaticTree(widths=[2, 2, 1])))


def test_another_text_is_read_from_its_beginning() -> None:
    model = transformer(LinearHeads(d_model=8, num_horizons=4))
    conversation, decoder = ContinuedExecutor(model), SpeculativeDecoder()
    for prompt in ([1, 2, 3, 4], [1, 2, 9], [5], [5]):
        found = decoder.generate(conversation, [prompt], max_new_tokens=9)
        assert found.tokens == decoder.generate(model, [prompt], max_new_tokens=9).tokens
    assert conversation.num_read == 1
    conversation.forget()
    assert decoder.generate(conversation, [[5, 6]], max_new_tokens=3).tokens[0]
    assert (conversation.num_read, conversation.num_reused) == (2, 0)


def test_one_conversation_is_one_row() -> None:
    model = transformer(LinearHeads(d_model=8, num_horizons=2))
    with pytest.raises(ValueError, match=r"^ContinuedExecutor: holds one conversation, got 2 prompts; decode them"):
        SpeculativeDecoder().generate(ContinuedExecutor(model), [[1], [2]], max_new_tokens=2)


def test_a_conversation_ends_where_the_positions_do() -> None:
    trunk = TransformerTrunk(vocab_size=11, d_model=8, num_layers=1, num_heads=2, max_positions=20)
    model = MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=4)).double().eval()
    conversation, text = ContinuedExecutor(model), [1]
    for _ in range(2):
        found = SpeculativeDecoder().generate(conversation, [text], max_new_tokens=15)
        assert found.tokens == SpeculativeDecoder().generate(model, [text], max_new_tokens=15).tokens
        text = [*text, *found.tokens[0], 3]
    assert found.finish_reasons == ["context"]
