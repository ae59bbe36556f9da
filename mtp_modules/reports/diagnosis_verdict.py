"""A diagnosis in sentences: the problems and what to do about them."""

from collections.abc import Iterator

from mtp_modules.reports.diagnosis import Diagnosis

_CLEARLY = 0.05
_MISCALIBRATED = 0.1
_CONFLICT = -0.05
_EASIER = 1.15


def verdict(found: Diagnosis) -> list[str]:
    """Return the findings as sentences, the most important one first.

    Args:
        found: The diagnosis.
    """
    return [*_number(found), *_heads(found), *_weakest(found), *_where(found), *_confidence(found), *_own_text(found)]


def _number(found: Diagnosis) -> Iterator[str]:
    best, measured = found.forecast_best, found.measured_best
    if best.num_drafts == 0:
        other = max(found.numbers[1:], key=lambda number: number.forecast)
        yield (
            f"Drafting does not pay here: {_drafts(other.num_drafts)} would give a mean accepted length of "
            f"{other.expected_tokens:.2f} tokens, but a round then costs {other.cost:.2f} times a step of plain "
            "decoding. Use plain decoding, or improve the drafts."
        )
    else:
        yield (
            f"{_drafts(best.num_drafts)} {'is' if best.num_drafts == 1 else 'are'} best here: the mean accepted length "
            f"on held-out text is {best.expected_tokens:.2f} tokens and a round costs {best.cost:.2f} times a step of "
            f"plain decoding, a speed-up of {best.forecast:.2f}x. Measured on generated text: {best.measured:.2f}x."
        )
        if best.num_drafts == found.numbers[-1].num_drafts:
            yield "No larger number was tried; if the heads can draft more, a larger num_drafts may be faster."
    if measured.measured > (1 + _CLEARLY) * best.measured:
        yield (
            f"In measured speed alone, {_drafts(measured.num_drafts)} did better: {measured.measured:.2f}x. "
            "Repeat on an idle machine with more prompts before you rely on either."
        )


def _heads(found: Diagnosis) -> Iterator[str]:
    for horizon in found.constant:
        yield f"Head {horizon} is dead: its output is the same for every input. Train it, or use fewer drafts."
    for score in found.accuracies:
        if score.horizon in found.useless and score.horizon not in found.constant:
            yield (
                f"Head {score.horizon} does not beat the baseline: its accuracy is {score.top1:.1%}, and that of "
                f"always predicting the most frequent token is {score.most_frequent:.1%}. It is untrained, or its "
                "horizon cannot be predicted."
            )
    if found.untouched:
        yield f"Parameters of the heads that still have their initial value: {', '.join(found.untouched)}."
    against = [
        (score.horizon, cosine)
        for score, cosine in zip(found.accuracies, found.gradient_cosines, strict=True)
        if cosine is not None and cosine < _CONFLICT
    ]
    if against:
        named = ", ".join(f"{horizon} ({cosine:.2f})" for horizon, cosine in against)
        yield (
            f"Gradients conflict: in the trunk, the gradients of {'head' if len(against) == 1 else 'heads'} {named} "
            "have a negative cosine with that of the next token. Lower their loss weight, or detach the trunk from "
            "them."
        )


def _weakest(found: Diagnosis) -> Iterator[str]:
    known = [depth for depth in found.depths if depth.reached >= found.rounds / 50]
    if known:
        weakest = min(known, key=lambda depth: depth.conditional)
        first = " All later drafts depend on it." if weakest.depth == 1 and len(found.depths) > 1 else ""
        yield (
            f"Draft {weakest.depth}, from head {found.head_of(weakest.depth)}, is accepted least often: "
            f"{weakest.conditional:.0%} of the times that it is reached.{first}"
        )


def _where(found: Diagnosis) -> Iterator[str]:
    groups = found.kinds or found.tokens
    if not groups or not found.rejected:
        return
    worst = max(groups, key=lambda group: group.count - group.accepted)
    share = (worst.count - worst.accepted) / found.rejected
    yield (
        f"Most rejections occur at {'' if found.kinds else 'token '}{worst.name}: {share:.0%} of all rejections; "
        f"{worst.rate:.0%} of the drafts there are accepted."
    )


def _confidence(found: Diagnosis) -> Iterator[str]:
    reached = sum(depth.reached for depth in found.depths)
    if not reached:
        return
    accepted = sum(depth.accepted for depth in found.depths) / reached
    confidence = sum(depth.confidence * depth.reached for depth in found.depths) / reached
    if abs(accepted - confidence) <= _MISCALIBRATED:
        return
    below = accepted > confidence
    yield (
        f"Drafts are {'under' if below else 'over'}confident: {accepted:.0%} are accepted, their mean probability is "
        f"{confidence:.0%}. Set a confidence threshold {'below' if below else 'above'} the acceptance rate that you "
        "want; the reliability diagrams on the page show by how much."
    )


def _own_text(found: Diagnosis) -> Iterator[str]:
    most = found.numbers[-1]
    if most.measured_tokens > _EASIER * most.expected_tokens:
        yield (
            "Generated text is easier to draft than held-out text: the mean accepted length is "
            f"{most.measured_tokens:.2f} against {most.expected_tokens:.2f} tokens. The model may repeat itself; do "
            "not judge the heads by decoding alone."
        )
    elif most.expected_tokens > _EASIER * most.measured_tokens:
        yield (
            f"Generated text is harder to draft than held-out text: the mean accepted length is "
            f"{most.measured_tokens:.2f} against {most.expected_tokens:.2f} tokens."
        )


def _drafts(count: int) -> str:
    return f"{count} draft{'' if count == 1 else 's'}"
