"""The loop of every beam search: draft or not, read a chunk, take as many steps as the chunk knows the laws for."""

from collections.abc import Iterator
from itertools import zip_longest

from mtp_modules.decoders.beam_tensors import BeamTensors, Laws, Path, Root
from mtp_modules.decoders.generation import DecodableModel, Request
from mtp_modules.decoders.hypotheses import BeamPlan, BeamRule, Continuation, Hypothesis, agreed
from mtp_modules.decoders.rounds import Round
from mtp_modules.decoders.sampling import RowLaws


class BeamSearch:
    """A search for all prompts of a request.

    Args:
        model: Trunk, heads and unembedding.
        request: Checked.
        laws: Of its prompts; ``None`` where every token is allowed.
        plan: How to search.
    """

    def __init__(self, model: DecodableModel, request: Request, laws: RowLaws | None, plan: BeamPlan) -> None:
        self.plan, self.limit = plan, model.trunk.max_positions
        self.prompt_lengths = [len(prompt) for prompt in request.prompts]
        self.rules = [self._rule(row, budget) for row, budget in enumerate(request.budgets)]
        self.beams = [[Hypothesis((), 0.0, stop.new(), row)] for row, stop in enumerate(request.stops)]
        """Of each prompt, best first."""
        self.tensors = BeamTensors(model, request, laws, plan)

    def _rule(self, row: int, budget: int) -> BeamRule:
        most, reason = budget, "length"
        if self.limit is not None and self.limit - self.prompt_lengths[row] + 1 < budget:
            most, reason = self.limit - self.prompt_lengths[row] + 1, "context"
        return BeamRule(self.plan.num_beams, self.plan.length_penalty, most, reason)

    def rounds(self) -> Iterator[Round]:
        """Yield a round a forward pass, with the tokens that all hypotheses of a prompt have come to agree on."""
        rows = list(range(len(self.beams)))
        settled = [0] * len(rows)
        read = _Read([Path(row, ()) for row in rows], self.tensors.read_prompts())
        steps = [self._advance(row, read, 0, []) for row in rows]
        drafted = [0] * len(rows)
        while True:
            tokens = []
            for row in rows:
                best = self.beams[row][0]
                until = len(best.tokens) if self._ended(row) else agreed(self.beams[row])
                tokens.append(list(best.tokens[settled[row] : until]))
                settled[row] = until
            reasons = [self.beams[row][0].finish_reason if self._ended(row) else None for row in rows]
            yield Round.of_lists(
                rows=rows,
                tokens=tokens,
                accepted=[step - 1 for step in steps],
                drafted=drafted,
                finish_reasons=reasons,
            )
            rows = [row for row in rows if not self._ended(row)]
            if not rows:
                return
            steps, drafted = self._round(rows)

    def _ended(self, row: int) -> bool:
        return all(hypothesis.finish_reason is not None for hypothesis in self.beams[row])

    def _round(self, rows: list[int]) -> tuple[list[int], list[int]]:
        """Read what the roots of these prompts need; return each prompt's steps, and how deep its drafts were."""
        roots = self._roots(rows)
        self.tensors.begin(roots)
        depth = self._depth(rows, roots)
        drafts = self.tensors.draft(depth) if depth else [[] for _ in rows]
        length = {root.prompt: root.length for root in roots}
        # What a prompt drafts is cut at its own end, never at a neighbour's.
        drafts = [levels[: self.rules[row].most - length[row] - 1] for row, levels in zip(rows, drafts, strict=True)]
        paths = self._layout(roots, drafts)
        read = _Read(paths, self.tensors.read(paths))
        blocks = [levels[-1] if levels else [] for levels in drafts]
        steps = [self._advance(row, read, length[row], own) for row, own in zip(rows, blocks, strict=True)]
        kept = dict.fromkeys(rows, 1)
        for row in rows:
            for hypothesis in self.beams[row]:
                if hypothesis.finish_reason is None:
                    kept[row] = len(hypothesis.tokens) - length[row]  # the same for all: they are equally long
        self.tensors.commit([kept[roots[path.root].prompt] for path in paths])
        return steps, [len(levels) for levels in drafts]

    def _roots(self, rows: list[int]) -> list[Root]:
        """List the hypotheses that go on; within the round, a hypothesis's row is its place in this list."""
        roots: list[Root] = []
        for row in rows:
            for place, (tokens, total, matcher, at, reason) in enumerate(self.beams[row]):
                if reason is None:
                    self.beams[row][place] = Hypothesis(tokens, total, matcher, len(roots))
                    roots.append(Root(row, at, tokens[-1], total, len(tokens)))
        return roots

    def _depth(self, rows: list[int], roots: list[Root]) -> int:
        """Return how many drafts one after the other are of use to some prompt, and fit into the trunk for all."""
        length = {root.prompt: root.length for root in roots}
        depth = min(self.plan.num_drafts, max(self.rules[row].most - length[row] - 1 for row in rows))
        if self.limit is not None:
            # All tokens but the last are read, and the chunk has that one and the drafts.
            depth = min(depth, *(self.limit - self.prompt_lengths[row] - length[row] for row in rows))
        return depth

    def _layout(self, roots: list[Root], drafts: list[list[list[Path]]]) -> list[Path]:
        """Return the paths to read: the longest ones, which hold the others, and roots without any."""
        paths: list[Path] = []
        nothing: list[Path] = []
        for levels in drafts:
            for shorter, longer in zip_longest(levels, levels[1:], fillvalue=nothing):
                go_on = {Path(path.root, path.tokens[:-1]) for path in longer}
                if not (self.plan.whole_blocks and longer):
                    paths += [path for path in shorter if path not in go_on]
        reached = {path.root for path in paths}
        return paths + [Path(root, ()) for root in range(len(roots)) if root not in reached]

    def _advance(self, row: int, read: "_Read", start: int, blocks: list[Path]) -> int:
        """Take as many steps as the laws are known for; return how many.

        Args:
            row: Of the prompt.
            read: What was read.
            start: Length of the hypotheses at the start of the round.
            blocks: The longest drafts of the prompt.
        """
        rule, beams, steps = self.rules[row], self.beams[row], 0
        if self.plan.whole_blocks and blocks:
            grown = _grown(rule, beams, read, blocks)
            if grown:  # else the model finds them all impossible
                beams = [beam for beam in beams if beam.finish_reason is not None] + grown
                steps = len(blocks[0].tokens)
        while True:
            following = [read.following(beam, start) for beam in beams]
            if None in following:
                break
            beams, steps = rule.best(beams, [known or [] for known in following]), steps + 1
            if all(beam.finish_reason is not None for beam in beams):
                break
        self.beams[row] = [
            beam._replace(row=read.row(beam, start)) if beam.finish_reason is None else beam for beam in beams
        ]
        return steps


class _Read:
    """What a forward pass has read, and what the model says of it.

    Args:
        paths: Drafts behind each root, one row each.
        laws: Of every place.
    """

    def __init__(self, paths: list[Path], laws: Laws) -> None:
        self.laws = laws
        self.places: dict[Path, tuple[int, int]] = {}
        for row, path in enumerate(paths):
            for place in range(len(path.tokens) + 1):
                self.places.setdefault(Path(path.root, path.tokens[:place]), (row, place))

    def following(self, beam: Hypothesis, start: int) -> list[Continuation] | None:
        """Return the best continuations of a hypothesis, none for a finished one; ``None`` if they are unknown."""
        if beam.finish_reason is not None:
            return []
        place = self.places.get(Path(beam.row, beam.tokens[start:]))
        return None if place is None else self.laws.following(*place)

    def row(self, beam: Hypothesis, start: int) -> int:
        """Return the row that holds a hypothesis up to its last token."""
        return self.places[Path(beam.row, beam.tokens[start:-1])][0]


def _grown(rule: BeamRule, beams: list[Hypothesis], read: _Read, blocks: list[Path]) -> list[Hypothesis]:
    """Return the hypotheses that whole blocks make, cut where they end; no text twice, and none that cannot be."""
    by_root = {beam.row: beam for beam in beams if beam.finish_reason is None}
    grown: dict[tuple[int, ...], Hypothesis] = {}
    for block in blocks:
        beam = by_root[block.root]
        row, _ = read.places[block]
        for place, token in enumerate(block.tokens, start=1):
            beam = rule.grow(beam, Continuation(token, read.laws.reached(row, place)))
            if beam.finish_reason is not None:
                break
        if beam.log_probability > -float("inf"):
            grown.setdefault(beam.tokens, beam)
    return list(grown.values())
