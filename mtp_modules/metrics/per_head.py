"""One torchmetrics metric for all per-head values."""

from collections.abc import Mapping, Sequence

import torch
from torchmetrics import Metric

from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.outputs import LossTerms
from mtp_modules.core.shapes import Tensor
from mtp_modules.metrics.functional import COUNT, counts, figures, sum_name


class PerHeadMetrics(Metric):
    """Loss, perplexity and accuracy per horizon, and mean accepted length, from the result of the loss, without logits.

    ``compute`` returns ``loss/head_h`` in nats, ``perplexity/head_h``, ``accuracy/head_h``, ``top5_accuracy/head_h``
    (for ``top_k=(1, 5)``) and ``accepted_length``: mean accepted length on the given text, from 1 to ``H``.

    Args:
        num_horizons: Number ``H``.
        top_k: Values of ``k`` for top-k accuracy.
        objectives: Names of the figures of each auxiliary objective, by its name; logged as ``<name>/<figure>``.

    Raises:
        ValueError: If a number is below 1.
    """

    full_state_update = False
    higher_is_better = None
    nll_sum: Tensor
    nll_count: Tensor
    hits: Tensor
    hit_count: Tensor
    accepted_sum: Tensor
    accepted_count: Tensor

    def __init__(
        self,
        *,
        num_horizons: int,
        top_k: Sequence[int] = (1, 5),
        objectives: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        whole(self, "num_horizons", num_horizons, 1)
        for k in top_k:
            whole(self, "top_k", k, 1)
        self.num_horizons, self.top_k = num_horizons, tuple(top_k)
        self.add_state("nll_sum", torch.zeros(num_horizons, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("nll_count", torch.zeros(num_horizons, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("hits", torch.zeros(len(self.top_k), num_horizons, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("hit_count", torch.zeros(num_horizons, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("accepted_sum", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("accepted_count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        for name, names in (objectives or {}).items():
            for figure in names:
                self.add_state(sum_name(name, figure), torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(sum_name(name, COUNT), torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, terms: LossTerms) -> None:
        """Add the counts of a batch.

        Args:
            terms: Result of the loss.

        Raises:
            ValueError: If it has an auxiliary objective that these metrics were not made for.
        """
        for name in terms.auxiliary:
            if sum_name(name, COUNT) not in self._defaults:
                refuse(self, f"the loss has the objective {name!r}; name it and its figures in objectives.")
        for name, value in counts(terms, self.top_k).items():
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> dict[str, Tensor]:
        """Return every metric under its log key."""
        return figures({name: getattr(self, name) for name in self._defaults}, self.top_k)
