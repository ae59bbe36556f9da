"""Read every tensor of a checkpoint exactly once, and detect tensors that were never trained."""

from collections.abc import Mapping

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Tensor
from mtp_modules.model import MTPModel

_NUMBERS = ("d2t", "t2d")
"""Tensors of whole numbers; all others hold weights."""


class Tensors:
    """The tensors of a checkpoint, taken one by one.

    Args:
        owner: Name of the format.
        tensors: Tensors by name.
    """

    def __init__(self, owner: str, tensors: Mapping[str, Tensor]) -> None:
        self.owner, self._left = owner, dict(tensors)

    def __contains__(self, name: str) -> bool:
        """Whether a tensor exists and has not been taken."""
        return name in self._left

    def names(self) -> list[str]:
        """Return the names of the tensors that have not been taken."""
        return list(self._left)

    def rows(self, name: str) -> int:
        """Return the number of rows of a matrix, for sizes that the configuration does not contain.

        Args:
            name: Name of the matrix.

        Raises:
            ValueError: If the tensor is missing, or is not a matrix.
        """
        if name not in self._left or self._left[name].ndim != 2:
            refuse(
                self.owner,
                f"{name} is missing, or not a matrix; the checkpoint is incomplete, or of another format.",
            )
        return len(self._left[name])

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor, and mark it as taken.

        Args:
            name: Name of the tensor.
            shape: Expected shape.

        Raises:
            ValueError: If the tensor is missing, has another shape, or holds values that are not finite.
        """
        if name not in self._left:
            refuse(self.owner, f"{name} is missing; the checkpoint is incomplete, or of another format.")
        value = self._left.pop(name)
        if tuple(value.shape) != shape:
            refuse(self.owner, f"{name} has shape {tuple(value.shape)}, the configuration has {shape}; correct either.")
        if value.is_floating_point() == (name in _NUMBERS):
            refuse(self.owner, f"{name} holds numbers of type {value.dtype}; the checkpoint is of another format.")
        if not bool(torch.isfinite(value).all()):
            refuse(self.owner, f"{name} holds values that are not finite; it was never written, or training diverged.")
        return value

    def drop(self, prefix: str = "") -> None:
        """Discard all remaining tensors whose names begin with a prefix.

        Args:
            prefix: Prefix of the tensor names.
        """
        self._left = {name: value for name, value in self._left.items() if not name.startswith(prefix)}

    def same(self, name: str, as_that: Tensor, what: str) -> None:
        """Take a tensor that must be a copy of another one, if it exists.

        Args:
            name: Name of the copy.
            as_that: The tensor that it must equal.
            what: Description of that tensor for the error message.

        Raises:
            ValueError: If their values differ.
        """
        if name in self._left and not torch.equal(self.take(name, *as_that.shape), as_that):
            refuse(
                self.owner,
                f"{name} must be a copy of {what}, but its values differ: readers that tie them and readers that do "
                "not would load different models.",
            )

    def finish(self) -> None:
        """Check that every tensor was taken.

        Raises:
            ValueError: If a tensor is left.
        """
        if self._left:
            more = f" and {len(self._left) - 1} more" if len(self._left) > 1 else ""
            refuse(
                self.owner,
                f"{sorted(self._left)[0]}{more} is not part of this format; the checkpoint is of another format.",
            )


def check_trained(model: MTPModel, before: MTPModel | None = None) -> None:
    """Reject heads with tensors that cannot have been trained.

    Args:
        model: The model. Its heads and the output matrices of horizons beyond the first are checked.
        before: The same model before training, if known: every tensor of the heads must differ from it.

    Raises:
        ValueError: If a value is not finite, all values of a matrix are equal, or training did not change a tensor.
    """
    earlier = None if before is None else before.state_dict()
    for name, value in model.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            refuse("export", f"{name} holds values that are not finite; train again.")
        if not name.startswith(("heads.", "unembedding.own_", "unembedding.transition")):
            continue
        if value.ndim > 1 and value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            refuse("export", f"all values of {name} are {value.flatten()[0].item():g}: it was never trained.")
        if earlier is not None and (name not in earlier or earlier[name].shape != value.shape):
            refuse("export", f"before is another model: it has no {name} of shape {tuple(value.shape)}.")
        if earlier is not None and torch.equal(earlier[name].to(value.dtype), value):
            refuse("export", f"training did not change {name}; export the checkpoint of the trained model.")
