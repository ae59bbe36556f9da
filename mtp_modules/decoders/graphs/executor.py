"""How the decoding loop runs a model: the one interface that it knows."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from mtp_modules.core.drafts import Draft
from mtp_modules.core.interfaces import DecodingState, Heads, Trunk
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.unembedding import Unembedding
from mtp_modules.decoders.round import RoundInputs, RoundOutputs
from mtp_modules.decoders.sampling.noise import RowNoise


class States:
    """The decoding states of trunk and heads, which hold the same rows and are committed together."""

    def __init__(self, trunk: DecodingState, heads: DecodingState) -> None:
        self.trunk, self.heads = trunk, heads

    @property
    def lengths(self) -> list[int]:
        """Committed tokens of each row."""
        return self.trunk.lengths

    def begin(self, chunk: int) -> None:
        """Announce a chunk to both."""
        self.trunk.begin(chunk)
        self.heads.begin(chunk)

    def expect(self, draft: Draft) -> None:
        """Announce that the next chunk is a tree, if the drafts are one."""
        if draft.parents is not None:
            parents = torch.cat((torch.full_like(draft.parents[:, :1], -1), draft.parents), dim=1)
            self.trunk.expect_tree(parents, draft.depth)
            self.heads.expect_tree(parents, draft.depth)

    def commit(self, keep: list[int], path: Int[Tensor, "B P"] | None = None) -> None:
        """Keep the first tokens of every row's chunk, or of the path in it, and forget the others."""
        self.trunk.commit(keep, path)
        self.heads.commit(keep, path)

    def select(self, rows: list[int]) -> None:
        """Go on with some of the rows only."""
        self.trunk.select(rows)
        self.heads.select(rows)


class Executor(ABC):
    """Runs a model: reads prompts, reads chunks, and runs rounds.

    Attributes:
        trunk: Of the model.
        heads: Of the model.
        unembedding: Of the model.
    """

    trunk: Trunk
    heads: Heads
    unembedding: Unembedding

    @abstractmethod
    def new_states(self, rows: int, capacity: int, *, longest: int, for_drafts: bool) -> States:
        """Make empty states for a run.

        Args:
            rows: How many prompts there are.
            capacity: Most tokens of a row, with the drafts of a round.
            longest: Most tokens of a prompt.
            for_drafts: Whether the heads will draft.

        Raises:
            ValueError: If the model is no longer what it was when the executor was made.
        """

    def batch_size(self, rows: int) -> int:
        """Return how many rows a batch of so many is filled up to."""
        return rows

    def num_drafts(self, useful: int, wanted: int, rows: int) -> int:
        """Return how many drafts to make where fewer are of use than are wanted.

        Args:
            useful: Most that any row can use.
            wanted: What the policy asks for.
            rows: Of the batch.
        """
        return useful

    def prompt_chunks(self, longest: int, rows: int) -> list[int]:
        """Return the sizes of the chunks that prompts are read in; the last one may reach beyond the longest.

        Args:
            longest: Most tokens of a prompt.
            rows: How many prompts there are.
        """
        return [longest]

    def read_prompts(self, prompts: Sequence[Sequence[int]], states: States) -> Float[Tensor, "B 1 V"]:
        """Read all prompts and commit them; return horizon 1's logits after the last token of each.

        Args:
            prompts: Token ids, none empty.
            states: Empty.
        """
        lengths = [len(prompt) for prompt in prompts]
        sizes = self.prompt_chunks(max(lengths), len(prompts))
        tokens = padded(prompts, sum(sizes), self.unembedding.weight.device)
        counts = torch.tensor(lengths, device=tokens.device)
        found: Tensor | None = None
        start = 0
        for size in sizes:
            last = counts - 1 - start
            chunk_logits = self.read_prompt(tokens[:, start : start + size], last.clamp(0, size - 1), states)
            states.commit([min(max(length - start, 0), size) for length in lengths])
            found = chunk_logits if found is None else torch.where((last >= 0)[:, None, None], chunk_logits, found)
            start += size
        assert found is not None
        return found

    @abstractmethod
    def read_prompt(self, chunk: Int[Tensor, "B C"], last: Int[Tensor, " B"], states: States) -> Float[Tensor, "B 1 V"]:
        """Append a chunk of the prompts to the states, and return horizon 1's logits at one place of each row.

        Args:
            chunk: Tokens.
            last: The place.
            states: Committed.
        """

    @abstractmethod
    def read(self, chunk: Int[Tensor, "B C"], draft: Draft, states: States) -> Float[Tensor, "B C V"]:
        """Append a chunk to the states, and return horizon 1's logits.

        Args:
            chunk: The token emitted last, and drafts.
            draft: The drafts, which may be a tree.
            states: Committed.
        """

    @abstractmethod
    def round(self, inputs: RoundInputs, states: States) -> RoundOutputs:
        """Draft, read and verify; the states then wait to be committed.

        Args:
            inputs: What the round starts from.
            states: Committed.
        """

    def noise(self, seeds: Int[Tensor, " B"], positions: Int[Tensor, " B"], most: int) -> RowNoise:
        """Return the random numbers of a round."""
        return RowNoise(seeds, positions, self.trunk.vocab_size, most)


def padded(texts: Sequence[Sequence[int]], width: int, device: torch.device) -> Int[Tensor, "B T"]:
    """Return texts in one tensor, with zeros behind those that are shorter."""
    tokens = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.as_tensor(text)
    return tokens.to(device)
