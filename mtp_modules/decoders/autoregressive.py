"""Plain decoding: one token a forward pass."""

from collections.abc import Collection, Iterator, Sequence

from mtp_modules.decoders.generation import DecodableModel, Decoder, Round
from mtp_modules.decoders.loop import greedy_rounds


class AutoregressiveDecoder(Decoder):
    """Greedy decoding with horizon 1 alone: the baseline of every speed-up.

    Example:
        >>> from mtp_modules import LinearHeads, MTPModel, RecurrentTrunk
        >>> model = MTPModel(
        ...     trunk=RecurrentTrunk(vocab_size=9, d_model=8), heads=LinearHeads(d_model=8, num_horizons=1)
        ... )
        >>> generation = AutoregressiveDecoder().generate(model, [[1, 2], [3]], max_new_tokens=4)
        >>> [len(tokens) for tokens in generation.tokens], generation.stats.tokens_per_forward
        ([4, 4], 1.0)
    """

    def stream(
        self,
        model: DecodableModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
    ) -> Iterator[Round]:
        """Yield one token a row and round; see :class:`~mtp_modules.decoders.generation.Decoder`."""
        return greedy_rounds(
            model, prompts, num_drafts=0, max_new_tokens=max_new_tokens, stop_tokens=frozenset(stop_tokens)
        )
