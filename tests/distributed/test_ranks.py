"""The harness: what ranks return, and what becomes of those that fail or hang."""

import pytest

from tests.distributed import runs
from tests.distributed.ranks import run_ranks


def test_results_come_back_in_the_order_of_ranks() -> None:
    assert run_ranks(runs.rank_and_sum, 10) == [(0, 21), (1, 21)]


def test_an_exception_of_one_rank_is_raised_here() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1: .*ValueError: broken on purpose"):
        run_ranks(runs.fail_on_rank_one)


def test_ranks_that_wait_for_ever_are_ended() -> None:
    with pytest.raises(AssertionError, match=r"ranks took too long; exit codes so far: \[None, None\]"):
        run_ranks(runs.wait_for_ever, timeout=3)
