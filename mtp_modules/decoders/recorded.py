"""A model whose decoding steps are recorded once, and replayed."""

from collections.abc import Callable, Collection
from weakref import WeakKeyDictionary, finalize

import torch

from mtp_modules.core.checks import at_least
from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Tensor
from mtp_modules.core.state import bucket_of
from mtp_modules.decoders.generation import DecodableModel
from mtp_modules.decoders.graphs import GraphModel
from mtp_modules.decoders.replays import Replays


def record_for_decoding(
    model: DecodableModel, *, batch_sizes: Collection[int] = (1,), capacity: int = 1024
) -> "RecordedModel":
    """Return the model for decoders with its rounds recorded; the output is the same, up to rounding.

    The kernels of a round are written down when a round of its kind is first run, and from then on launched without the
    Python between them: as a CUDA graph on a GPU, one call after the other elsewhere. No compiler is needed, and a
    recording takes about as long as twenty rounds. Attention looks at 64, 96, 128, 192 and so on slots, with a mask for
    those beyond each row's length, and each of these sizes is recorded.

    The same rounds as with :func:`~mtp_modules.decoders.compile_for_decoding` become one recording, and of the others
    reading and scoring; prompts and larger batches go through the model as it is. Weights may change in place, but not
    the settings of modules.

    Args:
        model: Not changed. The result shares its weights.
        batch_sizes: Numbers of rows to record for, such as ``(1, 4, 16)``. A batch of fewer is filled up to the next of
            them; a larger one goes through the model as it is, until enough of its rows have ended.
        capacity: Most tokens of a row, prompt and drafts included, that keys and values are kept for. It grows when a
            text needs more, to the next power of 2, and then everything is recorded anew.

    Raises:
        ValueError: If a batch size or the capacity is below 1, the trunk or the heads cannot be recorded, or the model
            is shared out over several processes; when decoding, if weights are no longer where they were, or a round
            takes numbers to the host.
    """
    return RecordedModel(model, batch_sizes=batch_sizes, capacity=capacity)


class RecordedModel(GraphModel):
    """A model for decoders whose rounds are recorded; made by :func:`record_for_decoding`.

    It shares the weights of the model that it was made from. What recordings read and write is kept for the next run.
    Several runs at once have recordings of their own, each of which is made and kept.

    Args:
        model: Trunk, heads and unembedding.
        batch_sizes: Numbers of rows that are recorded.
        capacity: Most tokens of a row, to begin with.
    """

    maker, done = "record_for_decoding", "recorded"

    def __init__(self, model: DecodableModel, *, batch_sizes: Collection[int], capacity: int) -> None:
        super().__init__(model, batch_sizes=batch_sizes)
        at_least(self.maker, "capacity", capacity, 1)
        self.capacity = 1 << (capacity - 1).bit_length()
        self._lent: WeakKeyDictionary[DecodingState, Replays] = WeakKeyDictionary()
        self._free: list[Replays] = []

    def _graphs_of(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @torch.inference_mode()
        def call(trunk_state: DecodingState, *inputs: object) -> Tensor:
            return self._replays_of(trunk_state)(function, trunk_state, *inputs)

        return call

    def _replays_of(self, state: DecodingState) -> Replays:
        """Return the recordings that are a run's own until its state is gone."""
        replays = self._lent.get(state)
        if replays is None:
            replays = self._free.pop() if self._free else Replays(self.unembedding.weight.device)
            self._lent[state] = replays
            finalize(state, self._free.append, replays).atexit = False
        return replays

    def capacity_for(self, capacity: int) -> int:
        """Return one number for all runs, as recordings are made for it; a longer one makes those before it useless.

        Args:
            capacity: How many tokens a row needs.
        """
        if capacity > self.capacity:
            self.capacity = 1 << (capacity - 1).bit_length()
            self._free = []  # those that are lent come back to the list that is given up here
        return self.capacity

    def lengths_of_graphs(self, longest: int) -> list[int]:
        """Return how many slots attention looks at, but the last.

        Args:
            longest: Up to this length of a text.
        """
        sizes = [bucket_of(1)]
        while sizes[-1] < longest:
            sizes.append(bucket_of(sizes[-1] + 1))
        return sizes[:-1]

    def expect(self, *states: DecodingState) -> None:
        """Tell the states of a run that sizes should seldom change."""
        for state in states:
            state.expect_graphs(same_sizes=True)

    def _version(self, weight: Tensor) -> tuple[object, ...]:
        return (weight.data_ptr(),)
