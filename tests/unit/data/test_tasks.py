"""What all tasks share: disjoint sides, rows that follow from seed and number, masks, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer

from mtp_modules.core import build, describe
from mtp_modules.core.targets import future_targets
from mtp_modules.data import (
    Example,
    PolynomialTask,
    SpanShuffle,
    StarGraphTask,
    StoryTask,
    Task,
    TaskDataModule,
    TokenDropout,
    WordTokenizer,
)
from mtp_modules.data.tasks import HELD_OUT, split_of_example
from tests.helpers import assert_same
from tests.unit.training.running import module, trainer

TASKS = {
    "polynomials": lambda: PolynomialTask(max_operations=3, num_pauses=2),
    "star": lambda: StarGraphTask(num_arms=3, path_length=4, num_nodes=12),
    "star_reverse": lambda: StarGraphTask(num_arms=2, path_length=3, num_nodes=20, reverse=True),
    "stories": lambda: StoryTask(random_names=0.5),
}


def data(name: str, **kwargs: object) -> TaskDataModule:
    sizes = {"batch_size": 4, "lookahead": 3, "num_train": 40, "num_val": 12, "num_test": 8}
    return TaskDataModule(task=TASKS[name](), **(sizes | kwargs))


@pytest.mark.parametrize("name", TASKS)
@given(index=st.integers(0, 10**9), seed=st.integers(0, 5))
def test_a_row_follows_from_seed_and_number(name: str, index: int, seed: int) -> None:
    first, second = (data(name, seed=seed).rows("train").example(index) for _ in range(2))
    assert first == second
    assert first != data(name, seed=seed + 1).rows("train").example(index)
    assert len(first.tokens) == len(first.answer) <= TASKS[name]().longest
    assert any(first.answer)
    assert not first.answer[0]


@pytest.mark.parametrize("name", TASKS)
def test_no_prompt_is_on_two_sides(name: str) -> None:
    module = data(name, num_train=120, num_val=15, num_test=15)
    prompts: dict[str, set[tuple[int, ...]]] = {}
    for split in ("train", "val", "test"):
        rows = module.rows(split)
        examples = [rows.example(index) for index in range(rows.num_rows)]
        prompts[split] = {tuple(t for t, asked in zip(*example, strict=True) if not asked) for example in examples}
    train, val, test = prompts.values()
    assert not train & val | train & test | val & test


def test_splits_have_their_shares_where_prompts_are_few() -> None:
    """All 49 * 49 questions of the smallest sum, told apart by nothing but their prompts."""
    task = PolynomialTask(max_operations=1, modulus=7, num_coefficients=2)
    splits = []
    for number in range(7**4):
        digits = [number // 7**place % 7 for place in range(4)]
        tokens = [task.tokenizer.encode("+")[0], *digits, task.equals]
        splits.append(split_of_example(Example(tokens, [False] * len(tokens))))
    for split in ("val", "test"):
        assert splits.count(split) / len(splits) == pytest.approx(HELD_OUT, abs=0.02)


def test_too_few_prompts_are_refused() -> None:
    task = PolynomialTask(max_operations=1, modulus=2, num_coefficients=1)
    splits = {split_of_example(task.sample(np.random.default_rng(seed), "train")) for seed in range(200)}
    missing = {"train", "val", "test"} - splits
    assert missing, "this task is meant to be too small for three splits"
    rows = TaskDataModule(task=task, batch_size=1, lookahead=1).rows(missing.pop())
    with pytest.raises(
        ValueError, match=r"^PolynomialTask: 10000 samples gave no prompt of the \w+ split; there are too"
    ):
        rows.example(0)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("lookahead", [1, 4])
def test_every_answer_is_a_target_of_horizon_one(name: str, lookahead: int) -> None:
    """And of each further horizon that can reach it, and nothing else is, unless the row is learned whole."""
    module = data(name, lookahead=lookahead)
    rows = module.rows("train")
    batch = rows.batch(np.arange(10))
    horizons = tuple(range(1, lookahead + 1))
    targets, _ = future_targets(batch["tokens"], horizons)
    asked = batch["answer_mask"]
    _, learned = future_targets(batch["tokens"], horizons, loss_mask=batch["loss_mask"])
    for row in range(10):
        example = rows.example(row)
        answer = [token for token, is_asked in zip(*example, strict=True) if is_asked]
        assert targets[row, :, 0][asked[row]].tolist() == answer
        length = len(example.tokens)
        assert batch["tokens"][row, :length].tolist() == example.tokens
        assert (batch["tokens"][row, length:] == module.task.blank).all()
        assert not batch["loss_mask"][row, length:].any()
        if not module.task.answers_only:
            assert batch["loss_mask"][row, :length].all()
    if module.task.answers_only:
        assert learned[:, :, 0].equal(asked)
        assert (learned.sum(dim=(0, 1)) == asked.sum()).all()


@pytest.mark.parametrize("name", ["polynomials", "star"])
def test_a_teacherless_model_reads_no_answer(name: str) -> None:
    plain, teacherless = (data(name, teacherless=flag).rows("val").batch(np.arange(5)) for flag in (False, True))
    assert "inputs" not in plain
    asked = plain["loss_mask"]
    assert teacherless["tokens"].equal(plain["tokens"])
    assert (teacherless["inputs"][asked] == TASKS[name]().blank).all()
    assert teacherless["inputs"][~asked].equal(plain["tokens"][~asked])


@pytest.mark.parametrize("name", TASKS)
def test_loaders_serve_every_side(name: str) -> None:
    module = data(name)
    assert [len(batch["tokens"]) for batch in module.train_dataloader()] == [4] * 10
    assert sum(len(batch["tokens"]) for batch in module.val_dataloader()) == 12
    batches = list(module.test_dataloader())
    assert sum(len(batch["tokens"]) for batch in batches) == 8
    assert {batch["tokens"].shape[1] for batch in batches} == {module.task.longest + 2}
    assert module.vocab_size == module.task.tokenizer.vocab_size
    with pytest.raises(ValueError, match=r"there is no split 'nowhere'; the splits are train, val, test"):
        module.rows("nowhere")


@pytest.mark.parametrize("name", TASKS)
def test_tasks_and_tokenizers_describe_themselves(name: str) -> None:
    task = TASKS[name]()
    twin: Task = build(describe(task))
    assert twin.sample(np.random.default_rng(3), "train") == task.sample(np.random.default_rng(3), "train")
    tokenizer: WordTokenizer = build(describe(task.tokenizer))
    assert tokenizer.words == task.tokenizer.words


@pytest.mark.parametrize("name", TASKS)
@given(index=st.integers(0, 10**6))
def test_text_of_a_row_reads_back(name: str, index: int) -> None:
    module = data(name)
    tokens = module.rows("test").example(index).tokens
    assert module.tokenizer.encode(module.tokenizer.decode(tokens)) == tokens


@pytest.mark.parametrize("name", TASKS)
def test_the_digest_knows_what_the_rows_follow_from(name: str) -> None:
    same = {data(name).rows("train").digest() for _ in range(2)}
    others = [
        data(name).rows("val"),
        data(name, seed=1).rows("train"),
        data(name, lookahead=4).rows("train"),
        data(name, num_train=41).rows("train"),
        TaskDataModule(
            task=StarGraphTask(num_arms=4), batch_size=4, lookahead=3, num_train=40, num_val=12, num_test=8
        ).rows("train"),
    ]
    assert len(same | {rows.digest() for rows in others}) == 1 + len(others)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_val": 0}, r"^TaskDataModule: num_val must be at least 1, got 0\.$"),
        ({"lookahead": 0}, r"^TaskDataModule: lookahead must be at least 1, got 0\.$"),
        ({"batch_size": 0}, r"^TaskDataModule: batch_size must be at least 1, got 0\.$"),
        (
            {"augmentation": SpanShuffle()},
            r"SpanShuffle moves tokens, which would separate answers from their prompts; ",
        ),
    ],
)
def test_senseless_arguments_are_refused(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data("star", **kwargs)


def test_stories_cannot_be_learned_teacherless() -> None:
    with pytest.raises(ValueError, match=r"answers alone are learned, StoryTask is learned whole; leave it out"):
        data("stories", teacherless=True)


def test_dropout_and_blanks_go_together() -> None:
    module = data("star", teacherless=True, augmentation=TokenDropout(share=0.5))
    batch = next(iter(module.train_dataloader()))
    assert batch["inputs"].shape == batch["tokens"].shape
    assert not batch["inputs"].equal(torch.where(batch["loss_mask"], module.task.blank, batch["tokens"]))


class StopIn(Callback):
    """Fail in the step after a checkpoint, as a machine does."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step + 1:
            raise ConnectionAbortedError


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("teacherless", [False, True])
def test_a_run_that_is_cut_off_within_an_epoch_ends_as_one_that_is_not(tmp_path: Path, teacherless: bool) -> None:
    """With blanks and dropped tokens, and far horizons at positions that are drawn."""

    def ends(*callbacks: Callback, start: Path | None = None, **options: Any) -> dict[str, torch.Tensor]:
        rows = TaskDataModule(
            **{"batch_size": 4, "lookahead": 3, "num_train": 24, "teacherless": teacherless, "seed": 5}
            | {"task": StarGraphTask(num_arms=2, path_length=2, num_nodes=20)}
            | {"augmentation": TokenDropout(share=0.4)}
            | options
        )
        made = module(share_of_positions=0.5)
        # Three epochs of six steps, each validated.
        run = trainer(tmp_path, *callbacks, max_epochs=3, limit_val_batches=2)
        run.fit(made, rows, ckpt_path=start, weights_only=True)
        moments = [value.flatten() for kept in run.optimizers[0].state.values() for value in kept.values()]
        return {**made.state_dict(), "moments": torch.cat(moments)}

    path = tmp_path / "cut.ckpt"
    with pytest.raises(ConnectionAbortedError):
        ends(StopIn(path, 9))
    whole = ends()
    assert_same(ends(start=path), whole, tolerance=0)
    assert not ends(augmentation=None)["moments"].equal(whole["moments"]), "dropped tokens must matter"
