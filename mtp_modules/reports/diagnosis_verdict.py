"""A diagnosis in plain sentences: what is wrong, and what to do."""

from collections.abc import Iterator

from mtp_modules.reports.diagnosis import Diagnosis

_CLEARLY = 0.05
_MISCALIBRATED = 0.1
_CONFLICT = -0.05
_EASIER = 1.15


def verdict(found: Diagnosis) -> list[str]:
    """Return what a user should know first, the most important sentence first.

    Args:
        found: What was measured.
    """
    return [*_number(found), *_heads(found), *_weakest(found), *_where(found), *_confidence(found), *_own_text(found)]


def _number(found: Diagnosis) -> Iterator[str]:
    best, measured = found.forecast_best, found.measured_best
    if best.num_drafts == 0:
        other = max(found.numbers[1:], key=lambda number: number.forecast)
        yield (
            f"Drafting does not pay here: {_drafts(other.num_drafts)} would bring {other.expected_tokens:.2f} tokens a "
            f"round, but a round then costs {other.cost:.2f} times a plain one. Decode plainly, or make drafts better."
        )
    else:
        yield (
            f"{_drafts(best.num_drafts)} {'is' if best.num_drafts == 1 else 'are'} best here: a round brings "
            f"{best.expected_tokens:.2f} tokens of held-out text and costs {best.cost:.2f} times a plain one, which "
            f"makes a speed-up of {best.forecast:.2f}x. Measured on the model's own text: {best.measured:.2f}x."
        )
        if best.num_drafts == found.numbers[-1].num_drafts:
            yield "No larger number was tried; if the heads can draft more, a larger num_drafts may be better still."
    if measured.measured > (1 + _CLEARLY) * best.measured:
        yield (
            f"Going by the clock alone, {_drafts(measured.num_drafts).lower()} did better: {measured.measured:.2f}x. "
            "Repeat on a quiet machine, with more prompts, before you trust either."
        )


def _heads(found: Diagnosis) -> Iterator[str]:
    for horizon in found.silent:
        yield f"Head {horizon} is dead: it says the same whatever was read. Train it, or draft less far."
    for score in found.accuracies:
        if score.horizon in found.useless and score.horizon not in found.silent:
            yield (
                f"Head {score.horizon} never beats a guess: {score.top1:.1%} right, and always saying the commonest "
                f"token is right {score.commonest:.1%} of the time. It is untrained, or its horizon cannot be foretold."
            )
    if found.untouched:
        yield f"These parameters of the heads still have their initial value: {', '.join(found.untouched)}."
    against = [
        (score.horizon, cosine)
        for score, cosine in zip(found.accuracies, found.gradient_cosines, strict=True)
        if cosine is not None and cosine < _CONFLICT
    ]
    if against:
        named = ", ".join(f"{horizon} ({cosine:.2f})" for horizon, cosine in against)
        yield (
            f"Gradients conflict: in the trunk, {'head' if len(against) == 1 else 'heads'} {named} pulled against the "
            "next token. Give them less weight, or detach the trunk from them."
        )


def _weakest(found: Diagnosis) -> Iterator[str]:
    known = [depth for depth in found.depths if depth.reached >= found.rounds / 50]
    if known:
        weakest = min(known, key=lambda depth: depth.conditional)
        behind = " All drafts behind it hang on it." if weakest.depth == 1 and len(found.depths) > 1 else ""
        yield (
            f"The weakest link is draft {weakest.depth}, by head {found.head_of(weakest.depth)}: "
            f"{weakest.conditional:.0%} of those that are reached are accepted.{behind}"
        )


def _where(found: Diagnosis) -> Iterator[str]:
    groups = found.kinds or found.tokens
    if not groups or not found.rejected:
        return
    worst = max(groups, key=lambda group: group.count - group.accepted)
    share = (worst.count - worst.accepted) / found.rejected
    yield (
        f"Drafts fail most often at {'' if found.kinds else 'token '}{worst.name}: {share:.0%} of all rejections; "
        f"{worst.rate:.0%} of the drafts there hold."
    )


def _confidence(found: Diagnosis) -> Iterator[str]:
    reached = sum(depth.reached for depth in found.depths)
    if not reached:
        return
    accepted = sum(depth.accepted for depth in found.depths) / reached
    confidence = sum(depth.confidence * depth.reached for depth in found.depths) / reached
    if abs(accepted - confidence) <= _MISCALIBRATED:
        return
    modest = accepted > confidence
    yield (
        f"Drafts are {'better' if modest else 'worse'} than their own probability says: {accepted:.0%} are accepted, "
        f"their probability is {confidence:.0%} on average. A confidence threshold must be set "
        f"{'below' if modest else 'above'} the acceptance that you want; the squares on the page show by how much."
    )


def _own_text(found: Diagnosis) -> Iterator[str]:
    most = found.numbers[-1]
    if most.measured_tokens > _EASIER * most.expected_tokens:
        yield (
            f"The model's own text is easier to draft than held-out text: {most.measured_tokens:.2f} tokens a round "
            f"against {most.expected_tokens:.2f}. It may repeat itself; do not judge the heads by decoding alone."
        )
    elif most.expected_tokens > _EASIER * most.measured_tokens:
        yield (
            f"The model's own text is harder to draft than held-out text: {most.measured_tokens:.2f} tokens a round "
            f"against {most.expected_tokens:.2f}."
        )


def _drafts(count: int) -> str:
    return f"{count} draft{'' if count == 1 else 's'}"
