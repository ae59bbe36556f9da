"""What users ask a decoder for, checked, with one of everything for each row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Protocol, SupportsIndex, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import nn

from mtp_modules.core.checks import at_least, refuse, tokens_in_vocabulary
from mtp_modules.core.interfaces import Heads, Trunk
from mtp_modules.core.shapes import Array, Tensor
from mtp_modules.core.unembedding import Unembedding
from mtp_modules.decoders.sampling.parameters import SamplingParams
from mtp_modules.decoders.sampling.stopping import EndTable, StopRule

_T = TypeVar("_T")

Prompts: TypeAlias = Sequence[Any] | Tensor | Array | Mapping[str, Any]
"""Token ids of any lengths: lists, tensors or arrays, one a prompt; a 2-D tensor or array; or what a tokenizer returns,
a mapping with ``input_ids`` and perhaps ``attention_mask``, whose zeros are padding.
"""

Numbers: TypeAlias = SupportsIndex | Sequence[SupportsIndex] | Tensor | Array
"""A whole number for all rows, or one for each."""


@runtime_checkable
class DecodableModel(Protocol):
    """What a decoder needs of a model; :class:`mtp_modules.MTPModel` is one."""

    trunk: Trunk
    heads: Heads
    unembedding: Unembedding


@dataclass(frozen=True)
class Request:
    """What a decoder is asked for, one of everything a row.

    Attributes:
        prompts: Token ids.
        budgets: Most new tokens.
        sampling: How tokens are sampled.
        seeds: What they are sampled with.
        stops: When a row ends before its budget.
    """

    prompts: list[list[int]]
    budgets: list[int]
    sampling: list[SamplingParams]
    seeds: list[int]
    stops: list[StopRule]

    def ends(self, trunk: Trunk) -> EndTable:
        """Return where rows end. The trunk reads all tokens that a row emits, but the last."""
        limit, room = trunk.max_positions, None
        if limit is not None:
            room = [limit - len(prompt) + 1 for prompt in self.prompts]
        return EndTable(self.budgets, room, self.stops, trunk.vocab_size)


def make_request(
    model: DecodableModel, prompts: Any, max_new_tokens: Any, stop: Any, sampling: Any, seed: Any
) -> Request:
    """Check what a user asks for, and give every row its own of everything.

    Raises:
        ValueError: If the model is in training mode; if a prompt is empty, too long, or holds what is no token of the
            vocabulary; if a number is out of range; if a list has not one item a prompt.
    """
    for part in (model.trunk, model.heads, model.unembedding):
        if isinstance(part, nn.Module) and part.training:
            refuse(
                "generate",
                f"{type(part).__name__} is in training mode, where dropout would change the output; call model.eval().",
            )
    texts, limit = token_lists(prompts), model.trunk.max_positions
    for row, prompt in enumerate(texts):
        if not prompt:
            refuse("generate", f"prompt {row} is empty; give at least one token.")
        if limit is not None and len(prompt) > limit:
            refuse(
                "generate",
                f"prompt {row} has {len(prompt)} tokens, the trunk reads at most max_positions={limit}; "
                "shorten the prompt.",
            )
        tokens_in_vocabulary("generate", torch.tensor(prompt), model.trunk.vocab_size)
    rows = len(texts)
    budgets = _each("max_new_tokens", max_new_tokens, _whole, rows)
    for budget in budgets:
        at_least("generate", "max_new_tokens", budget, 1)
    seeds = _each("seed", seed, _whole, rows)
    if not isinstance(seed, Sequence | Array | Tensor) or (isinstance(seed, Tensor | Array) and seed.ndim == 0):
        seeds = [first + row for row, first in enumerate(seeds)]
    return Request(
        prompts=texts,
        budgets=budgets,
        sampling=_each("sampling", sampling, _one_of(SamplingParams), rows),
        seeds=[_signed(value) for value in seeds],
        stops=_each("stop", StopRule() if stop is None else stop, _one_of(StopRule), rows),
    )


def token_lists(prompts: Any) -> list[list[int]]:
    """Return prompts as lists of token ids.

    Raises:
        ValueError: If there is none, or something is no list of token ids.
    """
    texts = prompts
    if isinstance(prompts, Mapping):
        if "input_ids" not in prompts:
            refuse("generate", f"prompts is a mapping without input_ids, got the keys {sorted(map(str, prompts))}.")
        texts, mask = prompts["input_ids"], prompts.get("attention_mask")
        _check_some(texts)
        if np.ndim(texts[0]) == 0:  # of a single text
            texts, mask = [texts], None if mask is None else [mask]
        if mask is not None:
            lists, masks = ([_tokens(row, text) for row, text in enumerate(part)] for part in (texts, mask))
            if [len(text) for text in lists] != [len(kept) for kept in masks]:
                refuse("generate", "attention_mask must be of the same shape as input_ids; tokenize both together.")
            pairs = zip(lists, masks, strict=True)
            return [[token for token, real in zip(*pair, strict=True) if real] for pair in pairs]
    _check_some(texts)
    return [_tokens(row, getattr(text, "ids", text)) for row, text in enumerate(texts)]


def _check_some(texts: Any) -> None:
    if isinstance(texts, str) or not hasattr(texts, "__len__"):
        refuse("generate", f"prompts must be lists of token ids, got {type(texts).__name__}; encode texts first.")
    if isinstance(texts, Tensor | Array) and texts.ndim == 0:
        refuse("generate", f"prompts must be lists of token ids, got the number {texts}; give a list of prompts.")
    if len(texts) == 0:
        refuse("generate", "prompts is empty; give at least one.")


def _tokens(row: int, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        refuse("generate", f"prompt {row} is text, got {prompt!r}; encode it with the model's tokenizer.")
    try:
        tokens = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError):
        refuse("generate", f"prompt {row} must be a list of token ids, got {prompt!r}.")
    if tokens.ndim == 0:
        refuse("generate", "prompts is a flat list of token ids; give a list of prompts, such as [[1, 2, 3]].")
    if tokens.ndim > 1:
        refuse("generate", f"prompt {row} must be a list of token ids, got {tokens.ndim} dimensions.")
    if tokens.dtype == torch.uint64:
        tokens = torch.from_numpy(np.minimum(tokens.cpu().numpy(), np.uint64(2**62)).astype(np.int64))
    if len(tokens) and (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool):
        refuse("generate", f"prompt {row} must hold token ids, which are whole numbers, got {tokens.dtype}.")
    return tokens.tolist()


def _each(name: str, given: Any, convert: Callable[[str, Any], _T], rows: int) -> list[_T]:
    """Return one item a row: those that are given, or the same for all."""
    if not isinstance(given, Sequence | Array | Tensor) or isinstance(given, str) or np.ndim(given) == 0:
        return [convert(name, given)] * rows
    values = [convert(name, value) for value in given]
    if len(values) != rows:
        refuse("generate", f"{name} holds {len(values)} items for {rows} prompts; give one, or one a prompt.")
    return values


def _whole(name: str, value: Any) -> int:
    try:
        return index(value)
    except TypeError:
        refuse("generate", f"{name} must be a whole number, got {value!r}.")


def _signed(seed: int) -> int:
    """Return the 64 bits of a seed as the signed number that tensors hold."""
    if not -(2**63) <= seed < 2**64:
        refuse("generate", f"the seed of every row must lie in -2**63..2**64-1, got {seed}; take it modulo 2**64.")
    return seed - 2**64 if seed >= 2**63 else seed


def _one_of(kind: type[_T]) -> Callable[[str, Any], _T]:
    def check(name: str, value: Any) -> _T:
        if not isinstance(value, kind):
            refuse("generate", f"{name} must be made of {kind.__name__}, got {value!r}.")
        return value

    return check
