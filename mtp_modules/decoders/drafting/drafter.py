"""The contract of drafters, what a round gives them, and the drafter that lets the model's own heads draft."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Component
from mtp_modules.core.drafts import Draft, one_hot
from mtp_modules.core.interfaces import DecodingState, Heads, Trunk
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.decoders.drafting.policies import DepthChooser
from mtp_modules.decoders.drafting.text import LookedUp, Text
from mtp_modules.decoders.verification.round_sampler import RoundSampler


class RoundDraftSampler:
    """Samples one draft after the other, as sampling parameters and acceptance rule ask, until the policy ends a row.

    On a CPU drafting ends once no row wants another draft; elsewhere drafts that no row wants do not count.

    Args:
        limits: Most drafts of each row.
        sampler: What they are sampled with; ``None`` takes the argmax.
        chooser: Ends rows by the confidence in their drafts; ``None`` if the policy does not.
        return_probs: In greedy decoding, also return the distributions at temperature 1.
    """

    def __init__(
        self,
        limits: Int[Tensor, " B"],
        sampler: RoundSampler | None,
        chooser: DepthChooser | None,
        *,
        return_probs: bool = False,
    ) -> None:
        self.limits, self.sampler, self.chooser, self.return_probs = limits, sampler, chooser, return_probs
        self.done = False
        self._depth = 0
        self._confidence = torch.ones_like(limits, dtype=torch.float64)
        self._going = limits > 0
        self._emitted = None if sampler is None or sampler.history is None else sampler.history.emitted

    def __call__(
        self, logits: Float[Tensor, "B V"], confidence: Float[Tensor, " B"] | None = None
    ) -> tuple[Int[Tensor, " B"], Float[Tensor, "B V"] | None]:
        """Return the next draft of every row, and the distributions that they were sampled from."""
        chooser = self.chooser
        if chooser is not None and chooser.predicted and confidence is not None:
            self._watch(chooser, confidence, self._depth)  # the draft that is about to be sampled does not count
        if self.sampler is None:
            token = logits.argmax(dim=-1)
            wanted = self.return_probs or (chooser is not None and not chooser.predicted)
            probs = logits.double().softmax(dim=-1) if wanted else None
        else:
            emitted = None if self._emitted is None else self._emitted[:, None]
            probs = self.sampler.probs(logits[:, None], emitted)[:, 0]
            token = self.sampler.acceptance.sample_draft(probs, self._depth, self.sampler.noise)
            if self._emitted is not None:
                self._emitted = self._emitted + one_hot(token, self._emitted.shape[1])
        self._depth += 1
        if probs is not None and chooser is not None and not chooser.predicted:
            self._watch(chooser, probs.gather(1, token[:, None])[:, 0], self._depth)  # the token looked at stays
        return token, None if self.sampler is None and not self.return_probs else probs

    def _watch(self, chooser: DepthChooser, chance: Float[Tensor, " B"], count: int) -> None:
        """Let the policy end rows.

        Args:
            chooser: Of the policy.
            chance: Probability of one more draft.
            count: How many drafts of a row that ends count.
        """
        self._confidence = self._confidence * chance
        goes_on = self._going & chooser.goes_on(self._confidence)
        self.limits = torch.where(self._going & ~goes_on, self.limits.clamp(max=count), self.limits)
        self._going = goes_on & (self.limits > count)
        if self.limits.device.type == "cpu":  # a GPU would have to be waited for, which takes longer than drafts
            self.done = not bool(self._going.any())


@dataclass(frozen=True)
class DraftingContext:
    """What a drafter may use in a round.

    Attributes:
        token: ``(B,)``, the token that each row emitted last.
        num_drafts: Most drafts ``K``.
        num_by_heads: How many of them the heads make, where they do.
        limits: ``(B,)``, how many drafts of each row may count.
        sampler: What tokens are sampled with; ``None`` in greedy decoding.
        chooser: Ends rows by confidence, if the policy does.
        return_probs: Whether drafts must have ``probs`` in greedy decoding too.
        looked_up: What :meth:`Drafter.look_up` has returned.
        heads: The model's heads.
        heads_state: Theirs, committed.
        embed: Embeds token ids.
        unembed: Turns states of a horizon into logits.
        vocab_size: Number ``V`` of token ids.
    """

    token: Int[Tensor, " B"]
    num_drafts: int
    num_by_heads: int
    limits: Int[Tensor, " B"]
    sampler: RoundSampler | None
    chooser: DepthChooser | None
    return_probs: bool
    looked_up: LookedUp | None
    heads: Heads
    heads_state: DecodingState
    embed: Callable[[Tensor], Tensor]
    unembed: Callable[[Tensor, int], Tensor]
    vocab_size: int

    def nothing(self) -> Draft:
        """Return no drafts."""
        return Draft(self.token[:, None][:, :0], counts=self.limits.clamp(max=0))

    def by_heads(self) -> Draft:
        """Let the model's heads draft a chain."""
        sampler = RoundDraftSampler(self.limits, self.sampler, self.chooser, return_probs=self.return_probs)
        draft = self.heads.draft(
            self.token,
            self.heads_state,
            num_drafts=self.num_by_heads,
            embed=self.embed,
            unembed=self.unembed,
            sampler=sampler,
        )
        kept = draft.tokens.shape[1]
        if sampler.done and self.chooser is not None and self.chooser.predicted:
            kept -= 1  # sampled, but left out of every row
        tokens, logits, probs = (
            None if part is None else part[:, :kept] for part in (draft.tokens, draft.logits, draft.probs)
        )
        assert tokens is not None
        return Draft(tokens, logits, probs, sampler.limits.clamp(max=kept))

    def from_text(self, found: LookedUp) -> Draft:
        """Return drafts that no head has made; a sampled token has to match them."""
        sampled = self.sampler is not None or self.return_probs
        probs = one_hot(found.tokens, self.vocab_size).double() if sampled else None
        return Draft(found.tokens, probs=probs, counts=torch.minimum(self.limits, found.counts))


class Drafter(Component, ABC):
    """Proposes tokens that follow the one emitted last.

    Attributes:
        uses_heads: Whether the model's heads draft, and so must remember what they have read.
        reads_text: Whether :meth:`look_up` is asked before every round.
        compilable: Whether :meth:`draft` is tensor operations alone, so that a compiled round can hold it.
    """

    uses_heads: bool = False
    reads_text: bool = False
    compilable: bool = False

    @abstractmethod
    def limits(self, heads: Heads) -> tuple[int, int | None]:
        """Return how many drafts one after the other are usual, and how many are possible (``None``: any number).

        Args:
            heads: Of the model.
        """

    @abstractmethod
    def draft(self, context: DraftingContext) -> Draft:
        """Return the drafts of a round.

        What a row is given must not depend on its neighbours.

        Args:
            context: What there is to draft from.
        """

    def look_up(self, text: Text, num_drafts: int) -> LookedUp | None:
        """Return what the text offers as drafts; called before the round, outside of what is compiled.

        Args:
            text: What the rows have read and emitted.
            num_drafts: Most drafts.
        """
        return None

    def reach(self, num_drafts: int) -> int:
        """Return the most drafts one after the other of a round in which the heads make so many."""
        return num_drafts

    def for_round(self, looked_up: LookedUp, num_drafts: int) -> tuple["Drafter | None", int]:
        """Return who drafts in a round, ``None`` if nobody, and how many tokens, once the text has been asked.

        Called before the round, outside of what is compiled: what the text has filled needs no heads.

        Args:
            looked_up: What :meth:`look_up` has returned.
            num_drafts: Most drafts that the heads make.
        """
        return self, looked_up.tokens.shape[1]

    def parts(self, rows: int, *, on_cpu: bool) -> list["Drafter | None"]:
        """Return all that :meth:`for_round` may return, for which graphs are then made beforehand.

        Args:
            rows: Of the batch.
            on_cpu: Whether what was looked up is on a CPU.
        """
        return [self]

    def chunk_size(self, num_drafts: int) -> int:
        """Return the most drafts that a round verifies: the nodes of a tree, or the links of a chain."""
        return self.reach(num_drafts)

    def check(self, trunk: Trunk, heads: Heads) -> None:
        """Refuse a model that this drafter cannot draft for.

        Args:
            trunk: Of the model.
            heads: Of the model.

        Raises:
            ValueError: If it cannot.
        """
        usual, possible = self.limits(heads)
        if possible is not None and usual > possible:
            refuse(
                self, f"num_drafts={usual} is more than the {possible} that {type(heads).__name__} can draft; lower it."
            )


class HeadsDrafter(Drafter):
    """Let the model's own heads draft a chain."""

    uses_heads = True
    compilable = True

    def limits(self, heads: Heads) -> tuple[int, int | None]:
        """Return how many tokens the horizons reach beyond the first, and how far the heads can be repeated."""
        return max(heads.horizons) - 1, heads.max_drafts

    def draft(self, context: DraftingContext) -> Draft:
        """Return what the heads draft."""
        return context.by_heads()


def number_of_drafts(
    owner: object, wanted: int | None, limits: tuple[int, int | None], heads: Heads, *, instead: str
) -> int:
    """Return how many drafts one after the other to make; raise an error where there are none, or not so many.

    Args:
        owner: Of the error.
        wanted: What a user asks for; the usual number if ``None``.
        limits: The usual and the possible number, see :meth:`Drafter.limits`.
        heads: Of the model.
        instead: What to use where nothing can be drafted.
    """
    usual, possible = limits
    if usual < 1:
        kind = f"{type(heads).__name__} with {len(heads.horizons)} horizon"
        refuse(owner, f"{kind} can draft nothing; use {instead}, or heads with more horizons.")
    if wanted is not None and possible is not None and wanted > possible:
        refuse(
            owner, f"num_drafts={wanted} is more than the {possible} that {type(heads).__name__} can draft; lower it."
        )
    return usual if wanted is None else wanted
