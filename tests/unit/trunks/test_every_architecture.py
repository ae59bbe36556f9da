"""Every causal architecture of transformers decodes what generate does, or is rejected in one sentence."""

from typing import Any

import pytest
import transformers

from tests.architectures import EQUAL, NAMES, PAGE, REJECTED, UNBUILT, WRONG, judge, judged_apart, table, written

FEW = ("glm4", "lfm2")
"""One with a KV cache, one that is recomputed."""


@pytest.mark.parametrize("name", FEW)
def test_one_of_each_kind_is_judged_equal(name: str) -> None:
    found = judge(name)
    assert (found["result"], found["keeps_keys"]) == (EQUAL, name == "glm4")
    assert found["distinct"] > 2  # more than one token over and over


def test_another_model_is_judged_not_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.architectures._generated", lambda own, prompt, use_cache=True: [1] * 6)
    assert judge("glm4") | {"distinct": 1} == {
        "name": "glm4",
        "keeps_keys": True,
        "uncapped": False,
        "distinct": 1,
        "result": WRONG,
        "why": "plain, drafted, ragged, loaded, in memory",
    }


def test_the_table_counts_and_is_read_back() -> None:
    results: list[dict[str, Any]] = [
        {"name": "a-b", "result": EQUAL, "keeps_keys": True, "uncapped": True},
        {"name": "c", "result": REJECTED, "why": "caps | a thing"},
        {"name": "d", "result": UNBUILT, "why": "no"},
    ]
    shown = table(results)
    assert "has 3 architectures" in shown
    assert "1 decode what `generate` does, 1 are rejected, 0 differ, and 1 could not be judged" in shown
    assert written(shown) == {"a-b": EQUAL, "c": REJECTED, "d": UNBUILT}


def test_the_page_has_no_architecture_that_differs() -> None:
    on_page = written(PAGE.read_text(encoding="utf-8"))
    assert len(on_page) > 150
    assert WRONG not in on_page.values()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_architecture_is_judged_as_the_page_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    results = {each["name"]: each["result"] for each in judged_apart(NAMES)}
    assert {name for name, result in results.items() if result == WRONG} == set()
    if f"transformers {transformers.__version__} " in page:
        assert results == written(page)
