"""Drafts from the text itself: what followed the same tokens before."""

from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.drafts import Draft
from mtp_modules.core.interfaces import Heads
from mtp_modules.decoders.drafting.drafter import Drafter, DraftingContext
from mtp_modules.decoders.drafting.text import LookedUp, Text


class PromptLookup(Drafter):
    """Draft what followed the same tokens earlier in the text. No training, and the baseline of every trained drafter.

    Looks for the last ``longest`` tokens, then for fewer. Saxena 2023 (prompt lookup decoding); Yang et al. 2023 (arXiv
    2304.04487).

    Args:
        num_drafts: How many tokens to draft, if the decoder does not say.
        longest: How many tokens must match at first.
        shortest: How many must match at last.

    Raises:
        ValueError: If a number is below 1, or ``shortest`` above ``longest``.
    """

    reads_text = True

    def __init__(self, *, num_drafts: int = 7, longest: int = 3, shortest: int = 1) -> None:
        num_drafts, shortest = whole(self, "num_drafts", num_drafts, 1), whole(self, "shortest", shortest, 1)
        longest = whole(self, "longest", longest, 1)
        if longest < shortest:
            refuse(self, f"longest must be at least shortest ({shortest}), got {longest}.")
        self.num_drafts, self.longest, self.shortest = num_drafts, longest, shortest

    def limits(self, heads: Heads) -> tuple[int, int | None]:
        """Return ``num_drafts``, and that any number is possible."""
        return self.num_drafts, None

    def look_up(self, text: Text, num_drafts: int) -> LookedUp:
        """Return what followed the same tokens."""
        return text.continuation(self.longest, self.shortest, num_drafts)

    def draft(self, context: DraftingContext) -> Draft:
        """Return what was looked up; nothing to verify where no row has found anything."""
        found = context.looked_up
        assert found is not None
        if found.counts.device.type == "cpu" and not found.counts.any():
            return context.nothing()
        return context.from_text(found)


class LookupOrHeads(Drafter):
    """Draft what followed the same tokens where they stood before, else let the heads draft.

    Args:
        num_drafts: How many tokens to draft, if the decoder does not say; as many as the heads are trained for if
            ``None``.
        longest: How many tokens must match at first.
        shortest: How many must match at last; few match by chance.

    Raises:
        ValueError: If a number is below 1, or ``shortest`` above ``longest``; when decoding, if ``num_drafts`` is more
            than the heads can draft.
    """

    uses_heads = True
    reads_text = True
    compilable = True

    def __init__(self, *, num_drafts: int | None = None, longest: int = 8, shortest: int = 5) -> None:
        self.lookup = PromptLookup(
            num_drafts=1 if num_drafts is None else num_drafts, longest=longest, shortest=shortest
        )
        self.num_drafts = num_drafts

    def limits(self, heads: Heads) -> tuple[int, int | None]:
        """Return what the heads can draft."""
        return max(heads.horizons) - 1 if self.num_drafts is None else self.num_drafts, heads.max_drafts

    def look_up(self, text: Text, num_drafts: int) -> LookedUp:
        """Return what followed the same tokens."""
        return self.lookup.look_up(text, num_drafts)

    def draft(self, context: DraftingContext) -> Draft:
        """Return what followed the same tokens, or what the heads draft."""
        assert context.looked_up is not None
        return context.looked_up.or_else(context.by_heads(), context.limits)
