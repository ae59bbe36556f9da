"""Build from a description that comes with data, within what the data holds.

A description of a hundred bytes can ask for a million layers, or for a terabyte. Its weights are stored beside it, so
their number and their size bound what it may ask for.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Tensor

_FREE_ELEMENTS = 2**22
"""Small tables that are not stored, such as masks and rotary frequencies."""
_FREE_COUNT, _FREE_MODULES = 1024, 256
_MODULES_PER_TENSOR = 16
_MAX_DEPTH = 64
_MAX_GROWTH = 1000
_FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        *("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "eye"),
        *("arange", "linspace", "logspace", "tril_indices", "triu_indices"),
    )
)
_active: list["Budget"] = []


class Budget(TorchFunctionMode):
    """Raise an error where a constructor makes more than weights that are stored can fill.

    Args:
        owner: Named in the error message.
        shapes: Shapes of the stored tensors.
    """

    def __init__(self, owner: str, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self._owner, self._tensors = owner, sum(1 for shape in shapes if prod(shape))
        self._stored = sum(prod(shape) for shape in shapes)
        self._elements = self._modules = 0
        self._hooks = ExitStack()

    def __enter__(self) -> "Budget":
        """Begin to count."""
        super().__enter__()  # type: ignore[no-untyped-call]
        _active.append(self)
        for register, count in (
            (registration.register_module_parameter_registration_hook, self._count_parameter),
            (registration.register_module_buffer_registration_hook, self._count_parameter),
            (registration.register_module_module_registration_hook, self._count_module),
        ):
            self._hooks.callback(register(count).remove)
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        self._hooks.close()
        _active.remove(self)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, and check the size of its result; of a new tensor before it is made."""
        kwargs = kwargs or {}
        if func in _FACTORIES:
            shown = {name: value for name, value in kwargs.items() if name not in ("out", "generator", "pin_memory")}
            self.spend(func(*args, **{**shown, "device": "meta"}).numel())
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self.spend(result.numel())
        return result

    def spend(self, elements: int) -> None:
        """Raise an error if one tensor has more elements than are stored.

        Args:
            elements: Of the tensor.

        Raises:
            ValueError: If they are too many.
        """
        if elements > max(self._stored, _FREE_ELEMENTS):
            self._refuse(f"a tensor of {elements} elements")

    def check_counts(self, description: Any) -> None:
        """Raise an error for a description whose counts cannot belong to these weights, before anything is built.

        Args:
            description: Plain values; any argument called ``num_...`` is a count.

        Raises:
            ValueError: If a count is larger than the number of tensors, or than all elements where it counts tokens.
        """
        for name, value in named_values(self._owner, description):
            if isinstance(value, int) and name.startswith("num_"):
                most = max(self._tensors, _FREE_COUNT)
                if value > (max(self._stored, most) if name.endswith("_tokens") else most):
                    self._refuse(f"{name}={value!s:.40}")

    def _count_parameter(self, module: nn.Module, name: str, value: Tensor | None) -> None:
        if value is not None:
            self._elements += value.numel()
            if self._elements > 2 * self._stored + _FREE_ELEMENTS:  # twice: some are registered twice, or replaced
                self._refuse(f"{self._elements} elements or more")

    def _count_module(self, module: nn.Module, name: str, value: nn.Module | None) -> None:
        self._modules += 1
        if self._modules > _MODULES_PER_TENSOR * self._tensors + _FREE_MODULES:
            self._refuse(f"{self._modules} modules or more")

    def _refuse(self, asked: str) -> None:
        refuse(
            self._owner,
            f"the description asks for {asked}, but {self._tensors} tensors of {self._stored} elements are stored "
            "with it; get both files again.",
        )


def reserve(elements: int) -> None:
    """Announce memory that a constructor will need beyond its parameters, if it is being built within a budget.

    Args:
        elements: How many numbers.

    Raises:
        ValueError: If they are more than the budget has.
    """
    for budget in _active:
        budget.spend(elements)


def check_growth(owner: str, tokenizer_json: str) -> None:
    """Raise an error for a tokenizer that makes a text many times longer.

    Each replacement of a letter by two doubles it, and a normalizer or a decoder may be a sequence of any number.

    Args:
        owner: Named in the error message.
        tokenizer_json: Content of a ``tokenizer.json``.

    Raises:
        ValueError: If the replacements together could make a text more than 1,000 times longer.
    """
    try:
        waiting, growth = [json.loads(tokenizer_json)], 1.0
    except (ValueError, RecursionError):
        return  # the package says so
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            if value.get("type") == "Replace" and isinstance(content := value.get("content"), str):
                pattern = value.get("pattern")
                text = pattern.get("String") if isinstance(pattern, Mapping) else None
                growth *= max(1.0, len(content) / max(1, len(text) if isinstance(text, str) else 1))
            waiting += [value[name] for name in ("normalizer", "decoder", "normalizers", "decoders") if name in value]
        elif isinstance(value, list):
            waiting += value
        if growth > _MAX_GROWTH:
            refuse(
                owner,
                f"the tokenizer's replacements could make a text {_MAX_GROWTH} times longer or more; get its file from "
                "its author again.",
            )


def named_values(owner: str, description: Any, *, most: int = 10**6) -> list[tuple[str, Any]]:
    """Return all values of a description, each with the name of its argument.

    Args:
        owner: Named in the error message.
        description: Plain values.
        most: How many values it may have.

    Raises:
        ValueError: If it is nested too deeply, or has too many values, as one that refers to itself does.
    """
    found: list[tuple[str, Any]] = []
    waiting: list[tuple[str, Any, int]] = [("", description, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        found.append((name, value))
        if depth > _MAX_DEPTH or len(found) + len(waiting) > most:
            refuse(owner, f"is nested deeper than {_MAX_DEPTH} levels, or has more than {most} values; write less.")
        if isinstance(value, Mapping):
            waiting += [(str(key), item, depth + 1) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(name, item, depth + 1) for item in value]
    return found
