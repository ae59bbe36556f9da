"""Tensors of a checkpoint, each of which must be taken exactly once; and tensors that cannot have been trained."""

from collections.abc import Mapping

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Tensor
from mtp_modules.model import MTPModel


class Tensors:
    """The tensors of a checkpoint, taken one by one.

    Args:
        owner: Name of the format.
        tensors: By name.
    """

    def __init__(self, owner: str, tensors: Mapping[str, Tensor]) -> None:
        self.owner, self._left = owner, dict(tensors)

    def __contains__(self, name: str) -> bool:
        """Whether a tensor is there and has not been taken."""
        return name in self._left

    def names(self) -> list[str]:
        """Return the names of what has not been taken."""
        return list(self._left)

    def rows(self, name: str) -> int:
        """Return how many rows a matrix has, where nothing else says it.

        Args:
            name: Of the matrix.

        Raises:
            ValueError: If it is missing, or is no matrix.
        """
        if name not in self._left or self._left[name].ndim != 2:
            refuse(self.owner, f"{name} is missing, or no matrix: this is half a checkpoint, or one of another kind.")
        return len(self._left[name])

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor, and count it as taken.

        Args:
            name: Of the tensor.
            shape: It must have.

        Raises:
            ValueError: If it is missing, has another shape, or holds numbers that are not finite.
        """
        if name not in self._left:
            refuse(self.owner, f"{name} is missing: this is half a checkpoint, or one of another kind.")
        value = self._left.pop(name)
        if tuple(value.shape) != shape:
            refuse(self.owner, f"{name} has shape {tuple(value.shape)}, the configuration says {shape}; mend either.")
        if not bool(torch.isfinite(value).all()):
            refuse(self.owner, f"{name} holds numbers that are not finite; it was never written, or training failed.")
        return value

    def drop(self, prefix: str = "") -> None:
        """Take all that is left whose name begins so, for nothing.

        Args:
            prefix: Of the names.
        """
        self._left = {name: value for name, value in self._left.items() if not name.startswith(prefix)}

    def same(self, name: str, as_that: Tensor, what: str) -> None:
        """Take a copy, if it is there.

        Args:
            name: Of the copy.
            as_that: What it must be a copy of.
            what: That it is a copy of, in words.

        Raises:
            ValueError: If its numbers differ.
        """
        if name in self._left and not torch.equal(self.take(name, *as_that.shape), as_that):
            refuse(
                self.owner,
                f"{name} must be a copy of {what}, but its numbers differ: readers that tie them and readers that do "
                "not would make different models of it.",
            )

    def finish(self) -> None:
        """Refuse what nobody took.

        Raises:
            ValueError: If something is left.
        """
        if self._left:
            more = f" and {len(self._left) - 1} more" if len(self._left) > 1 else ""
            refuse(self.owner, f"nothing here reads {sorted(self._left)[0]}{more}; this is another kind of checkpoint.")


def check_trained(model: MTPModel, before: MTPModel | None = None) -> None:
    """Refuse heads with tensors that cannot have been trained.

    Args:
        model: Whose heads, and output matrices of horizons beyond the first, are looked at.
        before: The same model before training, if it is known: no tensor of the heads may have the same bytes.

    Raises:
        ValueError: If a number is not finite, all numbers of a matrix are equal, or a tensor is as it was before.
    """
    earlier = None if before is None else before.state_dict()
    for name, value in model.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            refuse("export", f"{name} holds numbers that are not finite; train again.")
        if not name.startswith(("heads.", "unembedding.own_")):
            continue
        if value.ndim > 1 and value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            refuse("export", f"all numbers of {name} are {value.flatten()[0].item():g}: it was never trained.")
        if earlier is not None and (name not in earlier or earlier[name].shape != value.shape):
            refuse("export", f"before is another model: it has no {name} of shape {tuple(value.shape)}.")
        if earlier is not None and torch.equal(earlier[name].to(value.dtype), value):
            refuse("export", f"{name} is as it was before training; export the checkpoint of the trained model.")
