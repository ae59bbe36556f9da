"""Where drafts come from: the model's heads, the text itself, or both."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.component import Component
from mtp_modules.core.drafts import one_hot
from mtp_modules.core.interfaces import DecodingState, Heads
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.decoders.drafting.policies import DepthChooser
from mtp_modules.decoders.verification.verifier import Drawing


class Proposal(NamedTuple):
    """Drafts of a round.

    Attributes:
        tokens: ``(B, K)``.
        source: ``(B, K, V)``, the very laws that they were drawn from, float64; ``None`` in greedy decoding, if nobody
            wants to keep them.
        limits: ``(B,)``, how many drafts of each row count.
    """

    tokens: Int[Tensor, "B K"]
    source: Float[Tensor, "B K V"] | None
    limits: Int[Tensor, " B"]


class Found(NamedTuple):
    """What a text offers as drafts.

    Attributes:
        tokens: ``(B, K)``.
        counts: ``(B,)``, how many of them there are.
    """

    tokens: Int[Tensor, "B K"]
    counts: Int[Tensor, " B"]

    def instead_of(
        self, drafts: Int[Tensor, "B K"], limits: Int[Tensor, " B"], source: Float[Tensor, "B K V"] | None = None
    ) -> tuple[Int[Tensor, "B K"], Int[Tensor, " B"], Float[Tensor, "B K V"] | None]:
        """Return these drafts, how many count, and their laws, in rows that have any; others keep theirs.

        Args:
            drafts: Of the heads.
            limits: How many drafts of each row may count.
            source: The laws that the heads' were drawn from, if they were drawn.
        """
        there, width = self.counts > 0, drafts.shape[1]
        tokens = torch.where(there[:, None], self.tokens[:, :width], drafts)
        if source is not None:
            source = torch.where(there[:, None, None], one_hot(tokens, source.shape[2]).double(), source)
        return tokens, torch.where(there, torch.minimum(limits, self.counts).clamp(max=width), limits), source


class DraftChoice:
    """Chooses one draft after the other from a head's logits, as the sampling laws and the acceptance ask.

    On a CPU drafting ends once no row wants another draft; elsewhere drafts that nobody wants do not count.

    Args:
        limits: Most drafts of each row.
        drawing: What they are drawn with; ``None`` chooses the likeliest token.
        chooser: The policy's.
        return_distributions: Also keep the laws at temperature 1 where the likeliest token is chosen.
    """

    def __init__(
        self,
        limits: Int[Tensor, " B"],
        drawing: Drawing | None,
        chooser: DepthChooser,
        *,
        return_distributions: bool = False,
    ) -> None:
        self.limits, self.drawing, self.chooser, self.return_distributions = (
            limits,
            drawing,
            chooser,
            return_distributions,
        )
        self.tokens: list[Int[Tensor, " B"]] = []
        self.sources: list[Float[Tensor, "B V"]] = []
        self.done = False
        self._confidence = torch.ones_like(limits, dtype=torch.float64)
        self._going = limits > 0
        self._looks = limits.device.type == "cpu"  # a GPU would have to be waited for, which takes longer than drafts
        self._emitted = None if drawing is None or drawing.history is None else drawing.history.emitted

    def __call__(self, logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
        """Choose the next draft of every row.

        Args:
            logits: What the head says of it.
        """
        depth = len(self.tokens)
        law = None
        if self.drawing is None:
            token = logits.argmax(dim=-1)
            if self.return_distributions:
                self.sources.append(logits.double().softmax(dim=-1))
        else:
            emitted = None if self._emitted is None else self._emitted[:, None]
            law = self.drawing.law(logits[:, None], emitted)[:, 0]
            token = self.drawing.acceptance.choose(law, depth, self.drawing.noise)
            self.sources.append(law)
            if self._emitted is not None:
                self._emitted = self._emitted + one_hot(token, self._emitted.shape[1])
        self.tokens.append(token)
        if self.chooser.watches:
            self._watch(logits, law, token, depth)
        return token

    def _watch(self, logits: Tensor, law: Tensor | None, token: Tensor, depth: int) -> None:
        """Let the policy end rows by what has been drafted up to here; the token it has looked at stays."""
        law = logits.double().softmax(dim=-1) if law is None else law
        self._confidence = self._confidence * law.gather(1, token[:, None])[:, 0]
        goes_on = self._going & self.chooser.goes_on(self._confidence)
        self.limits = torch.where(self._going & ~goes_on, self.limits.clamp(max=depth + 1), self.limits)
        self._going = goes_on & (self.limits > depth + 1)
        if self._looks:
            self.done = not bool(self._going.any())

    def proposal(self) -> Proposal:
        """Return what was chosen."""
        tokens = torch.stack(self.tokens, dim=1)
        source = torch.stack(self.sources, dim=1) if self.sources else None
        return Proposal(tokens, source, self.limits.clamp(max=tokens.shape[1]))


class Drafter(Component, ABC):
    """Proposes tokens.

    Attributes:
        uses_heads: Whether the model's heads draft, and so must remember what they have read.
        reads_text: Whether it looks at the text of the rows.
        in_one_graph: Whether greedy drafts are the heads' own, but where :meth:`offered` has some, so that a compiled
            round makes them.
    """

    uses_heads: bool = True
    reads_text: bool = False
    in_one_graph: bool = False

    @abstractmethod
    def most(self, heads: Heads) -> tuple[int, int | None]:
        """Return how many drafts are usual, and how many are possible (``None``: any number).

        Args:
            heads: Of the model.
        """

    @abstractmethod
    def propose(
        self,
        token: Int[Tensor, " B"],
        choice: DraftChoice,
        num_drafts: int,
        *,
        from_heads: Callable[[DraftChoice, int], None],
        text: "Text | None",
    ) -> Proposal:
        """Return the drafts of a round.

        Args:
            token: The token that each row emitted last.
            choice: Chooses from logits.
            num_drafts: Most drafts.
            from_heads: Lets the model's heads draft.
            text: What the rows have read and emitted, if the drafter asked for it.
        """

    def offered(self, text: "Text", num_drafts: int) -> Found | None:
        """Return drafts that go before those of the heads; ``None`` if there never are any.

        Args:
            text: What the rows have read and emitted.
            num_drafts: Most drafts.
        """
        return None


class HeadsDrafter(Drafter):
    """Let the model's own heads draft."""

    in_one_graph = True

    def most(self, heads: Heads) -> tuple[int, int | None]:
        """Return how many tokens the horizons reach beyond the first, and how far the heads can be repeated."""
        return max(heads.horizons) - 1, heads.max_drafts

    def propose(
        self,
        token: Int[Tensor, " B"],
        choice: DraftChoice,
        num_drafts: int,
        *,
        from_heads: Callable[[DraftChoice, int], None],
        text: "Text | None",
    ) -> Proposal:
        """Return what the heads draft."""
        from_heads(choice, num_drafts)
        return choice.proposal()


class Text:
    """The tokens of all rows, prompts included.

    Args:
        batch_size: Number ``B`` of rows.
        capacity: Most tokens of a row.
        device: Where they live.
    """

    def __init__(self, batch_size: int, capacity: int, device: torch.device) -> None:
        self.tokens = torch.full((batch_size, capacity + 1), -1, device=device)  # the last takes what does not count
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)

    def append(self, tokens: Int[Tensor, "B C"], counts: Int[Tensor, " B"]) -> None:
        """Write the first ``counts[b]`` of the tokens behind row ``b``.

        Args:
            tokens: New tokens.
            counts: How many of them count.
        """
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        places = torch.where(offsets < counts[:, None], self.lengths[:, None] + offsets, self.tokens.shape[1] - 1)
        self.tokens.scatter_(1, places, tokens)
        self.lengths = self.lengths + counts

    def select(self, rows: list[int]) -> None:
        """Go on with some of the rows only.

        Args:
            rows: Which, in their new order.
        """
        self.tokens, self.lengths = self.tokens[rows], self.lengths[rows]

    def continuation(self, longest: int, shortest: int, num_drafts: int) -> Found:
        """Return what followed the longest run of last tokens that stood before, where it did so latest.

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
        return Found(self.tokens.gather(1, follow).clamp(min=0), counts[:, 0])


def heads_draft(
    heads: Heads,
    state: DecodingState,
    token: Int[Tensor, " B"],
    embed: Callable[[Tensor], Tensor],
    unembed: Callable[[Tensor, int], Tensor],
) -> Callable[[DraftChoice, int], None]:
    """Return the call by which a drafter lets the heads draft.

    Args:
        heads: Of the model.
        state: Their state.
        token: The token that each row emitted last.
        embed: Embeds token ids.
        unembed: Turns states into logits.
    """

    def draft(choice: DraftChoice, num_drafts: int) -> None:
        heads.draft(token, state, num_drafts=num_drafts, embed=embed, unembed=unembed, choose=choice)

    return draft
