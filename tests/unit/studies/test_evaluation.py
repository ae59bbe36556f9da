"""What a trained model is asked, against what Lightning and plain loops say."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from mtp_modules import LinearHeads, MTPModel, RecurrentTrunk
from mtp_modules.data.prompts import row_beginnings
from mtp_modules.studies.evaluation import decoded, evaluate, evaluating
from tests.reference.decoding import decode
from tests.unit.training.running import data, module, trainer


def test_the_figures_are_those_of_lightnings_validation(tmp_path: pytest.TempPathFactory) -> None:
    tested, rows = module(), data()
    runner = trainer(tmp_path)
    runner.validate(tested, rows, verbose=False)
    found = evaluate(tested, rows.val_dataloader())
    for key, value in found.figures.items():
        if not key.startswith("bits/"):
            assert value == pytest.approx(float(runner.callback_metrics[f"val/{key}"]), rel=1e-6)
    assert found.figures["bits/head_2"] == pytest.approx(found.figures["loss/head_2"] / math.log(2))
    assert [len(row) for row in found.positions] == [3] * 6
    mean = sum(row[1] or 0.0 for row in found.positions) / 6
    assert mean == pytest.approx(found.figures["accuracy/head_2"])


def test_answers_are_counted_where_the_data_marks_them() -> None:
    tested, batches = module(), list(data().val_dataloader())
    assert "answer/exact" not in evaluate(tested, batches).figures
    for batch in batches:
        batch["answer_mask"] = torch.zeros(len(batch["tokens"]), 6, dtype=torch.bool)
        batch["answer_mask"][:, -1] = True
    figures = evaluate(tested, batches)
    assert figures.figures["answer/exact"] == pytest.approx(figures.positions[-1][0])


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="the data has no validation batches; give it a validation split"):
        evaluate(module(), [])


def test_every_part_gets_its_own_mode_back() -> None:
    parts = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    parts[1].eval()
    with evaluating(parts):
        assert not any(part.training for part in parts.modules())
        assert not torch.is_grad_enabled()
    assert [part.training for part in parts.modules()] == [True, True, False, False]
    assert torch.is_grad_enabled()


def test_what_is_written_is_compared_with_the_truth() -> None:
    torch.manual_seed(3)
    trunk = RecurrentTrunk(vocab_size=3, d_model=8)
    model = MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=2)).eval()
    tokens = torch.randint(3, (40, 7))
    options = {"prompts": 30, "prompt_length": 2, "distances": 4, "new_tokens": 0}
    found = decoded(model, [{"tokens": tokens[:20]}, {"tokens": tokens[20:]}], options)
    right = [0] * 4
    for row in tokens[:30]:
        written, _ = decode(model, row[:2].tolist(), max_new_tokens=4)
        for place in range(4):
            right[place] += written[place] == int(row[2 + place])
    assert found == {f"written/distance_{place + 1}": pytest.approx(right[place] / 30) for place in range(4)}


def test_speed_is_measured_where_it_is_asked_for() -> None:
    make = partial(RecurrentTrunk, vocab_size=3, d_model=8)
    batches, options = [{"tokens": torch.ones(4, 6, dtype=torch.long)}], {"prompts": 2, "prompt_length": 3}
    for horizons, fewest in ((1, 1.0), (3, 1.0)):
        model = MTPModel(trunk=make(), heads=LinearHeads(d_model=8, num_horizons=horizons)).eval()
        found = decoded(model, batches, options | {"distances": 0, "new_tokens": 8})
        assert set(found) == {"decode/tokens_per_forward", "decode/tokens_per_second", "decode/speedup"}
        assert fewest <= found["decode/tokens_per_forward"] <= horizons
        assert found["decode/tokens_per_second"] > 0


def test_prompts_lie_in_one_document() -> None:
    tokens = torch.arange(12).view(3, 4)
    documents = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [2, 2, 2, 2]])
    batch = {"tokens": tokens, "document_ids": documents}
    assert list(row_beginnings([batch], length=3)) == [[0, 1, 2], [8, 9, 10]]
    assert list(row_beginnings([{"tokens": tokens[:, :2]}, {"tokens": tokens}], length=3)) == tokens[:, :3].tolist()
    options = {"prompts": 9, "prompt_length": 2, "distances": 3, "new_tokens": 0}
    model = MTPModel(trunk=RecurrentTrunk(vocab_size=12, d_model=4), heads=LinearHeads(d_model=4, num_horizons=2))
    with pytest.raises(ValueError, match="decode needs held-out rows that begin with 5 tokens of one document, and"):
        decoded(model, [batch], options)
