"""The tokens of all rows, where drafts are looked up."""

from typing import NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.drafts import Draft, one_hot
from mtp_modules.core.shapes import Int, Tensor


class LookedUp(NamedTuple):
    """Drafts from the text.

    Attributes:
        tokens: ``(B, K)``.
        counts: ``(B,)``, how many of them there are.
    """

    tokens: Int[Tensor, "B K"]
    counts: Int[Tensor, " B"]

    def rows_filled(self) -> int | None:
        """Return how many rows have drafts; ``None`` on a GPU, which would have to be waited for."""
        return int((self.counts > 0).sum()) if self.counts.device.type == "cpu" else None

    def or_else(self, other: Draft, limits: Int[Tensor, " B"], *, ended: bool) -> Draft:
        """Return these drafts in rows that have any; other rows keep theirs.

        What a row gets does not depend on how many drafts its neighbours have.

        Args:
            other: Drafts of the heads.
            limits: How many drafts of each row may count.
            ended: Whether the policy has ended the heads' drafting early, on a CPU: no row's drafts then need more
                places than there are.
        """
        there = self.counts > 0
        counts = torch.where(
            there, torch.minimum(limits, self.counts), limits if other.counts is None else other.counts
        )
        width = self.tokens.shape[1]
        if ended:
            width = max(other.tokens.shape[1], int(counts.max()))
        missing = width - other.tokens.shape[1]
        tokens = torch.where(there[:, None], self.tokens[:, :width], F.pad(other.tokens, (0, missing)))
        probs = other.probs
        if probs is not None:
            padded = F.pad(probs, (0, 0, 0, missing))
            probs = torch.where(there[:, None, None], one_hot(tokens, probs.shape[2]).double(), padded)
        return Draft(tokens, probs=probs, counts=counts)


class Text:
    """The tokens of all rows, prompts included.

    Args:
        batch_size: Number ``B`` of rows.
        capacity: Tokens of a row that there is room for at first; more is made as rows get longer.
        device: Where they live.
    """

    def __init__(self, batch_size: int, capacity: int, device: torch.device) -> None:
        self.tokens = torch.full((batch_size, capacity + 1), -1, device=device)  # the last takes what does not count
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self._most = 0  # no row is longer; kept on the CPU

    def append(self, tokens: Int[Tensor, "B C"], counts: Int[Tensor, " B"]) -> None:
        """Write the first ``counts[b]`` of the tokens behind row ``b``."""
        self._most += tokens.shape[1]
        if self._most >= self.tokens.shape[1]:
            self._most = int(self.lengths.max()) + tokens.shape[1]
            room = max(0, 2 * self._most - self.tokens.shape[1])
            self.tokens = F.pad(self.tokens, (0, room), value=-1)
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        places = torch.where(offsets < counts[:, None], self.lengths[:, None] + offsets, self.tokens.shape[1] - 1)
        self.tokens.scatter_(1, places, tokens)
        self.lengths = self.lengths + counts

    def select(self, rows: list[int]) -> None:
        """Go on with some of the rows only."""
        self.tokens, self.lengths = self.tokens[rows], self.lengths[rows]

    def continuation(self, longest: int, shortest: int, num_drafts: int) -> LookedUp:
        """Return what followed the longest earlier match of the last tokens; of several, the latest.

        Args:
            longest: How many tokens may match; more do not count.
            shortest: How many must match.
            num_drafts: Most tokens to return.
        """
        device, end = self.tokens.device, self.lengths[:, None]
        padded = F.pad(self.tokens, (longest, 0), value=-2)
        before = padded.unfold(1, longest, 1)[:, :-1]  # (B, T, longest): the tokens before each place
        tail = padded.gather(1, end + torch.arange(longest, device=device))
        matched = (before == tail[:, None]).flip(2).cumprod(dim=2).sum(dim=2)
        places = torch.arange(before.shape[1], device=device)
        matched = torch.where((matched >= shortest) & (places < end), matched, 0)
        best = (matched * len(places) + places).argmax(dim=1, keepdim=True)
        follow = (best + torch.arange(num_drafts, device=device)).clamp(max=len(places) - 1)
        counts = torch.where(matched.gather(1, best) > 0, (end - best).clamp(max=num_drafts), 0)
        return LookedUp(self.tokens.gather(1, follow).clamp(min=0), counts[:, 0])
