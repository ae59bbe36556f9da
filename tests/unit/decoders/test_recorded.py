"""Recorded rounds give what rounds give."""

import gc
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from mtp_modules import AutoregressiveDecoder, MTPModel, SpeculativeDecoder
from mtp_modules.core.state import bucket_of
from mtp_modules.decoders import (
    CostAwareDepth,
    DraftPolicy,
    DynamicTree,
    ExactMatch,
    RecordedModel,
    RejectionSampling,
    SamplingLaw,
    record_for_decoding,
    recorded,
    tape,
    warm_up,
)
from mtp_modules.decoders.acceptance import Verdict
from mtp_modules.decoders.draft_policy import DepthChooser
from mtp_modules.decoders.replays import Replays
from mtp_modules.layers import ChunkedState, cache
from tests.helpers import EVERY_HEADS, VOCAB, lists_of, make_model
from tests.unit.decoders.compiled import CASES, DRAWN, GREEDY, compare

PLAIN = AutoregressiveDecoder()


def recordings_of(fast: RecordedModel) -> int:
    """Count the recordings that no run has."""
    gc.collect()
    return sum(len(one.replays.recordings) for one in fast._free)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of tests are short, and are to cross sizes too."""
    for module in (cache, recorded):
        monkeypatch.setattr(module, "bucket_of", lambda length: 8 * -(-length // 8))


EVERY_CASE = {("transformer_previous", "recurrent"), ("transformer_grouped", "parallel")}


@pytest.mark.parametrize("heads", EVERY_HEADS)
@pytest.mark.parametrize("trunk", ["transformer_previous", "transformer_grouped"])
def test_recorded_rounds_give_the_same_tokens_without_recording_twice(trunk: str, heads: str) -> None:
    model = make_model(trunk, heads, 3).eval()
    fast = record_for_decoding(model, batch_sizes=(1, 2), prompt_sizes=(3,))
    cases = CASES if (trunk, heads) in EVERY_CASE else CASES[2:4]
    compare(model, fast, cases)
    made = recordings_of(fast)
    assert made >= len(cases)
    compare(model, fast, cases)
    assert recordings_of(fast) == made
    with torch.no_grad():
        model.unembedding.weight.add_(torch.randn_like(model.unembedding.weight))
    compare(model, fast, cases[:2])
    assert len(fast._free) == 1


def test_texts_that_outgrow_a_size_go_on_in_the_next() -> None:
    model = make_model("transformer_previous", "recurrent", 3).eval()
    fast = record_for_decoding(model)
    for decoder, law in ((PLAIN, DRAWN), (SpeculativeDecoder(), GREEDY)):
        asked = {"max_new_tokens": 40, "sampling": law, "seed": 1}
        wanted = decoder.generate(model, [[1, 2, 3]], **asked).tokens
        for _ in range(2):
            assert decoder.generate(fast, [[1, 2, 3]], **asked).tokens == wanted
    assert recordings_of(fast) == 2 * 6  # without drafts, and with two of them, in 8, 16, 24, 32, 40 and 48 slots


def test_sizes_grow_by_a_half_or_a_third() -> None:
    assert [bucket_of(length) for length in (1, 64, 65, 96, 97, 128, 129, 192, 193)] == [
        *(64, 64, 96, 96, 128, 128, 192, 192, 256)
    ]
    assert all(length <= bucket_of(length) < 1.5 * length + 2 for length in range(65, 5000))


@pytest.mark.parametrize(
    ("heads", "decoder", "law"),
    [
        ("recurrent", SpeculativeDecoder(), GREEDY),
        ("parallel", SpeculativeDecoder(), DRAWN),
        ("linear", SpeculativeDecoder(acceptance=RejectionSampling()), DRAWN),
        ("recurrent", PLAIN, DRAWN),
        ("linear", SpeculativeDecoder(tree=DynamicTree(depth=2, width=2, nodes=4)), GREEDY),
        ("linear", SpeculativeDecoder(keep_laws=True), DRAWN),
    ],
)
def test_batches_are_filled_and_shrink(heads: str, decoder: SpeculativeDecoder, law: object) -> None:
    model = make_model("transformer_previous", heads, 3).eval()
    fast = record_for_decoding(model, batch_sizes=(2, 4))
    asked = {"max_new_tokens": [4, 13, 9], "sampling": law, "seed": [5, 5, 7]}
    wanted = list(decoder.stream(model, [[1, 2, 3], [4], [5, 6]], **asked))
    for _ in range(2):
        found = list(decoder.stream(fast, [[1, 2, 3], [4], [5, 6]], **asked))
        assert lists_of(found) == lists_of(wanted)
        for one, other in zip(found, wanted, strict=True):
            if one.laws is not None and other.laws is not None:
                count = other.laws.drafts.shape[1]
                torch.testing.assert_close(one.laws.laws[:, : count + 1], other.laws.laws)
                torch.testing.assert_close(one.laws.draft_laws[:, :count], other.laws.draft_laws)


def test_several_runs_at_once_do_not_disturb_each_other() -> None:
    model = make_model("transformer_previous", "recurrent", 3).eval()
    fast = record_for_decoding(model)
    prompts, asked = [[1, 2, 3], [4, 5], [6]], {"max_new_tokens": 20}
    wanted = [SpeculativeDecoder().generate(model, [prompt], **asked).tokens[0] for prompt in prompts]
    for _ in range(2):
        streams = [SpeculativeDecoder().stream(fast, [prompt], **asked) for prompt in prompts]
        found: list[list[int]] = [[] for _ in prompts]
        going_on = list(range(len(prompts)))
        while going_on:
            for index in list(going_on):
                done = next(streams[index], None)
                if done is None:
                    going_on.remove(index)
                else:
                    found[index] += done.tokens[0]
        assert found == wanted
        del streams
    gc.collect()
    assert len(fast._free) == 3


def test_what_a_round_returns_is_not_written_over() -> None:
    """Two rounds by hand, whose tokens are looked at after both."""
    model = make_model("transformer", "linear", 3).eval()
    prompt = [1, 8, 3]
    wanted = PLAIN.generate(model, [prompt], max_new_tokens=3).tokens[0]
    assert len(set(wanted)) == 3
    fast = record_for_decoding(model)
    states = fast.new_states(fast, 1, 32, for_drafts=False)
    hidden = model.trunk(torch.tensor([prompt]), state=states[0]).hidden
    first = model.heads.extend(hidden, states[1])
    found = [model.unembedding.logits(first[:, -1]).argmax(dim=-1)]
    for keep in (3, 1):
        for state in states:
            state.commit([keep])
        found.append(fast.round(found[-1], torch.zeros_like(found[-1]), 0, *states)[:, 0])
    assert torch.cat(found).tolist() == wanted


def test_a_stream_that_is_given_up_gives_back_its_recordings() -> None:
    model = make_model("transformer", "recurrent", 3).eval()
    fast = record_for_decoding(model)
    stream = SpeculativeDecoder().stream(fast, [[1, 2]], max_new_tokens=20)
    for _ in range(3):
        next(stream)
    assert not fast._free
    stream.close()
    made = recordings_of(fast)
    assert made > 0
    wanted = SpeculativeDecoder().generate(model, [[3, 4]], max_new_tokens=20).tokens
    assert SpeculativeDecoder().generate(fast, [[3, 4]], max_new_tokens=20).tokens == wanted
    assert len(fast._free) == 1


def test_laws_share_recordings_where_only_their_numbers_differ() -> None:
    model = make_model("transformer", "recurrent", 3).eval()
    fast = record_for_decoding(model)
    made = []
    for temperature in (0.5, 1.5):
        law = SamplingLaw(temperature=temperature)
        wanted = SpeculativeDecoder().generate(model, [[1, 2]], max_new_tokens=20, sampling=law, seed=3).tokens
        assert SpeculativeDecoder().generate(fast, [[1, 2]], max_new_tokens=20, sampling=law, seed=3).tokens == wanted
        made.append(recordings_of(fast))
    assert made[0] == made[1]


def test_a_policy_learns_how_many_drafts_a_round_was_made_of() -> None:
    """Near the end of a row fewer of them count, but the graph, and the time, is that of all."""
    rounds: list[tuple[int, int]] = []

    class Watching(DepthChooser):
        def learn(self, rows: int, drafted: int, accepted: object, limits: Sequence[int], seconds: float) -> None:
            rounds.append((drafted, max(limits)))

    class Watched(DraftPolicy):
        def start(self, most: int) -> DepthChooser:
            return Watching(most)

    model = make_model("transformer", "recurrent", 4).eval()
    decoder = SpeculativeDecoder(policy=Watched())
    decoder.generate(record_for_decoding(model), [[1, 2]], max_new_tokens=12)
    assert {drafted for drafted, _ in rounds} == {3}
    assert min(counted for _, counted in rounds) < 3
    rounds.clear()
    decoder.generate(model, [[1, 2]], max_new_tokens=12)
    assert all(drafted == counted for drafted, counted in rounds)


@pytest.mark.parametrize("decoder", [SpeculativeDecoder(policy=CostAwareDepth(explore_every=2)), PLAIN])
def test_nothing_is_recorded_once_a_decoder_was_warmed_up(decoder: SpeculativeDecoder) -> None:
    model = make_model("transformer_previous", "recurrent", 2).eval()
    fast = record_for_decoding(model, batch_sizes=(1, 2), capacity=16)
    warm_up(fast, decoder, sampling=DRAWN, longest=40)
    made = recordings_of(fast)
    for prompts in ([[1, 2, 3]], [[1, 2], [3, 4]], [[5], [3, 4, 1]]):
        decoder.generate(fast, prompts, max_new_tokens=[36, 19][: len(prompts)], sampling=DRAWN)
    assert recordings_of(fast) == made
    with pytest.raises(ValueError, match=r"^warm_up: a sequence of 49 tokens is longer than max_positions=48; shorten"):
        warm_up(fast, decoder, longest=49)


def test_a_gpu_would_start_from_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph is captured in a second call of the round, which must not find a trace of the first."""

    def twice(function: Callable[[], object]) -> object:
        function()
        return kernels(function)

    kernels = tape._record_kernels
    monkeypatch.setattr(tape, "_record_kernels", twice)
    for heads in ("recurrent", "sequential", "joint", "conditioned", "block_diffusion"):
        model = make_model("transformer_previous", heads, 3).eval()
        compare(model, record_for_decoding(model, batch_sizes=(1, 2)), CASES[2:4])


def test_a_longer_text_makes_room_for_all_that_follow() -> None:
    model = make_model("transformer", "recurrent", 3).eval()
    fast = record_for_decoding(model, capacity=20)
    assert fast.capacity == 32
    made = []
    for budget in (5, 20, 40, 5, 40):
        wanted = PLAIN.generate(model, [[1, 2]], max_new_tokens=budget).tokens
        assert PLAIN.generate(fast, [[1, 2]], max_new_tokens=budget).tokens == wanted
        made.append(recordings_of(fast))
        assert len(fast._free) == 1
    assert fast.capacity == 64
    assert made == [1, 3, 6, 6, 6]  # a row of 5, 20 and 40 tokens looks at 8, at 24 and at 48 slots


def rule(shift: int) -> type[ExactMatch]:
    """Make a class of its own, as a cell of a notebook does that is run again."""

    class Shifted(ExactMatch):
        def verify(self, drafts: torch.Tensor, *others: torch.Tensor) -> Verdict:
            accepted, following = super().verify(drafts, *others)
            return Verdict(0 * accepted, (following + shift) % VOCAB)

    return Shifted


class Table(ExactMatch):
    """A rule that keeps what recordings do not look into, and a tensor."""

    def __init__(self, *, shift: int) -> None:
        self.table = {"shift": [shift]}
        self.added = torch.tensor(0)

    def verify(self, drafts: torch.Tensor, *others: torch.Tensor) -> Verdict:
        accepted, following = super().verify(drafts, *others)
        return Verdict(0 * accepted, (following + self.table["shift"][0] + self.added) % VOCAB)


def test_rules_of_somebody_else_are_told_apart_and_left_alone() -> None:
    model = make_model("transformer", "recurrent", 3).eval()
    fast = record_for_decoding(model)
    table = Table(shift=3)
    added = table.added
    for found in (rule(1)(), rule(2)(), Table(shift=1), Table(shift=2), table):
        asked = {"max_new_tokens": 9, "sampling": DRAWN, "seed": 2}
        decoder = SpeculativeDecoder(acceptance=found)
        assert decoder.generate(fast, [[1]], **asked).tokens == decoder.generate(model, [[1]], **asked).tokens
    assert table.added is added
    added.fill_(4)
    assert decoder.generate(fast, [[1]], **asked).tokens == decoder.generate(model, [[1]], **asked).tokens
    decoder.acceptance.table = {1, 2}
    with pytest.raises(
        ValueError, match=r"^record_for_decoding: a rule of acceptance holds a set, which recordings canno"
    ):
        decoder.generate(fast, [[1]], **asked)


def test_states_of_a_run_that_failed_are_not_used_again() -> None:
    model = make_model("transformer", "recurrent", 3).eval()
    fast = record_for_decoding(model)
    wanted = SpeculativeDecoder().generate(model, [[1, 2]], max_new_tokens=9).tokens
    weight = model.trunk.embedding.weight
    for spoil in (math.nan, None):
        assert SpeculativeDecoder().generate(fast, [[1, 2]], max_new_tokens=9).tokens == wanted
        assert len(fast._free) == 1
        if spoil is not None:
            kept = weight.detach().clone()
            with torch.no_grad():
                weight.fill_(spoil)
            with pytest.raises(ValueError, match=r"^generate: the model's logits are not numbers"):
                SpeculativeDecoder().generate(fast, [[1, 2, 3, 4, 5, 6]], max_new_tokens=9)
            with torch.no_grad():
                weight.copy_(kept)
            gc.collect()
            assert len(fast._free) == 0


def test_the_next_run_has_the_same_memory() -> None:
    model = make_model("transformer_previous", "parallel", 3).eval()
    fast = record_for_decoding(model, batch_sizes=(1, 2))
    made = []
    for _ in range(3):
        PLAIN.generate(fast, [[1, 2], [3]], max_new_tokens=[3, 9])
        made.append({pair[0].keys.data_ptr() for pair in fast._free[0].pairs.values()})
    assert made[0] == made[1] == made[2]


class Counting(ChunkedState):
    """A state that has one tensor under two names, and another state that knows it."""

    def __init__(self, other: "Counting | None" = None) -> None:
        super().__init__(1, 99)
        self.total = self.same = torch.zeros(1)
        self.other = other

    def expect_graphs(self, *, same_sizes: bool = False) -> None:
        """Everything that counts is in tensors."""


def test_what_is_there_twice_is_one_thing() -> None:
    def add(one: Counting, two: Counting, x: torch.Tensor) -> torch.Tensor:
        one.total.add_(x)
        two.other.same.add_(x)
        return one.total + two.other.total

    replays, one = Replays(torch.device("cpu")), Counting()
    two = Counting(one)
    assert [int(replays(add, one, two, torch.ones(1))) for _ in range(4)] == [4, 8, 12, 16]
    assert one.total is one.same
    assert len(replays.recordings) == 1


class LooksAtNumbers(ExactMatch):
    """Somebody's rule, which says that a graph can hold it."""

    def verify(self, drafts: torch.Tensor, *others: object) -> Verdict:
        assert min(drafts.flatten().tolist(), default=0) >= 0
        return super().verify(drafts, *others)


def _moved(model: MTPModel) -> RecordedModel:
    fast = record_for_decoding(model)
    model.unembedding.weight = torch.nn.Parameter(model.unembedding.weight.detach().clone())
    return fast


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no room": (
        lambda: record_for_decoding(make_model("transformer", "linear", 3), capacity=0),
        r"^record_for_decoding: capacity must be at least 1, got 0",
    ),
    "weights that were moved": (
        lambda: PLAIN.generate(_moved(make_model("transformer", "linear", 3).eval()), [[1]], max_new_tokens=3),
        r"^record_for_decoding: unembedding.weight has another shape, dtype, device, memory or mode since the model "
        r"was recorded; call record_for_decoding\(model\) again",
    ),
    "a rule that looks at numbers": (
        lambda: SpeculativeDecoder(acceptance=LooksAtNumbers()).generate(
            record_for_decoding(make_model("transformer", "linear", 3)), [[1]], max_new_tokens=3, sampling=DRAWN
        ),
        r"^record_for_decoding: a round calls Tensor.tolist, which takes numbers to the host",
    ),
    "a state with sizes of its own": (
        lambda: make_model("gru", "linear", 3).trunk.new_state(1, 5).expect_graphs(same_sizes=True),
        r"^RecurrentState: has other sizes in every round, so rounds cannot be recorded; decode with the model itself",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_state_that_hides_tensors_is_refused() -> None:
    model = make_model("transformer", "linear", 3).eval()
    made = model.heads.new_state

    def new_state(*sizes: int, **options: bool) -> object:
        state = made(*sizes, **options)
        state.table = {"hidden": torch.ones(1)}
        return state

    model.heads.new_state = new_state
    with pytest.raises(
        ValueError, match=r"^record_for_decoding: a state holds a dict, which recordings cannot follow; keep"
    ):
        PLAIN.generate(record_for_decoding(model), [[1]], max_new_tokens=3)
