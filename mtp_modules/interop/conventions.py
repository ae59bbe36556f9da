"""Conventions that tensor names and shapes leave unspecified; a file beside the tensors records them."""

from collections.abc import Mapping
from typing import NamedTuple

from mtp_modules.core.checks import refuse

VALUES: dict[str, tuple[str, ...]] = {
    "concatenation": ("embedding_first", "state_first", "none"),
    "trunk_state": ("after_norm", "before_norm"),
    "chain_state": ("after_norm", "before_norm", "none"),
    "position_0": ("token", "zero", "none"),
    "anchor": ("given", "predicts", "none"),
    "block_attention": ("bidirectional", "causal", "none"),
}
"""Every convention and its possible values. ``"none"``: the convention does not apply to these heads."""

_NONE = ("none",)


class Conventions(NamedTuple):
    """How to interpret heads beyond the names and shapes of their tensors.

    Attributes:
        concatenation: Whether the embedding or the hidden state comes first in the input of the merging matrix.
        trunk_state: Whether heads read the trunk's hidden states after or before its final norm.
        chain_state: Whether a module passes its hidden state to the next module after or before its output norm.
        position_0: Whether the embedding at position 0 is that of the token, or zero.
        anchor: Whether the first slot of a block, that of the next token, predicts the token after it.
        block_attention: Whether the slots of a block attend to all of its slots, or to earlier ones.
    """

    concatenation: str
    trunk_state: str
    chain_state: str
    position_0: str
    anchor: str = "none"
    block_attention: str = "none"


Takes = Mapping[str, tuple[str, ...]]
"""The values of each convention that readers of a format accept; several where readers disagree, or where the
configuration says which. A convention that is not named does not apply."""


def check_export(owner: str, takes: Takes, found: Conventions) -> None:
    """Reject heads whose conventions no reader of a format follows.

    Args:
        owner: Name of the format.
        takes: Values that its readers accept.
        found: Conventions of the heads.

    Raises:
        ValueError: If a convention of the heads is not among the accepted values.
    """
    for name, value in found._asdict().items():
        if value not in takes.get(name, _NONE):
            refuse(
                owner,
                f"the heads have {name}={value}, readers of this format expect {' or '.join(takes.get(name, _NONE))}; "
                "build and train heads with that convention, or use another format.",
            )


def resolve(
    owner: str, takes: Takes, written: Mapping[str, str] | None, given: Mapping[str, str | None]
) -> Conventions:
    """Determine the conventions of heads from the file beside the tensors and the caller's arguments.

    Args:
        owner: Name of the format.
        takes: Values that its readers accept.
        written: Conventions read from the file beside the tensors; ``None`` without a file.
        given: Conventions given by the caller; ``None`` for each that the file decides.

    Raises:
        ValueError: If both differ, if neither gives a convention on which readers disagree, or if the format does not
            have the value.
    """
    found = {}
    for name, values in VALUES.items():
        argument, stored, accepted = given.get(name), (written or {}).get(name), takes.get(name, _NONE)
        if argument is not None and stored is not None and argument != stored:
            refuse(owner, f"{name}={argument} was given, but the file has {stored}; omit {name}, or give {stored}.")
        value = argument or stored or (accepted[0] if len(accepted) == 1 else None)
        if value is None:
            refuse(
                owner,
                f"the file does not specify {name}, and readers of this format disagree about it; "
                f"give {name}: {' or '.join(accepted)}.",
            )
        if value not in accepted:
            known = " or ".join(accepted if value in values else values)
            refuse(owner, f"{name} must be {known}, got {value}.")
        found[name] = value
    return Conventions(**found)
