"""A model whose decoding steps are recorded once, and replayed."""

from collections.abc import Callable, Collection
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, finalize, ref

import torch

from mtp_modules.core.checks import at_least
from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Tensor
from mtp_modules.core.state import bucket_of
from mtp_modules.decoders.generation import DecodableModel
from mtp_modules.decoders.graphs import GraphModel
from mtp_modules.decoders.replays import Replays


def record_for_decoding(
    model: DecodableModel,
    *,
    batch_sizes: Collection[int] = (1,),
    prompt_sizes: Collection[int] = (),
    capacity: int = 256,
) -> "RecordedModel":
    """Return the model for decoders with its rounds recorded; the output is the same, up to rounding.

    The kernels of a round are written down when a round of its kind is first run, and from then on launched without the
    Python between them: as a CUDA graph on a GPU, one call after the other elsewhere. No compiler is needed, but a
    recording takes the time of some rounds. Attention looks at 64, 96, 128, 192 and so on slots, with a mask for
    those beyond each row's length, and each of these sizes is recorded.

    The same rounds as with :func:`~mtp_modules.decoders.compile_for_decoding` become one recording, and of the others
    reading and scoring; larger batches go through the model as it is, and so do prompts, unless there are sizes for
    them. Weights may change in place, but not the settings of modules.

    Args:
        model: Not changed. The result shares its weights.
        batch_sizes: Numbers of rows to record for, such as ``(1, 4, 16)``. A batch of fewer is filled up to the next of
            them; a larger one goes through the model as it is, until enough of its rows have ended.
        prompt_sizes: Numbers of positions to record the reading of prompts for, as with
            :func:`~mtp_modules.decoders.compile_for_decoding`.
        capacity: Most tokens of a row, prompt and drafts included, that keys and values are kept for. It grows when a
            text needs more, to the next power of 2, and then everything is recorded anew.

    Raises:
        ValueError: If a size or the capacity is below 1, the trunk or the heads cannot be recorded, or the model
            is shared out over several processes; when decoding, if weights are no longer where they were, or a round
            takes numbers to the host.
    """
    return RecordedModel(model, batch_sizes=batch_sizes, prompt_sizes=prompt_sizes, capacity=capacity)


class _Set:
    """Recordings, and the states that they read and write, which one run has at a time."""

    def __init__(self, device: torch.device) -> None:
        self.replays = Replays(device)
        self.pairs: dict[tuple[int, bool], tuple[DecodingState, DecodingState]] = {}
        self.states: dict[tuple[int, bool], list[tuple[DecodingState, dict[str, Any]]]] = {}
        self.failed = False


def _give_back(free: list[_Set], used: _Set) -> None:
    if not used.failed:
        free.append(used)


class RecordedModel(GraphModel):
    """A model for decoders whose rounds are recorded; made by :func:`record_for_decoding`.

    It shares the weights of the model that it was made from. What recordings read and write is kept for the next run.
    Several runs at once have recordings of their own, each of which is made and kept.

    Args:
        model: Trunk, heads and unembedding.
        batch_sizes: Numbers of rows that are recorded.
        prompt_sizes: How many tokens of prompts are read at once by recordings.
        capacity: Most tokens of a row, to begin with.
    """

    maker, done = "record_for_decoding", "recorded"

    def __init__(
        self, model: DecodableModel, *, batch_sizes: Collection[int], prompt_sizes: Collection[int], capacity: int
    ) -> None:
        super().__init__(model, batch_sizes=batch_sizes, prompt_sizes=prompt_sizes)
        at_least(self.maker, "capacity", capacity, 1)
        self.capacity = 1 << (capacity - 1).bit_length()
        self._sets: WeakKeyDictionary[DecodingState, ReferenceType[_Set]] = WeakKeyDictionary()  # which hold the keys
        self._free: list[_Set] = []

    def _graphs_of(self, function: Callable[..., Tensor], *, many_positions: bool = False) -> Callable[..., Tensor]:
        @torch.inference_mode()
        def call(trunk_state: DecodingState, *inputs: object) -> Tensor:
            return self._set_of(trunk_state).replays(function, trunk_state, *inputs)

        return call

    def _set_of(self, trunk_state: DecodingState) -> _Set:
        found = self._sets[trunk_state]()
        assert found is not None  # it is with the run, or among the free ones
        return found

    def new_states(
        self, owner: object, rows: int, capacity: int, *, for_drafts: bool
    ) -> tuple[DecodingState, DecodingState]:
        """Return empty states, those of a run that is over if there are any.

        Recordings are made for one capacity. When a run needs more, all of them are useless.

        Args:
            owner: The run that they are for, as long as there is somebody who knows it.
            rows: How many.
            capacity: How many tokens a row needs.
            for_drafts: Whether the heads will draft.
        """
        self.make_room(capacity)
        used = self._free.pop() if self._free else _Set(self.unembedding.weight.device)
        finalize(owner, _give_back, self._free, used).atexit = False
        kind = rows, for_drafts
        if kind in used.states:
            for state, attributes in used.states[kind]:
                vars(state).clear()
                vars(state).update(attributes)
        else:
            trunk_state = self.trunk.new_state(rows, self.capacity)
            heads_state = self.heads.new_state(rows, self.capacity, for_drafts=for_drafts)
            for state in (trunk_state, heads_state):
                state.expect_graphs(same_sizes=True)
            used.states[kind] = used.replays.adopt(trunk_state, heads_state)
            used.pairs[kind] = trunk_state, heads_state
            self._sets[trunk_state] = ref(used)
        return used.pairs[kind]

    def give_up(self, trunk_state: DecodingState) -> None:
        """Let no other run have the states of one that has failed.

        Args:
            trunk_state: The trunk's.
        """
        self._set_of(trunk_state).failed = True

    def make_room(self, capacity: int) -> None:
        """Keep so many tokens a row from now on, if it was fewer.

        Args:
            capacity: How many.
        """
        if capacity > self.capacity:
            self.capacity = 1 << (capacity - 1).bit_length()
            self._free = []  # what is in use comes back to the list that is given up here

    def lengths_of_graphs(self, longest: int) -> list[int]:
        """Return how many slots attention looks at, but the last.

        Args:
            longest: Up to this length of a text.
        """
        sizes = [bucket_of(1)]
        while sizes[-1] < longest:
            sizes.append(bucket_of(sizes[-1] + 1))
        return sizes[:-1]

    def _version(self, weight: Tensor) -> tuple[object, ...]:
        return (weight.data_ptr(),)
