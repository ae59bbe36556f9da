"""Which tokens are drafted is counted from the training data, and what is frozen is not scored in training."""

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.distributed import DeviceMesh

from mtp_modules import LinearHeads, MTPModel, MultiTokenLoss, RecurrentTrunk, load_model
from mtp_modules.core.objective import NextTokenTeacher, OutputMatrix
from mtp_modules.data import frequent_tokens
from mtp_modules.training import MTPModule, choose_draft_tokens, draft_tokens, training_flops
from mtp_modules.training.tensor_parallel import _shard_unembedding
from tests.helpers import assert_same, gradients, make_model, random_tokens
from tests.unit.training.running import VOCAB, SaveAt, data, trainer


def module(**options: object) -> MTPModule:
    torch.manual_seed(0)
    trunk, heads = RecurrentTrunk(vocab_size=VOCAB, d_model=16), LinearHeads(d_model=16, num_horizons=3)
    return MTPModule(trunk=trunk, heads=heads, loss=MultiTokenLoss(distillation=0.5), **options)


def most_frequent(size: int) -> list[int]:
    rows = data().rows("train")
    counted = Counter(rows.batch(rows.fixed_ids())["tokens"].flatten().tolist())
    return sorted(sorted(range(VOCAB), key=lambda token: (-counted[token], token))[:size])


def test_a_run_drafts_what_its_text_has_most_often(tmp_path: Path) -> None:
    made = module(num_draft_tokens=7)
    choose_draft_tokens(made.model, data())
    trainer(tmp_path, max_steps=2).fit(made, data())
    assert made.model.unembedding.draft_tokens.tolist() == most_frequent(7) != list(range(7))
    assert frequent_tokens(data().rows("train"), 7, vocab_size=VOCAB) == most_frequent(7)


def test_tokens_that_were_told_stay(tmp_path: Path) -> None:
    made = module(num_draft_tokens=3)
    made.model.trim_drafts([4, 9, 20])
    choose_draft_tokens(made.model, data())
    trainer(tmp_path, max_steps=1).fit(made, data())
    assert made.model.unembedding.draft_tokens.tolist() == [4, 9, 20]


def test_the_first_tokens_of_the_vocabulary_may_be_told_too(tmp_path: Path) -> None:
    made = module(num_draft_tokens=3)
    made.model.trim_drafts([0, 1, 2])
    choose_draft_tokens(made.model, data())
    trainer(tmp_path, max_steps=1).fit(made, data())
    assert made.model.unembedding.draft_tokens.tolist() == [0, 1, 2]


NOT_CHOSEN = (
    r"^num_draft_tokens: is 3, but the tokens were not chosen; call choose_draft_tokens\(module\.model, data\) of "
    r"mtp_modules\.training before the fit, or module\.model\.trim_drafts\(\.\.\.\)\.$"
)


def test_a_fit_does_not_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MTPModule, "training_step", lambda *_: pytest.fail("training began"))
    made = module(num_draft_tokens=3)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with pytest.raises(ValueError, match=NOT_CHOSEN):
        trainer(tmp_path).fit(made, data())
    assert_same(dict(made.state_dict()), before, tolerance=0)


def test_resuming_and_evaluation_go_on_with_the_tokens_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = module(num_draft_tokens=7), tmp_path / "one.ckpt"
    choose_draft_tokens(made.model, data())
    trainer(tmp_path, SaveAt(path, 1), max_steps=1).fit(made, data())
    monkeypatch.setattr(draft_tokens, "frequent_tokens", lambda *_, **__: pytest.fail("the data was counted"))
    resumed = module(num_draft_tokens=7)
    trainer(tmp_path, max_steps=2).fit(resumed, data(), ckpt_path=path, weights_only=True)
    assert resumed.model.unembedding.draft_tokens.tolist() == most_frequent(7)
    choose_draft_tokens(resumed.model, data())
    evaluated = module(num_draft_tokens=7)
    trainer(tmp_path).validate(evaluated, data(), ckpt_path=path, weights_only=True, verbose=False)
    assert evaluated.model.unembedding.draft_tokens.tolist() == most_frequent(7)
    choose_draft_tokens(copy.deepcopy(load_model(path)[0]), data())


def test_what_cannot_be_counted_is_refused() -> None:
    loader = torch.utils.data.DataLoader([{"tokens": torch.zeros(9, dtype=torch.long)}] * 4)
    with pytest.raises(ValueError, match=r"^num_draft_tokens: is 3, but the data is no TokenDataModule whose tokens"):
        choose_draft_tokens(module(num_draft_tokens=3).model, loader)
    with torch.device("meta"):
        empty = module(num_draft_tokens=3).model
    sentence = (
        r"^num_draft_tokens: is 3, but the model is on the meta device, which keeps no tokens; set init_on_meta to"
    )
    with pytest.raises(ValueError, match=sentence):
        choose_draft_tokens(empty, data())
    with pytest.raises(ValueError, match=r"^frequent_tokens: size must lie in 1\.\.24, the vocabulary, got 25\.$"):
        frequent_tokens(data().rows("train"), 25, vocab_size=VOCAB)


def test_what_few_tokens_do_not_go_with_is_refused() -> None:
    model = make_model(draft_tokens=[1, 2, 5])
    with pytest.raises(ValueError, match=r"^tensor_parallelize: horizons beyond the first score 3 tokens of their own"):
        _shard_unembedding(model.unembedding, model.trunk.embedding, DeviceMesh.__new__(DeviceMesh))
    states = torch.zeros(2, 6, model.trunk.d_model, dtype=torch.float64)
    teacher = NextTokenTeacher(states, OutputMatrix(model.unembedding.weight.detach()), 0.5)
    with pytest.raises(ValueError, match=r"^Unembedding: another model's distribution covers all tokens, but horizons"):
        MultiTokenLoss()(model, random_tokens(2, 9), teacher=teacher)


def test_operations_are_those_of_few_rows() -> None:
    def flops(**options: object) -> int:
        model = MTPModel(
            trunk=RecurrentTrunk(vocab_size=50, d_model=16), heads=LinearHeads(d_model=16, num_horizons=3), **options
        )
        return training_flops(model, batch_size=1, length=1)

    assert flops() - flops(num_draft_tokens=10) == 3 * 2 * 2 * 16 * (50 - 10)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("draft_tokens", [None, [0, 3, 4, 8]])
def test_a_frozen_horizon_one_is_left_out_in_training_and_changes_no_gradient(
    share: float, draft_tokens: list[int] | None
) -> None:
    model, tokens = make_model("transformer", "residual", 3, tied=True, draft_tokens=draft_tokens), random_tokens(2, 9)
    model.trunk.requires_grad_(False)
    loss = MultiTokenLoss(distillation=0.7, total_variation=0.3, share_of_positions=share)
    torch.manual_seed(0)
    left_out = loss.train()(model, tokens)
    assert left_out.count[0] == 0
    assert not left_out.comparable.any()
    torch.manual_seed(0)
    with torch.no_grad():
        scored = loss(model, tokens)  # without gradients, nothing is left out
    assert scored.count[0] == 12
    assert_same(scored.loss - scored.nll[0], left_out.loss.detach())
    assert_same(scored.nll[1:], left_out.nll[1:])
    assert torch.equal(scored.rank[:, :, 1:], left_out.rank[:, :, 1:])
    if share == 1.0:  # in evaluation everything is scored, with gradients too
        assert_same(gradients(model.heads, left_out.loss), gradients(model.heads, loss.eval()(model, tokens).loss))
