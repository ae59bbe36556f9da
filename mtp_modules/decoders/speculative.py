"""Self-speculative decoding: the model's own heads draft, one forward pass verifies."""

from collections.abc import Collection, Iterator, Sequence

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.decoders.generation import DecodableModel, Decoder, Round
from mtp_modules.decoders.loop import greedy_rounds


class SpeculativeDecoder(Decoder):
    """Greedy decoding that emits every draft that the model itself would have chosen.

    The output is that of :class:`AutoregressiveDecoder`, token for token, up to ties that rounding decides: a chunk of
    several positions and a single one add up in different orders. Stern et al. 2018 (arXiv 1811.03115).

    Args:
        num_drafts: Most drafts ``K`` a round; as many as the heads can draft if ``None``.

    Raises:
        ValueError: If ``num_drafts`` is below 1, or above what the heads can draft.

    Example:
        >>> from mtp_modules import LinearHeads, MTPModel, RecurrentTrunk
        >>> model = MTPModel(
        ...     trunk=RecurrentTrunk(vocab_size=9, d_model=8), heads=LinearHeads(d_model=8, num_horizons=4)
        ... ).double()
        >>> from mtp_modules import AutoregressiveDecoder
        >>> plain = AutoregressiveDecoder().generate(model, [[1, 2], [3]], max_new_tokens=9)
        >>> SpeculativeDecoder().generate(model, [[1, 2], [3]], max_new_tokens=9).tokens == plain.tokens
        True
    """

    def __init__(self, *, num_drafts: int | None = None) -> None:
        if num_drafts is not None:
            at_least(self, "num_drafts", num_drafts, 1)
        self.num_drafts = num_drafts

    def stream(
        self,
        model: DecodableModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
    ) -> Iterator[Round]:
        """Yield the tokens of each round; see :class:`~mtp_modules.decoders.generation.Decoder`."""
        most = model.heads.max_drafts
        if most < 1:
            refuse(
                self,
                f"{type(model.heads).__name__} with {len(model.heads.horizons)} horizon can draft nothing; "
                "use AutoregressiveDecoder, or heads with more horizons.",
            )
        if self.num_drafts is not None and self.num_drafts > most:
            refuse(
                self,
                f"num_drafts={self.num_drafts} is more than the {most} that {type(model.heads).__name__} can draft.",
            )
        return greedy_rounds(
            model,
            prompts,
            num_drafts=self.num_drafts or most,
            max_new_tokens=max_new_tokens,
            stop_tokens=frozenset(stop_tokens),
        )
