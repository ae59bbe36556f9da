"""The figures of a diagnosis, against models whose answers are known and against the decoder."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules import MTPModel, SpeculativeDecoder
from mtp_modules.data.tokenizers import ByteTokenizer
from mtp_modules.reports import Diagnosis, DraftedText, diagnose, draft_along
from mtp_modules.reports.diagnosis import depths_of
from mtp_modules.reports.diagnosis_verdict import verdict
from mtp_modules.reports.draft_groups import Group, by_column, by_kind, by_position, by_token
from tests.drafting import ScriptedHeads, clock
from tests.helpers import VOCAB, make_model, random_tokens

COUNTING = torch.arange(40).remainder(VOCAB)


def counting(rows: int, length: int) -> list[dict[str, torch.Tensor]]:
    return [{"tokens": torch.stack([COUNTING[row : row + length] for row in range(rows)])}]


def drafted(accepted: list[int], confidence: list[list[float]], num_drafts: int) -> DraftedText:
    """Make rounds with these outcomes."""
    count = len(accepted)
    return DraftedText(
        rows=torch.zeros(count, dtype=torch.long),
        positions=torch.arange(1, count + 1),
        drafts=torch.zeros(count, num_drafts, dtype=torch.long),
        target_tokens=torch.zeros(count, num_drafts, dtype=torch.long),
        confidence=torch.tensor(confidence, dtype=torch.float64),
        accepted=torch.tensor(accepted),
        before=torch.rand(count, num_drafts, dtype=torch.float64),
        overlap=torch.rand(count, num_drafts, dtype=torch.float64),
        predicted=torch.tensor(confidence, dtype=torch.float64) / 2,
    )


ROUNDS = st.integers(1, 4).flatmap(
    lambda most: st.lists(
        st.tuples(st.integers(0, most), st.lists(st.floats(0, 1), min_size=most, max_size=most)),
        min_size=1,
        max_size=30,
    )
)


@given(rounds=ROUNDS)
def test_figures_by_depth_are_those_of_a_loop(rounds: list[tuple[int, list[float]]]) -> None:
    num_drafts = len(rounds[0][1])
    walked = drafted([accepted for accepted, _ in rounds], [chances for _, chances in rounds], num_drafts)
    expected, chain = 1.0, 1.0
    for found in depths_of(walked):
        index = found.depth - 1
        reached = [(accepted > index, chances[index]) for accepted, chances in rounds if accepted >= index]
        assert found.reached == len(reached)
        assert found.accepted == sum(held for held, _ in reached)
        error = 0.0
        for place in range(10):
            inside = [(held, chance) for held, chance in reached if min(int(chance * 10), 9) == place]
            assert found.bins[place].count == len(inside)
            error += abs(sum(held - chance for held, chance in inside))
        assert found.calibration_error == pytest.approx(error / max(len(reached), 1), abs=1e-9)
        predicted = [(held, chance / 2) for held, chance in reached]
        halves = [[pair for pair in predicted if min(int(pair[1] * 10), 9) == place] for place in range(10)]
        error = sum(abs(sum(held - chance for held, chance in inside)) for inside in halves)
        assert [one.count for one in found.predicted_bins] == list(map(len, halves))
        assert found.predicted_error == pytest.approx(error / max(len(reached), 1), abs=1e-9)
        assert (found.predicted is None) == (not reached)
        pairs = list(zip(walked.before[:, index].tolist(), walked.overlap[:, index].tolist(), strict=True))
        held = sum(weight * share for weight, share in pairs)
        assert found.sampled == pytest.approx(held / len(pairs))
        assert found.overlap == pytest.approx(held / sum(weight for weight, _ in pairs))
        chain *= found.conditional
        expected += chain
    assert expected == pytest.approx(1 + sum(accepted for accepted, _ in rounds) / len(rounds))


@pytest.mark.parametrize(("probability", "every", "error"), [(0.95, 4, 0.2), (0.75, 4, 0.0), (0.15, 2, 0.35)])
def test_calibration_of_drafts_with_known_probability_and_known_share(
    probability: float, every: int, error: float
) -> None:
    """A clock whose drafts are wrong at every so many places."""
    model = clock(2)
    model.heads = ScriptedHeads(
        heads=model.heads,
        script=lambda row, length, _: [(length + row + 1 + (length % every == 0)) % VOCAB],
        probability=probability,
    )
    tokens = counting(1, 33)[0]["tokens"]
    (found,) = depths_of(draft_along(model, tokens, num_drafts=1))
    assert found.reached == 32
    assert found.conditional == 1 - 1 / every
    assert found.confidence == pytest.approx(probability)
    assert found.calibration_error == pytest.approx(error)
    (only,) = [one for one in found.bins if one.count]
    assert (only.count, only.accepted) == (32, 1 - 1 / every)


@pytest.fixture(scope="module")
def healthy() -> Diagnosis:
    return diagnose(clock(4), counting(3, 24), [[0, 1], [5]], new_tokens=12, every=1)


def test_a_healthy_model(healthy: Diagnosis) -> None:
    assert [depth.conditional for depth in healthy.depths] == [1.0] * 3
    assert [number.expected_tokens for number in healthy.numbers] == [1.0, 2.0, 3.0, 4.0]
    assert [number.measured_tokens for number in healthy.numbers] == [1.0, 2.0, 3.0, 4.0]
    assert [(score.top1, score.top5) for score in healthy.accuracies] == [(1.0, 1.0)] * 4
    assert all(score.most_frequent == pytest.approx(1 / VOCAB, abs=0.05) for score in healthy.accuracies)
    assert healthy.constant == healthy.useless == healthy.untouched == []
    assert healthy.rounds == 3 * 23
    assert not any("dead" in sentence or "baseline" in sentence for sentence in verdict(healthy))


def test_forecasts_are_tokens_over_costs(healthy: Diagnosis) -> None:
    plain = healthy.numbers[0]
    assert (plain.cost, plain.forecast, plain.measured) == (1.0, 1.0, 1.0)
    for number in healthy.numbers:
        assert number.cost == number.round_seconds / plain.round_seconds
        assert number.forecast == number.expected_tokens / number.cost
    assert healthy.forecast_best.forecast == max(number.forecast for number in healthy.numbers)


@pytest.mark.parametrize(("trunk", "heads"), [("transformer", "parallel"), ("gru", "recurrent")])
def test_measured_tokens_are_what_the_decoder_counts(trunk: str, heads: str) -> None:
    model = make_model(trunk, heads, 3, seed=1)
    batch = {"tokens": random_tokens(2, 16)}
    prompts = [row[:5].tolist() for row in batch["tokens"]]
    found = diagnose(model, [batch], prompts, new_tokens=9, every=5)
    for number in found.numbers[1:]:
        tokens = forwards = 0
        for prompt in prompts:
            stats = SpeculativeDecoder(num_drafts=number.num_drafts).generate(model, [prompt], max_new_tokens=10).stats
            tokens, forwards = tokens + stats.tokens - 1, forwards + stats.forwards - 1
        assert number.measured_tokens == tokens / forwards
        walked = draft_along(model, batch["tokens"], num_drafts=number.num_drafts, every=5)
        assert number.expected_tokens == pytest.approx(1 + walked.accepted.double().mean().item())


def broken(kind: str) -> MTPModel:
    model = clock(4)
    with torch.no_grad():
        if kind == "constant":
            model.heads.maps[2].weight.zero_()
        else:  # another token of the circle than the one that comes
            model.heads.maps[2].weight.copy_(model.heads.maps[1].weight)
    return model


def test_a_dead_head_is_found_and_named() -> None:
    found = diagnose(broken("constant"), counting(3, 24), [[0, 1]], new_tokens=5)
    assert found.constant == [3]
    assert found.useless == [3]
    assert [sentence for sentence in verdict(found) if "Head 3 is dead" in sentence]
    assert not [sentence for sentence in verdict(found) if "Head 2" in sentence or "Head 4" in sentence]


def test_a_head_that_is_never_right_is_found_and_named() -> None:
    found = diagnose(broken("wrong"), counting(3, 24), [[0, 1]], new_tokens=5)
    assert found.constant == []
    assert found.useless == [3]
    assert found.depths[1].accepted == 0
    said = verdict(found)
    assert [line for line in said if line.startswith("Head 3 does not beat the baseline: its accuracy is 0.0%,")]
    assert [line for line in said if line.startswith("Draft 2, from head 3, is accepted least often: 0% of")]


def test_verdicts_follow_the_figures(healthy: Diagnosis) -> None:
    def with_costs(*costs: float) -> list[str]:
        numbers = [
            replace(number, cost=cost, forecast=number.expected_tokens / cost, measured=number.expected_tokens / cost)
            for number, cost in zip(healthy.numbers, costs, strict=True)
        ]
        return verdict(replace(healthy, numbers=numbers))

    assert with_costs(1, 1.1, 1.2, 3)[0].startswith(
        "2 drafts are best here: the mean accepted length on held-out text is 3.00 tokens"
    )
    assert with_costs(1, 3, 5, 7)[0].startswith(
        "Drafting does not pay here: 1 draft would give a mean accepted length of 2.00 tokens"
    )
    assert with_costs(1, 1, 2, 3)[0].startswith("1 draft is best here")
    assert with_costs(1, 1.1, 1.2, 1.3)[1].startswith("No larger number was tried")
    slow = [replace(number, measured=2.0 if number.num_drafts == 1 else 1.0) for number in healthy.numbers]
    assert any(
        "In measured speed alone, 1 draft did better: 2.00x" in line for line in verdict(replace(healthy, numbers=slow))
    )
    against = replace(healthy, gradient_cosines=[None, 0.3, -0.2, 0.0])
    conflict = "Gradients conflict: in the trunk, the gradients of head 3 (-0.20) have a negative cosine"
    assert any(line.startswith(conflict) for line in verdict(against))
    easy = [replace(number, expected_tokens=1.5) for number in healthy.numbers]
    assert any("Generated text is easier to draft" in line for line in verdict(replace(healthy, numbers=easy)))
    untouched = verdict(replace(healthy, untouched=["depth_bias[1]"]))
    assert "Parameters of the heads that still have their initial value: depth_bias[1]." in untouched
    for below, sure in ((True, 0.5), (False, 1.0)):
        accepted = 100 if below else 50
        depths = [replace(depth, reached=100, accepted=accepted, confidence=sure) for depth in healthy.depths]
        said = [line for line in verdict(replace(healthy, depths=depths)) if "confident:" in line]
        assert [("underconfident" in line, "below" in line) for line in said] == [(below, below)]


def test_groups_count_what_was_reached_by_what_the_model_chose() -> None:
    text = torch.tensor([list(b"x\nab 1\nq")])
    walked = DraftedText(
        rows=torch.zeros(3, dtype=torch.long),
        positions=torch.tensor([1, 3, 7]),
        drafts=torch.tensor([list(b"ab"), list(b" 2"), list(b"zz")]),
        target_tokens=torch.tensor([list(b"ab"), list(b" 1"), list(b"=z")]),
        confidence=torch.ones(3, 2, dtype=torch.float64),
        accepted=torch.tensor([2, 1, 0]),
        before=torch.ones(3, 2, dtype=torch.float64),
        overlap=torch.ones(3, 2, dtype=torch.float64),
        predicted=torch.zeros(3, 0, dtype=torch.float64),
    )
    tokenizer = ByteTokenizer()
    assert by_kind(walked, tokenizer) == [
        Group("letters", 2, 2),
        Group("digits", 1, 0),
        Group("whitespace", 1, 1),
        Group("punctuation", 1, 0),
    ]
    assert by_token(walked, tokenizer)[:2] == [Group("1", 1, 0), Group("=", 1, 0)]
    assert {group.name for group in by_token(walked, None)} == {"97", "98", "32", "49", "61"}
    assert by_kind(walked, None) == by_column(walked, text, None) == []
    assert by_column(walked, text, tokenizer) == [Group("0", 1, 2), Group("1 to 3", 2, 1)]
    assert by_position(walked) == [Group("1 to 1", 1, 2), Group("3 to 3", 1, 1), Group("7 to 7", 1, 0)]


def test_what_a_diagnosis_refuses() -> None:
    batch = counting(2, 12)
    with pytest.raises(ValueError, match="LinearHeads with one horizon cannot draft; there is nothing to diagnose"):
        diagnose(clock(1), batch, [[1]])
    with pytest.raises(ValueError, match="needs text and prompts, got 1 batches and 0 prompts"):
        diagnose(clock(2), batch, [])
    with pytest.raises(ValueError, match=r"num_drafts must lie in 1\.\.3 for 4 horizons, got 9"):
        diagnose(clock(4), batch, [[1]], num_drafts=9)
    with pytest.raises(ValueError, match="diagnose: new_tokens must be at least 1, got 0"):
        diagnose(clock(4), batch, [[1]], new_tokens=0)
    with pytest.raises(ValueError, match=r"batches must have equal lengths, got rows of 12 and 14 tokens"):
        diagnose(clock(4), [*batch, *counting(1, 14)], [[1]])
    with pytest.raises(
        ValueError, match="a prompt of 48 tokens leaves the trunk, which reads max_positions=48, no room"
    ):
        diagnose(make_model(num_horizons=2), [{"tokens": random_tokens(1, 20)}], [[1] * 48])
