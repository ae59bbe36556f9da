"""What beam searches return, and the contract that they share."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.interfaces import Heads
from mtp_modules.decoders.beam.hypotheses import Beam, BeamPlan
from mtp_modules.decoders.beam.search import BeamSearch
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


class BeamSearchDecoder(Decoder):
    """What all beam searches share. A row's beams depend on its own prompt and stop rule, never on its neighbours.

    Nothing is sampled: ``sampling`` may only say which tokens are allowed, others then have probability 0, and ``seed``
    has no effect.
    """

    default_sampling = SamplingParams()

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
            ValueError: If there are more beams or paths than tokens; if ``sampling`` says more than which tokens are
                allowed.
        """
        return (
            replace(done, arrays=done.arrays._replace(rows=np.array(rows)[done.arrays.rows]))
            for rows, search in self._searches(model, request)
            for done in search.rounds()
        )

    def _collect(self, model: DecodableModel, request: Request) -> BeamGeneration:
        """Search to the end."""
        stats = DecodingStats()
        beams: list[list[Beam]] = [[] for _ in request.prompts]
        for rows, search in self._searches(model, request):
            stats.count_arrays([done.arrays for done in search.rounds()])
            for row, found in zip(rows, search.beams(), strict=True):
                beams[row] = found
        best = [found[0] for found in beams]
        return BeamGeneration([beam.tokens for beam in best], [beam.finish_reason for beam in best], stats, beams)

    def _searches(self, model: DecodableModel, request: Request) -> Iterator[tuple[list[int], BeamSearch]]:
        """Yield searches, and which prompts each of them is for; all checks come first."""
        if isinstance(model, Executor):
            refuse(self, "has no compiled rounds; pass the model that compile_for_decoding was given.")
        plan = self.plan(model)
        for of_prompt in request.sampling:
            self._check_params(of_prompt)
        params = None
        if any(row.allowed_tokens is not None for row in request.sampling):
            params = BatchSampling(request.sampling, model.trunk.vocab_size, model.unembedding.weight.device)
        batches = [list(range(len(request.prompts)))]
        if plan.whole_blocks and model.trunk.max_positions is not None:
            batches = _apart(request, model.trunk.max_positions - plan.num_drafts)
        return (
            (rows, BeamSearch(model, _part(request, rows), None if params is None else params.select(rows), plan))
            for rows in batches
        )

    def _check_params(self, params: SamplingParams) -> None:
        for name, usual in vars(SamplingParams()).items():
            value = getattr(params, name)
            if value != usual and name not in ("allowed_tokens", "_description"):
                refuse(
                    self,
                    f"sampling has {name}={value}, but beams are ranked by the model's own probabilities at "
                    "temperature 1; give allowed_tokens alone, or leave sampling out.",
                )

    def _check_beams(self, num_beams: int, length_penalty: float) -> None:
        at_least(self, "num_beams", num_beams, 1)
        at_least(self, "length_penalty", length_penalty, 0)
        if length_penalty == float("inf"):
            refuse(self, "length_penalty must be a finite number, got inf.")

    def _check_size(self, name: str, value: int, model: DecodableModel) -> None:
        if value > model.trunk.vocab_size:
            refuse(self, f"{name}={value} is more than the {model.trunk.vocab_size} tokens there are; lower it.")

    def _num_paths(self, name: str, wanted: int | None, num_beams: int, model: DecodableModel) -> int:
        """Return how many drafts to follow at each depth; by default twice the beams, if there are so many tokens."""
        if wanted is None:
            return min(2 * num_beams, model.trunk.vocab_size)
        self._check_size(name, wanted, model)
        return wanted

    def _num_drafts(self, heads: Heads, wanted: int | None) -> int:
        """Return how deep to draft, after a look at what the heads can."""
        usual, possible = max(heads.horizons) - 1, heads.max_drafts
        if usual < 1:
            refuse(
                self,
                f"{type(heads).__name__} with {len(heads.horizons)} horizon can draft nothing; "
                "use BeamDecoder, or heads with more horizons.",
            )
        if wanted is not None and possible is not None and wanted > possible:
            refuse(
                self,
                f"num_drafts={wanted} is more than the {possible} that {type(heads).__name__} can draft; lower it.",
            )
        return usual if wanted is None else wanted
