"""What a run of the decoding loop is told to do."""

from dataclasses import dataclass

from mtp_modules.decoders.drafting.drafter import Drafter
from mtp_modules.decoders.drafting.policies import DraftPolicy
from mtp_modules.decoders.drafting.trees import DraftTree
from mtp_modules.decoders.verification.rules import Acceptance


@dataclass(frozen=True)
class Speculation:
    """How a run drafts and verifies.

    Attributes:
        drafter: Where drafts come from; ``None`` for plain decoding.
        acceptance: Which drafts hold.
        policy: How many tokens are drafted.
        most: Most drafts of a round, one after the other.
        tree: Shape of the drafts; ``None`` for a chain.
        return_distributions: Whether rounds tell the laws of drafts and model; not with a tree.
    """

    drafter: Drafter | None
    acceptance: Acceptance
    policy: DraftPolicy
    most: int
    tree: DraftTree | None = None
    return_distributions: bool = False
