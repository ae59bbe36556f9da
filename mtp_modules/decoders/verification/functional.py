"""Which drafts are accepted, and the token that follows them: the maths of the acceptance rules, as pure functions.

``drafts (B, K)`` are proposed tokens; ``draft_probs (B, K, V)`` the distributions ``q`` that they were sampled from,
the very tensor; ``target_probs (B, K + 1, V)`` the distributions ``p`` that the model would sample from after the token
before the first draft, after the first draft, and so on; ``limits (B,)`` how many of a row's drafts count, the others
are padding; ``uniform (B, K + 1)`` numbers in [0, 1), one for the token that follows, then one a draft.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.shapes import Bool, Float, Int, Tensor
from mtp_modules.decoders.sampling.noise import sample


class Verdict(NamedTuple):
    """The outcome of a verification.

    Attributes:
        accepted: How many drafts of each row are accepted.
        following: The token after them, the model's own.
    """

    accepted: Int[Tensor, " B"]
    following: Int[Tensor, " B"]


def accept_greedy(drafts: Int[Tensor, "B K"], choices: Int[Tensor, "B C"]) -> Int[Tensor, " B"]:
    """Return how many drafts equal what the model itself would have chosen, up to the first that does not.

    Example:
        >>> import torch
        >>> accept_greedy(torch.tensor([[4, 5, 6]]), torch.tensor([[4, 5, 7, 8]])).tolist()
        [2]
    """
    return leading(drafts == choices[:, : drafts.shape[1]])


def greedy_round(
    drafts: Int[Tensor, "B K"], limits: Int[Tensor, " B"], logits: Float[Tensor, "B C V"]
) -> tuple[Int[Tensor, "B C"], Int[Tensor, " B"]]:
    """Return the tokens of a round of greedy decoding, and how many of each row's are accepted drafts; one more counts.

    Example:
        >>> import torch
        >>> logits = torch.nn.functional.one_hot(torch.tensor([[4, 2, 3]]), 9).float()
        >>> greedy_round(torch.tensor([[4, 5]]), torch.tensor([2]), logits)
        (tensor([[4, 2, 3]]), tensor([1]))
    """
    choices = logits.argmax(dim=-1)
    if drafts.shape[1] == 0:  # in a step of a small model, the time of every call is felt
        return choices, torch.zeros_like(limits)
    accepted = accept_greedy(torch.where(within(limits, drafts.shape[1]), drafts, -1), choices)
    return choices, accepted


def leading(holds: Bool[Tensor, "B K"]) -> Int[Tensor, " B"]:
    """Return how many drafts are accepted before the first that is not."""
    num_drafts = holds.shape[1]
    if num_drafts == 0:
        return holds.new_zeros(len(holds), dtype=torch.long)
    places = torch.arange(num_drafts, device=holds.device)
    return torch.where(holds, num_drafts, places).amin(dim=1)


def within(limits: Int[Tensor, " B"], num_drafts: int) -> Bool[Tensor, "B K"]:
    """Return which drafts count."""
    return torch.arange(num_drafts, device=limits.device) < limits[:, None]


def _of(probs: Float[Tensor, "B C V"], tokens: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Return the probability of each token."""
    return probs[:, : tokens.shape[1]].gather(2, tokens[:, :, None])[:, :, 0]


def _at(values: Tensor, index: Int[Tensor, " B"]) -> Tensor:
    return values[torch.arange(len(index), device=index.device), index]


def _follow(
    target_probs: Float[Tensor, "B V"], draft_probs: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """Sample from the residual ``(p - q)+``; from ``p`` where the residual is empty."""
    residual = (target_probs - draft_probs).clamp(min=0)
    empty = residual.sum(dim=1, keepdim=True) <= 0
    return sample(torch.where(empty, target_probs, residual), uniform)


def accept_by_rejection(
    drafts: Int[Tensor, "B K"],
    draft_probs: Float[Tensor, "B K V"],
    target_probs: Float[Tensor, "B C V"],
    limits: Int[Tensor, " B"],
    uniform: Float[Tensor, "B C"],
) -> Verdict:
    r"""Accept a draft with probability :math:`\min(1, p/q)`; at the first rejection sample from :math:`(p - q)_+`.

    Lossless: Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318).
    """
    counts = within(limits, drafts.shape[1])
    holds = (uniform[:, 1:] * _of(draft_probs, drafts) < _of(target_probs, drafts)) & counts
    accepted = leading(holds)
    draft_probs = torch.cat((draft_probs * counts[:, :, None], torch.zeros_like(target_probs[:, :1])), dim=1)
    return Verdict(accepted, _follow(_at(target_probs, accepted), _at(draft_probs, accepted), uniform[:, 0]))


def accept_block(
    drafts: Int[Tensor, "B K"],
    draft_probs: Float[Tensor, "B K V"],
    target_probs: Float[Tensor, "B C V"],
    limits: Int[Tensor, " B"],
    uniform: Float[Tensor, "B C"],
) -> Verdict:
    """Verify all drafts together, which accepts at least as many on average as one by one.

    Lossless: Sun et al. 2024 (arXiv 2403.10444), algorithm 2. A draft may be accepted although one before it would be
    rejected alone.
    """
    rows, num_drafts = drafts.shape
    counts = within(limits, num_drafts)
    draft_probs = torch.cat((draft_probs * counts[:, :, None], torch.zeros_like(target_probs[:, :1])), dim=1)
    ratio = _of(target_probs, drafts) / _of(draft_probs, drafts)
    joint = [target_probs.new_ones(rows)]
    for depth in range(num_drafts):
        grown = (joint[-1] * ratio[:, depth]).clamp(max=1.0)
        joint.append(torch.where(counts[:, depth], grown, 0.0))
    weight = torch.stack(joint, dim=1)
    excess = (weight[:, :, None] * target_probs - draft_probs).clamp(min=0).sum(dim=2)
    chance = torch.where(excess > 0, excess / (excess + 1 - weight), 0.0)[:, 1:]
    places = torch.arange(1, num_drafts + 1, device=drafts.device)
    chance = torch.where(places == limits[:, None], weight[:, 1:], chance)
    holds = (uniform[:, 1:] < chance) & counts
    accepted = F.pad(torch.where(holds, places, 0), (1, 0)).amax(dim=1)
    scaled = _at(target_probs, accepted) * torch.where(accepted == limits, 1.0, _at(weight, accepted))[:, None]
    return Verdict(accepted, _follow(scaled, _at(draft_probs, accepted), uniform[:, 0]))


def accept_typical(
    drafts: Int[Tensor, "B K"],
    target_probs: Float[Tensor, "B C V"],
    limits: Int[Tensor, " B"],
    uniform: Float[Tensor, " B"],
    *,
    epsilon: float,
    delta: float,
) -> Verdict:
    r"""Accept drafts that the model finds likely enough. **Lossy**: the output follows another distribution.

    A draft is accepted if :math:`p(x) > \min(\epsilon, \delta e^{-H(p)})`. Cai et al. 2024 (arXiv 2401.10774),
    section 2.3.1.

    Args:
        drafts: Proposed tokens.
        target_probs: ``p``.
        limits: How many drafts count.
        uniform: One number in [0, 1) a row, for the token that follows.
        epsilon: Probability that is always enough.
        delta: Share of the typical probability that is enough.
    """
    entropy = torch.special.entr(target_probs[:, :-1]).sum(dim=2)
    enough = (delta * (-entropy).exp()).clamp(max=epsilon)
    accepted = leading((_of(target_probs, drafts) > enough) & within(limits, drafts.shape[1]))
    return Verdict(accepted, sample(_at(target_probs, accepted), uniform))


def accept_among_top(
    drafts: Int[Tensor, "B K"],
    scores: Float[Tensor, "B C V"],
    target_probs: Float[Tensor, "B C V"],
    limits: Int[Tensor, " B"],
    uniform: Float[Tensor, " B"],
    *,
    top_k: int,
) -> Verdict:
    """Accept drafts that are among the ``top_k`` best tokens. **Lossy**: the output follows another distribution.

    Stern et al. 2018 (arXiv 1811.03115), section 5.1.

    Args:
        drafts: Proposed tokens.
        scores: The logits that ``p`` was made from, penalties and allowed tokens included; minus infinity is never good
            enough.
        target_probs: ``p``, for the token that follows.
        limits: How many drafts count.
        uniform: One number in [0, 1) a row, for the token that follows.
        top_k: How many tokens are good enough.
    """
    own = _of(scores, drafts)
    rank = (scores[:, :-1] > own[:, :, None]).sum(dim=2)
    accepted = leading((rank < top_k) & (own > -torch.inf) & within(limits, drafts.shape[1]))
    return Verdict(accepted, sample(_at(target_probs, accepted), uniform))
