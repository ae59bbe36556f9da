"""Beam search: exact, exact and faster by drafts, and lossy over whole blocks."""

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.decoders.beam.generation import BeamSearchDecoder
from mtp_modules.decoders.beam.hypotheses import BeamPlan
from mtp_modules.decoders.request import DecodableModel


class BeamDecoder(BeamSearchDecoder):
    r"""Exact beam search, one forward pass a token.

    A hypothesis with tokens :math:`y_1 .. y_n` has the score :math:`\sum_t \log p(y_t \mid x, y_{<t}) / n^\alpha`;
    :math:`p` is the model's own law at temperature 1, :math:`\alpha` the length penalty. The search starts with the
    empty hypothesis. In every step each hypothesis that is not finished is replaced by all that it makes with one token
    more; of these, and of the finished ones as they are, the ``num_beams`` best stay. A hypothesis is finished when its
    last token ends it by the stop rule, when it is ``max_new_tokens`` long, or when the trunk has no position left. The
    search ends when all that stayed are finished. Meister et al. 2020 (arXiv 2007.03909), algorithm 1: finished
    hypotheses keep their places in the beam.

    Scores are compared to the nearest :math:`2^{-30}`, for what is less is rounding. Where they tie, a finished
    hypothesis comes first, then the smaller last token, then the beam that was better a step before.

    Args:
        num_beams: How many hypotheses stay.
        length_penalty: :math:`\alpha`; 0 ranks by the log-probability, 1 by its mean over the tokens.

    Raises:
        ValueError: If ``num_beams`` is below 1, or ``length_penalty`` below 0 or infinite; when decoding, if there are
            more beams than tokens.

    Example:
        >>> from mtp_modules import LinearHeads, MTPModel, RecurrentTrunk
        >>> model = MTPModel(
        ...     trunk=RecurrentTrunk(vocab_size=9, d_model=8), heads=LinearHeads(d_model=8, num_horizons=1)
        ... ).eval()
        >>> generation = BeamDecoder(num_beams=3).generate(model, [[1, 2], [3]], max_new_tokens=4)
        >>> [[len(beam.tokens) for beam in beams] for beams in generation.beams]
        [[4, 4, 4], [4, 4, 4]]
        >>> generation.tokens[0] == generation.beams[0][0].tokens
        True
    """

    def __init__(self, *, num_beams: int = 4, length_penalty: float = 0.0) -> None:
        self._check_beams(num_beams, length_penalty)
        self.num_beams, self.length_penalty = num_beams, length_penalty

    def plan(self, model: DecodableModel) -> BeamPlan:
        """Return a plan without drafts."""
        self._check_size("num_beams", self.num_beams, model)
        return BeamPlan(self.num_beams, self.length_penalty)


class DraftedBeamDecoder(BeamSearchDecoder):
    """Exact beam search, several steps a forward pass: the beams of :class:`BeamDecoder`, and their scores.

    Before each forward pass the heads foresee the search: a beam search over their own laws, which starts from all
    hypotheses of a prompt and keeps ``num_paths`` paths at each depth, those among them that ``num_beams`` beams would
    follow. The model reads all those paths in one pass, a
    row each. A step of the search needs the law after every hypothesis that is not finished; as long as all of them are
    among the paths, the next step needs no further pass. So drafts change how many forward passes there are and nothing
    else, up to scores that differ by rounding. The idea is that of Stern et al. 2018 (arXiv 1811.03115), for beams.

    It pays where drafts are good and several rows cost little more than one: a forward pass has up to ``num_paths``
    rows a depth and prompt, each of ``num_drafts + 1`` tokens, and the states of all rows are copied when they fork.

    Args:
        num_beams: How many hypotheses stay.
        length_penalty: See :class:`BeamDecoder`.
        num_drafts: Most drafts one after the other; one a horizon beyond the first if ``None``.
        num_paths: Drafted paths that are followed at each depth; twice ``num_beams`` if ``None``. More of them hold all
            hypotheses more often, and cost more.

    Raises:
        ValueError: As :class:`BeamDecoder`; if ``num_drafts`` is below 1, or above what the heads can draft; if
            ``num_paths`` is below ``num_beams``.

    Example:
        >>> from mtp_modules import LinearHeads, MTPModel, RecurrentTrunk
        >>> model = MTPModel(
        ...     trunk=RecurrentTrunk(vocab_size=9, d_model=8), heads=LinearHeads(d_model=8, num_horizons=3)
        ... ).double().eval()
        >>> plain = BeamDecoder(num_beams=3).generate(model, [[1, 2], [3]], max_new_tokens=6)
        >>> drafted = DraftedBeamDecoder(num_beams=3, num_paths=9).generate(model, [[1, 2], [3]], max_new_tokens=6)
        >>> drafted.tokens == plain.tokens, drafted.stats.forwards <= plain.stats.forwards
        (True, True)
    """

    def __init__(
        self,
        *,
        num_beams: int = 4,
        length_penalty: float = 0.0,
        num_drafts: int | None = None,
        num_paths: int | None = None,
    ) -> None:
        self._check_beams(num_beams, length_penalty)
        if num_drafts is not None:
            at_least(self, "num_drafts", num_drafts, 1)
        if num_paths is not None and num_paths < num_beams:
            refuse(self, f"num_paths must be at least num_beams ({num_beams}), got {num_paths}.")
        self.num_beams, self.length_penalty = num_beams, length_penalty
        self.num_drafts, self.num_paths = num_drafts, num_paths

    def plan(self, model: DecodableModel) -> BeamPlan:
        """Return a plan with drafts."""
        self._check_size("num_beams", self.num_beams, model)
        paths = self._num_paths("num_paths", self.num_paths, self.num_beams, model)
        depth = self._num_drafts(model.heads, self.num_drafts)
        return BeamPlan(self.num_beams, self.length_penalty, depth, paths)


class JointBeamDecoder(BeamSearchDecoder):
    """Beam search over whole blocks that the heads propose. **Lossy**: the beams are not those of :class:`BeamDecoder`.

    Each round, a beam search over the heads' laws of the next ``num_drafts`` tokens, which starts from all hypotheses
    of a prompt, proposes ``num_blocks`` blocks. One forward pass gives each block its joint probability by the model's
    own law, and the law of the token after it. The ``num_beams`` best of all blocks with one token more stay. A round
    brings ``num_drafts + 1`` tokens, whatever the drafts are worth.

    What it loses: a text that the heads do not propose is never found, however likely the model finds it, so one beam
    is not greedy decoding, and with poor heads the text is poor. What it may win over :class:`BeamDecoder`: a block is
    judged as a whole, so a start that looks poor at first does not drop out. The scores that it returns are the model's
    own, and so can be compared with those of :class:`BeamDecoder`.

    Args:
        num_beams: How many hypotheses stay.
        length_penalty: See :class:`BeamDecoder`.
        num_drafts: Tokens of a block; one a horizon beyond the first if ``None``.
        num_blocks: How many blocks the heads propose for a prompt; twice ``num_beams`` if ``None``.

    Raises:
        ValueError: As :class:`DraftedBeamDecoder`; if ``num_blocks`` is below ``num_beams``.

    Example:
        >>> from mtp_modules import LinearHeads, MTPModel, RecurrentTrunk
        >>> model = MTPModel(
        ...     trunk=RecurrentTrunk(vocab_size=9, d_model=8), heads=LinearHeads(d_model=8, num_horizons=3)
        ... ).eval()
        >>> generation = JointBeamDecoder(num_beams=2).generate(model, [[1, 2], [3]], max_new_tokens=7)
        >>> generation.stats.tokens_per_forward  # the prompt's pass brings 1 token, two others 3 each
        2.3333333333333335
    """

    def __init__(
        self,
        *,
        num_beams: int = 4,
        length_penalty: float = 0.0,
        num_drafts: int | None = None,
        num_blocks: int | None = None,
    ) -> None:
        self._check_beams(num_beams, length_penalty)
        if num_drafts is not None:
            at_least(self, "num_drafts", num_drafts, 1)
        if num_blocks is not None and num_blocks < num_beams:
            refuse(self, f"num_blocks must be at least num_beams ({num_beams}), got {num_blocks}.")
        self.num_beams, self.length_penalty = num_beams, length_penalty
        self.num_drafts, self.num_blocks = num_drafts, num_blocks

    def plan(self, model: DecodableModel) -> BeamPlan:
        """Return a plan with blocks."""
        self._check_size("num_beams", self.num_beams, model)
        blocks = self._num_paths("num_blocks", self.num_blocks, self.num_beams, model)
        depth = self._num_drafts(model.heads, self.num_drafts)
        return BeamPlan(self.num_beams, self.length_penalty, depth, blocks, whole_blocks=True)
