"""Speculative decoding: drafts that one forward pass of the same model verifies."""

from collections.abc import Iterator

from mtp_modules.core.checks import refuse, whole
from mtp_modules.decoders.drafting.drafter import Drafter, HeadsDrafter, number_of_drafts
from mtp_modules.decoders.drafting.policies import DraftPolicy, FixedDepth
from mtp_modules.decoders.drafting.trees import DraftTree, TreeDrafter
from mtp_modules.decoders.generation import Decoder
from mtp_modules.decoders.graphs.eager import as_executor
from mtp_modules.decoders.loop import Speculation, rounds
from mtp_modules.decoders.request import DecodableModel, Request
from mtp_modules.decoders.results import Round
from mtp_modules.decoders.verification.rules import Acceptance, ExactMatch


class SpeculativeDecoder(Decoder):
    """Decoding that emits every draft that the model itself would have chosen.

    By default the output is that of :class:`AutoregressiveDecoder`, token for token, sampled tokens too, up to ties
    that rounding decides: a chunk of several positions and a single one add up in different orders. Stern et al. 2018
    (arXiv 1811.03115).

    Args:
        num_drafts: Most drafts ``K`` a round; as many as the drafter usually makes if ``None``.
        acceptance: Which drafts are accepted; :class:`~mtp_modules.decoders.ExactMatch` if ``None``.
        policy: How many tokens to draft in a round; always ``num_drafts`` if ``None``.
        drafter: Where drafts come from; the model's heads if ``None``.
        tree: Draft a tree of this shape with the heads, instead of a chain; its depth is then the number of drafts.
        return_distributions: Give each :class:`~mtp_modules.decoders.Round` the distributions of its drafts and of the
            model.

    Raises:
        ValueError: If ``num_drafts`` is below 1; if a tree goes with another acceptance than
            :class:`~mtp_modules.decoders.ExactMatch`, with a drafter, with ``num_drafts`` or with
            ``return_distributions``; when decoding, before a prompt is read, if there is nothing to draft, more drafts
            are asked for than the heads have, a tree is wider than the vocabulary, or the trunk cannot read trees.

    Example:
        >>> from mtp_modules import LinearHeads, MTPModel, RecurrentTrunk
        >>> model = MTPModel(
        ...     trunk=RecurrentTrunk(vocab_size=9, d_model=8), heads=LinearHeads(d_model=8, num_horizons=4)
        ... ).double().eval()
        >>> from mtp_modules import AutoregressiveDecoder
        >>> from mtp_modules.decoders import SamplingParams
        >>> options = {"max_new_tokens": 9, "sampling": SamplingParams(temperature=0.8), "seed": 3}
        >>> plain = AutoregressiveDecoder().generate(model, [[1, 2], [3]], **options)
        >>> SpeculativeDecoder().generate(model, [[1, 2], [3]], **options).tokens == plain.tokens
        True
    """

    def __init__(
        self,
        *,
        num_drafts: int | None = None,
        acceptance: Acceptance | None = None,
        policy: DraftPolicy | None = None,
        drafter: Drafter | None = None,
        tree: DraftTree | None = None,
        return_distributions: bool = False,
    ) -> None:
        if num_drafts is not None:
            num_drafts = whole(self, "num_drafts", num_drafts, 1)
        self.num_drafts = num_drafts
        self.acceptance = ExactMatch() if acceptance is None else acceptance
        self.policy = FixedDepth() if policy is None else policy
        self.return_distributions = return_distributions
        self.drafter: Drafter = HeadsDrafter() if drafter is None else drafter
        if tree is not None:
            if not isinstance(self.acceptance, ExactMatch):
                refuse(
                    self,
                    f"a tree is verified by the model's own choices, which {type(self.acceptance).__name__} does not "
                    "make; leave acceptance out.",
                )
            for name, value in (("num_drafts", num_drafts), ("drafter", drafter)):
                if value is not None:
                    refuse(self, f"{name} does not go with a tree, which says how the heads draft; leave it out.")
            if return_distributions:
                refuse(self, "return_distributions needs a chain of drafts, not a tree; leave one of the two out.")
            self.drafter = TreeDrafter(tree=tree)

    def rounds(self, model: DecodableModel, request: Request) -> Iterator[Round]:
        """Yield the accepted drafts of each round and one token more."""
        how = Speculation(self.drafter, self.acceptance, self.policy, self.most(model), self.return_distributions)
        return rounds(as_executor(model), request, how)

    def most(self, model: DecodableModel) -> int:
        """Return the most drafts of a round, one after the other.

        Raises:
            ValueError: If the drafter cannot draft, or not so many tokens, for this model.
        """
        limits, instead = self.drafter.limits(model.heads), "AutoregressiveDecoder, PromptLookup"
        most = number_of_drafts(self, self.num_drafts, limits, model.heads, instead=instead)
        self.drafter.check(model.trunk, model.heads)
        self.policy.check(model.heads)
        return most
