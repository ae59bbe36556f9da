"""Which tokens the horizons beyond the first may draft."""

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.data.frequent import frequent_tokens
from mtp_modules.data.module import TokenDataModule
from mtp_modules.model import MTPModel


def choose_draft_tokens(model: MTPModel, data: object) -> None:
    """Trim a model's drafts to the tokens that its training data has most often, unless it has been told which.

    Args:
        model: Changed in place, if it has few draft tokens that nobody has chosen.
        data: The data module, if there is one.

    Raises:
        ValueError: If the data cannot be counted.
    """
    chosen = model.unembedding.draft_tokens
    if chosen is None or not torch.equal(chosen, torch.arange(len(chosen), device=chosen.device)):
        return
    if not isinstance(data, TokenDataModule):
        refuse(
            "num_draft_tokens",
            f"is {len(chosen)}, but the data is no TokenDataModule whose tokens could be counted; choose them with "
            "model.trim_drafts(...).",
        )
    rows = data.rows("train")
    assert rows is not None
    model.trim_drafts(frequent_tokens(rows, len(chosen), vocab_size=model.trunk.vocab_size))
