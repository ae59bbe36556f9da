"""What is recorded of each token: the distributions of the run itself, and rejected drafts."""

import pytest

from mtp_modules import AutoregressiveDecoder, MTPModel, SpeculativeDecoder
from mtp_modules.data.tokenizers import ByteTokenizer
from mtp_modules.decoders import RejectionSampling, Round, SamplingParams, StopRule
from mtp_modules.reports.recording import Alternative, Recording, RejectedDraft, record
from mtp_modules.reports.token_text import shown_token, shown_tokens
from tests.drafting import ScriptedHeads, clock
from tests.helpers import VOCAB, make_model
from tests.small_tokenizers import SpelledBytes, small_tokenizer

PROMPT = [1, 2, 3]


def recorded(model: MTPModel, temperature: float) -> tuple[Recording, list[Round]]:
    decoder = SpeculativeDecoder(acceptance=RejectionSampling(), return_distributions=True)
    sampling = SamplingParams(temperature=temperature)
    rounds = list(decoder.stream(model, [PROMPT], max_new_tokens=25, sampling=sampling, seed=4))
    return record(PROMPT, rounds, alternatives=3), rounds


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_draft_of_the_run_is_in_the_recording(temperature: float) -> None:
    run, rounds = recorded(make_model("transformer", "recurrent", 4), temperature)
    assert [token.token for token in run.tokens] == [token for done in rounds for token in done.tokens[0]]
    assert [token.depth for token in run.tokens] == [depth for done in rounds for depth in done.depths[0]]
    assert sum(token.depth > 0 for token in run.tokens) == sum(run.stats.accepted) > 0
    rejected = [draft for token in run.tokens for draft in token.rejected]
    assert len(rejected) == sum(run.stats.drafted) - sum(run.stats.accepted) > 0
    place = 0
    for done in rounds:
        assert done.distributions is not None
        drafts, target_probs, draft_probs = (
            done.distributions.drafts[0].tolist(),
            done.distributions.target_probs[0],
            done.distributions.draft_probs[0],
        )
        for index, token in enumerate(done.tokens[0]):
            found = run.tokens[place]
            assert found.p == target_probs[index, token].item()
            assert found.q == (draft_probs[index, token].item() if index < done.drafted[0] else None)
            best = target_probs[index].argsort(descending=True)[:3].tolist()
            assert found.model == [Alternative(other, target_probs[index, other].item()) for other in best]
            assert len(found.draft) == (3 if index < done.drafted[0] else 0)
            place += 1
        assert run.tokens[place - 1].rejected == [
            RejectedDraft(token, depth + 1, target_probs[depth, token].item(), draft_probs[depth, token].item())
            for depth, token in list(enumerate(drafts[: done.drafted[0]]))[done.accepted[0] :]
        ]


def test_drafts_behind_a_stop_are_no_rejected_ones() -> None:
    rounds = SpeculativeDecoder(return_distributions=True).stream(
        clock(5), [[0]], max_new_tokens=20, stop=StopRule(tokens=[4])
    )
    run = record([0], rounds)
    assert [(token.token, token.depth, token.rejected) for token in run.tokens] == [
        *((1, 0, []), (2, 1, []), (3, 2, []), (4, 3, []))
    ]


def test_scripted_drafts_have_their_probability() -> None:
    model = clock(3)
    script = lambda row, length, count: [(length + 1) % VOCAB, length % VOCAB]  # noqa: E731 - right, then wrong
    model.heads = ScriptedHeads(heads=model.heads, script=script, probability=0.7)
    run = record([0], SpeculativeDecoder(return_distributions=True).stream(model, [[0]], max_new_tokens=9))
    assert [token.depth for token in run.tokens] == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    own, draft = run.tokens[2], run.tokens[1]
    assert draft.q == pytest.approx(0.7)
    assert own.q == pytest.approx(0.03)
    (rejected,) = own.rejected
    assert (rejected.depth, rejected.q) == (2, pytest.approx(0.7))
    assert own.draft[0] == Alternative(rejected.token, rejected.q)


def test_plain_decoding_has_no_drafts() -> None:
    run = record([1], AutoregressiveDecoder(return_distributions=True).stream(make_model(), [[1]], max_new_tokens=4))
    assert [(token.depth, token.q, token.draft, token.rejected) for token in run.tokens] == [(0, None, [], [])] * 4


def test_rounds_without_distributions_are_refused() -> None:
    with pytest.raises(
        ValueError, match="record: the rounds have no distributions; create the decoder with return_distributions=True"
    ):
        record([1], SpeculativeDecoder().stream(make_model(), [[1]], max_new_tokens=4))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b"a b", "a| |b"),
        ("\u20ac1".encode(), "E2|82|\u20ac|1"),
        (b"\xc3a", "C3|a"),
        (b"a\xff\xfeb", "a|FF|FE|b"),
        (b"\xf0\x9f\x98a\xc3\xa9", "F0|9F|98|a|C3|\xe9"),
        (b"x\n\ty\x00", "x|\u21b5\n|\u21e5\t|y|00"),
        (b"\xe2\x82", "E2|82"),
    ],
)
def test_bytes_are_shown_as_text_where_they_are_text(text: bytes, shown: str) -> None:
    assert "|".join(one.text for one in shown_tokens(list(text), ByteTokenizer())) == shown


@pytest.mark.parametrize(
    ("kind", "text", "shown"),
    [
        ("words", "the dog.", "the| dog|."),
        ("unigram", "the dog", "the| dog"),
        ("fallback-bpe", "the → é", "the| |#229|#137|→| |#198|é"),
        ("word-piece", "barking", "bark|ing"),
    ],
)
def test_spaces_are_shown_where_the_text_has_them(kind: str, text: str, shown: str) -> None:
    tokenizer = small_tokenizer(kind)
    assert "|".join(one.text for one in shown_tokens(tokenizer.encode(text), tokenizer)) == shown


def test_ids_of_no_token_are_shown_by_their_numbers() -> None:
    assert [one.text for one in shown_tokens([0xC3, 300, 0xA9], ByteTokenizer())] == ["C3", "#300", "é"]
    assert shown_token(300, ByteTokenizer()) == "token 300"


def test_a_name_has_the_space_that_its_token_writes() -> None:
    tokenizer = small_tokenizer("unigram")
    dog, x, space = (tokenizer.encode(text)[-1] for text in ("dog", "dogx", " "))
    assert [shown_token(token, tokenizer) for token in (dog, x, space)] == ["\u2423dog", "x", "\u2423"]
    assert shown_token(0, SpelledBytes(texts=["\xa9\xc3"])) == "token 0"


def test_names_of_single_tokens() -> None:
    names = [shown_token(token, ByteTokenizer()) for token in (97, 32, 10, 9, 0, 195)]
    assert names == ["a", "\u2423", "\u21b5", "\u21e5", "byte 00", "byte C3"]
    assert shown_token(17, None) == "17"
