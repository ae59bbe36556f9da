"""Plain decoding: one token a forward pass."""

from collections.abc import Iterator

from mtp_modules.decoders.drafting.policies import FixedDepth
from mtp_modules.decoders.generation import Decoder
from mtp_modules.decoders.graphs.eager import as_executor
from mtp_modules.decoders.loop import Speculation, rounds
from mtp_modules.decoders.request import DecodableModel, Request
from mtp_modules.decoders.results import Round
from mtp_modules.decoders.verification.rules import ExactMatch


class AutoregressiveDecoder(Decoder):
    """Decoding with horizon 1 alone: the baseline of every speed-up.

    Args:
        return_distributions: Give each :class:`~mtp_modules.decoders.Round` the distributions of its tokens.

    Example:
        >>> from mtp_modules import LinearHeads, MTPModel, RecurrentTrunk
        >>> model = MTPModel(
        ...     trunk=RecurrentTrunk(vocab_size=9, d_model=8), heads=LinearHeads(d_model=8, num_horizons=1)
        ... ).eval()
        >>> generation = AutoregressiveDecoder().generate(model, [[1, 2], [3]], max_new_tokens=4)
        >>> [len(tokens) for tokens in generation.tokens], generation.stats.tokens_per_forward
        ([4, 4], 1.0)
    """

    def __init__(self, *, return_distributions: bool = False) -> None:
        self.return_distributions = return_distributions

    def rounds(self, model: DecodableModel, request: Request) -> Iterator[Round]:
        """Yield one token a row and round."""
        how = Speculation(None, ExactMatch(), FixedDepth(), 0, return_distributions=self.return_distributions)
        return rounds(as_executor(model), request, how)
