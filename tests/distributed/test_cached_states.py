"""One process writes a frozen trunk's hidden states, the other waits, and both train from them."""

from pathlib import Path

from tests.distributed.cached import train
from tests.distributed.ranks import run_ranks
from tests.helpers import assert_same


def test_one_process_writes_for_both(tmp_path: Path) -> None:
    corpus = tmp_path / "texts"
    corpus.mkdir()
    for index in range(40):
        text = "".join(chr(1 + (index * 7 + place) % 10) for place in range(12 + index % 9))
        (corpus / f"{index}.txt").write_text(text, encoding="utf-8")
    (first, weights), (second, others) = run_ranks(train, corpus, tmp_path / "two", 2, timeout=120)
    assert first == {"before": 40, "in training": 0}
    assert second == {"before": 0, "in training": 0}
    assert_same(others, weights)
    alone, expected = train(corpus, tmp_path / "one", 1)
    assert alone == first
    assert_same(weights, expected)
