"""Sentences for bad input: who refuses, by what rule, what was given, and the way out."""

import math
from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor


class InputError(ValueError):
    """Bad input, told in one sentence. The command line prints it without a traceback."""


def refuse(owner: object, rule: str) -> NoReturn:
    """Raise the one error that a user sees.

    Args:
        owner: The object, or the name of the class, that refuses.
        rule: The rest of the sentence: argument, limit, value and way out.

    Raises:
        InputError: Always; it is a ``ValueError``.
    """
    name = owner if isinstance(owner, str) else type(owner).__name__
    raise InputError(f"{name}: {rule}")


def refusal_behind(error: BaseException | None) -> InputError | None:
    """Return the sentence for the user that an error wraps, if there is one.

    Args:
        error: As it was caught.
    """
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


def at_least(owner: object, argument: str, value: float, limit: float) -> None:
    """Refuse a number below ``limit``, and NaN.

    Raises:
        ValueError: If ``value`` is below ``limit`` or is not a number.
    """
    if math.isnan(value) or value < limit:
        refuse(owner, f"{argument} must be at least {limit}, got {value}.")


def fraction(owner: object, argument: str, value: float, *, zero: bool = True) -> None:
    """Refuse a number outside [0, 1], or outside (0, 1] where zero makes no sense.

    Raises:
        ValueError: If ``value`` lies outside.
    """
    if not (0.0 <= value <= 1.0) or (value == 0.0 and not zero):
        refuse(owner, f"{argument} must lie in {'[' if zero else '('}0, 1], got {value}.")


def within_positions(owner: object, length: int, max_positions: int | None, part: str) -> None:
    """Refuse a sequence that is longer than positions go; ``None`` is no limit.

    Args:
        owner: Who refuses.
        length: Of the sequence.
        max_positions: Longest one.
        part: What to build with more positions, ``"trunk"`` or ``"heads"``.

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
    """Refuse sizes that do not divide.

    Raises:
        ValueError: If ``part_value`` does not divide ``whole_value``.
    """
    if whole_value % part_value:
        refuse(owner, f"{whole} ({whole_value}) must be a multiple of {part} ({part_value}).")


def ascending_layers(owner: object, layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return the layers whose outputs are wanted; refuse what is not there, and another order than the trunk's.

    Args:
        owner: Who refuses.
        layers: As they were given, counted from 0.
        num_layers: How many there are.

    Raises:
        ValueError: If a layer is not there, or they do not ascend.
    """
    asked = tuple(layers)
    if any(not 0 <= layer < num_layers for layer in asked) or list(asked) != sorted(set(asked)):
        refuse(owner, f"feature_layers must ascend within 0..{num_layers - 1}, got {list(asked)}.")
    return asked


def tokens_in_vocabulary(owner: object, tokens: Tensor, vocab_size: int) -> None:
    """Refuse token ids that have no row in the embedding.

    Args:
        owner: Who refuses.
        tokens: Token ids of any shape; an empty tensor passes.
        vocab_size: Number ``V`` of rows.

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
    """Whether a tensor is a ``DTensor``. To import that class takes a second, so it is told by what it has.

    Args:
        tensor: Any tensor.
    """
    return hasattr(tensor, "device_mesh")
