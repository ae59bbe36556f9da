"""Checks that a trunk, heads and an output matrix fit together."""

import inspect
from collections.abc import Callable

import torch
from torch import nn

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import Heads, Trunk, TrunkOutput
from mtp_modules.core.objective import OutputMatrix


def heads_for(owner: str, trunk: Trunk, heads: Heads | Callable[..., Heads], num_horizons: int | None = None) -> Heads:
    """Return heads of the widths, on the device and in the precision of a trunk.

    Args:
        owner: Named in error messages.
        trunk: The trunk.
        heads: Heads, returned as they are; or what makes them, called with ``d_model`` and, if it takes it,
            ``embedding_width``.
        num_horizons: Passed on, if given.

    Raises:
        ValueError: If heads are given with a number of horizons, or what makes them needs more.
    """
    if isinstance(heads, Heads):
        if num_horizons is not None:
            refuse(owner, f"num_horizons is {num_horizons}, but the heads are built already; leave it out.")
        return heads
    if not callable(heads):
        refuse(
            owner, f"heads must be a class of heads, or heads, got {heads!r:.60}; give a class such as RecurrentHeads."
        )
    takes = inspect.signature(heads).parameters
    sizes = {"d_model": trunk.d_model} | ({} if num_horizons is None else {"num_horizons": num_horizons})
    if "embedding_width" in takes and trunk.embedding_width != trunk.d_model:
        sizes["embedding_width"] = trunk.embedding_width
    try:
        inspect.signature(heads).bind(**sizes)
    except TypeError as error:
        made_by = getattr(heads, "func", heads)
        name = getattr(made_by, "__name__", type(made_by).__name__)
        refuse(
            owner,
            f"heads={name} cannot be called with {', '.join(sizes)} alone ({error}); give the rest by "
            f"functools.partial({name}, ...), or num_horizons.",
        )
    made = heads(**sizes)
    if not isinstance(made, Heads):
        refuse(owner, f"heads must make Heads, got {type(made).__name__}; give a class such as RecurrentHeads.")
    where = next(trunk.parameters()).device
    return made.to(where, dtype_of(trunk))


def check_draft_tokens(count: int, trunk: Trunk, heads: Heads) -> None:
    """Raise an error for an empty draft vocabulary, heads without drafts, and heads with a joint distribution.

    Args:
        count: Size of the draft vocabulary.
        trunk: Has the whole vocabulary.
        heads: The heads.

    Raises:
        ValueError: If the drafts cannot be trimmed.
    """
    if not 1 <= count <= trunk.vocab_size:
        refuse("MTPModel", f"num_draft_tokens must lie in 1..{trunk.vocab_size}, the vocabulary, got {count}.")
    if len(heads.horizons) == 1:
        refuse(
            "MTPModel",
            f"num_draft_tokens is {count}, but {type(heads).__name__} with one horizon drafts nothing; leave it out.",
        )
    if heads.states_scored > len(heads.horizons) - 1:
        refuse(
            "MTPModel",
            f"num_draft_tokens is {count}, but the joint distribution of {type(heads).__name__} is over the whole "
            "vocabulary; leave it out.",
        )


def check_trained_output(trunk: Trunk, trained: OutputMatrix, *, tied: bool, bias: bool) -> None:
    """Raise an error if a part of a trunk's trained output layer would be lost.

    Args:
        trunk: The trunk.
        trained: Its trained output layer.
        tied: Whether the embedding will be the output matrix.
        bias: Whether logits will have a bias.

    Raises:
        ValueError: If a part would be lost.
    """
    name = type(trunk).__name__
    if tied and trained.weight is not trunk.embedding.weight:
        refuse(
            "MTPModel",
            f"the {name} was trained with an output matrix that is not its embedding, which tie_embeddings would lose; "
            "set it to false.",
        )
    if trained.bias is not None and not bias:
        refuse("MTPModel", f"the {name} was trained with a bias on its logits; set output_bias to true.")


def check_fit(trunk: Trunk, heads: Heads) -> None:
    """Compare sizes and precisions of trunk and heads.

    Args:
        trunk: The trunk.
        heads: The heads.

    Raises:
        ValueError: If they do not fit.
    """
    check_widths(trunk, heads)
    check_dtypes(trunk, heads)


def check_widths(trunk: Trunk, heads: Heads) -> None:
    """Compare the sizes that the heads were built for with those of the trunk.

    Args:
        trunk: The trunk.
        heads: The heads.

    Raises:
        ValueError: If they do not fit.
    """
    for name, has in (
        ("d_model", trunk.d_model),
        ("embedding_width", trunk.embedding_width),
        ("vocab_size", trunk.vocab_size),
    ):
        wanted = getattr(heads, name, has)
        if wanted != has:
            refuse(
                "MTPModel",
                f"{type(heads).__name__} was built for {name}={wanted}, but {type(trunk).__name__} has {has}; "
                "make them equal.",
            )
    if heads.num_features not in (0, len(trunk.feature_layers)):
        refuse(
            "MTPModel",
            f"{type(heads).__name__} reads {heads.num_features} inner layers, but {type(trunk).__name__} has "
            f"feature_layers={list(trunk.feature_layers)}; name {heads.num_features} of its layers there.",
        )
    reads = getattr(heads, "max_positions", None)
    if reads is not None and (trunk.max_positions or 0) > reads:
        refuse(
            "MTPModel",
            f"{type(heads).__name__} reads at most max_positions={reads}, {type(trunk).__name__} "
            f"{trunk.max_positions}; give the heads at least as many.",
        )


def check_dtypes(trunk: Trunk, heads: Heads) -> None:
    """Reject heads that cannot read the trunk's states, because their weights have another precision.

    Args:
        trunk: The trunk.
        heads: The heads; those without parameters read any precision.

    Raises:
        ValueError: If none of the heads' weights has the precision of the trunk's embedding.
    """
    has, reads = dtype_of(trunk), _dtypes(heads)
    if has is not None and reads and has not in reads:
        refuse(
            "MTPModel",
            f"{type(trunk).__name__} is in {_name(has)}, but {type(heads).__name__} are in {_name(reads[0])}; call "
            f"heads.to(torch.{_name(has)}) before, or make the trunk in {_name(reads[0])}.",
        )


def checked_output(
    known: TrunkOutput, trunk: Trunk, heads: Heads, positions: tuple[int, int], dtype: torch.dtype
) -> TrunkOutput:
    """Return a known output of a trunk in a precision, if it fits.

    Args:
        known: The output.
        trunk: The trunk.
        heads: Will read it.
        positions: Rows and positions that it must have.
        dtype: Of the result.

    Raises:
        ValueError: If it has other positions, widths or layers.
    """
    needs = heads.num_features
    read = known.features if needs else ()
    if len(read) != needs:
        name = type(heads).__name__
        refuse("MTPModel", f"known holds {len(read)} inner layers, but {name} read {needs}; recompute it.")
    wanted = (*positions, trunk.d_model)
    for state in (known.hidden, *read):
        if state.shape != wanted:
            refuse("MTPModel", f"known has shape {tuple(state.shape)}, these tokens need {wanted}; recompute it.")
    return TrunkOutput(known.hidden.to(dtype), tuple(feature.to(dtype) for feature in read))


def dtype_of(trunk: Trunk) -> torch.dtype | None:
    """Return the precision of a trunk's states: that of its embedding, because layers may be quantised.

    Args:
        trunk: The trunk.
    """
    return next(iter((*_dtypes(trunk.embedding), *_dtypes(trunk))), None)


def _dtypes(module: nn.Module) -> list[torch.dtype]:
    return [parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
