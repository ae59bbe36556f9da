"""The counts behind per-head metrics. Pure functions of :class:`~mtp_modules.core.outputs.LossTerms`."""

import torch

from mtp_modules.core.outputs import LossTerms
from mtp_modules.core.shapes import Bool, Float, Int, Tensor

COUNT = "count"
_OF = "__"


def hits(rank: Int[Tensor, "B P H"], valid: Bool[Tensor, "B P H"], top_k: int) -> Int[Tensor, " H"]:
    """Count the valid targets among the ``top_k`` most likely tokens, per horizon.

    Args:
        rank: Number of logits above the target's.
        valid: Which targets count.
        top_k: Number of tokens.
    """
    return ((rank < top_k) & valid).sum(dim=(0, 1))


def accepted_lengths(agrees: Bool[Tensor, "B P G"]) -> Int[Tensor, "B P"]:
    """Return the accepted length at each position: horizon 1's token, which is always emitted, and the accepted drafts.

    Args:
        agrees: Whether each horizon's argmax is horizon 1's; true for horizon 1 itself.
    """
    return agrees.cumprod(dim=2).sum(dim=2)


def counts(terms: LossTerms, top_k: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the sums from which metrics are computed.

    Args:
        terms: Of one batch.
        top_k: Values of ``k`` for top-k accuracy.
    """
    accepted = torch.where(terms.comparable, accepted_lengths(terms.agrees), 0)
    return {
        "nll_sum": terms.nll.double() * terms.count,
        "nll_count": terms.count,
        "hits": torch.stack([hits(terms.rank, terms.valid, k) for k in top_k]),
        "hit_count": terms.valid.sum(dim=(0, 1)),
        "accepted_sum": accepted.sum(),
        "accepted_count": terms.comparable.sum(),
        **{
            sum_name(name, figure): value
            for name, found in terms.auxiliary.items()
            for figure, value in {**found.sums, COUNT: found.examples}.items()
        },
    }


def sum_name(objective: str, figure: str) -> str:
    """Return the name of a sum over the examples of an auxiliary objective.

    Args:
        objective: Its name.
        figure: Of what it logs; ``COUNT`` for the number of examples.
    """
    return f"{objective}{_OF}{figure}"


def perplexities(nll: Float[Tensor, " H"], count: Int[Tensor, " H"]) -> Float[Tensor, " H"]:
    """Return the perplexity, the exponential of the mean loss.

    Args:
        nll: Mean loss per horizon in nats.
        count: Number of targets of that mean; the result is 0 where there are none.
    """
    return torch.where(count > 0, nll.exp(), 0.0).float()


def figures(sums: dict[str, Tensor], top_k: tuple[int, ...]) -> dict[str, Tensor]:
    """Compute the logged metrics from sums.

    Args:
        sums: Results of :func:`counts`, added up over batches and ranks.
        top_k: Values of ``k`` for top-k accuracy.
    """
    found = {}
    nll = sums["nll_sum"] / sums["nll_count"].clamp(min=1)
    perplexity = perplexities(nll, sums["nll_count"])
    rates = sums["hits"] / sums["hit_count"].clamp(min=1)
    for index in range(len(nll)):
        found[f"loss/head_{index + 1}"] = nll[index].float()
        found[f"perplexity/head_{index + 1}"] = perplexity[index]
        for k, rate in zip(top_k, rates, strict=True):
            found[f"{'' if k == 1 else f'top{k}_'}accuracy/head_{index + 1}"] = rate[index]
    found["accepted_length"] = sums["accepted_sum"] / sums["accepted_count"].clamp(min=1)
    for name, total in sums.items():
        objective, _, figure = name.partition(_OF)
        if figure and figure != COUNT:
            mean = total / sums[sum_name(objective, COUNT)].clamp(min=1)
            found[f"{objective}/{figure}"] = mean.float()
    return found
