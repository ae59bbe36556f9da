"""Freezing parts of a model."""

from collections.abc import Sequence

from mtp_modules.core.checks import refuse
from mtp_modules.model import MTPModel

FREEZABLE = ("trunk", "heads", "unembedding")


def freeze_parts(owner: object, model: MTPModel, parts: Sequence[str]) -> tuple[str, ...]:
    """Disable the gradients of parts of a model, and return their names.

    The matrix of a transition is frozen with the heads, not with the unembedding that holds it.

    Args:
        owner: Named in the error message.
        model: Changed in place.
        parts: Any of ``FREEZABLE``.

    Raises:
        ValueError: If ``parts`` names something else, a tied output matrix without its trunk, or everything.
    """
    for part in parts:
        if part not in FREEZABLE:
            refuse(owner, f"freeze may hold {', '.join(FREEZABLE)}, got {part!r}.")
    if "unembedding" in parts and "trunk" not in parts and model.unembedding.tied:
        refuse(
            owner,
            "freeze holds unembedding, which is the trunk's embedding; freeze the trunk too, or set "
            "tie_embeddings to false.",
        )
    for part in parts:
        getattr(model, part).requires_grad_(False)
    if model.unembedding.transition is not None and {"heads", "unembedding"}.intersection(parts):
        model.unembedding.transition.requires_grad_("heads" not in parts)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        refuse(owner, f"freeze holds {', '.join(parts)}, which leaves nothing to train; leave one out.")
    return tuple(parts)
