"""Decode with compiled rounds and without, in float64: ``compiled.py eager``, or another backend; ``quick`` for a part.

``compiled.py frozen`` does so with weights that are constants, in float32, as only those are laid out anew.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.cpp_builder
import torch._inductor.graph

from mtp_modules import AutoregressiveDecoder, MTPModel, SpeculativeDecoder
from mtp_modules.decoders import (
    BlockVerification,
    ConfidentDepth,
    CostAwareDepth,
    Decoder,
    DynamicTree,
    ExactMatch,
    LookupOrHeads,
    PromptLookup,
    RejectionSampling,
    SamplingParams,
    TypicalAcceptance,
    compile_for_decoding,
    warm_up,
)
from mtp_modules.decoders.graphs import inductor
from mtp_modules.decoders.graphs.compiled import CompiledModel
from mtp_modules.decoders.round import RoundInputs
from mtp_modules.decoders.sampling.noise import RowNoise
from mtp_modules.decoders.verification.functional import Verdict
from mtp_modules.decoders.verification.rules import Candidates
from tests.helpers import lists_of, make_model


class OnTheHost(ExactMatch):
    """Somebody's rule, which looks at numbers, as a graph cannot."""

    compilable = False

    def verify(self, candidates: Candidates, noise: RowNoise) -> Verdict:
        assert min(candidates.drafts.flatten().tolist(), default=0) >= 0
        return super().verify(candidates, noise)


SAMPLED, GREEDY = SamplingParams(temperature=0.8, presence_penalty=0.5), SamplingParams(temperature=0.0)
CUT = SamplingParams(temperature=1.2, top_k=7, top_p=0.9, min_p=0.01, allowed_tokens=[0, 1, 2, 3, 5, 6, 7, 8])
CASES: list[tuple[Decoder, SamplingParams]] = [
    (AutoregressiveDecoder(), GREEDY),
    (AutoregressiveDecoder(), SAMPLED),
    (SpeculativeDecoder(), GREEDY),
    (SpeculativeDecoder(), SAMPLED),
    (SpeculativeDecoder(policy=ConfidentDepth(threshold=0.1)), GREEDY),
    (SpeculativeDecoder(acceptance=RejectionSampling()), SAMPLED),
    (SpeculativeDecoder(acceptance=BlockVerification()), CUT),
    (SpeculativeDecoder(acceptance=OnTheHost()), SAMPLED),
    (SpeculativeDecoder(drafter=PromptLookup(num_drafts=2)), GREEDY),
    (SpeculativeDecoder(drafter=LookupOrHeads(num_drafts=2, longest=2, shortest=1)), GREEDY),
    (SpeculativeDecoder(drafter=LookupOrHeads(num_drafts=2, longest=2, shortest=1, num_lookup=3)), SAMPLED),
    (SpeculativeDecoder(acceptance=TypicalAcceptance()), CUT),
    (SpeculativeDecoder(tree=DynamicTree(depth=2, width=2, nodes=4)), GREEDY),
]
OTHERS = (
    ("transformer", "sequential"),
    ("transformer", "early_exit"),
    ("transformer", "joint"),
    ("transformer", "fused"),
    ("transformer", "transition"),
    ("transformer_grouped", "context_block"),
)
MORE = (
    ("transformer_grouped", "causal"),
    ("transformer", "conditioned"),
    ("transformer", "linear_leap"),
    ("transformer_grouped", "parallel_leap"),
    ("transformer", "block_diffusion_few"),
)
"""Made of the same parts as the others, so tried by the slow test alone."""

PROMPTS = [[[1, 2, 3, 1, 2]], [[1, 2, 3, 2, 3], [6]]]


def compare(model: MTPModel, fast: CompiledModel, cases: list[tuple[Decoder, SamplingParams]]) -> None:
    """Compare tokens and counts."""
    for decoder, params in cases:
        for prompts in PROMPTS:
            asked = {"max_new_tokens": 9, "sampling": params, "seed": 5}
            wanted = decoder.generate(model, prompts, **asked)
            found = decoder.generate(fast, prompts, **asked)
            assert found.tokens == wanted.tokens, (model.heads, decoder, params)
            assert found.stats.drafted == wanted.stats.drafted
            assert found.stats.accepted == wanted.stats.accepted


def main(backend: str, *, quick: bool) -> None:
    """Compare tokens and counts, count graphs, and see that they follow weights that change."""
    few = [CASES[index] for index in (0, 3, 12)]
    pairs = [("transformer_previous", "recurrent", few)]
    if not quick:
        pairs = [
            (*pair, CASES) for pair in (("transformer_previous", "recurrent"), ("transformer_grouped", "parallel"))
        ]
        pairs += [(*pair, CASES[2:4]) for pair in OTHERS]
        pairs += [(*pair, CASES[2:3]) for pair in MORE if backend != "eager"]
    for trunk, heads, cases in pairs:
        model = make_model(trunk, heads, 3).eval()
        graphs: list[int] = []

        def compiler(graph: torch.fx.GraphModule, inputs: object, graphs: list[int] = graphs) -> object:
            graphs.append(len(graph.graph.nodes))
            with torch._inductor.config.patch(inductor.options_for_noise({})):  # a backend that is a function gets none
                return torch._dynamo.lookup_backend(backend)(graph, inputs)

        prompt_sizes = (3,) if len(cases) > 2 else ()
        fast = compile_for_decoding(model, batch_sizes=(1, 2), prompt_sizes=prompt_sizes, backend=compiler)
        compare(model, fast, cases)
        made = len(graphs)
        assert made >= len(cases)
        with torch.no_grad():
            model.unembedding.weight.add_(torch.randn_like(model.unembedding.weight))
        for decoder, params in cases[:4]:
            asked = {"max_new_tokens": 11, "sampling": params, "seed": 6}
            wanted = decoder.generate(model, PROMPTS[0], **asked)
            assert decoder.generate(fast, PROMPTS[0], **asked).tokens == wanted.tokens
        assert len(graphs) == made, "a text of another length was compiled anew"
        for function in (CompiledModel._reading, CompiledModel._reading_prompt, CompiledModel._whole):
            for entry in torch._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__):
                assert "L['self']" not in str(entry.guard_manager), "the model is looked at before every round"


def rows_that_end() -> None:
    """See that a row which goes on alone uses the graph of one row, whoever was there before."""
    for first in ([[1], [2]], [[1]]):
        model, graphs = make_model("transformer", "recurrent", 3).eval(), []
        fast = compile_for_decoding(
            model, batch_sizes=(1, 2), backend=lambda graph, inputs, graphs=graphs: graphs.append(graph) or graph
        )
        for prompts in (first, [[1], [2]], [[1]]):
            asked = {"max_new_tokens": [3, 6][-len(prompts) :]}
            wanted = AutoregressiveDecoder().generate(model, prompts, **asked)
            assert AutoregressiveDecoder().generate(fast, prompts, **asked).tokens == wanted.tokens
        assert len(graphs) == 2, len(graphs)


def prompts_in_chunks() -> None:
    """See that the graph of a prompt serves all prompts, and that those which lie between two sizes leave no trace.

    Also where a chunk reaches beyond the last position, which is 48.
    """
    for heads in ("recurrent", "parallel", "sequential"):
        graphs: list[object] = []
        model = make_model("transformer_previous", heads, 3)
        fast = compile_for_decoding(
            model,
            batch_sizes=(1, 2),
            prompt_sizes=(4,),
            backend=lambda graph, inputs, graphs=graphs: graphs.append(graph) or graph,
        )
        for count, prompts in (
            (1, [[1, 2, 3]]),
            (3, [[1, 2, 3, 4] * 3]),
            (2, [[5, 6] * 4, [7]]),
            (2, [[5], [6, 7] * 4]),
            (12, [[1] * 47]),
        ):
            shapes: list[torch.Size] = []
            fast._prompt, made = noted(fast._prompt, shapes), fast._prompt
            for decoder, params in ((AutoregressiveDecoder(), GREEDY), (SpeculativeDecoder(), SAMPLED)):
                asked = {"max_new_tokens": min(9, 48 - max(map(len, prompts))), "sampling": params, "seed": 5}
                wanted = decoder.generate(model, prompts, **asked).tokens
                assert decoder.generate(fast, prompts, **asked).tokens == wanted
            assert shapes == [(len(prompts), 4)] * (2 * count), shapes
            fast._prompt = made
        first, same = (
            next(AutoregressiveDecoder(return_distributions=True).stream(used, [[5], [6, 7] * 4], max_new_tokens=1))
            for used in (fast, model)
        )
        assert first.distributions is not None
        assert same.distributions is not None
        torch.testing.assert_close(first.distributions.target_probs, same.distributions.target_probs)
        count = len(graphs)
        for length in (4, 5, 11, 23, 42):
            AutoregressiveDecoder().generate(fast, [[1] * length], max_new_tokens=3)
        assert len(graphs) == count, (count, len(graphs))


def static_memory(*, quick: bool) -> None:
    """See that rounds write at addresses that stay from round to round and run to run, as CUDA graphs need.

    The same code runs on a CUDA device, where the backend then captures each graph.
    """
    pairs = [OTHERS[0], ("transformer_previous", "recurrent"), ("transformer_grouped", "parallel")]
    for trunk, heads in pairs[:1] if quick else pairs:
        cases = [CASES[index] for index in (2, 3, 12)] if quick else CASES
        model, graphs = make_model(trunk, heads, 3), list[object]()
        fast = compile_for_decoding(
            model,
            batch_sizes=(1, 2),
            static_memory=True,
            backend=lambda graph, inputs, graphs=graphs: graphs.append(graph) or graph,
        )
        addresses: dict[tuple[int, int], set[int]] = {}
        compare(model, fast, cases)
        made = len(graphs)
        compare(model, fast, cases)
        assert len(graphs) == made, (made, len(graphs))
        for length in (3, 17, 40):  # of one bucket
            wanted = SpeculativeDecoder().generate(model, [[1] * length], max_new_tokens=5).tokens
            assert SpeculativeDecoder().generate(fast, [[1] * length], max_new_tokens=5).tokens == wanted
        assert len(graphs) == made, "a text of another length was compiled anew"
        # Rounds outside of graphs see the states' tensors: their addresses do not change from run to run.
        for prompts in ([[1, 2]], [[1, 2], [3, 4]], [[1, 2]]):
            with torch.inference_mode():
                states = fast.new_states(len(prompts), 20, longest=2, for_drafts=True)
            kept = states.trunk.keys if hasattr(states.trunk, "keys") else states.trunk.keys_values.keys
            addresses.setdefault((len(prompts), 0), set()).add(kept.data_ptr())
            del states, kept
        assert all(len(found) == 1 for found in addresses.values()), addresses
        # Two runs at once have memory of their own.
        options = {"max_new_tokens": 9}
        alone = [SpeculativeDecoder().generate(model, [[token]], **options).tokens[0] for token in (1, 2)]
        streams = [SpeculativeDecoder().stream(fast, [[token]], **options) for token in (1, 2)]
        together: list[list[int]] = [[], []]
        for _ in range(9):
            for stream, tokens in zip(streams, together, strict=True):
                if done := next(stream, None):
                    tokens += done.tokens[0]
        assert together == alone, (together, alone)


def noted(made: Callable[..., torch.Tensor], shapes: list[torch.Size]) -> Callable[..., torch.Tensor]:
    """Return the graphs with a note of how many rows, and tokens where there are several, each call is given."""

    def call(
        trunk_state: object, heads_state: object, chunk: torch.Tensor | RoundInputs, *others: object
    ) -> torch.Tensor:
        shapes.append(chunk.token.shape if isinstance(chunk, RoundInputs) else chunk.shape)
        return made(trunk_state, heads_state, chunk, *others)

    return call


def rows_that_fill() -> None:
    """See that a batch between two sizes uses graphs of the larger, and that the rows which fill it leave no trace."""
    cases = [
        ("recurrent", SpeculativeDecoder(), GREEDY),
        ("parallel", SpeculativeDecoder(), SAMPLED),
        ("linear", SpeculativeDecoder(acceptance=RejectionSampling()), SAMPLED),
        ("recurrent", AutoregressiveDecoder(), SAMPLED),
        ("linear", SpeculativeDecoder(tree=DynamicTree(depth=2, width=2, nodes=4)), GREEDY),
        ("linear", SpeculativeDecoder(return_distributions=True), SAMPLED),
    ]
    for heads, decoder, params in cases:
        model, shapes = make_model("transformer_previous", heads, 3).eval(), []
        fast = compile_for_decoding(model, batch_sizes=(2, 4), backend="eager")
        for name in ("_read", "_round"):
            setattr(fast, name, noted(getattr(fast, name), shapes))
        asked = {"max_new_tokens": [4, 13, 9], "sampling": params, "seed": [5, 5, 7]}
        wanted = list(decoder.stream(model, [[1, 2, 3], [4], [5, 6]], **asked))
        found = list(decoder.stream(fast, [[1, 2, 3], [4], [5, 6]], **asked))
        assert lists_of(found) == lists_of(wanted), heads
        for one, other in zip(found, wanted, strict=True):
            if one.distributions is not None and other.distributions is not None:
                count = other.distributions.drafts.shape[1]
                assert torch.equal(one.distributions.drafts[:, :count], other.distributions.drafts)
                torch.testing.assert_close(
                    one.distributions.target_probs[:, : count + 1], other.distributions.target_probs
                )
        sizes = {shape[0] for shape in shapes}
        assert sizes == {2, 4}, sizes


def warm() -> None:
    """See that nothing is compiled once a decoder was warmed up, whatever it comes to decode."""
    cases = [
        (AutoregressiveDecoder(), GREEDY),
        (SpeculativeDecoder(policy=CostAwareDepth(explore_every=2)), SAMPLED),
        (SpeculativeDecoder(policy=ConfidentDepth(threshold=0.6)), GREEDY),
        (SpeculativeDecoder(policy=ConfidentDepth(threshold=0.3, predicted=True)), GREEDY),
        (SpeculativeDecoder(tree=DynamicTree(depth=2, width=2, nodes=4)), GREEDY),
        (SpeculativeDecoder(drafter=PromptLookup(num_drafts=2)), GREEDY),
        (SpeculativeDecoder(drafter=LookupOrHeads(longest=2, shortest=1, num_lookup=3)), GREEDY),
    ]
    for decoder, params in cases:
        policy = getattr(decoder, "policy", None)
        heads = "confident" if getattr(policy, "predicted", False) else "recurrent"
        model, graphs = make_model("transformer_previous", heads, 3).eval(), []
        fast = compile_for_decoding(
            model,
            batch_sizes=(1, 2),
            prompt_sizes=(3,),
            backend=lambda graph, inputs, graphs=graphs: graphs.append(graph) or graph,
        )
        warm_up(fast, decoder, sampling=params)
        made = len(graphs)
        assert made >= 2, made
        for prompts in ([[1, 2, 3]], [[1, 2], [3, 4]], [[5], [3, 4, 1]]):
            decoder.generate(fast, prompts, max_new_tokens=[20, 9][: len(prompts)], sampling=params)
        assert len(graphs) == made, (decoder, made, len(graphs))


def unprepared() -> None:
    """See that random numbers are not made in the middle of a graph, which is not compiled for them."""

    class Unprepared(ExactMatch):
        def prepare(self, noise: RowNoise) -> None:
            """Forget to ask."""

    fast = compile_for_decoding(make_model("transformer", "linear", 3), backend="eager")
    decoder = SpeculativeDecoder(acceptance=Unprepared())
    message = "RowNoise: numbers are asked for in a compiled round; let Acceptance.prepare"
    with pytest.raises(Exception, match=message):  # the compiler wraps it in one of its own
        decoder.generate(fast, [[1, 2]], max_new_tokens=3, sampling=SAMPLED)


class Lacking:
    """An object without some of its attributes."""

    def __init__(self, whole: object, *names: str) -> None:
        self._whole, self._names = whole, names

    def __getattr__(self, name: str) -> Any:
        if name in self._names:
            raise AttributeError(name)
        return getattr(self._whole, name)


def compile_without(*names: str) -> Callable[..., Any]:
    """Return a ``torch.compile`` of a version that lacks some arguments, or options that are named with a colon."""
    real = torch.compile

    def compile(function: Callable[..., Any], *, options: dict[str, Any] | None = None, **given: Any) -> Any:
        for name in names:
            if name in given:
                raise TypeError(f"compile() got an unexpected keyword argument {name!r}")
            if name.startswith(":") and name[1:] in (options or {}):
                raise RuntimeError(f"Unexpected optimization option {name[1:]}")
        return real(function, options=options, **given)

    return compile


MISSING: dict[str, tuple[object, str, Callable[[], object]]] = {
    "guard_filter_fn": (torch, "compile", lambda: compile_without(":guard_filter_fn")),
    "recompile_limit": (torch, "compile", lambda: compile_without("recompile_limit", "isolate_recompiles")),
    "maybe_mark_dynamic": (inductor, "_dynamo", lambda: lambda: Lacking(torch._dynamo, "maybe_mark_dynamic")),
    "mark_static_address": (inductor, "_dynamo", lambda: lambda: Lacking(torch._dynamo, "mark_static_address")),
    "prepare_freezing": (inductor, "_dynamo", lambda: lambda: Lacking(torch._dynamo, "config")),
    "add_tensor_constant": (torch._inductor.graph, "GraphLowering", lambda: object),
    "is_gcc": (torch._inductor, "cpp_builder", lambda: object()),
}


def missing_parts() -> None:
    """See that what a version of torch lacks makes rounds slower, never wrong."""
    for name, (place, attribute, make) in MISSING.items():
        model, whole = make_model("transformer", "recurrent", 3), getattr(place, attribute)
        setattr(place, attribute, make())
        inductor._share_constants.cache_clear()
        try:
            frozen, static = name in ("prepare_freezing", "add_tensor_constant"), name == "mark_static_address"
            fast = compile_for_decoding(model, freeze=frozen, static_memory=static, backend="eager")
            assert fast.freeze is (name == "add_tensor_constant")
            for prompt in ([1] * length for length in range(1, 12)):
                for decoder, params in (CASES[0], CASES[3]):
                    asked = {"max_new_tokens": 5, "sampling": params, "seed": 5}
                    wanted = decoder.generate(model, [prompt], **asked).tokens
                    assert decoder.generate(fast, [prompt], **asked).tokens == wanted, name
            on_cuda = inductor.inductor_options(torch.device("cuda"), freeze=False)
            assert on_cuda == ({} if static else {"triton.cudagraphs": True}), on_cuda
            flags = inductor.inductor_options(torch.device("cpu"), freeze=True)
            assert ("cpp.enable_floating_point_contract_flag" in flags) is (name != "is_gcc"), flags
        finally:
            setattr(place, attribute, whole)
            inductor._share_constants.cache_clear()


def side_by_side() -> None:
    """See that two models of the same shapes, each compiled, do not get each other's graphs."""
    models = [make_model("transformer", "recurrent", 3, seed=seed).eval() for seed in (1, 2)]
    compiled = [compile_for_decoding(model, backend="eager", freeze=True) for model in models]
    for index in (0, 1, 0):
        compare(models[index], compiled[index], CASES[2:3])


def frozen() -> None:
    """Compare tokens and counts where weights are constants, and see that they were laid out anew."""
    for trunk, heads, case in (("transformer_previous", "recurrent", 2), ("transformer_grouped", "sequential", 3)):
        model = make_model(trunk, heads, 3).eval().float()
        fast = compile_for_decoding(model, freeze=True, prompt_sizes=(3,))
        compare(model, fast, CASES[case : case + 1])
    packed = torch._dynamo.utils.counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"]
    assert packed > 20, packed


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if sys.argv[1] == "frozen":
        frozen()
    elif sys.argv[1] == "inductor":
        main("inductor", quick=False)
    else:
        quick = sys.argv[1] == "quick"
        main("eager", quick=quick)
        side_by_side()
        rows_that_end()
        static_memory(quick=quick)
        unprepared()
        if not quick:
            rows_that_fill()
            prompts_in_chunks()
            warm()
            missing_parts()
    print("equal")
