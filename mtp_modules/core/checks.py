"""Error messages for bad input: one sentence that names the class, the argument, its value, the limit and the fix."""

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any, NoReturn, SupportsIndex, TypeAlias

from numpy.typing import NDArray
from torch import Tensor

_LARGEST = (2 - 2**-23) * 2.0**127  # of float32

TokenIds: TypeAlias = Sequence[SupportsIndex] | Tensor | NDArray[Any]
"""A list, a range, a tensor or an array of token ids."""


class InputError(ValueError):
    """Bad input, described in one sentence. The command line prints it without a traceback."""


def refuse(owner: object, rule: str) -> NoReturn:
    """Raise the error that a user sees.

    Args:
        owner: The object that rejects the input, or the name of its class.
        rule: The rest of the sentence: argument, limit, value, and what to do instead.

    Raises:
        InputError: Always; it is a ``ValueError``.
    """
    name = owner if isinstance(owner, str) else type(owner).__name__
    raise InputError(f"{name}: {rule}")


def refusal_behind(error: BaseException | None) -> InputError | None:
    """Return the ``InputError`` that an error is or was caused by; ``None`` if there is none.

    Args:
        error: The caught error.
    """
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


def at_least(owner: object, argument: str, value: float, limit: float) -> None:
    """Raise an error for a number below ``limit``, and for NaN.

    Raises:
        ValueError: If ``value`` is below ``limit`` or is not a number.
    """
    if math.isnan(value) or value < limit:
        refuse(owner, f"{argument} must be at least {limit}, got {value}.")


def finite(owner: object, argument: str, value: Any, limit: float = -math.inf, *, above: bool = False) -> float:
    """Return a number as a ``float``; raise an error if it is below ``limit``, infinite in float32 or not a number.

    Args:
        owner: The object that rejects it.
        argument: Name of the number.
        value: The number.
        limit: The smallest one that is accepted; none if it is minus infinity.
        above: Whether the number must lie above ``limit``.

    Raises:
        ValueError: If it is something else.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        refuse(owner, f"{argument} must be a number, got {value!r}.")
    if not math.isfinite(number) or number < limit or (above and number == limit):
        rule = "" if limit == -math.inf else f" {'above' if above else 'of at least'} {limit}"
        refuse(owner, f"{argument} must be a finite number{rule}, got {value}.")
    if abs(number) > _LARGEST:
        refuse(owner, f"{argument} must lie within {_LARGEST:.3g}, the largest number of float32, got {value}.")
    return number


def whole(owner: object, argument: str, value: Any, limit: int | None = None) -> int:
    """Return a whole number as an ``int``; raise an error for anything else, and below ``limit`` if there is one.

    Raises:
        ValueError: If ``value`` is no whole number, or below ``limit``.
    """
    try:
        number = index(value)
    except TypeError:
        refuse(owner, f"{argument} must be a whole number, got {value!r}.")
    if limit is not None:
        at_least(owner, argument, number, limit)
    return number


def fraction(owner: object, argument: str, value: float, *, zero: bool = True) -> None:
    """Raise an error for a number outside [0, 1], or outside (0, 1] if ``zero`` is false.

    Raises:
        ValueError: If ``value`` lies outside.
    """
    if not (0.0 <= value <= 1.0) or (value == 0.0 and not zero):
        refuse(owner, f"{argument} must lie in {'[' if zero else '('}0, 1], got {value}.")


def within_positions(owner: object, length: int, max_positions: int | None, part: str) -> None:
    """Raise an error for a sequence that is longer than ``max_positions``.

    Args:
        owner: The object that rejects it.
        length: Length of the sequence.
        max_positions: Maximum length; ``None`` for no limit.
        part: The part to build with more positions, ``"trunk"`` or ``"heads"``.

    Raises:
        ValueError: If it is too long.
    """
    if max_positions is not None and length > max_positions:
        refuse(
            owner,
            f"a sequence of {length} tokens is longer than max_positions={max_positions}; "
            f"shorten it or build the {part} with more positions.",
        )


def divides(owner: object, part: str, part_value: int, whole: str, whole_value: int) -> None:
    """Raise an error if one size does not divide another.

    Raises:
        ValueError: If ``part_value`` does not divide ``whole_value``.
    """
    if whole_value % part_value:
        refuse(owner, f"{whole} ({whole_value}) must be a multiple of {part} ({part_value}).")


def content_only(owner: object, arguments: Mapping[str, Any], content: str) -> None:
    """Raise an error for stored arguments that name a model, whose files would be read or downloaded.

    Args:
        owner: Name of the class that they belong to.
        arguments: From a file.
        content: What the class is built from instead.

    Raises:
        ValueError: If ``pretrained``, ``gguf_file`` or ``revision`` is given.
    """
    for name in ("pretrained", "gguf_file", "revision"):
        if arguments.get(name) is not None:
            refuse(
                owner,
                f"a file names {name}={arguments[name]!r:.100}, but only {content} is read from files; make "
                f"{owner}(pretrained=...) yourself, and save the model with it again.",
            )


def ascending_layers(owner: object, layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return ``feature_layers`` as a tuple, after checking that they exist and ascend.

    Args:
        owner: The object that rejects them.
        layers: Layer indices, counted from 0.
        num_layers: How many layers the trunk has.

    Raises:
        ValueError: If a layer does not exist, or the layers do not ascend.
    """
    indices = tuple(layers)
    if any(not 0 <= layer < num_layers for layer in indices) or list(indices) != sorted(set(indices)):
        refuse(owner, f"feature_layers must ascend within 0..{num_layers - 1}, got {list(indices)}.")
    return indices


def tokens_in_vocabulary(owner: object, tokens: Tensor, vocab_size: int) -> None:
    """Raise an error for token ids outside the vocabulary.

    Args:
        owner: The object that rejects them.
        tokens: Token ids of any shape; an empty tensor passes.
        vocab_size: Number ``V`` of token ids.

    Raises:
        ValueError: If an id is negative or not below ``vocab_size``.
    """
    if tokens.numel() == 0:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        refuse(
            owner,
            f"token {wrong} is outside the vocabulary 0..{vocab_size - 1}; "
            "encode the text with the tokenizer that the model was trained with.",
        )


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, recognised by an attribute because importing the class takes a second.

    Args:
        tensor: Any tensor.
    """
    return hasattr(tensor, "device_mesh")


def plain_ids(owner: object, tokens: TokenIds) -> list[int]:
    """Return draft tokens as a list of ``int``.

    Args:
        owner: Named in the error message.
        tokens: A list, a range, a tensor or an array.

    Raises:
        ValueError: If it is none of these, or an element is no whole number.
    """
    given: Any = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    if not isinstance(given, Iterable) or any(isinstance(token, bool) for token in given):
        refuse(owner, f"draft tokens must be a list of token ids, got {tokens!r:.60}.")
    return [whole(owner, "a draft token", token) for token in given]
