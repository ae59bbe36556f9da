"""Choice of the draft vocabulary of the horizons beyond the first: a step before training, never a part of it."""

from mtp_modules.core.checks import refuse
from mtp_modules.data.frequent import frequent_tokens
from mtp_modules.data.module import TokenDataModule
from mtp_modules.model import MTPModel


def choose_draft_tokens(model: MTPModel, data: object) -> None:
    """Trim a model's drafts to the most frequent tokens of its training data, unless they are chosen already.

    The command ``fit`` does this before training; a script of your own calls it before ``Trainer.fit``. A model whose
    weights were loaded keeps the tokens that it was trained with.

    Args:
        model: Changed in place, if it has a draft vocabulary that was not chosen yet.
        data: The data module.

    Raises:
        ValueError: If the tokens of the data cannot be counted, or the model is on the meta device.

    Example:
        >>> from mtp_modules import LinearHeads, RecurrentTrunk
        >>> from mtp_modules.data import ProgressionDataModule
        >>> trunk, heads = RecurrentTrunk(vocab_size=24, d_model=16), LinearHeads(d_model=16, num_horizons=3)
        >>> model = MTPModel(trunk=trunk, heads=heads, num_draft_tokens=5)
        >>> choose_draft_tokens(model, ProgressionDataModule(batch_size=8, lookahead=3, vocab_size=24, length=6))
        >>> len(model.unembedding.draft_tokens), model.unembedding.drafts_chosen
        (5, True)
    """
    chosen = model.unembedding.draft_tokens
    if chosen is None or model.unembedding.drafts_chosen:
        return
    if chosen.is_meta:
        refuse(
            "num_draft_tokens",
            f"is {len(chosen)}, but the model is on the meta device, which keeps no tokens; set init_on_meta to false.",
        )
    if not isinstance(data, TokenDataModule):
        refuse(
            "num_draft_tokens",
            f"is {len(chosen)}, but the data is no TokenDataModule whose tokens could be counted; choose them with "
            "model.trim_drafts(...).",
        )
    data.prepare_data()
    data.setup("fit")
    rows = data.rows("train")
    assert rows is not None
    model.trim_drafts(frequent_tokens(rows, len(chosen), vocab_size=model.trunk.vocab_size))


def check_draft_tokens_chosen(model: MTPModel) -> None:
    """Raise an error if the model has a draft vocabulary that was never chosen.

    Args:
        model: About to be trained.

    Raises:
        ValueError: If it has a draft vocabulary, and its tokens are still the initial ones.
    """
    tokens = model.unembedding.draft_tokens
    if tokens is not None and not model.unembedding.drafts_chosen:
        refuse(
            "num_draft_tokens",
            f"is {len(tokens)}, but the tokens were not chosen; call choose_draft_tokens(module.model, data) of "
            "mtp_modules.training before the fit, or module.model.trim_drafts(...).",
        )
