"""All offset arithmetic: the target of each head, and the tokens between a position and its targets.

A training batch carries ``T + max(horizons)`` tokens. The trunk reads ``T`` of them; the others give every head a
target at every position.
"""

from collections.abc import Sequence

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Bool, Int, Shaped, Tensor


def num_positions(tokens: Tensor, horizons: Sequence[int]) -> int:
    """Return ``T``, the number of positions of a batch that the trunk reads.

    Args:
        tokens: ``(B, T + max(horizons))``.
        horizons: Offsets of the heads.

    Raises:
        ValueError: If no position is left.
    """
    positions = tokens.shape[1] - max(horizons)
    if positions < 1:
        refuse(
            "future_targets",
            f"a row of {tokens.shape[1]} tokens leaves no position for horizon {max(horizons)}; "
            "give at least one token more than the largest horizon.",
        )
    return positions


def _windows(values: Shaped[Tensor, "B L"], length: int, offsets: Sequence[int]) -> Shaped[Tensor, "B T O"]:
    return torch.stack([values[:, offset : offset + length] for offset in offsets], dim=-1)


def leaping_horizons(num_horizons: int, stride: int) -> tuple[int, ...]:
    """Return the offsets of heads that leap: 1, 1 + stride, 1 + 2 stride, and so on (L-MTP, arXiv 2505.17505).

    Args:
        num_horizons: Number ``H`` of horizons.
        stride: Distance from each horizon to the next; 1 for 1 .. H.
    """
    return tuple(range(1, 2 + (num_horizons - 1) * stride, stride))


def horizon_of_draft(horizons: Sequence[int], depth: int) -> tuple[int, int]:
    """Return the index of the horizon that predicts a draft, and how many positions before the last one it does so.

    Draft ``depth``, counted from 0, lies ``depth + 2`` after the last position. If no horizon has that offset, the next
    larger one has predicted the same token from an earlier position. The last horizon predicts drafts beyond all
    horizons.

    Args:
        horizons: Offsets of the heads, ascending.
        depth: Depth of the draft.

    Example:
        >>> [horizon_of_draft((1, 2, 3), depth) for depth in range(3)]
        [(1, 0), (2, 0), (2, 0)]
        >>> [horizon_of_draft((1, 4, 7), depth) for depth in range(6)]
        [(1, 2), (1, 1), (1, 0), (2, 2), (2, 1), (2, 0)]
    """
    offset = depth + 2
    index = min(len([horizon for horizon in horizons if horizon < offset]), len(horizons) - 1)
    return index, max(horizons[index] - offset, 0)


def in_order_of_drafts(values: Bool[Tensor, "B T H"], horizons: Sequence[int]) -> Bool[Tensor, "B T G"]:
    """Reorder values of horizons into values of horizon 1 and of each draft that decoding makes at a position.

    For horizons 1 .. H the result equals ``values``. If horizons leap, some drafts come from earlier positions; the
    result is false if there is no such position.

    Args:
        values: One value per position and horizon.
        horizons: Offsets of the heads, ascending from 1.
    """
    length, columns = values.shape[1], [values[:, :, 0]]
    for depth in range(max(horizons) - 1):
        index, back = horizon_of_draft(horizons, depth)
        earlier = torch.zeros_like(values[:, :, index])
        earlier[:, back:] = values[:, : max(length - back, 0), index]
        columns.append(earlier)
    return torch.stack(columns, dim=2)


def future_targets(
    tokens: Int[Tensor, "B L"],
    horizons: Sequence[int],
    document_ids: Int[Tensor, "B L"] | None = None,
    loss_mask: Bool[Tensor, "B L"] | None = None,
) -> tuple[Int[Tensor, "B T H"], Bool[Tensor, "B T H"]]:
    """Return the target of each head at each position, and whether it is valid.

    A target is valid if its id is not negative (-100 marks what is no target), ``loss_mask`` is true at its token, and
    the token lies in the same document as the position that predicts it. Documents are runs of equal ids; the same id
    may occur again later as another document.

    Args:
        tokens: Token ids, ``L = T + max(horizons)``; negative where there is no target.
        horizons: Offsets of the heads, each at least 1.
        document_ids: The document of every token; ``None`` if each row is one document.
        loss_mask: False at tokens that are not trained on (padding, prompts); ``None`` if all are.

    Returns:
        ``targets`` and ``valid``, both ``(B, T, H)``.

    Raises:
        ValueError: If a row is too short, or a shape differs from that of ``tokens``.

    Example:
        >>> targets, valid = future_targets(torch.tensor([[5, 6, 7, 8]]), (1, 2))
        >>> targets.tolist(), valid.all().item()
        ([[[6, 7], [7, 8]]], True)
    """
    length = num_positions(tokens, horizons)
    for name, given in (("document_ids", document_ids), ("loss_mask", loss_mask)):
        if given is not None and given.shape != tokens.shape:
            refuse(
                "future_targets",
                f"{name} has shape {tuple(given.shape)}, tokens {tuple(tokens.shape)}; make them equal.",
            )
    targets = _windows(tokens, length, horizons)
    valid = targets >= 0
    if document_ids is not None:
        runs = document_runs(document_ids)
        valid = valid & (_windows(runs, length, horizons) == runs[:, :length, None])
    if loss_mask is not None:
        valid = valid & _windows(loss_mask.bool(), length, horizons)
    return targets, valid


def count_targets(
    tokens: Int[Tensor, "B L"],
    horizons: Sequence[int],
    document_ids: Int[Tensor, "B L"] | None = None,
    loss_mask: Bool[Tensor, "B L"] | None = None,
) -> Int[Tensor, " H"]:
    """Return how many targets of each head are valid; see :func:`future_targets`.

    Args:
        tokens: Token ids, ``L = T + max(horizons)``.
        horizons: Offsets of the heads, each at least 1.
        document_ids: The document of every token; ``None`` if each row is one document.
        loss_mask: False at tokens that are not trained on; ``None`` if all are.
    """
    return future_targets(tokens, horizons, document_ids, loss_mask)[1].sum(dim=(0, 1))


def document_runs(document_ids: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Number the runs of equal ids from 0, so that no two documents of a row share a number.

    Args:
        document_ids: Any ids; a change from one token to the next starts a new document.
    """
    starts = torch.zeros_like(document_ids)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts.cumsum(dim=1)


def tokens_between(
    tokens: Int[Tensor, "B L"], horizons: Sequence[int], positions: Int[Tensor, "B P"] | None = None
) -> Int[Tensor, "B P K"]:
    """Return the tokens after each position that heads may read: those at ``t + 1 .. t + max(horizons) - 1``.

    They stand for the drafted tokens in the training of conditioned heads. If one of them lies in another document, so
    does the target, which :func:`future_targets` then marks as invalid.

    Args:
        tokens: Token ids, ``L = T + max(horizons)``.
        horizons: Offsets of the heads.
        positions: Positions to return, ``(B, P)``; all ``T`` if ``None``.
    """
    length = num_positions(tokens, horizons)
    if max(horizons) == 1:
        between = tokens.new_empty(tokens.shape[0], length, 0)
    else:
        between = _windows(tokens, length, range(1, max(horizons)))
    return between if positions is None else at_positions(between, positions)


def tokens_before(
    tokens: Int[Tensor, "B T"], count: int, padding: int, document_ids: Int[Tensor, "B T"] | None = None
) -> Int[Tensor, "B T C"]:
    """Return the tokens at ``t - 1 .. t - count``, nearest first.

    Args:
        tokens: Token ids.
        count: How many previous tokens per position.
        padding: Token id to use if there is no such token in the same document.
        document_ids: The document of every token; ``None`` if each row is one document.
    """
    length = tokens.shape[1]
    padded = torch.nn.functional.pad(tokens, (count, 0), value=padding)
    before = _windows(padded, length, range(count - 1, -1, -1))
    if document_ids is None:
        return before
    runs = document_runs(document_ids)
    same = _windows(torch.nn.functional.pad(runs, (count, 0), value=-1), length, range(count - 1, -1, -1))
    return torch.where(same == runs[:, :, None], before, padding)


def at_positions(values: Shaped[Tensor, "B T *rest"], positions: Int[Tensor, "B P"]) -> Shaped[Tensor, "B P *rest"]:
    """Gather positions row by row.

    Args:
        values: A tensor with an axis of positions.
        positions: Positions to gather, ``(B, P)``.
    """
    return values[torch.arange(values.shape[0], device=values.device)[:, None], positions]


def num_sampled(length: int, share: float) -> int:
    """Return how many of ``length`` positions to sample: ``share`` of them, at least one.

    Args:
        length: Number ``T`` of positions.
        share: In (0, 1].
    """
    return max(1, round(share * length))


def sample_positions(batch_size: int, length: int, share: float, device: torch.device) -> Int[Tensor, "B P"]:
    """Sample a sorted random subset of positions for every row, each position with equal probability.

    Args:
        batch_size: Number ``B`` of rows.
        length: Number ``T`` of positions.
        share: Share of the positions to keep, in (0, 1]; at least one is kept.
        device: Device of the result.
    """
    keys = torch.rand(batch_size, length, device=device)
    return keys.topk(num_sampled(length, share), dim=1).indices.sort(dim=1).values


def positions_of_horizon_one(positions: Int[Tensor, "B P"], horizons: Sequence[int]) -> Int[Tensor, "B P H"]:
    """Return where horizon 1 predicts the token that each horizon predicts at ``positions``: ``t + h - 1``.

    Used to compare drafts with the model's own predictions. The result may reach ``T`` or beyond; the caller masks.

    Args:
        positions: Positions ``t``.
        horizons: Offsets ``h``.
    """
    offsets = torch.tensor([horizon - 1 for horizon in horizons], device=positions.device, dtype=positions.dtype)
    return positions[:, :, None] + offsets


def same_document_keys(document_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T T"]:
    """Return the causal attention mask within documents: each query sees the keys up to itself in its own document.

    Args:
        document_ids: The document of every token.
    """
    runs = document_runs(document_ids)
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return (runs[:, :, None] == runs[:, None, :]) & causal
