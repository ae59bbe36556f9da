"""A sharded run that goes on from a checkpoint drafts the tokens in it, and does not choose again."""

from pathlib import Path

from tests.distributed.few_tokens import resume
from tests.distributed.ranks import run_ranks
from tests.helpers import assert_same


def test_a_sharded_run_goes_on_with_the_tokens_of_its_checkpoint(tmp_path: Path) -> None:
    for found in run_ranks(resume, tmp_path, timeout=150):
        tokens, weights = found["whole"]
        assert tokens != [0, 1, 2, 3]
        for name in ("file", "shards"):
            assert found[name][0] == tokens
            assert_same(found[name][1], weights)
