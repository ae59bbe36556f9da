"""What beam searches return, and the contract that they share."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.interfaces import Heads
from mtp_modules.decoders.beam.hypotheses import Beam, BeamPlan
from mtp_modules.decoders.beam.search import BeamSearch
from mtp_modules.decoders.generation import DecodableModel, Decoder, Generation, Request, make_request
from mtp_modules.decoders.graphs.executor import GraphModel
from mtp_modules.decoders.rounds import DecodingStats, Round
from mtp_modules.decoders.sampling.parameters import BatchSampling, SamplingParams
from mtp_modules.decoders.sampling.stopping import StopRule


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
    """What all beam searches share. A row's beams depend on its own prompt and stop rule, never on its neighbours."""

    @abstractmethod
    def plan(self, model: DecodableModel) -> BeamPlan:
        """Return how to search.

        Args:
            model: Trunk, heads and unembedding.

        Raises:
            ValueError: If the decoder asks for what the model cannot do.
        """

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
        """Yield the tokens that all beams of a prompt have come to agree on, maybe none; at the end, those of the best.

        In a round, ``drafted`` and ``accepted`` count steps of the search, not the tokens that it brings.

        Args:
            model: Trunk, heads and unembedding.
            prompts: Token ids, of any lengths.
            max_new_tokens: Budget of every prompt, or of each.
            stop: When a beam ends by its own words, for all prompts or for each; by the budget alone if ``None``.
            sampling: Nothing is drawn; it may only say which tokens are allowed. Others then have probability 0.
            seed: Of no effect.

        Raises:
            ValueError: See :class:`~mtp_modules.decoders.generation.Decoder`; if there are more beams or paths than
                tokens; if ``sampling`` says more than which tokens are allowed.
        """
        searches = self._searches(model, prompts, max_new_tokens, stop, sampling, seed)
        return (
            replace(done, arrays=done.arrays._replace(rows=np.array(rows)[done.arrays.rows]))
            for rows, search in searches
            for done in search.rounds()
        )

    def generate(
        self,
        model: DecodableModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        stop: StopRule | Sequence[StopRule] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        seed: int | Sequence[int] = 0,
    ) -> BeamGeneration:
        """Search to the end; see :meth:`stream` for the arguments."""
        started = time.perf_counter()
        stats = DecodingStats()
        beams: list[list[Beam]] = [[] for _ in prompts]
        for rows, search in self._searches(model, prompts, max_new_tokens, stop, sampling, seed):
            stats.count_arrays([done.arrays for done in search.rounds()])
            for row, found in zip(rows, search.beams(), strict=True):
                beams[row] = found
        stats.seconds = time.perf_counter() - started
        best = [found[0] for found in beams]
        return BeamGeneration([beam.tokens for beam in best], [beam.finish_reason for beam in best], stats, beams)

    def _searches(
        self,
        model: DecodableModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        stop: StopRule | Sequence[StopRule] | None,
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        seed: int | Sequence[int],
    ) -> Iterator[tuple[list[int], BeamSearch]]:
        """Yield searches, and which prompts each of them is for; all checks come first."""
        if isinstance(model, GraphModel):
            refuse(self, f"has no {model.done} rounds; pass the model that {model.maker} was given.")
        plan = self.plan(model)
        sampling = SamplingParams() if sampling is None else sampling
        request = make_request(model, prompts, max_new_tokens, stop, sampling, seed)
        for law in request.laws:
            self._check_law(law)
        laws = None
        if any(law.allowed_tokens is not None for law in request.laws):
            laws = BatchSampling(request.laws, model.trunk.vocab_size, model.unembedding.weight.device)
        batches = [list(range(len(request.prompts)))]
        if plan.whole_blocks and model.trunk.max_positions is not None:
            batches = _apart(request, model.trunk.max_positions - plan.num_drafts)
        return (
            (rows, BeamSearch(model, _part(request, rows), None if laws is None else laws.select(rows), plan))
            for rows in batches
        )

    def _check_law(self, law: SamplingParams) -> None:
        for name, usual in vars(SamplingParams()).items():
            value = getattr(law, name)
            if value != usual and name not in ("allowed_tokens", "_description"):
                refuse(
                    self,
                    f"sampling has {name}={value}, but beams are ranked by the model's own law at temperature 1; "
                    "give allowed_tokens alone, or leave sampling out.",
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
