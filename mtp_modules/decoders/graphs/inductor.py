"""Constants of compiled graphs, kept once however often they are used."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch.utils._python_dispatch import _disable_current_modes

from mtp_modules.core.shapes import Tensor

_KEPT: ContextVar["SharedConstants | None"] = ContextVar("_KEPT", default=None)


class SharedConstants:
    """Constants that graphs have, of which each that is made takes those that are there already.

    Inductor lays a weight out anew for each product that it goes into. Heads that take the same step for one draft
    after the other would read other memory for each, and none of it would still be in the cache.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], list[ref[Tensor]]] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let graphs that are compiled meanwhile, by this thread, have their constants here."""
        _look_here_first()
        token = _KEPT.set(self)
        try:
            yield
        finally:
            _KEPT.reset(token)

    def known(self, constant: Tensor) -> Tensor:
        """Return the constant of some graph that is the same to the bit, or else this one.

        Args:
            constant: Nobody writes to it.
        """
        if constant.layout != torch.strided or constant.dim() == 0 or not constant.is_contiguous():
            return constant
        kind = constant.shape, constant.dtype, constant.device
        alive = [found for weak in self._known.get(kind, ()) if (found := weak()) is not None]
        for found in alive:
            if torch.equal(found.view(torch.uint8), constant.view(torch.uint8)):
                return found
        self._known[kind] = [ref(found) for found in (*alive, constant)]
        return constant


@cache
def _look_here_first() -> None:
    """Let inductor ask for what is known, from now on and once for all."""
    from torch._inductor.graph import GraphLowering  # takes a second, so only where it is in use

    theirs = getattr(GraphLowering, "add_tensor_constant", None)
    if theirs is None:  # then graphs are slower, and right
        return

    def ours(graph: GraphLowering, data: Tensor, *others: Any, **named: Any) -> Any:
        kept = _KEPT.get()
        if kept is not None:
            with _disable_current_modes():  # the numbers count, not the shapes that compilers go by
                data = kept.known(data)
        return theirs(graph, data, *others, **named)

    GraphLowering.add_tensor_constant = ours  # type: ignore[method-assign, assignment]
