"""FSP: a summary of what will come, as a bag of words."""

from mtp_modules.core.auxiliary import AuxiliaryText
from mtp_modules.core.checks import whole
from mtp_modules.core.shapes import Bool, Int, Tensor
from mtp_modules.objectives.bags import BagObjective


class FutureBagOfWords(BagObjective):
    r"""Predict which tokens will occur from the one after the next on, in any order.

    The bag of position :math:`t` is :math:`x_{t+2..t+\tau}`; :class:`~mtp_modules.objectives.bags.BagObjective` has the
    formula. Future summary prediction, Mahajan et al. 2025 (arXiv 2510.14751), its variant with a bag of words. Tokens
    of another document do not count, and windows end with the document or the row.

    Args:
        d_model: Width ``D`` of the trunk's states.
        vocab_size: Number ``V`` of token ids.
        window: The farthest token :math:`\tau` of the bag; 12 and 100 in the paper.
        weighted: Weigh tokens by their rarity; without, all alike.
        weight: Factor of the mean loss.

    Logs ``loss``, and ``recall``: the share of bags whose most likely token is in them.

    Raises:
        ValueError: If a size is too small, or the weight negative; in training, if ``weighted`` and the frequencies are
            unknown, because :func:`~mtp_modules.training.prepare_objectives` was not called.

    Example:
        >>> import torch
        >>> from mtp_modules.core.trunk import TrunkOutput
        >>> objective = FutureBagOfWords(d_model=16, vocab_size=50, weighted=False)
        >>> text = AuxiliaryText(torch.randint(50, (2, 12)), length=9)
        >>> terms = objective(TrunkOutput(torch.zeros(2, 9, 16)), text)
        >>> int(terms.examples), bool(terms.loss > 0)
        (18, True)
    """

    name = "future_bag"

    def __init__(
        self, *, d_model: int, vocab_size: int, window: int = 12, weighted: bool = True, weight: float = 1.0
    ) -> None:
        super().__init__(d_model=d_model, vocab_size=vocab_size, weighted=weighted, weight=weight)
        self.window = whole(self, "window", window, 2)

    def upcoming(self, text: AuxiliaryText) -> tuple[Int[Tensor, "B T W"], Bool[Tensor, "B T W"]]:
        """Return the tokens from the one after the next on."""
        return text.upcoming(self.window, first=2)
