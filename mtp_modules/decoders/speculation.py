"""What a run of the decoding loop is told to do."""

from dataclasses import dataclass

from mtp_modules.decoders.draft_policy import DraftPolicy
from mtp_modules.decoders.drafting import Drafter
from mtp_modules.decoders.tree import DraftTree
from mtp_modules.decoders.verification import Acceptance


@dataclass(frozen=True)
class Speculation:
    """How a run drafts and verifies.

    Attributes:
        drafter: Where drafts come from; ``None`` for plain decoding.
        acceptance: Which drafts hold.
        policy: How many tokens are drafted.
        most: Most drafts of a round, one after the other.
        tree: Shape of the drafts; ``None`` for a chain.
        keep_laws: Whether rounds tell the laws of drafts and model; not with a tree.
    """

    drafter: Drafter | None
    acceptance: Acceptance
    policy: DraftPolicy
    most: int
    tree: DraftTree | None = None
    keep_laws: bool = False
