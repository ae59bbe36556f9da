"""Speculative decoding: drafts that one forward pass of the same model verifies."""

from collections.abc import Iterator, Sequence

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.decoders.drafting.drafter import Drafter, HeadsDrafter
from mtp_modules.decoders.drafting.policies import DraftPolicy, FixedDepth
from mtp_modules.decoders.drafting.trees import DraftTree
from mtp_modules.decoders.generation import DecodableModel, Decoder, make_request
from mtp_modules.decoders.loop import rounds
from mtp_modules.decoders.rounds import Round
from mtp_modules.decoders.sampling.parameters import SamplingParams
from mtp_modules.decoders.sampling.stopping import StopRule
from mtp_modules.decoders.speculation import Speculation
from mtp_modules.decoders.verification.rules import Acceptance, ExactMatch


class SpeculativeDecoder(Decoder):
    """Decoding that emits every draft that the model itself would have chosen.

    By default the output is that of :class:`AutoregressiveDecoder`, token for token, drawn tokens too, up to ties that
    rounding decides: a chunk of several positions and a single one add up in different orders. Stern et al. 2018
    (arXiv 1811.03115).

    Args:
        num_drafts: Most drafts ``K`` a round; as many as the drafter usually makes if ``None``.
        acceptance: Which drafts hold; :class:`~mtp_modules.decoders.ExactMatch` if ``None``.
        policy: How many tokens to draft in a round; always ``num_drafts`` if ``None``.
        drafter: Where drafts come from; the model's heads if ``None``.
        tree: Draft a tree of this shape with the heads, instead of a chain; its depth is then the number of drafts.
        return_distributions: Let each :class:`~mtp_modules.decoders.Round` tell the laws of its drafts and of the model.

    Raises:
        ValueError: If ``num_drafts`` is below 1, or above what can be drafted; if a tree goes with another acceptance
            than :class:`~mtp_modules.decoders.ExactMatch`, with a drafter, with ``num_drafts`` or with ``return_distributions``;
            when decoding, if the trunk cannot read trees.

    Example:
        >>> from mtp_modules import LinearHeads, MTPModel, RecurrentTrunk
        >>> model = MTPModel(
        ...     trunk=RecurrentTrunk(vocab_size=9, d_model=8), heads=LinearHeads(d_model=8, num_horizons=4)
        ... ).double()
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
            at_least(self, "num_drafts", num_drafts, 1)
        self.num_drafts = num_drafts
        self.acceptance = ExactMatch() if acceptance is None else acceptance
        self.policy = FixedDepth() if policy is None else policy
        self.drafter = HeadsDrafter() if drafter is None else drafter
        self.tree, self.return_distributions = tree, return_distributions
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
                refuse(
                    self,
                    "return_distributions tells the laws of a chain of drafts, not of a tree; leave one of the two out.",
                )

    def stream(
        self,
        model: DecodableModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        stop: StopRule | Sequence[StopRule] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Iterator[Round]:
        """Yield the tokens of each round; see :class:`~mtp_modules.decoders.generation.Decoder`."""
        most = self.most(model)
        request = make_request(model, prompts, max_new_tokens, stop, sampling, seed)
        how = Speculation(self.drafter, self.acceptance, self.policy, most, self.tree, self.return_distributions)
        return rounds(model, request, how)

    def most(self, model: DecodableModel) -> int:
        """Return the most drafts of a round, one after the other.

        Args:
            model: Trunk, heads and unembedding.

        Raises:
            ValueError: If it can draft nothing, or not so many; if the trunk cannot read trees.
        """
        usual, possible = self.drafter.most(model.heads)
        if usual < 1:
            refuse(
                self,
                f"{type(model.heads).__name__} with {len(model.heads.horizons)} horizon can draft nothing; "
                "use AutoregressiveDecoder, PromptLookup, or heads with more horizons.",
            )
        if self.num_drafts is not None and possible is not None and self.num_drafts > possible:
            refuse(
                self,
                f"num_drafts={self.num_drafts} is more than the {possible} that {type(model.heads).__name__} can "
                "draft; lower it.",
            )
        if self.tree is None:
            return self.num_drafts or usual
        model.heads.check_num_drafts(self.tree.depth)
        if not model.trunk.supports_trees:
            refuse(self, f"{type(model.trunk).__name__} cannot read a tree of drafts; leave tree out.")
        return self.tree.depth
