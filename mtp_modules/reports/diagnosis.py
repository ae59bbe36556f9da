"""Why drafts are accepted or rejected: the measurements of ``python -m mtp_modules diagnose``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.core.shapes import Int, Tensor
from mtp_modules.model import MTPModel
from mtp_modules.reports.calibration import Bin, calibration_bins, calibration_error
from mtp_modules.reports.draft_groups import Group, by_column, by_kind, by_position, by_token
from mtp_modules.reports.draft_walk import DraftedText, draft_along
from mtp_modules.reports.head_health import (
    Accuracy,
    Batch,
    accuracies,
    gradient_cosines,
    heads_without_input,
    untouched_parameters,
)
from mtp_modules.studies import measure_speeds

_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Depth:
    """The drafts at one depth, in rounds in which all earlier drafts were accepted.

    Attributes:
        depth: 1 is the first draft.
        reached: Number of rounds in which all earlier drafts were accepted.
        accepted: Number of those rounds in which this draft was accepted too.
        confidence: Mean probability of the drafts under the draft distribution.
        calibration_error: Expected calibration error: mean distance between confidence and acceptance over the bins,
            weighted by their counts (Guo et al. 2017, arXiv 1706.04599).
        bins: Bins in order of confidence.
        overlap: The counterpart of ``conditional`` at temperature 1: probability that rejection sampling accepts a
            sampled draft, given that all earlier drafts were accepted. The mean of 1 - TV(p, q) between the
            distributions of model and draft.
        sampled: Probability that all drafts up to this depth are accepted at temperature 1.
        predicted: Mean acceptance that the heads predict of these drafts; ``None`` if they predict none.
        predicted_error: Expected calibration error of that prediction.
        predicted_bins: Bins in order of the prediction.
    """

    depth: int
    reached: int
    accepted: int
    confidence: float
    calibration_error: float
    bins: list[Bin]
    overlap: float
    sampled: float
    predicted: float | None = None
    predicted_error: float | None = None
    predicted_bins: list[Bin] = field(default_factory=list)

    @property
    def conditional(self) -> float:
        """Fraction of the reached drafts that were accepted."""
        return self.accepted / max(self.reached, 1)


@dataclass(frozen=True)
class NumberOfDrafts:
    """Mean accepted length and cost of a round with a given number of drafts.

    Mean accepted lengths are tokens per round and include the token that is always emitted.

    Attributes:
        num_drafts: Number of drafts per round; 0 is plain decoding.
        expected_tokens: Mean accepted length of greedy decoding on held-out text.
        expected_sampled_tokens: Mean accepted length on held-out text at temperature 1, by rejection sampling.
        measured_tokens: Mean accepted length of greedy decoding from held-out prompts.
        round_seconds: Median time of a round.
        cost: That time relative to plain decoding.
        forecast: ``expected_tokens / cost``, the speed-up to expect on such text.
        measured: Measured speed-up.
    """

    num_drafts: int
    expected_tokens: float
    expected_sampled_tokens: float
    measured_tokens: float
    round_seconds: float
    cost: float
    forecast: float
    measured: float


@dataclass(frozen=True)
class Diagnosis:
    """Why drafts are accepted or rejected.

    Attributes:
        model: Summary of the model.
        rounds: Number of rounds on held-out text.
        accuracies: Accuracy of every head on the text.
        gradient_cosines: Cosine of every horizon's gradient in the trunk with horizon 1's; ``None`` for horizon 1.
        depths: Drafts by depth.
        numbers: Mean accepted length and cost of every number of drafts, from 0.
        kinds: Drafts by the kind of the model's argmax token at their position; empty without a tokenizer.
        tokens: Drafts by the model's argmax token at their position, for the tokens with most rejections.
        positions: Rounds by the position in the row of the token that they follow.
        columns: Rounds by the number of tokens since the last newline; empty without a tokenizer.
        constant: Horizons whose head has the same output for every input.
        useless: Horizons whose head is no better than always predicting the most frequent token.
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
    positions: list[Group]
    columns: list[Group]
    constant: list[int] = field(default_factory=list)
    useless: list[int] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)

    @property
    def rejected(self) -> int:
        """Number of rounds in which a draft was rejected."""
        return sum(depth.reached - depth.accepted for depth in self.depths)

    def head_of(self, depth: int) -> int:
        """Return the horizon of the head that drafts at a depth; the last head may draft repeatedly.

        Args:
            depth: 1 is the first draft.
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
        model: A model in evaluation mode.
        batches: Held-out text, ``tokens (B, T + max(horizons))`` as for validation, all of one length.
        prompts: Token ids of the prompts to decode.
        tokenizer: Tokenizer for names and kinds of tokens; without one, reports show token ids.
        num_drafts: Largest number of drafts; as many as the heads are trained for if ``None``.
        new_tokens: Number of tokens to generate after each prompt.
        every: Draft after every ``every``-th token of the text.
        seed: Seed of the sampled drafts.
        progress: Called with a short description before each part of the work.

    Raises:
        ValueError: If the model has one horizon, if there is no text or no prompt, or a number is out of range.
    """
    trained_drafts = max(model.horizons) - 1
    if trained_drafts < 1:
        refuse("diagnose", f"{type(model.heads).__name__} with one horizon cannot draft; there is nothing to diagnose.")
    if not batches or not prompts:
        refuse("diagnose", f"needs text and prompts, got {len(batches)} batches and {len(prompts)} prompts.")
    lengths = sorted({batch["tokens"].shape[1] for batch in batches})
    if len(lengths) > 1:
        refuse("diagnose", f"batches must have equal lengths, got rows of {lengths[0]} and {lengths[-1]} tokens.")
    num_drafts = trained_drafts if num_drafts is None else num_drafts
    model.heads.check_num_drafts(num_drafts)
    at_least("diagnose", "new_tokens", new_tokens, 1)
    at_least("diagnose", "every", every, 1)
    report = progress or (lambda _: None)
    report("drafting along the text")
    text, walked = _walk(model, batches, num_drafts, every, seed)
    report("evaluating every head")
    scores = accuracies(model, batches)
    constant = heads_without_input(model, batches[0])
    report("comparing gradients")
    cosines = gradient_cosines(model, batches[0])
    report("decoding prompts")
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
                expected_sampled_tokens=1 + sum(depth.sampled for depth in known),
                measured_tokens=speed.stats.tokens_per_forward,
                round_seconds=speed.round_seconds,
                cost=cost,
                forecast=expected / cost,
                measured=speed.speed_up,
            )
        )
    return Diagnosis(
        model=model_summary(model),
        rounds=len(walked.rows),
        accuracies=scores,
        gradient_cosines=cosines,
        depths=depths,
        numbers=numbers,
        kinds=by_kind(walked, tokenizer),
        tokens=by_token(walked, tokenizer),
        positions=by_position(walked),
        columns=by_column(walked, text, tokenizer),
        constant=constant,
        useless=[score.horizon for score in scores if score.horizon in constant or not score.beats_baseline],
        untouched=untouched_parameters(model.heads),
    )


def model_summary(model: MTPModel) -> str:
    """Return the classes of a model's parts and its size as text.

    Args:
        model: The model.
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
    """Aggregate rounds by depth.

    Args:
        walked: Rounds of drafting along a text.
    """
    found = []
    for index in range(walked.drafts.shape[1]):
        reached = walked.accepted >= index
        accepted = walked.accepted[reached] > index
        confidence = walked.confidence[reached, index]
        bins = calibration_bins(confidence, accepted)
        weights = walked.before[:, index]
        predicted = walked.predicted[reached, index] if walked.predicted.shape[1] else None
        predicted_bins = [] if predicted is None else calibration_bins(predicted, accepted)
        found.append(
            Depth(
                depth=index + 1,
                reached=len(accepted),
                accepted=int(accepted.sum()),
                confidence=confidence.mean().item() if len(accepted) else 0.0,
                calibration_error=calibration_error(bins),
                bins=bins,
                overlap=(walked.reach[:, index].sum() / weights.sum().clamp(min=1e-300)).item(),
                sampled=walked.reach[:, index].mean().item(),
                predicted=None if predicted is None or not len(accepted) else predicted.mean().item(),
                predicted_error=None if predicted is None else calibration_error(predicted_bins),
                predicted_bins=predicted_bins,
            )
        )
    return found
