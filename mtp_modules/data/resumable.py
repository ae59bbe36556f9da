"""A loader of one's own that a resumed run reads on from the first batch that was not trained on."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mtp_modules.data.loaders import TrainLoader

_EVERY = 16
"""Batches between two looks at the state of a loader, which may be costly; those between are read again."""


class ResumableLoader:
    """Iterate over any loader, and save where the first batch lies that was not trained on.

    The state of a stateful loader (``state_dict`` and ``load_state_dict``, Lightning's protocol) belongs to the last
    batch that was *read*, and more are read than trained on. So states are noted while batches are read; the saved
    place is a noted state, and how many batches to read again from there. Any other loader is read again from its
    beginning, with the random state that its pass began with. That gives the same batches if its order depends on
    nothing else.

    Args:
        loader: Any iterable of batches.

    Attributes:
        yielded: Batches of this pass that were handed on.

    Example:
        >>> loader, again = ResumableLoader("abc"), ResumableLoader("abc")
        >>> next(iter(loader))
        'a'
        >>> again.load_state_dict(loader.state_dict())
        >>> list(again)
        ['b', 'c']
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.yielded = 0
        self._stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._trained: Callable[[], int] = lambda: self.yielded
        self._trained_before = 0
        self._limit = float("inf")
        self._start = 0
        self._noted: deque[tuple[int, Any]] = deque()
        self._random: Tensor | None = None
        self._end: int | None = None
        self._resumed: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # a loader without a length raises Python's own TypeError

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches():
            self.yielded += 1
            yield batch

    def follow(self, trained: Callable[[], int], *, limit: float = float("inf")) -> None:
        """Learn from a trainer which batches have been trained on; without it, those that were yielded.

        :class:`~mtp_modules.training.MTPModule` calls this when training begins. It matters where a trainer reads ahead
        itself, as Lightning does for loaders without a length.

        Args:
            trained: Returns how many batches have been trained on since any fixed time.
            limit: Batches after which the trainer begins the next pass.
        """
        self._trained, self._trained_before, self._limit = trained, trained(), limit

    def batches(self) -> Iterator[Any]:
        """Yield the batches of one pass, from the loaded place on in the first pass after ``load_state_dict``.

        The caller counts in ``yielded`` the batches that it hands on.
        """
        resumed, self._resumed = self._resumed, None
        self.yielded, self._end, self._start = 0, None, 0
        self._trained_before = self._trained()
        place, skipped = 0, 0
        batches: Iterator[Any]
        if resumed is None or resumed["random"] is None:
            self._random = torch.get_rng_state()
            batches = iter(self.loader)
        else:
            self._random, self._start, skipped = resumed["random"], int(resumed["place"]), int(resumed["skip"])
            place = self._start - skipped
            batches = self._as_before(self._random)
        self._noted = deque([(place, self._state())])
        for batch in batches:
            place += 1
            if place > self._start:
                yield batch
            if self._stateful and place % _EVERY == 0:
                self._noted.append((place, self._state()))
        self._end = place

    def _as_before(self, random: Tensor) -> Iterator[Any]:
        """Iterate with the random state of the interrupted pass, and leave that of the run as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(random)
            batches = iter(self.loader)
            first = list(zip(range(1), batches, strict=False))
        for _, batch in first:
            yield batch
        yield from batches

    def _state(self) -> Any:
        return self.loader.state_dict() if self._stateful else None  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the first batch that was not trained on."""
        if isinstance(self.loader, TrainLoader) and self.loader.follows_training:
            return dict(self.loader.state_dict())
        if self._resumed is not None:
            return self._resumed
        place = self._start + self._trained() - self._trained_before
        if not self._noted or place in (self._end, self._limit):  # the next pass begins
            return {"place": 0, "skip": 0, "random": None, "loader": self._state()}
        while len(self._noted) > 1 and self._noted[1][0] <= place:
            self._noted.popleft()
        noted, state = self._noted[0]
        return {"place": place, "skip": place - noted, "random": self._random, "loader": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved place in the next pass.

        Args:
            state_dict: Result of ``state_dict``.
        """
        if isinstance(self.loader, TrainLoader) and self.loader.follows_training:
            self.loader.load_state_dict(state_dict)  # type: ignore[arg-type]
            return
        self._resumed = state_dict
        if self._stateful:
            self.loader.load_state_dict(state_dict["loader"])  # type: ignore[attr-defined]
