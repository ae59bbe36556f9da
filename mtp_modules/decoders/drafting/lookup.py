"""Drafts from the text itself: what followed the same tokens before."""

from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.drafts import Draft
from mtp_modules.core.interfaces import Heads
from mtp_modules.decoders.drafting.drafter import Drafter, DraftingContext, HeadsDrafter
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
    compilable = True

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

    def for_round(self, looked_up: LookedUp, num_drafts: int) -> tuple[Drafter | None, int]:
        """Return nobody where no row has found anything: a round without drafts."""
        if looked_up.rows_filled() == 0:
            return None, 0
        return super().for_round(looked_up, num_drafts)

    def parts(self, rows: int, *, on_cpu: bool) -> list[Drafter | None]:
        """Return the lookup, and nobody."""
        return [self, None] if on_cpu else [self]

    def draft(self, context: DraftingContext) -> Draft:
        """Return what was looked up."""
        assert context.looked_up is not None
        return context.from_text(context.looked_up)


class LookupOrHeads(Drafter):
    """Draft what followed the same tokens where they stood before, else let the heads draft.

    On a CPU the heads rest in rounds in which every row has found something.

    Args:
        num_drafts: How many tokens the heads draft, if the decoder does not say; as many as they are trained for if
            ``None``.
        longest: How many tokens must match at first.
        shortest: How many must match at last; few match by chance.
        num_lookup: How many tokens to take from the text, where more than the heads draft. They cost nothing but their
            places in the forward pass.

    Raises:
        ValueError: If a number is below 1, or ``shortest`` above ``longest``; when decoding, if ``num_drafts`` is more
            than the heads can draft.
    """

    uses_heads = True
    reads_text = True
    compilable = True

    def __init__(
        self, *, num_drafts: int | None = None, longest: int = 8, shortest: int = 5, num_lookup: int | None = None
    ) -> None:
        self.lookup = PromptLookup(
            num_drafts=1 if num_drafts is None else num_drafts, longest=longest, shortest=shortest
        )
        self.by_heads = HeadsDrafter()
        self.num_lookup = None if num_lookup is None else whole(self, "num_lookup", num_lookup, 1)
        self.num_drafts = num_drafts

    def limits(self, heads: Heads) -> tuple[int, int | None]:
        """Return what the heads can draft."""
        return max(heads.horizons) - 1 if self.num_drafts is None else self.num_drafts, heads.max_drafts

    def look_up(self, text: Text, num_drafts: int) -> LookedUp:
        """Return what followed the same tokens."""
        return self.lookup.look_up(text, num_drafts)

    def reach(self, num_drafts: int) -> int:
        """Return how many tokens are taken from the text; none where the policy wants none."""
        return num_drafts if self.num_lookup is None or not num_drafts else max(num_drafts, self.num_lookup)

    def for_round(self, looked_up: LookedUp, num_drafts: int) -> tuple[Drafter | None, int]:
        """Return the lookup where it has filled every row, and the heads where it has filled none."""
        filled = looked_up.rows_filled()
        if filled == 0:
            return self.by_heads, num_drafts
        if filled == len(looked_up.counts):
            return self.lookup.for_round(looked_up, num_drafts)
        return super().for_round(looked_up, num_drafts)

    def parts(self, rows: int, *, on_cpu: bool) -> list[Drafter | None]:
        """Return the heads, the lookup, and both side by side in the rows of a batch."""
        alone: list[Drafter | None] = [self.by_heads, self.lookup] if on_cpu else []
        return alone if on_cpu and rows == 1 else [*alone, self]

    def draft(self, context: DraftingContext) -> Draft:
        """Return what followed the same tokens, or what the heads draft."""
        assert context.looked_up is not None
        drafts = context.by_heads()
        ended = drafts.tokens.shape[1] < context.num_by_heads
        return context.looked_up.or_else(drafts, context.limits, ended=ended)
