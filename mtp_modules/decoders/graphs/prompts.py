"""The prompts of a batch, read piece by piece."""

from collections.abc import Callable, Sequence

import torch

from mtp_modules.core.shapes import Float, Int, Tensor


def in_one_tensor(texts: Sequence[Sequence[int]], width: int, device: torch.device) -> Int[Tensor, "B T"]:
    """Return texts in one tensor, with zeros behind those that are shorter.

    Args:
        texts: Token ids.
        width: Number ``T`` of tokens, at least as many as the longest has.
        device: Where to.
    """
    chunk = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        chunk[row, : len(text)] = torch.as_tensor(text)
    return chunk.to(device)


def logits_behind(
    chunk: Int[Tensor, "B T"],
    lengths: Sequence[int],
    sizes: Sequence[int],
    read: Callable[[Int[Tensor, "B C"], Int[Tensor, " B"], list[int]], Float[Tensor, "B 1 V"]],
) -> Float[Tensor, "B 1 V"]:
    """Read all prompts, and return the logits behind the last token of each.

    Args:
        chunk: The prompts.
        lengths: Of each, at least 1.
        sizes: Lengths ``C`` of pieces, which are together as long as the chunk; those of 0 are left out.
        read: Appends a piece, keeps so many tokens of each row, and returns the logits at one place of each row.
    """
    counts = torch.tensor(lengths, device=chunk.device)
    found: Tensor | None = None
    start = 0
    for size in filter(None, sizes):
        last = counts - 1 - start
        keep = [min(max(length - start, 0), size) for length in lengths]
        logits = read(chunk[:, start : start + size], last.clamp(0, size - 1), keep)
        found = logits if found is None else torch.where((last >= 0)[:, None, None], logits, found)
        start += size
    assert found is not None  # no prompt is empty
    return found
