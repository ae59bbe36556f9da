"""Plain decoding: one token a forward pass."""

from collections.abc import Iterator, Sequence

from mtp_modules.decoders.drafting.policies import FixedDepth
from mtp_modules.decoders.generation import DecodableModel, Decoder, make_request
from mtp_modules.decoders.loop import rounds
from mtp_modules.decoders.rounds import Round
from mtp_modules.decoders.sampling.parameters import SamplingParams
from mtp_modules.decoders.sampling.stopping import StopRule
from mtp_modules.decoders.speculation import Speculation
from mtp_modules.decoders.verification.rules import ExactMatch


class AutoregressiveDecoder(Decoder):
    """Decoding with horizon 1 alone: the baseline of every speed-up.

    Args:
        return_distributions: Let each :class:`~mtp_modules.decoders.Round` tell the laws that its tokens were drawn from.

    Example:
        >>> from mtp_modules import LinearHeads, MTPModel, RecurrentTrunk
        >>> model = MTPModel(
        ...     trunk=RecurrentTrunk(vocab_size=9, d_model=8), heads=LinearHeads(d_model=8, num_horizons=1)
        ... )
        >>> generation = AutoregressiveDecoder().generate(model, [[1, 2], [3]], max_new_tokens=4)
        >>> [len(tokens) for tokens in generation.tokens], generation.stats.tokens_per_forward
        ([4, 4], 1.0)
    """

    def __init__(self, *, return_distributions: bool = False) -> None:
        self.return_distributions = return_distributions

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
        """Yield one token a row and round; see :class:`~mtp_modules.decoders.generation.Decoder`."""
        request = make_request(model, prompts, max_new_tokens, stop, sampling, seed)
        how = Speculation(None, ExactMatch(), FixedDepth(), most=0, return_distributions=self.return_distributions)
        return rounds(model, request, how)
