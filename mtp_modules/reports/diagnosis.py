"""Why drafts are accepted or not: everything that ``python -m mtp_modules diagnose`` measures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.core.shapes import Bool, Float, Int, Tensor
from mtp_modules.decoders import measure_speeds
from mtp_modules.model import MTPModel
from mtp_modules.reports.draft_groups import Group, by_column, by_kind, by_place, by_token
from mtp_modules.reports.draft_walk import DraftedText, draft_along
from mtp_modules.reports.head_health import (
    Accuracy,
    Batch,
    accuracies,
    gradient_cosines,
    heads_without_input,
    untouched_parameters,
)

NUM_BINS = 10
_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Bin:
    """Drafts whose own probability lies in one tenth of [0, 1].

    Attributes:
        count: How many.
        confidence: Their mean probability.
        accepted: Share of them that were accepted.
    """

    count: int
    confidence: float
    accepted: float


@dataclass(frozen=True)
class Depth:
    """The drafts at one depth, where all drafts before them were accepted.

    Attributes:
        depth: 1 is the nearest draft.
        reached: Number of rounds in which all drafts before were accepted.
        accepted: In how many of those this draft was accepted too.
        confidence: Mean probability of the drafts by their own law.
        calibration_error: Expected calibration error: mean distance between confidence and acceptance over the bins,
            weighted by their counts (Guo et al. 2017, arXiv 1706.04599).
        bins: By confidence, from unlikely to likely.
        overlap: What ``conditional`` is at temperature 1: chance that a draft holds, drawn from its law and verified by
            rejection sampling, where all before it did. The mean of 1 - TV(p, q) between the laws of model and draft.
        drawn: Chance that all drafts up to here hold at temperature 1.
    """

    depth: int
    reached: int
    accepted: int
    confidence: float
    calibration_error: float
    bins: list[Bin]
    overlap: float
    drawn: float

    @property
    def conditional(self) -> float:
        """Share of the reached drafts that were accepted."""
        return self.accepted / max(self.reached, 1)


@dataclass(frozen=True)
class NumberOfDrafts:
    """What a round with so many drafts brings and costs.

    Attributes:
        num_drafts: 0 is plain decoding.
        expected_tokens: Tokens a greedy round brings on the held-out text, by the acceptance there.
        expected_drawn_tokens: The same at temperature 1 by rejection sampling.
        measured_tokens: Tokens a round brought when the decoder went on from held-out prompts.
        round_seconds: Median time of a round.
        cost: That time over plain decoding's.
        forecast: ``expected_tokens / cost``: the speed-up to expect on such text.
        measured: Speed-up that was measured.
    """

    num_drafts: int
    expected_tokens: float
    expected_drawn_tokens: float
    measured_tokens: float
    round_seconds: float
    cost: float
    forecast: float
    measured: float


@dataclass(frozen=True)
class Diagnosis:
    """Why drafts are accepted or not.

    Attributes:
        model: The model in words.
        rounds: Number of rounds on held-out text.
        accuracies: Of every head against the text.
        gradient_cosines: Of every horizon's gradient in the trunk with horizon 1's; ``None`` for horizon 1.
        depths: Drafts by depth.
        numbers: Cost and use of every number of drafts, from 0 on.
        kinds: Drafts by the kind of token that the model itself chose in their place; empty without a
            tokenizer.
        tokens: The tokens in whose place most drafts were rejected.
        places: Rounds by the place in the row of the token they follow.
        columns: Rounds by the number of tokens since the last line end; empty without a tokenizer.
        silent: Horizons whose head says the same whatever was read.
        useless: Horizons whose head is no better than always saying the commonest token.
        untouched: Parameters of the heads that still have their initial value.
    """

    model: str
    rounds: int
    accuracies: list[Accuracy]
    gradient_cosines: list[float | None]
    depths: list[Depth]
    numbers: list[NumberOfDrafts]
    kinds: list[Group]
    tokens: list[Group]
    places: list[Group]
    columns: list[Group]
    silent: list[int] = field(default_factory=list)
    useless: list[int] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)

    @property
    def rejected(self) -> int:
        """Number of rounds in which a draft was rejected."""
        return sum(depth.reached - depth.accepted for depth in self.depths)

    def head_of(self, depth: int) -> int:
        """Return the horizon of the head that makes the drafts at a depth; the last one may be repeated.

        Args:
            depth: 1 is the nearest draft.
        """
        return self.accuracies[min(depth, len(self.accuracies) - 1)].horizon

    @property
    def forecast_best(self) -> NumberOfDrafts:
        """The number of drafts with the largest forecast."""
        return max(self.numbers, key=lambda number: number.forecast)

    @property
    def measured_best(self) -> NumberOfDrafts:
        """The number of drafts with the largest measured speed-up."""
        return max(self.numbers, key=lambda number: number.measured)


def diagnose(
    model: MTPModel,
    batches: Sequence[Batch],
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: Tokenizer | None = None,
    num_drafts: int | None = None,
    new_tokens: int = 96,
    every: int = 4,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Measure a model on held-out text, and decode held-out prompts.

    Args:
        model: In evaluation mode.
        batches: Held-out text, ``tokens (B, T + max(horizons))`` as for validation, all equally long.
        prompts: Token ids that the decoders go on from.
        tokenizer: Names tokens and tells their kinds; without one, they are told by their ids.
        num_drafts: Most drafts; as many as the heads are trained for if ``None``.
        new_tokens: How many tokens follow each prompt.
        every: Draft after every so many tokens of the text.
        seed: Of what is drawn.
        progress: Called with a few words before each part of the work.

    Raises:
        ValueError: If the model has one horizon, there is no text or prompt, or a number is out of range.
    """
    usual = max(model.horizons) - 1
    if usual < 1:
        refuse(
            "diagnose", f"{type(model.heads).__name__} with one horizon drafts nothing; there is nothing to diagnose."
        )
    if not batches or not prompts:
        refuse("diagnose", f"needs text and prompts, got {len(batches)} batches and {len(prompts)} prompts.")
    lengths = sorted({batch["tokens"].shape[1] for batch in batches})
    if len(lengths) > 1:
        refuse("diagnose", f"batches must be equally long, got rows of {lengths[0]} and {lengths[-1]} tokens.")
    num_drafts = usual if num_drafts is None else num_drafts
    model.heads.check_num_drafts(num_drafts)
    at_least("diagnose", "new_tokens", new_tokens, 1)
    at_least("diagnose", "every", every, 1)
    tell = progress or (lambda _: None)
    tell("drafting along the text")
    text, walked = _walk(model, batches, num_drafts, every, seed)
    tell("scoring every head")
    scores = accuracies(model, batches)
    silent = heads_without_input(model, batches[0])
    tell("comparing gradients")
    cosines = gradient_cosines(model, batches[0])
    tell("decoding prompts")
    speeds = measure_speeds(model, prompts, num_drafts=range(num_drafts + 1), new_tokens=new_tokens)
    depths = depths_of(walked)
    plain = speeds[0].round_seconds
    numbers = []
    for speed in speeds:
        known = depths[: speed.num_drafts]
        expected = 1 + sum(depth.accepted for depth in known) / len(walked.rows)
        cost = speed.round_seconds / plain
        numbers.append(
            NumberOfDrafts(
                num_drafts=speed.num_drafts,
                expected_tokens=expected,
                expected_drawn_tokens=1 + sum(depth.drawn for depth in known),
                measured_tokens=speed.stats.tokens_per_forward,
                round_seconds=speed.round_seconds,
                cost=cost,
                forecast=expected / cost,
                measured=speed.speed_up,
            )
        )
    return Diagnosis(
        model=model_in_words(model),
        rounds=len(walked.rows),
        accuracies=scores,
        gradient_cosines=cosines,
        depths=depths,
        numbers=numbers,
        kinds=by_kind(walked, tokenizer),
        tokens=by_token(walked, tokenizer),
        places=by_place(walked),
        columns=by_column(walked, text, tokenizer),
        silent=silent,
        useless=[score.horizon for score in scores if score.horizon in silent or not score.says_something],
        untouched=untouched_parameters(model.heads),
    )


def model_in_words(model: MTPModel) -> str:
    """Return the kinds of its parts and its size.

    Args:
        model: Any.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    parts = f"{type(model.trunk).__name__} with {type(model.heads).__name__}"
    return f"{parts}, {len(model.horizons)} horizons, {count:,} parameters"


def _walk(
    model: MTPModel, batches: Sequence[Batch], num_drafts: int, every: int, seed: int
) -> tuple[Int[Tensor, "B L"], DraftedText]:
    text = torch.cat([batch["tokens"] for batch in batches])
    documents = torch.cat([batch.get("document_ids", torch.zeros_like(batch["tokens"])) for batch in batches])
    parts = []
    for start in range(0, len(text), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        found = draft_along(
            model, text[rows], num_drafts=num_drafts, document_ids=documents[rows], every=every, seed=seed + start
        )
        parts.append((found.rows + start, *list(vars(found).values())[1:]))
    return text.cpu(), DraftedText(*(torch.cat(values) for values in zip(*parts, strict=True)))


def depths_of(walked: DraftedText) -> list[Depth]:
    """Sum rounds up by depth.

    Args:
        walked: Rounds on a text.
    """
    found = []
    for index in range(walked.drafts.shape[1]):
        reached = walked.accepted >= index
        holds = walked.accepted[reached] > index
        confidence = walked.confidence[reached, index]
        bins = calibration_bins(confidence, holds)
        weights = walked.before[:, index]
        error = sum(one.count * abs(one.accepted - one.confidence) for one in bins) / max(len(holds), 1)
        found.append(
            Depth(
                depth=index + 1,
                reached=len(holds),
                accepted=int(holds.sum()),
                confidence=confidence.mean().item() if len(holds) else 0.0,
                calibration_error=error,
                bins=bins,
                overlap=(walked.reach[:, index].sum() / weights.sum().clamp(min=1e-300)).item(),
                drawn=walked.reach[:, index].mean().item(),
            )
        )
    return found


def calibration_bins(confidence: Float[Tensor, " N"], holds: Bool[Tensor, " N"]) -> list[Bin]:
    """Sort drafts by their own probability into ten bins of equal width.

    Args:
        confidence: Probability of each draft.
        holds: Whether it was accepted.

    Example:
        >>> bins = calibration_bins(torch.tensor([0.95, 0.91, 0.25]), torch.tensor([True, False, False]))
        >>> [(one.count, round(one.confidence, 2), one.accepted) for one in bins if one.count]
        [(1, 0.25, 0.0), (2, 0.93, 0.5)]
    """
    index = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    found = []
    for place in range(NUM_BINS):
        inside = index == place
        count = int(inside.sum())
        mean = confidence[inside].mean().item() if count else (place + 0.5) / NUM_BINS
        found.append(Bin(count, mean, holds[inside].double().mean().item() if count else 0.0))
    return found
