"""Beam search: exact, exact and faster by drafts, and lossy over whole blocks."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields

from mtp_modules.core.checks import at_least, refuse, whole
from mtp_modules.decoders.beam.hypotheses import Beam, BeamPlan
from mtp_modules.decoders.beam.search import BeamSearch
from mtp_modules.decoders.drafting.drafter import HeadsDrafter, number_of_drafts
from mtp_modules.decoders.generation import Decoder, Generation
from mtp_modules.decoders.graphs.executor import Executor
from mtp_modules.decoders.request import DecodableModel, Request
from mtp_modules.decoders.results import DecodingStats, Round
from mtp_modules.decoders.sampling.batch import BatchSampling
from mtp_modules.decoders.sampling.parameters import SamplingParams


@dataclass(frozen=True)
class BeamGeneration(Generation):
    """The best beam of every prompt, and all its beams.

    ``stats.tokens`` are those of the best beams; a forward pass counts once for every prompt that took part; drafts are
    counted in steps of the search: how many a round could save at most, and how many it saved.

    Attributes:
        beams: Of each prompt, best first. Fewer than asked for where fewer texts are possible.
    """

    beams: list[list[Beam]]


class BeamSearchDecoder(Decoder):
    """What all beam searches share. A row's beams depend on its own prompt and stop rule, never on its neighbours.

    Nothing is sampled: ``sampling`` may only set ``allowed_tokens``, others then have probability 0; ``seed`` has no
    effect.
    """

    default_sampling = SamplingParams()

    def __init__(self, *, num_beams: int, length_penalty: float) -> None:
        num_beams = whole(self, "num_beams", num_beams, 1)
        at_least(self, "length_penalty", length_penalty, 0)
        if length_penalty == float("inf"):
            refuse(self, "length_penalty must be a finite number, got inf.")
        self.num_beams, self.length_penalty = num_beams, length_penalty

    @abstractmethod
    def plan(self, model: DecodableModel) -> BeamPlan:
        """Return how to search.

        Args:
            model: Trunk, heads and unembedding.

        Raises:
            ValueError: If the decoder asks for what the model cannot do.
        """

    def rounds(self, model: DecodableModel, request: Request) -> Iterator[Round]:
        """Yield the tokens that all beams of a prompt have come to agree on, maybe none; at the end, those of the best.

        In a round, ``drafted`` and ``accepted`` count steps of the search, not tokens.

        Args:
            model: Trunk, heads and unembedding.
            request: Checked.

        Raises:
            ValueError: If there are more beams or paths than tokens; if ``sampling`` sets more than ``allowed_tokens``.
        """
        return (done for search in self._searches(model, request) for done in search.rounds())

    def _collect(self, model: DecodableModel, request: Request) -> BeamGeneration:
        """Search to the end."""
        stats, found = DecodingStats(), dict[int, list[Beam]]()
        for search in self._searches(model, request):
            stats.count_arrays([done.arrays for done in search.rounds()])
            found |= search.beams()
        beams = [found[prompt] for prompt in range(len(request.prompts))]
        best = [of_prompt[0] for of_prompt in beams]
        return BeamGeneration([beam.tokens for beam in best], [beam.finish_reason for beam in best], stats, beams)

    def _searches(self, model: DecodableModel, request: Request) -> Iterator[BeamSearch]:
        """Yield searches for all prompts, each for some of them; all checks come first."""
        if isinstance(model, Executor):
            refuse(self, "has no compiled rounds; pass the model that compile_for_decoding was given.")
        plan = self.plan(model)
        for row in request.sampling:
            self._check_params(row)
        params = None
        if any(row.allowed_tokens is not None for row in request.sampling):
            params = BatchSampling(request.sampling, model.trunk.vocab_size, model.unembedding.weight.device)
        batches = [list(range(len(request.prompts)))]
        if plan.whole_blocks and model.trunk.max_positions is not None:
            batches = _apart(request, model.trunk.max_positions - plan.num_drafts)
        return (BeamSearch(model, _part(request, prompts), prompts, params, plan) for prompts in batches)

    def _check_params(self, params: SamplingParams) -> None:
        for name, usual in vars(SamplingParams()).items():
            value = getattr(params, name)
            if value != usual and name != "allowed_tokens":
                refuse(
                    self,
                    f"sampling has {name}={value}, but beams are ranked by the model's own probabilities at "
                    "temperature 1; give allowed_tokens alone, or leave sampling out.",
                )

    def _check_drafts(self, num_drafts: int | None, name: str, num_paths: int | None) -> None:
        """Check what the constructor of a search with drafts takes besides; it calls the paths by ``name``."""
        for argument, value in (("num_drafts", num_drafts), (name, num_paths)):
            if value is not None:
                whole(self, argument, value, 1)
        if num_paths is not None and num_paths < self.num_beams:
            refuse(self, f"{name} must be at least num_beams ({self.num_beams}), got {num_paths}.")

    def _plan_with_drafts(
        self, model: DecodableModel, num_drafts: int | None, name: str, num_paths: int | None, *, whole_blocks: bool
    ) -> BeamPlan:
        """Return a plan with drafts: by default one a horizon beyond the first, and twice as many paths as beams."""
        self._check_size("num_beams", self.num_beams, model)
        if num_paths is None:
            num_paths = min(2 * self.num_beams, model.trunk.vocab_size)
        self._check_size(name, num_paths, model)
        limits = HeadsDrafter().limits(model.heads)
        depth = number_of_drafts(self, num_drafts, limits, model.heads, instead="BeamDecoder")
        return BeamPlan(self.num_beams, self.length_penalty, depth, num_paths, whole_blocks)

    def _check_size(self, name: str, value: int, model: DecodableModel) -> None:
        if value > model.trunk.vocab_size:
            refuse(self, f"{name}={value} is more than the {model.trunk.vocab_size} tokens there are; lower it.")


class BeamDecoder(BeamSearchDecoder):
    r"""Exact beam search, one forward pass a token.

    A hypothesis with tokens :math:`y_1 .. y_n` has the score :math:`\sum_t \log p(y_t \mid x, y_{<t}) / n^\alpha`;
    :math:`p` is the model's own distribution at temperature 1, :math:`\alpha` the length penalty. The search starts
    with the empty hypothesis. A step extends each unfinished hypothesis by every token; of these and of the finished
    ones, the ``num_beams`` best are kept. A hypothesis is finished when its last token ends it by the stop rule, when
    it is ``max_new_tokens`` long, or when the trunk has no position left. The search ends when all that are kept are
    finished. Meister et al. 2020 (arXiv 2007.03909), algorithm 1: finished hypotheses keep their places in the beam.

    Scores are compared to the nearest :math:`2^{-30}`, for smaller differences are rounding. Where they tie, a finished
    hypothesis comes first, then the smaller last token, then the beam that was better a step before.

    Args:
        num_beams: How many hypotheses are kept.
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
        super().__init__(num_beams=num_beams, length_penalty=length_penalty)

    def plan(self, model: DecodableModel) -> BeamPlan:
        """Return a plan without drafts."""
        self._check_size("num_beams", self.num_beams, model)
        return BeamPlan(self.num_beams, self.length_penalty)


class DraftedBeamDecoder(BeamSearchDecoder):
    """Exact beam search, several steps a forward pass: the beams of :class:`BeamDecoder`, and their scores.

    Before each forward pass the heads draft: a beam search over their own distributions starts from all hypotheses of a
    prompt and keeps ``num_paths`` paths at each depth, among them those that ``num_beams`` beams would follow. The
    model reads all those paths in one pass, a row each. A step of the search needs the distribution after every
    unfinished hypothesis; as long as all of them are among the paths, the next step needs no further pass. So drafts
    change how many forward passes there are and nothing else, up to scores that differ by rounding. The idea is that of
    Stern et al. 2018 (arXiv 1811.03115), for beams.

    It pays where drafts are good and several rows cost little more than one: a forward pass has up to ``num_paths``
    rows a depth and prompt, each of ``num_drafts + 1`` tokens, and a hypothesis that is continued in several rows has
    its states copied to each.

    Args:
        num_beams: How many hypotheses are kept.
        length_penalty: See :class:`BeamDecoder`.
        num_drafts: Most drafts one after the other; one a horizon beyond the first if ``None``.
        num_paths: Drafted paths that are kept at each depth; twice ``num_beams`` if ``None``. More of them hold all
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
        super().__init__(num_beams=num_beams, length_penalty=length_penalty)
        self._check_drafts(num_drafts, "num_paths", num_paths)
        self.num_drafts, self.num_paths = num_drafts, num_paths

    def plan(self, model: DecodableModel) -> BeamPlan:
        """Return a plan with drafts."""
        return self._plan_with_drafts(model, self.num_drafts, "num_paths", self.num_paths, whole_blocks=False)


class JointBeamDecoder(BeamSearchDecoder):
    """Beam search over whole blocks that the heads propose. **Lossy**: the beams are not those of :class:`BeamDecoder`.

    Each round, a beam search over the heads' distributions of the next ``num_drafts`` tokens, which starts from all
    hypotheses of a prompt, proposes ``num_blocks`` blocks. One forward pass gives each block its joint probability
    under the model's own distribution, and the distribution of the token after it. The ``num_beams`` best of all blocks
    with one token more are kept. A round emits ``num_drafts + 1`` tokens, however good the drafts are.

    What it loses: a text that the heads do not propose is never found, however likely the model finds it, so one beam
    is not greedy decoding, and with poor heads the text is poor. What it may win over :class:`BeamDecoder`: a block is
    scored as a whole, so a start that looks poor at first does not drop out. The scores that it returns are the model's
    own, and so can be compared with those of :class:`BeamDecoder`.

    Args:
        num_beams: How many hypotheses are kept.
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
        >>> generation.stats.tokens_per_forward  # the prompt's pass emits 1 token, two others 3 each
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
        super().__init__(num_beams=num_beams, length_penalty=length_penalty)
        self._check_drafts(num_drafts, "num_blocks", num_blocks)
        self.num_drafts, self.num_blocks = num_drafts, num_blocks

    def plan(self, model: DecodableModel) -> BeamPlan:
        """Return a plan with whole blocks."""
        return self._plan_with_drafts(model, self.num_drafts, "num_blocks", self.num_blocks, whole_blocks=True)


def _apart(request: Request, room: int) -> list[list[int]]:
    """Give a prompt that may come near the trunk's last position a search of its own.

    All rows of a batch read equally many tokens, so near the end it would cut its neighbours' blocks short.
    """
    wants = [len(prompt) + budget - 1 for prompt, budget in zip(request.prompts, request.budgets, strict=True)]
    together = [row for row, length in enumerate(wants) if length <= room]
    alone = [[row] for row, length in enumerate(wants) if length > room]
    return [together, *alone] if together else alone


def _part(request: Request, rows: list[int]) -> Request:
    return Request(*([getattr(request, part.name)[row] for row in rows] for part in fields(request)))
