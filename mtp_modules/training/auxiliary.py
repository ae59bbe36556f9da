"""Auxiliary objectives of a run: their counts, their losses beside that of the horizons, and their figures."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from mtp_modules.core.auxiliary import AuxiliaryObjective, AuxiliaryText
from mtp_modules.core.checks import refuse
from mtp_modules.core.outputs import LossTerms
from mtp_modules.core.shapes import Int, Tensor
from mtp_modules.core.tokenizer import Tokenizer
from mtp_modules.core.trunk import Trunk, TrunkOutput
from mtp_modules.data.cached_states import cached_output
from mtp_modules.data.frequent import token_counts
from mtp_modules.data.module import TokenDataModule
from mtp_modules.metrics.per_head import PerHeadMetrics
from mtp_modules.model import MTPModel


class Objectives(nn.ModuleList):
    """The auxiliary objectives of a run, in order; there may be none.

    Args:
        owner: Named in error messages.
        objectives: What is trained beside the horizons.
        trunk: Whose states they read.
        lookahead: How many tokens a batch carries beyond the positions that the trunk reads.

    Raises:
        ValueError: If one was built for another trunk, or has the name of another.
    """

    def __init__(
        self, owner: object, objectives: Sequence[AuxiliaryObjective], *, trunk: Trunk, lookahead: int
    ) -> None:
        super().__init__()
        for objective in objectives:
            for size in ("d_model", "vocab_size"):
                wanted, has = getattr(objective, size, None), getattr(trunk, size)
                if wanted not in (None, has):
                    refuse(
                        owner,
                        f"{type(objective).__name__} was built for {size}={wanted}, but {type(trunk).__name__} has "
                        f"{has}; make them equal.",
                    )
            if objective.name in self.names:
                refuse(owner, f"objectives holds {objective.name!r} twice; leave one out.")
            self.append(objective)
        self.lookahead = lookahead

    @property
    def all(self) -> list[AuxiliaryObjective]:
        """All of them, in order."""
        return [cast("AuxiliaryObjective", objective) for objective in self]

    @property
    def names(self) -> list[str]:
        """Of the figures in logs."""
        return [objective.name for objective in self.all]

    def metrics(self, num_horizons: int, top_k: Sequence[int] = (1, 5)) -> PerHeadMetrics:
        """Return metrics of the horizons and of the objectives.

        Args:
            num_horizons: Number ``H``.
            top_k: Values of ``k`` for top-k accuracy.
        """
        return PerHeadMetrics(num_horizons=num_horizons, top_k=top_k, objectives=self.figures)

    @property
    def figures(self) -> dict[str, tuple[str, ...]]:
        """What each logs, by name."""
        return {objective.name: objective.figures for objective in self.all}

    @property
    def counter(self) -> Callable[[dict[str, Any]], Tensor] | None:
        """:meth:`count`, if there is anything to count."""
        return self.count if self.all else None

    def count(self, batch: dict[str, Any]) -> Int[Tensor, " O"]:
        """Return how many examples each has in a batch.

        Args:
            batch: Of the training data.
        """
        text = AuxiliaryText.of(batch, self.lookahead)
        return torch.stack([objective.count(text) for objective in self.all])

    def states(self, model: MTPModel, batch: dict[str, Tensor]) -> TrunkOutput | None:
        """Return the trunk's states for horizons and objectives; ``None`` where the horizons alone need them.

        Args:
            model: With the trunk.
            batch: The batch, with cached states or without.
        """
        known = cached_output(batch)
        if not self.all:
            return known
        if known is None:
            return model.read(batch.get("inputs", batch["tokens"]), document_ids=batch.get("document_ids"))
        dtype = model.unembedding.weight.dtype  # cached states are in float16, say
        return TrunkOutput(known.hidden.to(dtype), tuple(feature.to(dtype) for feature in known.features))

    def added(
        self, terms: LossTerms, output: TrunkOutput | None, batch: dict[str, Tensor], counts: Int[Tensor, " N"] | None
    ) -> LossTerms:
        """Add their losses to that of the horizons.

        Args:
            terms: Of the horizons.
            output: The trunk's states; not needed where there are no objectives.
            batch: The batch.
            counts: Targets of each horizon, and then examples of each objective, in the whole optimizer step; only
                those of the batch if ``None``.
        """
        if output is None or not self.all:
            return terms
        text, found = AuxiliaryText.of(batch, self.lookahead), {}
        own = [None] * len(self.all) if counts is None else counts[-len(self.all) :]
        for objective, count in zip(self.all, own, strict=True):
            found[objective.name] = objective(output, text, count=count)
        loss = torch.stack([terms.loss, *(each.loss.to(terms.loss.dtype) for each in found.values())]).sum()
        return replace(terms, loss=loss, auxiliary=found)


def prepare_objectives(module: Any, data: object) -> None:
    """Tell auxiliary objectives how often each token occurs in the training data, and its text, if any asks.

    The command ``fit`` does this before training; a script of your own calls it before ``Trainer.fit``.

    Args:
        module: An :class:`~mtp_modules.training.MTPModule`, changed in place.
        data: The data module.

    Raises:
        ValueError: If the tokens of the data cannot be counted, or have no texts.
    """
    counting = [objective for objective in module.objectives if objective.reads_frequencies]
    reading = [objective for objective in module.objectives if objective.reads_vocabulary]
    for asking, needs, setter in ((counting, "frequencies", "set_frequencies"), (reading, "texts", "set_vocabulary")):
        if asking and not isinstance(data, TokenDataModule):
            refuse(
                asking[0],
                f"needs the {needs} of tokens, but the data is no TokenDataModule that has them; call {setter}(...).",
            )
    if not isinstance(data, TokenDataModule) or not (counting or reading):
        return
    data.prepare_data()
    data.setup("fit")
    if counting:
        rows = data.rows("train")
        assert rows is not None
        counts = token_counts(rows, module.vocab_size)
        for objective in counting:
            objective.set_frequencies(counts)
    if reading:
        tokenizer = getattr(data, "tokenizer", None)
        if not isinstance(tokenizer, Tokenizer):
            refuse(reading[0], "needs the texts of tokens, but the data has no tokenizer; call set_vocabulary(texts).")
        known = min(module.vocab_size, tokenizer.vocab_size)
        texts = [tokenizer.decode([token]) for token in range(known)] + [""] * (module.vocab_size - known)
        for objective in reading:
            objective.set_vocabulary(texts)
