"""Drafts from the text itself: what followed the same words before."""

from collections.abc import Callable

import torch

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.drafts import one_hot
from mtp_modules.core.interfaces import Heads
from mtp_modules.core.shapes import Int, Tensor
from mtp_modules.decoders.drafting.drafter import DraftChoice, Drafter, Found, Proposal, Text


class PromptLookup(Drafter):
    """Draft what followed the same words earlier in the text. No training, and the baseline of every trained drafter.

    Looks for the last ``longest`` tokens, then for fewer. Saxena 2023 (prompt lookup decoding); Yang et al. 2023 (arXiv
    2304.04487).

    Args:
        num_drafts: How many tokens to draft, if the decoder does not say.
        longest: How many tokens must match at first.
        shortest: How many must match at last.

    Raises:
        ValueError: If a number is below 1, or ``shortest`` above ``longest``.
    """

    uses_heads = False
    reads_text = True

    def __init__(self, *, num_drafts: int = 7, longest: int = 3, shortest: int = 1) -> None:
        at_least(self, "num_drafts", num_drafts, 1)
        at_least(self, "shortest", shortest, 1)
        if longest < shortest:
            refuse(self, f"longest must be at least shortest ({shortest}), got {longest}.")
        self.num_drafts, self.longest, self.shortest = num_drafts, longest, shortest

    def most(self, heads: Heads) -> tuple[int, int | None]:
        """Return ``num_drafts``, and that any number is possible."""
        return self.num_drafts, None

    def look_up(self, text: Text, num_drafts: int) -> Found:
        """Return what followed the same words.

        Args:
            text: Of the rows.
            num_drafts: Most drafts.
        """
        return text.continuation(self.longest, self.shortest, num_drafts)

    def propose(
        self,
        token: Int[Tensor, " B"],
        choice: DraftChoice,
        num_drafts: int,
        *,
        from_heads: Callable[[DraftChoice, int], None],
        text: Text | None,
    ) -> Proposal:
        """Return what followed the same words."""
        assert text is not None
        tokens, counts = self.look_up(text, num_drafts)
        source = None if choice.drawing is None else one_hot(tokens, choice.drawing.laws.vocab_size).double()
        return Proposal(tokens, source, torch.minimum(choice.limits, counts))


class LookupOrHeads(Drafter):
    """Draft what followed the same words where they stood before, else let the heads draft.

    Args:
        num_drafts: How many tokens to draft, if the decoder does not say; as many as the heads are trained for if
            ``None``.
        longest: How many tokens must match at first.
        shortest: How many must match at last; few match by chance.

    Raises:
        ValueError: If a number is below 1, or ``shortest`` above ``longest``.
    """

    reads_text = True
    in_one_graph = True

    def __init__(self, *, num_drafts: int | None = None, longest: int = 8, shortest: int = 5) -> None:
        self.lookup = PromptLookup(num_drafts=num_drafts or 1, longest=longest, shortest=shortest)
        self.num_drafts = num_drafts

    def most(self, heads: Heads) -> tuple[int, int | None]:
        """Return what the heads can."""
        return self.num_drafts or max(heads.horizons) - 1, heads.max_drafts

    def offered(self, text: Text, num_drafts: int) -> Found:
        """Return what followed the same words.

        Args:
            text: What the rows have read and emitted.
            num_drafts: Most drafts.
        """
        return self.lookup.look_up(text, num_drafts)

    def propose(
        self,
        token: Int[Tensor, " B"],
        choice: DraftChoice,
        num_drafts: int,
        *,
        from_heads: Callable[[DraftChoice, int], None],
        text: Text | None,
    ) -> Proposal:
        """Return what followed the same words, or what the heads draft."""
        assert text is not None
        found, limits = self.offered(text, num_drafts), choice.limits
        from_heads(choice, num_drafts)
        drafted, there = choice.proposal(), found.counts > 0
        tokens, limits, source = found.instead_of(drafted.tokens, limits, drafted.source)
        return Proposal(tokens, source, torch.where(there, limits, drafted.limits))
