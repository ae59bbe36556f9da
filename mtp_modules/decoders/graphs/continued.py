"""A conversation: the states of one run are where the next one starts."""

from collections.abc import Sequence
from itertools import takewhile

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.decoders.graphs.eager import EagerExecutor
from mtp_modules.decoders.graphs.executor import States
from mtp_modules.decoders.request import DecodableModel
from mtp_modules.decoders.results import emitted_of
from mtp_modules.decoders.round import RoundInputs, RoundOutputs


class HeldStates(States):
    """States whose last commit waits for the next chunk.

    The tokens that a stop rule cuts off were committed too. While their chunk waits, fewer of them can still be kept.
    """

    def __init__(self, states: States) -> None:
        super().__init__(states.trunk, states.heads)
        self._held: tuple[int, Int[Tensor, "B P"] | None] | None = None

    @property
    def lengths(self) -> list[int]:
        """Committed tokens of each row, those that wait included."""
        return [length + (self._held[0] if self._held else 0) for length in super().lengths]

    def commit(self, keep: list[int], path: Int[Tensor, "B P"] | None = None) -> None:
        """Note what is kept of the chunk."""
        self._held = keep[0], path

    def restart(self, states: States) -> None:
        """Hold empty states instead."""
        self.trunk, self.heads, self._held = states.trunk, states.heads, None

    def settle(self, most: int | None = None) -> None:
        """Commit what waits, or only the first ``most`` tokens of it."""
        if self._held is not None:
            (keep, path), self._held = self._held, None
            keep = keep if most is None else min(keep, most)
            super().commit([keep], path if path is None else path[:, :keep])


class ContinuedExecutor(EagerExecutor):
    """Runs a model for one conversation: a prompt that goes on from the last run's text is not read again.

    One prompt a run. The output is that of the model itself: only what the states hold already is left out.

    Attributes:
        num_reused: Tokens of the last prompt that the states held.
        num_read: Tokens of the last prompt that were read.

    Example:
        >>> from mtp_modules import AutoregressiveDecoder, LinearHeads, MTPModel, RecurrentTrunk
        >>> model = MTPModel(
        ...     trunk=RecurrentTrunk(vocab_size=9, d_model=8), heads=LinearHeads(d_model=8, num_horizons=2)
        ... ).double().eval()
        >>> conversation, decoder = ContinuedExecutor(model), AutoregressiveDecoder()
        >>> first = decoder.generate(conversation, [[1, 2, 3]], max_new_tokens=4).tokens[0]
        >>> second = [1, 2, 3, *first, 5]
        >>> found = decoder.generate(conversation, [second], max_new_tokens=4).tokens
        >>> found == decoder.generate(model, [second], max_new_tokens=4).tokens, conversation.num_read
        (True, 2)
    """

    def __init__(self, model: DecodableModel) -> None:
        super().__init__(model)
        self.num_reused = self.num_read = 0
        self._states: HeldStates | None = None
        self._capacity, self._for_drafts = 0, False
        self._kept: list[int] = []
        self._chunk: list[int] = []

    def new_states(self, rows: int, capacity: int, *, longest: int, for_drafts: bool) -> States:
        """Return the states of the last run, if they are large enough."""
        if rows != 1:
            refuse(self, f"holds one conversation, got {rows} prompts; decode them with the model itself.")
        if self._states is None or capacity > self._capacity or for_drafts != self._for_drafts:
            limit = self.trunk.max_positions
            self._capacity = 2 * capacity if limit is None else max(capacity, min(2 * capacity, limit))
            self._for_drafts, self._kept, self._chunk = for_drafts, [], []
            made = super().new_states(1, self._capacity, longest=longest, for_drafts=for_drafts)
            self._states = HeldStates(made)
        return self._states

    def forget(self) -> None:
        """Start anew, as after a run that was interrupted in the middle of a forward pass."""
        self._states, self._kept, self._chunk = None, [], []

    def read_prompts(self, prompts: Sequence[Sequence[int]], states: States) -> Float[Tensor, "B 1 V"]:
        """Read what of the prompt the states do not hold."""
        assert isinstance(states, HeldStates)
        prompt, kept = list(prompts[0]), self._kept
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip([*kept, *self._chunk], prompt, strict=False))))
        same = min(same, len(prompt) - 1)  # the last token's logits are what decoding starts from
        if same < len(kept):  # another text: what a state has committed it cannot forget
            fresh = super().new_states(1, self._capacity, longest=len(prompt), for_drafts=self._for_drafts)
            states.restart(fresh)
            kept, same = [], 0
        states.settle(same - len(kept))
        self.num_reused, self.num_read = same, len(prompt) - same
        rest = torch.tensor([prompt[same:]], device=self.unembedding.weight.device)
        logits = self.read_prompt(rest, torch.tensor([rest.shape[1] - 1], device=rest.device), states)
        states.commit([rest.shape[1]])
        states.settle()
        self._kept, self._chunk = prompt, []
        return logits

    def round(self, inputs: RoundInputs, states: States) -> RoundOutputs:
        """Draft, read and verify, and note what the states will hold."""
        assert isinstance(states, HeldStates)
        states.settle()
        self._kept += self._chunk
        outputs = super().round(inputs, states)
        tokens, counts = emitted_of(outputs.packed)
        self._chunk = [int(inputs.token[0]), *tokens[0, : int(counts[0]) - 1].tolist()]
        return outputs
