"""What the names of tensors leave open, said beside them."""

from collections.abc import Mapping
from typing import NamedTuple

from mtp_modules.core.checks import refuse

VALUES: dict[str, tuple[str, ...]] = {
    "concatenation": ("embedding_first", "state_first", "none"),
    "trunk_state": ("after_norm", "before_norm"),
    "chain_state": ("after_norm", "before_norm", "none"),
    "position_0": ("token", "zero", "none"),
}
"""Every convention and its values. ``"none"`` is that of heads which have no such thing."""


class Conventions(NamedTuple):
    """How heads are meant that have certain names and shapes.

    Attributes:
        concatenation: Whether a joining matrix has the columns of the embedding first, or those of the state.
        trunk_state: Whether heads read the trunk's state after or before its final norm.
        chain_state: Whether a module gives the next one its state after or before the norm behind it.
        position_0: Whether the embedding at position 0 is that of the token there, or zero.
    """

    concatenation: str
    trunk_state: str
    chain_state: str
    position_0: str


Takes = Mapping[str, tuple[str, ...]]
"""The values of each convention that the readers of a format take; several where they disagree."""


def check_export(owner: str, takes: Takes, found: Conventions) -> None:
    """Refuse heads that no reader of a format would read as they are meant.

    Args:
        owner: Name of the format.
        takes: What its readers take.
        found: What the heads do.

    Raises:
        ValueError: If they do something else.
    """
    for name, value in found._asdict().items():
        if value not in takes[name]:
            refuse(
                owner,
                f"the heads have {name}={value}, readers of this format take {' or '.join(takes[name])}; "
                "build and train heads that do so, or take another format.",
            )


def resolve(
    owner: str, takes: Takes, written: Mapping[str, str] | None, given: Mapping[str, str | None]
) -> Conventions:
    """Find out how heads are meant, from what is written beside them and what the caller says.

    Args:
        owner: Name of the format.
        takes: What its readers take.
        written: What stands beside the tensors; ``None`` if nothing does.
        given: What the caller says; ``None`` for what is left to the file.

    Raises:
        ValueError: If both differ, if neither says what readers disagree about, or a value is none of the format's.
    """
    found = {}
    for name, values in VALUES.items():
        said, stands = given.get(name), (written or {}).get(name)
        if said is not None and stands is not None and said != stands:
            refuse(owner, f"{name}={said} was given, but the file says {stands}; leave {name} out, or give {stands}.")
        value = said or stands or (takes[name][0] if len(takes[name]) == 1 else None)
        if value is None:
            refuse(
                owner,
                f"the file does not say {name}, about which readers of this format disagree; "
                f"give {name}: {' or '.join(takes[name])}.",
            )
        if value not in takes[name]:
            known = " or ".join(takes[name] if value in values else values)
            refuse(owner, f"{name} must be {known}, got {value}.")
        found[name] = value
    return Conventions(**found)
