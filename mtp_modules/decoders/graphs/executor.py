"""Models for decoders whose rounds are graphs, made beforehand by one means or another."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection

import torch
from torch import nn

from mtp_modules.core.checks import at_least, is_distributed, refuse
from mtp_modules.core.interfaces import DecodingState, Heads, Trunk
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import at_positions
from mtp_modules.decoders.drafting.drafter import DraftChoice, Found, heads_draft
from mtp_modules.decoders.drafting.policies import DepthChooser
from mtp_modules.decoders.generation import DecodableModel
from mtp_modules.decoders.sampling.noise import gumbels
from mtp_modules.decoders.transfer import told_of_round
from mtp_modules.decoders.verification.functional import greedy_round
from mtp_modules.decoders.verification.verifier import Drawing


class GraphModel(ABC):
    """A model for decoders whose rounds run as graphs. It shares the weights of the model that it was made from.

    Args:
        model: Trunk, heads and unembedding.
        batch_sizes: Numbers of rows that graphs are used for.
        prompt_sizes: How many tokens of prompts are read at once by graphs.

    Attributes:
        maker: The function that makes such a model, for what users are told.
        done: What it does to a model.

    Raises:
        ValueError: If a size is below 1, the trunk or the heads have no step that is tensor operations alone, or the
            model is shared out over several processes.
    """

    maker: str
    done: str

    def __init__(self, model: DecodableModel, *, batch_sizes: Collection[int], prompt_sizes: Collection[int]) -> None:
        for name, sizes in (("batch_sizes", batch_sizes), ("prompt_sizes", prompt_sizes)):
            for size in sizes:
                at_least(self.maker, name, size, 1)
        for part, base in ((model.trunk, Trunk), (model.heads, Heads)):
            if type(part).read is base.read:
                refuse(
                    part, f"has no read(...), so it cannot be {self.done} for decoding; decode with the model itself."
                )
        if is_distributed(model.unembedding.weight):
            refuse(self.maker, "the model is shared out over several processes; decode with the model itself.")
        self.trunk, self.heads, self.unembedding = model.trunk, model.heads, model.unembedding
        self.batch_sizes, self.prompt_sizes = frozenset(batch_sizes), frozenset(prompt_sizes)
        self._read, self._round = self._graphs_of(self._reading), self._graphs_of(self._whole)
        self._prompt = self._graphs_of(self._reading_prompt, many_positions=True)
        self._made_for = self._weights()

    @abstractmethod
    def _graphs_of(self, function: Callable[..., Tensor], *, many_positions: bool = False) -> Callable[..., Tensor]:
        """Return what gives the same as a function of tensors and of objects that hold some, by graphs.

        Args:
            function: Which.
            many_positions: Whether there are so many positions that computing takes longer than fetching the weights.
        """

    @abstractmethod
    def _version(self, weight: Tensor) -> tuple[object, ...]:
        """Return what graphs rely on of a weight, besides its shape, dtype and device."""

    def new_states(
        self, owner: object, rows: int, capacity: int, *, for_drafts: bool
    ) -> tuple[DecodingState, DecodingState]:
        """Return empty states of trunk and heads that know of graphs.

        Args:
            owner: The run that they are for, as long as there is somebody who knows it.
            rows: How many.
            capacity: How many tokens a row needs.
            for_drafts: Whether the heads will draft.
        """
        trunk_state = self.trunk.new_state(rows, capacity)
        heads_state = self.heads.new_state(rows, capacity, for_drafts=for_drafts)
        for state in (trunk_state, heads_state):
            state.expect_graphs()
        return trunk_state, heads_state

    def make_room(self, capacity: int) -> None:
        """Learn how many tokens a row will need, if graphs are made for that.

        Args:
            capacity: How many.
        """
        return

    def give_up(self, trunk_state: DecodingState) -> None:
        """Learn that a run has failed, so that nobody knows what its states hold.

        Args:
            trunk_state: The trunk's.
        """
        return

    def _announce(self, chunk: int, *states: DecodingState) -> None:
        """Tell states of a chunk."""
        for state in states:
            state.begin(chunk)

    def _prepare(self, drawing: Drawing) -> None:
        """Make what a graph cannot make itself."""
        return

    def lengths_of_graphs(self, longest: int) -> list[int]:
        """Return the lengths of texts from which on other graphs are used.

        Args:
            longest: Up to this length.
        """
        return []

    @property
    def gumbels(self) -> Callable[..., Tensor]:
        """What :func:`mtp_modules.decoders.sampling.noise.gumbels` is."""
        return gumbels

    def check(self) -> None:
        """Refuse to decode with weights that are not those of the graphs.

        Raises:
            ValueError: If they have changed.
        """
        now = self._weights()
        for name, found in now.items():
            if self._made_for.get(name) != found:
                self._refuse_weights(name)

    def _refuse_weights(self, name: str) -> None:
        refuse(
            self.maker,
            f"{name} has another shape, dtype, device, memory or mode since the model was {self.done}; "
            f"call {self.maker}(model) again.",
        )

    def _weights(self) -> dict[str, tuple[object, ...]]:
        """Return what graphs rely on, of every part and weight."""
        found: dict[str, tuple[object, ...]] = {}
        for name in ("trunk", "heads", "unembedding"):
            part: nn.Module = getattr(self, name)
            found[name] = tuple(module.training for module in part.modules())
            for key, weight in (*part.named_parameters(), *part.named_buffers()):
                version = self._version(weight)
                found[f"{name}.{key}"] = weight.shape, weight.stride(), weight.dtype, weight.device, *version
        return found

    def size_for(self, rows: int) -> int:
        """Return the smallest batch that there are graphs for and that holds so many rows; just those if there is none.

        Args:
            rows: How many.
        """
        return min((size for size in self.batch_sizes if size >= rows), default=rows)

    def prompt_pieces(self, length: int) -> list[int]:
        """Return how many tokens of prompts each graph reads; what is left of them goes through the model as it is.

        The last piece may be filled up, if it is by less than as many tokens as it holds.

        Args:
            length: Of the longest prompt.

        Example:
            With graphs for 16 and 64 tokens, 100 are read as 64 and, filled up, 64; and 20 as 16, with 4 left.
        """
        pieces: list[int] = []
        while length > 0:
            holding = [size for size in self.prompt_sizes if length <= size < 2 * length]
            fitting = [size for size in self.prompt_sizes if size < length]
            if not holding and not fitting:
                break
            pieces.append(min(holding) if holding else max(fitting))
            length -= pieces[-1]
        return pieces

    def read_prompt(
        self, piece: Int[Tensor, "B C"], last: Int[Tensor, " B"], trunk_state: DecodingState, heads_state: DecodingState
    ) -> Float[Tensor, "B 1 V"]:
        """Append a piece of the prompts to both states, and return horizon 1's logits at one place of each row.

        Args:
            piece: Tokens, as many as there is a graph for.
            last: The place.
            trunk_state: Committed.
            heads_state: Committed.
        """
        self._announce(piece.shape[1], trunk_state, heads_state)
        piece = piece.clone(memory_format=torch.contiguous_format)  # graphs are for one layout of it
        return self._prompt(trunk_state, heads_state, piece, last)

    def read(
        self, chunk: Int[Tensor, "B C"], trunk_state: DecodingState, heads_state: DecodingState
    ) -> Float[Tensor, "B C V"]:
        """Append a chunk to both states, and return horizon 1's logits.

        Args:
            chunk: Tokens.
            trunk_state: Committed.
            heads_state: Committed.
        """
        self._announce(chunk.shape[1], trunk_state, heads_state)
        return self._read(trunk_state, heads_state, chunk)

    def round(
        self,
        token: Int[Tensor, " B"],
        limits: Int[Tensor, " B"],
        num_drafts: int,
        trunk_state: DecodingState,
        heads_state: DecodingState,
        found: Found | None = None,
        drawing: Drawing | None = None,
    ) -> Int[Tensor, "B M"]:
        """Draft with the heads, and verify: a whole round.

        Args:
            token: The token that each row emitted last.
            limits: How many drafts of each row count.
            num_drafts: How many to make.
            trunk_state: Committed.
            heads_state: Committed.
            found: Drafts that go before those of the heads.
            drawing: What drafts and tokens are drawn with; ``None`` chooses the likeliest.

        Returns:
            What :func:`~mtp_modules.decoders.transfer.told_of_round` says.
        """
        heads_state.settle()
        if drawing is not None:
            self._prepare(drawing)
        self._announce(1 + num_drafts, trunk_state, heads_state)
        return self._round(trunk_state, heads_state, token, limits, num_drafts, found, drawing)

    def _states(self, trunk_state: DecodingState, heads_state: DecodingState, chunk: Tensor) -> Tensor:
        output = self.trunk.read(chunk, trunk_state)
        given = self.heads.features_of(output)
        return self.heads.read(output.hidden, heads_state, tokens=chunk, embed=self.trunk.embedding, **given)

    def _reading(self, trunk_state: DecodingState, heads_state: DecodingState, chunk: Tensor) -> Tensor:
        return self.unembedding.logits(self._states(trunk_state, heads_state, chunk))

    def _reading_prompt(
        self, trunk_state: DecodingState, heads_state: DecodingState, piece: Tensor, last: Tensor
    ) -> Tensor:
        states = self._states(trunk_state, heads_state, piece)
        return self.unembedding.logits(at_positions(states, last[:, None]))

    def _whole(
        self,
        trunk_state: DecodingState,
        heads_state: DecodingState,
        token: Tensor,
        limits: Tensor,
        num_drafts: int,
        found: Found | None,
        drawing: Drawing | None,
    ) -> Tensor:
        drafts, source = token[:, None][:, :0], None
        if num_drafts:
            choice = DraftChoice(limits, drawing, DepthChooser(num_drafts))
            heads_draft(self.heads, heads_state, token, self.trunk.embedding, self.unembedding.logits)(
                choice, num_drafts
            )
            drafts, source, limits = choice.proposal()
            if found is not None:
                drafts, limits, source = found.instead_of(drafts, limits, source)
        logits = self._reading(trunk_state, heads_state, torch.cat((token[:, None], drafts), dim=1))
        if drawing is None:
            tokens, accepted = greedy_round(drafts, limits, logits)
        else:
            tokens, accepted, _ = drawing.verify(drafts, source, limits, logits)
        return told_of_round(tokens, accepted, limits, logits)
