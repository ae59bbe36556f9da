"""Stories: names that must be remembered, and a world in which effects follow from causes."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.data import StoryTask
from mtp_modules.data.story_grammar import ANIMALS, FIRST_NAMES, LAST_NAMES, TROUBLES, WEATHERS, tell, vocabulary

NAMES = len(FIRST_NAMES)


def is_first(token: int) -> bool:
    return token < NAMES


def is_last(token: int) -> bool:
    return NAMES <= token < NAMES + len(LAST_NAMES)


@given(st.integers(0, 10**6))
def test_an_answer_is_the_last_name_that_the_first_name_had_before(seed: int) -> None:
    tokens, answer = StoryTask().sample(np.random.default_rng(seed), "train")
    last: dict[int, int] = {}
    for place, token in enumerate(tokens):
        if is_first(token):
            assert is_last(tokens[place + 1])
            assert answer[place + 1] == (token in last)
            assert last.setdefault(token, tokens[place + 1]) == tokens[place + 1]
        elif not is_last(token):
            assert not answer[place]
    assert len(set(last.values())) == len(last) >= 2
    assert sum(answer) >= 3


def test_pairs_tell_nothing_about_one_another() -> None:
    """Knowing the first name helps nobody to guess the last one where it comes up for the first time."""
    task, generator = StoryTask(), np.random.default_rng(0)
    pairs: Counter[tuple[int, int]] = Counter()
    for _ in range(1000):
        tokens = task.sample(generator, "train").tokens
        pairs.update({(token, tokens[place + 1]) for place, token in enumerate(tokens) if is_first(token)})
    total = sum(pairs.values())
    assert len(pairs) > 0.6 * NAMES * len(LAST_NAMES)
    expected = total / (NAMES * len(LAST_NAMES))
    deviation = sum((pairs[first, NAMES + last] - expected) ** 2 for first in range(NAMES) for last in range(NAMES))
    freedom = NAMES * len(LAST_NAMES) - 1
    assert deviation / expected == pytest.approx(freedom, abs=6 * (2 * freedom) ** 0.5)  # chi-square, 6 sigma


def test_fixed_names_are_fixed_in_training_only() -> None:
    task, generator = StoryTask(random_names=0.0), np.random.default_rng(0)
    lasts: dict[str, dict[int, set[int]]] = {split: defaultdict(set) for split in ("train", "val")}
    for split, found in lasts.items():
        for _ in range(200):
            tokens = task.sample(generator, split).tokens
            for place, token in enumerate(tokens):
                if is_first(token):
                    found[token].add(tokens[place + 1])
    assert {len(found) for found in lasts["train"].values()} == {1}
    assert min(len(found) for found in lasts["val"].values()) > 1


@given(st.integers(0, 10**6))
def test_effects_follow_from_causes(seed: int) -> None:
    story = " ".join(tell(np.random.default_rng(seed)))
    (trouble,) = [trouble for trouble in TROUBLES if f" {trouble.tool} " in story]
    assert sum(f" {toy} " in story for toy in trouble.toys) == 1
    assert any(f"the {place}" in story for place in trouble.places)
    assert story.index(trouble.happens.split("{toy}")[1].split(" and ")[0]) < story.index(trouble.tool)
    for animal in ANIMALS:
        if f" {animal.name} " in story:
            assert animal.voice in story
            assert animal.food in story or animal.home in story
    for weather in WEATHERS:
        if f"it {weather.sky}" in story:
            assert weather.clothes in story or weather.effect in story


def test_stories_differ_and_use_every_word() -> None:
    generator = np.random.default_rng(0)
    stories = [tell(generator) for _ in range(600)]
    assert len({" ".join(story) for story in stories}) > 595
    people = {"{hero}", "{friend}", "{other}"}
    used = {word for story in stories for word in story} - people
    assert used == set(vocabulary()) - set(FIRST_NAMES) - set(LAST_NAMES)
    task = StoryTask()
    assert np.mean([len(story) + sum(word in people for word in story) <= task.max_length for story in stories]) > 0.9


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"random_names": 1.5}, r"random_names must lie in \[0, 1\], got 1.5"),
        ({"max_length": 60}, "max_length must be at least 100, got 60"),
    ],
)
def test_senseless_arguments_are_refused(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoryTask(**kwargs)
