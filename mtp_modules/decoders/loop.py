"""The one decoding loop: draft, read a chunk, keep what holds, emit. Plain decoding is the loop with no drafts."""

from collections.abc import Iterator

import numpy as np
import torch

from mtp_modules.core.drafts import ancestors_of, one_hot
from mtp_modules.core.selection import holes_filled
from mtp_modules.core.shapes import Array, Float, Int, Tensor
from mtp_modules.core.targets import at_positions
from mtp_modules.decoders.drafting.drafter import DraftChoice, Proposal, Text, heads_draft
from mtp_modules.decoders.drafting.policies import DepthChooser, now
from mtp_modules.decoders.drafting.trees import DraftTree, Grower, Guess, counts_along, walk
from mtp_modules.decoders.generation import DecodableModel, Request
from mtp_modules.decoders.graphs.executor import GraphModel
from mtp_modules.decoders.graphs.prompts import in_one_tensor, logits_behind
from mtp_modules.decoders.rounds import Round, RoundArrays, RoundDistributions
from mtp_modules.decoders.sampling.noise import gumbels
from mtp_modules.decoders.sampling.parameters import BatchSampling, History
from mtp_modules.decoders.sampling.stopping import Endings
from mtp_modules.decoders.speculation import Speculation
from mtp_modules.decoders.transfer import Told, on_host, told_of_round
from mtp_modules.decoders.verification.functional import greedy_round
from mtp_modules.decoders.verification.rules import RowNoise, own_choice
from mtp_modules.decoders.verification.verifier import Drawing


def rounds(model: DecodableModel, request: Request, how: Speculation) -> Iterator[Round]:
    """Yield the rounds of a run.

    Args:
        model: Trunk, heads and unembedding.
        request: Checked.
        how: How to draft and verify.
    """
    run = _Run(model, request, how)
    try:
        yield from _rounds(run, request, how)
    except Exception:
        if run.graph_model is not None:
            run.graph_model.give_up(run.trunk_state)
        raise


def _rounds(run: "_Run", request: Request, how: Speculation) -> Iterator[Round]:
    depths, endings = how.policy.start(how.most), Endings(request.ends(run.model.trunk), request.stops)
    rows, told = np.arange(len(request.prompts)), run.read_prompts()
    while True:
        counts, reasons, any_ends = endings.cut(told.tokens, told.counts)
        used = np.minimum(told.accepted, counts)
        last = told.tokens[np.arange(len(rows)), counts - 1]
        yield Round(RoundArrays(rows, told.tokens, counts, used, told.limits, reasons), run.kept_distributions)
        if any_ends:
            going_on = holes_filled(np.flatnonzero(reasons == 0))
            if not going_on:
                return
            run.select(going_on)
            endings.select(going_on)
            rows, last = rows[going_on], last[going_on]
        started = now()
        wanted = depths.depth(len(rows)) if how.drafter is not None else 0
        told, drafted = run.round(last, endings.useful(wanted), wanted, depths)
        depths.learn(len(rows), drafted, told.accepted, told.limits, now() - started)


class _Run:
    """The tensors of one run: a model, the states of its trunk and heads, and what laws and drafters look at."""

    def __init__(self, model: DecodableModel, request: Request, how: Speculation) -> None:
        self.model, self.request, self.how = model, request, how
        self.graph_model = model if isinstance(model, GraphModel) else None
        if self.graph_model is not None:
            self.graph_model.check()
        self.embed, self.unembedding = model.trunk.embedding, model.unembedding
        self.device, self.limit = self.unembedding.weight.device, model.trunk.max_positions
        prompts, vocab_size = request.prompts, model.trunk.vocab_size
        longest = max(len(prompt) for prompt in prompts)
        capacity = longest + max(request.budgets) + how.most
        if self.limit is not None:
            capacity = min(capacity, self.limit + how.most)
        if how.tree is not None:
            capacity += how.tree.nodes - how.tree.depth  # a tree has more tokens than positions
        graphs = self._graphs_for(len(prompts))
        self.pieces = [] if graphs is None else graphs.prompt_pieces(longest)
        capacity = max(capacity, sum(self.pieces))
        with torch.inference_mode():
            laws = BatchSampling(request.laws, vocab_size, self.device)
            # Without a law of its own and without a lossy rule, choosing the likeliest token is all there is to do.
            self.laws = None if laws.greedy and how.acceptance.lossless else laws
            for_drafts = how.drafter is not None and how.drafter.uses_heads
            if self.graph_model is None:
                self.trunk_state = model.trunk.new_state(len(prompts), capacity)
                self.heads_state = model.heads.new_state(len(prompts), capacity, for_drafts=for_drafts)
            else:
                states = self.graph_model.new_states(self, len(prompts), capacity, for_drafts=for_drafts)
                self.trunk_state, self.heads_state = states
            self.seeds = torch.tensor(request.seeds, device=self.device)
            self.history = History(prompts, vocab_size, self.device) if laws.penalises else None
            reads_text = how.drafter is not None and how.drafter.reads_text
            self.text = Text(len(prompts), capacity + 1, self.device) if reads_text else None
        self.kept_distributions: RoundDistributions | None = None
        self.live = len(prompts)  # rows whose tokens are wanted; others fill the batch of a graph, and repeat the first

    @torch.inference_mode()
    def read_prompts(self) -> Told:
        """Read all prompts, and draw the first new token of each."""
        prompts, by_graphs = self.request.prompts, sum(self.pieces)
        lengths = [len(prompt) for prompt in prompts]
        chunk = in_one_tensor(prompts, max(*lengths, by_graphs), self.device)
        logits = logits_behind(chunk, lengths, [*self.pieces, chunk.shape[1] - by_graphs], self._read_piece)
        drawing = self._drawing(unread=0, most=1)
        target = None if drawing is None else drawing.law(logits)
        first = logits.argmax(dim=-1) if drawing is None or target is None else own_choice(target, drawing.noise)
        counts = torch.tensor(lengths, device=self.device)
        self._keep_distributions(Proposal(first[:, :0], None, counts), target, logits)
        if self.text is not None:
            self.text.append(chunk[:, : max(lengths)], counts)
        self._remember(first, torch.ones_like(counts))
        none = torch.zeros_like(counts)
        self.select(list(range(self.live)))
        return on_host(told_of_round(first, none, none, logits))

    def _read_piece(
        self, piece: Int[Tensor, "B C"], last: Int[Tensor, " B"], keep: list[int]
    ) -> Float[Tensor, "B 1 V"]:
        if self.graph_model is not None and piece.shape[1] in self.pieces:  # what is left is of another size
            logits = self.graph_model.read_prompt(piece, last, self.trunk_state, self.heads_state)
        else:
            logits = self.unembedding.logits(at_positions(self._extend(piece), last[:, None]))
        self._commit(keep)
        return logits

    @torch.inference_mode()
    def round(
        self, last: Int[Array, " B"], limits: Int[Array, " B"], wanted: int, depths: DepthChooser
    ) -> tuple[Told, int]:
        """Draft after the last token of every row, verify, and keep what holds.

        Args:
            last: The token that each row emitted last.
            limits: How many drafts of each row can be of use.
            wanted: What the policy asks for.
            depths: The policy's.

        Returns:
            What has come of it, and how many drafts were made.
        """
        useful, token, counted = int(limits.max()), self._on_device(last), self._on_device(limits)
        drawing = self._drawing(unread=1, most=wanted + 1)
        if self.how.tree is not None and useful >= self.how.tree.depth:
            return self._tree_round(self.how.tree, token, counted, drawing)
        graphs = self._graphs()
        # A graph is made for one number of drafts: a row that can use fewer gets as many, of which fewer count.
        most = useful if graphs is None or self.how.tree is not None else wanted
        if graphs is not None and self._is_one_graph(most, depths):
            found = self.how.drafter.offered(self.text, most) if self.how.drafter and self.text else None
            told = graphs.round(token, counted, most, self.trunk_state, self.heads_state, found, drawing)
            self._remember(told[:, : most + 1], told[:, most + 1] + 1)
            return self._settle(told), most
        proposal = self._propose(token, counted, most, depths, drawing)
        drafts, counted = proposal.tokens, proposal.limits
        graphs = graphs if drafts.shape[1] in (0, most) else None  # graphs are for whole rounds
        logits = self._logits(torch.cat((token[:, None], drafts), dim=1), graphs)
        target = None
        if drawing is None:
            tokens, accepted = greedy_round(drafts, counted, logits)
        else:
            tokens, accepted, target = drawing.verify(drafts, proposal.source, counted, logits)
        self._keep_distributions(proposal, target, logits)
        return self._finish(logits, tokens, accepted, counted)

    def _finish(
        self,
        logits: Float[Tensor, "B C V"],
        tokens: Int[Tensor, "B N"],
        accepted: Int[Tensor, " B"],
        counted: Int[Tensor, " B"],
        path: Int[Tensor, "B P"] | None = None,
    ) -> tuple[Told, int]:
        """Remember what holds, bring it to the host, and commit it."""
        self._remember(tokens, accepted + 1)
        told = self._settle(told_of_round(tokens, accepted, counted, logits), path)
        return told, int(told.limits.max())

    def _settle(self, told: Int[Tensor, "B M"], path: Int[Tensor, "B P"] | None = None) -> Told:
        """Learn what holds, and commit it."""
        known = on_host(told)
        self._commit(known.counts.tolist(), path)
        return known if len(known.counts) == self.live else Told(*(part[: self.live] for part in known))

    def _on_device(self, numbers: Int[Array, " N"]) -> Int[Tensor, " B"]:
        """Return numbers where tensors are, one a row of the states; rows that fill a graph's batch get the first."""
        spare = len(self.trunk_state.lengths) - self.live
        numbers = np.pad(numbers, (0, spare), constant_values=numbers[0]) if spare else numbers
        return torch.from_numpy(numbers).to(self.device)

    def _graphs(self) -> GraphModel | None:
        """Return the graphs, where there are any for so many rows."""
        return self._graphs_for(len(self.trunk_state.lengths))

    def _graphs_for(self, rows: int) -> GraphModel | None:
        return self.graph_model if self.graph_model is not None and rows in self.graph_model.batch_sizes else None

    def _is_one_graph(self, num_drafts: int, depths: DepthChooser) -> bool:
        """Say whether nothing has to be decided, or kept, in the middle of the round."""
        drafter = self.how.drafter
        by_heads = drafter is not None and drafter.in_one_graph and self.how.tree is None and not depths.watches
        verified = self.laws is None or self.how.acceptance.in_one_graph
        return verified and not self.how.return_distributions and (num_drafts == 0 or by_heads)

    def _logits(self, chunk: Int[Tensor, "B C"], graphs: GraphModel | None) -> Float[Tensor, "B C V"]:
        if graphs is not None:
            return graphs.read(chunk, self.trunk_state, self.heads_state)
        return self.unembedding.logits(self._extend(chunk))

    def _tree_round(
        self, shape: DraftTree, token: Int[Tensor, " B"], limits: Int[Tensor, " B"], drawing: Drawing | None
    ) -> tuple[Told, int]:
        """Verify a tree of drafts by the model's own choices."""

        def guess(logits: Tensor, depth: int) -> Guess:
            if drawing is None:
                return Guess(logits, logits.double().log_softmax(dim=-1))
            log_law = drawing.law(logits).log()
            return Guess(log_law + drawing.noise.own()[:, depth : depth + 1], log_law)

        grower = Grower(self.model.heads, self.heads_state, token, self.embed, self.unembedding.logits, guess)
        tree = shape.grow(grower)
        for state in (self.trunk_state, self.heads_state):
            state.expect_tree(tree.parents, shape.depth)
        logits = self._logits(tree.tokens, self._graphs())
        if drawing is None:
            own = logits.argmax(dim=-1)
        else:
            ancestors = ancestors_of(tree.parents)
            history = self.history
            emitted = None if history is None else counts_along(tree, ancestors, history.emitted)
            law = drawing.law(logits, emitted)
            places = (ancestors.sum(dim=2) - 1)[:, :, None].expand_as(law)
            own = (law.log() + drawing.noise.own().gather(1, places)).argmax(dim=-1)
        tokens, path, accepted = walk(tree, own, shape.depth)
        counts = limits.clamp(max=shape.depth)
        accepted = torch.minimum(accepted, counts)
        return self._finish(logits, tokens, accepted, counts, path)

    def _propose(
        self,
        token: Int[Tensor, " B"],
        limits: Int[Tensor, " B"],
        most: int,
        depths: DepthChooser,
        drawing: Drawing | None,
    ) -> Proposal:
        drafter = None if self.how.tree is not None else self.how.drafter
        if drafter is None or most == 0:
            return Proposal(token.new_zeros(len(limits), 0), None, limits)
        choice = DraftChoice(limits, drawing, depths, return_distributions=self.how.return_distributions)
        from_heads = heads_draft(self.model.heads, self.heads_state, token, self.embed, self.unembedding.logits)
        return drafter.propose(token, choice, most, from_heads=from_heads, text=self.text)

    def _keep_distributions(self, proposal: Proposal, target: Tensor | None, logits: Float[Tensor, "B C V"]) -> None:
        """Keep what the round was decided by, if anybody wants it."""
        if not self.how.return_distributions:
            return
        source = proposal.source
        if source is None:  # no drafts, or drafts from the text
            source = one_hot(proposal.tokens, logits.shape[2]).double()
        target = logits.double().softmax(dim=-1) if target is None else target
        self.kept_distributions = RoundDistributions(*(kept[: self.live] for kept in (proposal.tokens, source, target)))

    @torch.inference_mode()
    def select(self, rows: list[int]) -> None:
        """Go on with some of the rows only, or with as many copies of one as a graph needs to be full.

        Args:
            rows: Which, in their new order; in their old order if all go on.
        """
        size = len(rows) if self.graph_model is None else self.graph_model.size_for(len(rows))
        if len(rows) == self.live and size == len(self.trunk_state.lengths):
            return
        self.live, rows = len(rows), [*rows, *rows[:1] * (size - len(rows))]
        self.trunk_state.select(rows)
        self.heads_state.select(rows)
        self.seeds = self.seeds[rows]
        self.laws = None if self.laws is None else self.laws.select(rows)
        for part in (self.history, self.text):
            if part is not None:
                part.select(rows)

    def _drawing(self, unread: int, most: int) -> Drawing | None:
        """Return what the tokens of a round, ``most`` a row, are drawn with; ``None`` if the likeliest are chosen."""
        if self.laws is None:
            return None
        places = torch.tensor(self.trunk_state.lengths, device=self.device) + unread
        graphs = self._graphs()
        make = gumbels if graphs is None else graphs.gumbels
        noise = RowNoise(self.seeds, places, self.model.trunk.vocab_size, most, make)
        return Drawing(self.laws, self.how.acceptance, noise, self.history)

    def _remember(self, tokens: Int[Tensor, "B C"], counts: Int[Tensor, " B"]) -> None:
        if self.history is not None:
            self.history.add(tokens, counts)
        if self.text is not None:
            self.text.append(tokens, counts)

    def _extend(self, chunk: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        output, heads = self.model.trunk(chunk, state=self.trunk_state), self.model.heads
        given = heads.features_of(output)
        return heads.extend(output.hidden, self.heads_state, tokens=chunk, embed=self.embed, **given)

    def _commit(self, keep: list[int], path: Int[Tensor, "B P"] | None = None) -> None:
        self.trunk_state.commit(keep, path)
        self.heads_state.commit(keep, path)
