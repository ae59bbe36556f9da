"""A model whose decoding steps are compiled."""

import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from mtp_modules.core.checks import at_least, is_distributed, refuse
from mtp_modules.core.drafts import Draft
from mtp_modules.core.interfaces import DecodingState, Heads, Trunk
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.state import StaticMemory, bucket_of
from mtp_modules.core.targets import at_positions
from mtp_modules.decoders.graphs import inductor
from mtp_modules.decoders.graphs.eager import EagerExecutor
from mtp_modules.decoders.graphs.executor import Executor, States
from mtp_modules.decoders.request import DecodableModel
from mtp_modules.decoders.round import RoundInputs, RoundOutputs, draft_and_verify
from mtp_modules.decoders.sampling.noise import RowNoise, gumbels


def compile_for_decoding(
    model: DecodableModel,
    *,
    batch_sizes: Collection[int] = (1,),
    prompt_sizes: Collection[int] = (),
    freeze: bool = False,
    static_memory: bool | None = None,
    backend: str = "inductor",
    options: Mapping[str, Any] | None = None,
) -> "CompiledModel":
    """Return the model for decoders with its rounds compiled; the output is the same, up to rounding.

    A round with no drafts, or with drafts of the heads or of the text, verification and all, becomes one graph, whether
    tokens are sampled or not. Where drafts form a tree or end by confidence, or where distributions are returned, the
    trunk's pass over the chunk does. Larger batches go through the model as it is, and so do prompts,
    unless there are sizes for them. A number of drafts is compiled when it is first used, which takes up to a minute.

    Args:
        model: Not changed. The result shares its weights.
        batch_sizes: Numbers of rows to compile for, such as ``(1, 4, 16)``. A batch of fewer is filled up to the next
            of them; a larger one goes through the model as it is, until enough of its rows have ended.
        prompt_sizes: Numbers of positions to compile the reading of prompts for, such as ``(64,)``. A prompt is read by
            as many of them as it takes, the last one filled up; what would not fill more than half of it goes through
            the model as it is, and so do prompts of a batch that is not of one of the ``batch_sizes``.
        freeze: Make the weights constants of the graphs. Faster, above all on CPUs, where they are then laid out for
            the matrix products they go into; needs memory for them once more for each layout, and longer to compile.
            When weights change, decoding raises an error; without, it follows them as long as they change in place.
        static_memory: Keep what rounds write at fixed addresses, from run to run, and let attention look at one of a
            few numbers of positions (64, 96, 128, 192 ...) under a mask, as CUDA graphs need. There is a graph for each
            of these sizes; without, one serves all lengths. On a CUDA device if ``None``, where rounds then run as CUDA
            graphs.
        backend: Of ``torch.compile``.
        options: Of the backend; for inductor, those of
            :func:`~mtp_modules.decoders.graphs.inductor.inductor_options` if ``None``.

    Raises:
        ValueError: If a size is below 1, the trunk or the heads cannot be compiled, or the model is sharded over
            several processes; when decoding, if the weights are no longer those that were compiled for.
    """
    return CompiledModel(
        model,
        batch_sizes=batch_sizes,
        prompt_sizes=prompt_sizes,
        freeze=freeze,
        static_memory=static_memory,
        backend=backend,
        options=options,
    )


class CompiledModel(Executor):
    """A model for decoders whose rounds run as compiled graphs; :func:`compile_for_decoding` makes it."""

    def __init__(
        self,
        model: DecodableModel,
        *,
        batch_sizes: Collection[int],
        prompt_sizes: Collection[int],
        freeze: bool,
        static_memory: bool | None,
        backend: str,
        options: Mapping[str, Any] | None,
    ) -> None:
        for name, sizes in (("batch_sizes", batch_sizes), ("prompt_sizes", prompt_sizes)):
            for size in sizes:
                at_least("compile_for_decoding", name, size, 1)
        for part, base in ((model.trunk, Trunk), (model.heads, Heads)):
            if type(part).read is base.read:
                refuse(part, "has no read(...), so it cannot be compiled for decoding; decode with the model itself.")
        if is_distributed(model.unembedding.weight):
            refuse("compile_for_decoding", "the model is sharded over several processes; decode with the model itself.")
        self.trunk, self.heads, self.unembedding = model.trunk, model.heads, model.unembedding
        self.batch_sizes, self.prompt_sizes = frozenset(batch_sizes), frozenset(prompt_sizes)
        device = model.unembedding.weight.device
        self.static_memory = device.type == "cuda" if static_memory is None else static_memory
        constants = inductor.weights_as_constants() if freeze else None
        self.freeze, self._constants, self._shared = constants is not None, constants, inductor.SharedConstants()
        self._backend, self._options = backend, options
        self._eager, self._room, self._idle = EagerExecutor(model), 0, list[tuple[StaticMemory, StaticMemory]]()
        self._read, self._round = self._graphs_of(self._reading), self._graphs_of(self._whole)
        self._prompt = self._graphs_of(self._reading_prompt, many_positions=True)
        usual = self._options_for(device)
        on_cpu = backend == "inductor" and device.type == "cpu"
        self._gumbels = inductor.compiled(
            gumbels, backend=backend, options=inductor.options_for_noise(usual) if on_cpu else usual
        )
        self._made_for = self._weights()

    def _options_for(self, device: torch.device, *, many_positions: bool = False) -> Mapping[str, Any]:
        if self._options is None and self._backend == "inductor":
            return inductor.inductor_options(device, freeze=self.freeze, many_positions=many_positions)
        return self._options or {}

    def _graphs_of(self, function: Callable[..., Tensor], *, many_positions: bool = False) -> Callable[..., Tensor]:
        options = self._options_for(self.unembedding.weight.device, many_positions=many_positions)
        graphs, constants = inductor.compiled(function, backend=self._backend, options=options), self._constants
        if constants is None:
            return graphs

        def call(*inputs: object) -> Tensor:
            with constants, self._shared.used():
                return graphs(*inputs)

        return call

    def check(self) -> None:
        """Raise an error where the weights are not those of the graphs.

        Raises:
            ValueError: If they have changed.
        """
        for name, found in self._weights().items():
            if self._made_for.get(name) != found:
                how = "changed" if self.freeze else "another shape, dtype or device"
                refuse(
                    "compile_for_decoding",
                    f"{name} has {how} since the model was compiled; call compile_for_decoding(model) again"
                    + (", or leave freeze out while weights change." if self.freeze else "."),
                )

    def _weights(self) -> dict[str, tuple[object, ...]]:
        """Return what graphs rely on, of every weight."""
        found: dict[str, tuple[object, ...]] = {}
        for name in ("trunk", "heads", "unembedding"):
            part: nn.Module = getattr(self, name)
            for key, weight in (*part.named_parameters(), *part.named_buffers()):
                kind = weight.shape, weight.stride(), weight.dtype, weight.device
                version = (weight.data_ptr(), 0 if weight.is_inference() else weight._version) if self.freeze else ()
                found[f"{name}.{key}"] = *kind, *version
        return found

    def new_states(self, rows: int, capacity: int, *, longest: int, for_drafts: bool) -> States:
        """Make empty states for a run, laid out for graphs."""
        self.check()
        capacity = max(capacity, sum(self.prompt_chunks(longest, rows)))
        if self.static_memory:
            self.make_room(capacity)
            capacity = self._room
        trunk_state = self.trunk.new_state(rows, capacity)
        heads_state = self.heads.new_state(rows, capacity, for_drafts=for_drafts)
        if not self.static_memory:
            trunk_state.for_graphs()
            heads_state.for_graphs()
            return States(trunk_state, heads_state)
        mark = inductor.mark_static_address
        memories = self._idle.pop() if self._idle else (StaticMemory(mark), StaticMemory(mark))
        weakref.finalize(trunk_state, self._idle.append, memories)  # the next run takes it
        trunk_state.for_graphs(memories[0])
        heads_state.for_graphs(memories[1])
        return States(trunk_state, heads_state)

    def make_room(self, capacity: int) -> None:
        """Let static memory hold so many tokens a row from the next run on."""
        self._room = max(self._room, bucket_of(capacity))

    def batch_size(self, rows: int) -> int:
        """Return the smallest batch that there are graphs for and that holds so many rows; as many if there is none."""
        return min((size for size in self.batch_sizes if size >= rows), default=rows)

    def num_drafts(self, useful: int, wanted: int, rows: int) -> int:
        """Return what is wanted: a graph is made for one number of drafts, of which fewer may count."""
        return wanted if rows in self.batch_sizes else useful

    def prompt_chunks(self, longest: int, rows: int) -> list[int]:
        """Return how many tokens of prompts each graph reads, and what is left for the model as it is.

        Example:
            With graphs for 16 and 64 tokens, 100 are read as 64 and, filled up, 64; and 20 as 16, with 4 left.
        """
        chunks: list[int] = []
        while longest > 0:
            sizes = self.prompt_sizes if rows in self.batch_sizes else ()
            holding = [size for size in sizes if longest <= size < 2 * longest]
            fitting = [size for size in sizes if size < longest]
            if not holding and not fitting:
                return [*chunks, longest]
            chunks.append(min(holding) if holding else max(fitting))
            longest -= chunks[-1]
        return chunks

    def read_prompt(self, chunk: Int[Tensor, "B C"], last: Int[Tensor, " B"], states: States) -> Float[Tensor, "B 1 V"]:
        """Append a chunk of the prompts to the states, by a graph if there is one for its size."""
        if len(chunk) not in self.batch_sizes or chunk.shape[1] not in self.prompt_sizes:
            return self._eager.read_prompt(chunk, last, states)
        self._begin(chunk.shape[1], states)
        chunk = chunk.clone(memory_format=torch.contiguous_format)  # graphs are for one layout of it
        return self._prompt(states.trunk, states.heads, chunk, last)

    def read(self, chunk: Int[Tensor, "B C"], draft: Draft, states: States) -> Float[Tensor, "B C V"]:
        """Append a chunk to the states by a graph, and return horizon 1's logits."""
        states.expect(draft)
        self._begin(chunk.shape[1], states)
        return self._read(states.trunk, states.heads, chunk)

    def round(self, inputs: RoundInputs, states: States) -> RoundOutputs:
        """Draft, read and verify: in one graph if that can be, else the forward pass of the trunk alone."""
        if len(inputs.token) not in self.batch_sizes:
            return self._eager.round(inputs, states)
        if self._is_one_graph(inputs):
            states.heads.prepare_drafts()
            if inputs.sampler is not None:
                inputs.sampler.acceptance.prepare(inputs.sampler.noise)
            self._begin(1 + inputs.num_drafts, states)
            return RoundOutputs(self._round(states.trunk, states.heads, inputs))

        def read(chunk: Int[Tensor, "B C"], draft: Draft) -> Float[Tensor, "B C V"]:
            whole = draft.parents is not None or chunk.shape[1] in (1, 1 + inputs.num_drafts)
            return (self if whole else self._eager).read(chunk, draft, states)  # there are graphs for whole rounds

        return draft_and_verify(inputs, self.heads, states.heads, self.trunk.embedding, self.unembedding, read)

    @staticmethod
    def _is_one_graph(inputs: RoundInputs) -> bool:
        """Whether the CPU has to decide, or to keep, nothing in the middle of the round."""
        drafted = inputs.num_drafts == 0 or inputs.drafter is None
        drafted = drafted or (inputs.drafter is not None and inputs.drafter.compilable and inputs.chooser is None)
        verified = inputs.sampler is None or inputs.sampler.acceptance.compilable
        return drafted and verified and not inputs.return_distributions

    def noise(self, seeds: Int[Tensor, " B"], positions: Int[Tensor, " B"], most: int) -> RowNoise:
        """Return the random numbers of a round, made by a graph."""
        make = self._gumbels if len(seeds) in self.batch_sizes else gumbels
        return RowNoise(seeds, positions, self.trunk.vocab_size, most, make)

    def _begin(self, chunk: int, states: States) -> None:
        """Do the CPU-side bookkeeping of a chunk, and tell the compiler what differs from round to round."""
        states.begin(chunk)
        if self.static_memory:
            inductor.begin_step()
            return
        for state in (states.trunk, states.heads):
            for tensor, axis in state.dynamic_axes():
                inductor.mark_dynamic(tensor, axis)

    def _hidden(self, trunk_state: DecodingState, heads_state: DecodingState, chunk: Tensor) -> Tensor:
        output = self.trunk.read(chunk, trunk_state)
        given = self.heads.features_of(output)
        return self.heads.read(output.hidden, heads_state, tokens=chunk, embed=self.trunk.embedding, **given)

    def _reading(self, trunk_state: DecodingState, heads_state: DecodingState, chunk: Tensor) -> Tensor:
        return self.unembedding.logits(self._hidden(trunk_state, heads_state, chunk))

    def _reading_prompt(
        self, trunk_state: DecodingState, heads_state: DecodingState, chunk: Tensor, last: Tensor
    ) -> Tensor:
        return self.unembedding.logits(at_positions(self._hidden(trunk_state, heads_state, chunk), last[:, None]))

    def _whole(self, trunk_state: DecodingState, heads_state: DecodingState, inputs: RoundInputs) -> Tensor:
        def read(chunk: Tensor, draft: Draft) -> Tensor:
            return self._reading(trunk_state, heads_state, chunk)

        embed, unembedding = self.trunk.embedding, self.unembedding
        return draft_and_verify(inputs, self.heads, heads_state, embed, unembedding, read).packed
