"""Functions of tensors, and of objects that hold some, whose kernels are recorded once and replayed from then on."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import torch
from torch.utils._pytree import tree_leaves

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Component
from mtp_modules.core.shapes import Tensor
from mtp_modules.core.state import DecodingState
from mtp_modules.decoders.drawing import Drawing
from mtp_modules.decoders.sampling import History, RowLaws
from mtp_modules.decoders.tape import Recording, record
from mtp_modules.decoders.verification import Acceptance, RowNoise

_NUMBERS = frozenset((int, float))
_LOOKED_INTO = (DecodingState, Drawing, RowLaws, RowNoise, History)


class _Recording(NamedTuple):
    """A recorded call: its result, what computes it again, and the attributes that it leaves in states."""

    result: Tensor
    recorded: Recording
    left: list[tuple[int, str, Any]]


class Replays:
    """Recordings that share the memory of what they read.

    Before a call, every tensor that it can read is moved to a place of its own, once; what a round brings anew is
    copied there. A call with tensors of other sizes, or with other plain values, is recorded anew. The numbers that a
    :class:`~mtp_modules.core.state.DecodingState` keeps on the host do not count as plain values: it has promised that
    they change nothing (``expect_graphs(same_sizes=True)``). A rule of acceptance is the user's, so its tensors stay
    where they are.

    Args:
        device: Where tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.places: dict[Hashable, Tensor] = {}
        self.memory: set[int] = set()
        self.recordings: dict[Hashable, _Recording] = {}

    def __call__(self, function: Callable[..., Tensor], *inputs: object) -> Tensor:
        """Return what the function returns, and leave in the states what it leaves there.

        Args:
            function: Computes a tensor with tensors alone.
            *inputs: Tensors, plain values, and objects that hold some.
        """
        moving = _Moving(self)
        inputs = tuple(moving.move(str(place), value, counts=True) for place, value in enumerate(inputs))
        moving.copy()
        key = (function.__name__, *moving.key)
        recording = self.recordings.get(key)
        if recording is None:
            recording = self.recordings[key] = self._recorded(function, inputs, moving)
        else:
            recording.recorded.replay()
        for index, name, value in recording.left:
            setattr(moving.states[index], name, self._apart(value))
        return recording.result.clone()

    def adopt(self, *states: DecodingState) -> list[tuple[DecodingState, dict[str, Any]]]:
        """Take the tensors of new states for places, where there are none yet, and return what the states are like.

        Args:
            *states: Those that calls will begin with, in this order.
        """
        moving = _Moving(self, adopts=True)
        for place, state in enumerate(states):
            moving.move(str(place), state, counts=False)
        moving.copy()
        return [(state, dict(vars(state))) for state in moving.states]

    def _recorded(self, function: Callable[..., Tensor], inputs: tuple[object, ...], moved: "_Moving") -> _Recording:
        before = [(found, dict(vars(found))) for found in (*moved.states, *moved.others)]

        def from_the_start() -> Tensor:
            for found, attributes in before:
                vars(found).clear()
                vars(found).update(attributes)
            return function(*inputs)

        result, recorded = record(from_the_start, self.device)
        left = [
            (index, name, value)
            for index, state in enumerate(moved.states)
            for name, value in vars(state).items()
            if value is not before[index][1].get(name, self)
        ]
        seen = tree_leaves([value for _, _, value in left])
        if all(value is None or isinstance(value, Tensor | bool | int | float | str) for value in seen):
            recorded.share_memory([result, *(value for value in seen if isinstance(value, Tensor))])
        return _Recording(result, recorded, left)

    def _apart(self, value: Any) -> Any:
        """Return a value with its tensors copied, as the next replay writes over them; but not what is read there."""
        if isinstance(value, Tensor):
            return value if value.untyped_storage()._cdata in self.memory else value.clone()
        if isinstance(value, tuple | list):
            return _like(value, [self._apart(part) for part in value])
        return value


def _like(value: tuple[Any, ...] | list[Any], parts: list[Any]) -> Any:
    """Return a list, a tuple or a named tuple of the same kind with other parts."""
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


class _Moving:
    """One look at all that a call can read."""

    def __init__(self, replays: Replays, *, adopts: bool = False) -> None:
        self.replays, self.adopts = replays, adopts
        self.key: list[Hashable] = []
        self.states: list[DecodingState] = []
        self.others: list[object] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.moved: dict[int, tuple[int, Tensor, Tensor]] = {}
        self.looked_into: dict[int, int] = {}

    def move(self, place: str, value: Any, *, counts: bool) -> Any:
        """Return a value with its tensors in their places; objects are the same, and hold them from now on.

        Args:
            place: Name of where it was found.
            value: Anything.
            counts: Whether numbers count.
        """
        if isinstance(value, Tensor):
            return self._move_tensor(place, value)
        if value is None or isinstance(value, bool | str):
            self.key.append(value)
        elif isinstance(value, int | float):
            if counts:
                self.key.append((type(value), value))
        elif isinstance(value, tuple | list):
            self.key.append(len(value))
            if not counts and _NUMBERS.issuperset(map(type, value)):  # one a row, say
                return value
            parts = [self.move(f"{place}.{index}", part, counts=counts) for index, part in enumerate(value)]
            if any(part is not old for part, old in zip(parts, value, strict=True)):
                return _like(value, parts)
        elif isinstance(value, Acceptance):
            self.key.append(_held(value))
            self.others.append(value)
        elif isinstance(value, _LOOKED_INTO):
            self._look_into(place, value)
        elif not counts and not isinstance(value, torch.device | torch.dtype):
            _refuse_to_follow("a state", value)
        return value

    def _look_into(self, place: str, value: object) -> None:
        if id(value) in self.looked_into:
            self.key.append(self.looked_into[id(value)])
            return
        self.looked_into[id(value)] = len(self.looked_into)
        self.key.append(cast("Hashable", type(value)))
        counts = not isinstance(value, DecodingState)
        if isinstance(value, DecodingState):
            self.states.append(value)
        else:
            self.others.append(value)
        attributes = vars(value)
        for name, part in attributes.items():
            moved = self.move(f"{place}.{name}", part, counts=counts)
            if moved is not part:
                attributes[name] = moved  # the same name, so the walk may go on

    def _move_tensor(self, place: str, tensor: Tensor) -> Tensor:
        if id(tensor) in self.moved:  # the same tensor under another name
            index, _, known = self.moved[id(tensor)]
            self.key.append(index)
            return known
        kind = (tensor.shape, tensor.dtype)
        self.key.append(kind)
        places = self.replays.places
        kept = places.get((place, kind))
        if kept is None:
            kept = places[place, kind] = tensor if self.adopts else tensor.clone()
            self.replays.memory.add(kept.untyped_storage()._cdata)
        elif kept is not tensor:
            self.pairs.append((kept, tensor))
        self.moved[id(tensor)] = len(self.moved), tensor, kept
        return kept

    def copy(self) -> None:
        """Bring to their places what lies elsewhere."""
        memory = self.replays.memory
        new = [tensor.clone() if tensor.untyped_storage()._cdata in memory else tensor for _, tensor in self.pairs]
        for (kept, _), tensor in zip(self.pairs, new, strict=True):
            kept.copy_(tensor)


def _held(value: Any) -> Hashable:
    """Return what tells a rule from another one. Its tensors stay where they are, like weights."""
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    if isinstance(value, Component):
        return type(value), _held(vars(value))
    if isinstance(value, dict):
        return tuple((name, _held(part)) for name, part in value.items())
    if isinstance(value, tuple | list):
        return type(value), tuple(_held(part) for part in value)
    if not isinstance(value, Hashable):
        _refuse_to_follow("a rule of acceptance", value)
    return type(value), value


def _refuse_to_follow(holder: str, value: object) -> None:
    refuse(
        "record_for_decoding",
        f"{holder} holds a {type(value).__name__}, which recordings cannot follow; keep tensors, plain values, and "
        "tuples or lists of them, or decode with the model itself.",
    )
