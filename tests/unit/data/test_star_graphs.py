"""Star graphs: the path is the one way from start to goal, and nothing but the edges gives it away."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.data import StarGraphTask


def parsed(text: str) -> tuple[list[tuple[str, str]], str, str, list[str]]:
    """Return edges, start, goal and path."""
    edges, rest = text.split(" / ")
    ends, path = rest.split(" = ")
    start, goal = ends.split()
    pairs = [tuple(edge.split()) for edge in edges.split(" | ")]
    return pairs, start, goal, path.split()


@given(
    num_arms=st.integers(2, 6),
    path_length=st.integers(2, 6),
    room=st.integers(0, 20),
    seed=st.integers(0, 10**6),
    reverse=st.booleans(),
)
def test_the_path_is_the_way(num_arms: int, path_length: int, room: int, seed: int, reverse: bool) -> None:
    num_nodes = 1 + num_arms * (path_length - 1) + room
    task = StarGraphTask(num_arms=num_arms, path_length=path_length, num_nodes=num_nodes, reverse=reverse)
    example = task.sample(np.random.default_rng(seed), "train")
    edges, start, goal, path = parsed(task.tokenizer.decode(example.tokens))
    assert len(example.tokens) == task.longest
    asked = [token for token, is_asked in zip(*example, strict=True) if is_asked]
    assert task.tokenizer.decode(asked).split() == path
    before = {child: parent for parent, child in edges}
    way = [goal]
    while way[-1] != start:
        way.append(before[way[-1]])
    assert path == (way if reverse else way[::-1])
    assert len(path) == path_length
    assert len(edges) == len(before) == num_arms * (path_length - 1)
    leaves = set(before) - set(before.values())
    assert goal in leaves
    assert len(leaves) == sum(parent == start for parent, _ in edges) == num_arms
    assert len(set(before) | {start}) == 1 + num_arms * (path_length - 1)


def test_the_place_in_the_list_says_nothing() -> None:
    """The asked-for first step is equally often each of the start's edges, in the order they are listed in."""
    task = StarGraphTask()
    generator = np.random.default_rng(0)
    places: Counter[int] = Counter()
    for _ in range(1500):
        edges, start, _, path = parsed(task.tokenizer.decode(task.sample(generator, "train").tokens))
        firsts = [child for parent, child in edges if parent == start]
        places[firsts.index(path[1])] += 1
    assert [places[place] / 1500 for place in range(5)] == pytest.approx([0.2] * 5, abs=0.04)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_arms": 1}, "num_arms must be at least 2, got 1"),
        ({"path_length": 1}, "path_length must be at least 2, got 1"),
        (
            {"num_nodes": 20},
            "num_nodes must be at least 21 for 5 arms of 5 nodes, got 20; take more names, or a smaller",
        ),
    ],
)
def test_senseless_arguments_are_refused(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StarGraphTask(**kwargs)
