"""Trees of drafts: each path is the chain that the heads would draft along it, and the best of them are kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_modules import AutoregressiveDecoder, MTPModel, SpeculativeDecoder
from mtp_modules.core.drafts import ancestors_of
from mtp_modules.decoders import (
    ConfidentDepth,
    CostAwareDepth,
    DraftPolicy,
    DraftTree,
    DynamicTree,
    SamplingParams,
    StaticTree,
)
from mtp_modules.decoders.drafting.trees import Grower, Guess, Tree
from mtp_modules.decoders.verification.trees import counts_along, walk
from tests.helpers import EVERY_HEADS, extend, log_probs_of, make_model, random_tokens

DEPTH = 3


def read_and_grow(model: MTPModel, shape: DraftTree, seed: int) -> tuple[list[list[int]], Tree]:
    """Read a tree of tokens and keep one of its paths, and grow a tree from there; return the text and the tree."""
    rows = 2
    states = model.trunk.new_state(rows, 30), model.heads.new_state(rows, 30)

    def read(tokens: Tensor) -> None:
        extend(model, tokens, *states)

    prompt, chunk = random_tokens(rows, 3, seed=seed), random_tokens(rows, 5, seed=seed + 1)
    read(prompt)
    for state in states:
        state.commit([3, 2])
        state.expect_tree(torch.tensor([[-1, 0, 0, 1, 2]] * rows), 2)
    read(chunk)
    paths = [[0, 2, 4], [0, 2]]
    for state in states:
        state.commit([3, 2], torch.tensor([[0, 2, 4], [0, 2, 2]]))
    kept = [[*prompt[b, : 3 - b].tolist(), *chunk[b, path].tolist()] for b, path in enumerate(paths)]
    token = random_tokens(1, rows, seed=seed + 2)[0]

    def guess(logits: Tensor, depth: int) -> Guess:
        return Guess(logits, logits.log_softmax(dim=-1))

    embed, unembed = model.trunk.embedding, model.unembedding.logits
    tree = shape.grow(Grower(model.heads, states[1], token, embed, unembed, guess), shape.depth)
    return [[*text, int(last)] for text, last in zip(kept, token, strict=True)], tree


def probs_after(model: MTPModel, text: list[int], drafts: tuple[int, ...]) -> Tensor:
    """Return the logarithm of the distribution of the next draft, as training computes it."""
    depth = len(drafts) + 1
    filler = [0] * (model.lookahead - depth)
    with torch.no_grad():
        return log_probs_of(model, torch.tensor([[*text, *drafts, *filler]]))[depth][0, len(text) - 2]


def paths_of(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    """Return the drafts up to each token of a tree."""
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        found.append((*found[parent], token))
    return found


def best(probs: Tensor, width: int) -> set[int]:
    return set(probs.topk(width).indices.tolist())


@pytest.mark.parametrize("heads", EVERY_HEADS)
@settings(max_examples=settings.default.max_examples // 4)
@given(seed=st.integers(0, 99), widths=st.lists(st.integers(1, 3), min_size=1, max_size=DEPTH))
def test_a_tree_s_drafts_are_those_of_the_chains_along_it(heads: str, seed: int, widths: list[int]) -> None:
    model = make_model("transformer", heads, DEPTH + 1, seed=seed).eval()
    texts, tree = read_and_grow(model, StaticTree(widths=widths), seed)
    for b, text in enumerate(texts):
        paths = paths_of(tree.tokens[b].tolist(), tree.parents[b].tolist())
        assert len(set(paths)) == len(paths) == StaticTree(widths=widths).nodes + 1
        for path in paths:
            children = {other[-1] for other in paths if len(other) == len(path) + 1 and other[:-1] == path}
            expected = best(probs_after(model, text, path), widths[len(path)]) if len(path) < len(widths) else set()
            assert children == expected


@pytest.mark.parametrize("heads", EVERY_HEADS)
@settings(max_examples=settings.default.max_examples // 4)
@given(seed=st.integers(0, 99), width=st.integers(1, 3), nodes=st.integers(1, 12))
def test_a_dynamic_tree_keeps_the_most_likely_paths(heads: str, seed: int, width: int, nodes: int) -> None:
    model = make_model("transformer", heads, DEPTH + 1, seed=seed).eval()
    texts, tree = read_and_grow(model, DynamicTree(depth=DEPTH, width=width, nodes=nodes), seed)
    for b, text in enumerate(texts):
        known: dict[tuple[int, ...], float] = {(): 0.0}
        frontier: list[tuple[int, ...]] = [()]
        for _ in range(DEPTH):
            grown = {}
            for path in frontier:
                probs = probs_after(model, text, path)
                grown |= {(*path, token): known[path] + float(probs[token]) - 1e-6 for token in best(probs, width)}
            known |= grown
            frontier = sorted(grown, key=grown.__getitem__)[-width:]
        expected = sorted(known, key=known.__getitem__, reverse=True)[: nodes + 1]
        paths = paths_of(tree.tokens[b].tolist(), tree.parents[b].tolist())
        assert set(paths) == set(expected)
        assert len(paths) == len(expected)


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Draw tokens, parents, and the model's own choices; among siblings no token comes twice."""
    parents, tokens = [-1], [draw(st.integers(0, 2))]
    for _ in range(draw(st.integers(0, 9))):
        parent, token = draw(st.integers(0, len(tokens) - 1)), draw(st.integers(0, 2))
        if (parent, token) not in zip(parents, tokens, strict=True):
            parents.append(parent)
            tokens.append(token)
    return tokens, parents, [draw(st.integers(0, 2)) for _ in tokens]


@settings(max_examples=4 * settings.default.max_examples)
@given(trees())
def test_a_walk_goes_from_parents_to_their_own_children(grown: tuple[list[int], list[int], list[int]]) -> None:
    tokens, parents, own = grown
    place, path = 0, [0]
    while True:
        children = [child for child, parent in enumerate(parents) if parent == place and tokens[child] == own[place]]
        if not children:
            break
        place = children[0]
        path.append(place)
    said, way, accepted = walk(*(torch.tensor([part]) for part in (tokens, parents, own)), len(tokens))
    assert accepted.tolist() == [len(path) - 1]
    assert way[0, : len(path)].tolist() == path
    assert said[0, : len(path)].tolist() == [own[place] for place in path]


@settings(max_examples=2 * settings.default.max_examples)
@given(trees())
def test_counts_along_a_path_are_those_of_the_output_on_that_way(grown: tuple[list[int], list[int], list[int]]) -> None:
    tokens, parents, _ = grown
    emitted = torch.tensor([[4, 0, 1]])
    counts = counts_along(torch.tensor([tokens]), ancestors_of(torch.tensor([parents])), emitted)[0]
    for place, path in enumerate(paths_of(tokens, parents)):
        assert counts[place].tolist() == [count + path.count(token) for token, count in enumerate(emitted[0].tolist())]


@settings(max_examples=settings.default.max_examples // 3)
@given(
    seed=st.integers(0, 99),
    tree=st.sampled_from([StaticTree(widths=[3, 2, 1]), DynamicTree(depth=3, nodes=7), StaticTree(widths=[1, 1, 1])]),
    temperature=st.sampled_from([0.0, 1.0, 4.0]),  # a hot distribution accepts more: both choose with the same numbers
    penalty=st.sampled_from([0.0, 0.8]),
)
def test_a_tree_gives_the_sample_of_plain_decoding(
    seed: int, tree: DraftTree, temperature: float, penalty: float
) -> None:
    model = make_model("transformer", "recurrent", DEPTH + 1, seed=seed).eval()
    params = SamplingParams(temperature=temperature, frequency_penalty=penalty)
    options = {"max_new_tokens": 12, "sampling": params, "seed": seed}
    prompts = [[1, 2, 3], [4]]
    generation = SpeculativeDecoder(tree=tree).generate(model, prompts, **options)
    assert generation.tokens == AutoregressiveDecoder().generate(model, prompts, **options).tokens


@pytest.mark.parametrize(
    "policy", [CostAwareDepth(explore_every=2), ConfidentDepth(threshold=0.3)], ids=["cost", "confident"]
)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize(
    "tree", [StaticTree(widths=[2, 1, 1]), DynamicTree(depth=3, width=2, nodes=1)], ids=["static", "few"]
)
def test_a_tree_grows_as_deep_as_the_policy_asks(tree: DraftTree, temperature: float, policy: DraftPolicy) -> None:
    """Also one with fewer nodes than levels."""
    model = make_model("transformer", "linear", 5)
    options = {"max_new_tokens": 25, "sampling": SamplingParams(temperature=temperature), "seed": 3}
    wanted = AutoregressiveDecoder().generate(model, [[1, 2], [3]], **options).tokens
    decoder = SpeculativeDecoder(tree=tree, policy=policy)
    assert decoder.generate(model, [[1, 2], [3]], **options).tokens == wanted
    if isinstance(policy, CostAwareDepth):
        assert len(set(policy._last[3].seconds[2])) == 4  # every choice was tried: 0, 1, 2 and 3 levels
