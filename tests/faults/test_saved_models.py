"""``save_pretrained`` that is killed, and files of it that were damaged or changed."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from mtp_modules import LinearHeads, MTPModel, RecurrentTrunk
from mtp_modules.core.component import describe
from tests.faults.processes import killed_midway, times
from tests.faults.saving import save_models
from tests.faults.test_flipped_bits import flipped


def model(width: int = 16) -> MTPModel:
    torch.manual_seed(width)
    return MTPModel(
        trunk=RecurrentTrunk(vocab_size=30, d_model=width), heads=LinearHeads(d_model=width, num_horizons=2)
    ).eval()


def positions_of(loaded: MTPModel) -> int | None:
    return describe(loaded)["init_args"]["trunk"]["init_args"]["max_positions"]


def test_a_killed_save_over_another_model_leaves_one_of_the_two(tmp_path: Path) -> None:
    dice, found = random.Random(3), []
    for _ in range(times(20, 100)):
        killed_midway(save_models, tmp_path / "model", tmp_path / "model" / "config.json", 0.1 * dice.random())
        loaded, _ = MTPModel.from_pretrained(tmp_path / "model")
        (value,) = loaded.trunk.embedding.weight.unique().tolist()
        assert value == positions_of(loaded)  # the two models have equal shapes: nothing else tells them apart
        found.append(value)
    assert set(found) == {256, 512}


def test_weights_of_an_interrupted_save_describe_themselves(tmp_path: Path) -> None:
    model(16).save_pretrained(tmp_path / "old")
    model(8).save_pretrained(tmp_path / "new")
    shutil.copyfile(tmp_path / "new" / "model.safetensors", tmp_path / "old" / "model.safetensors")
    loaded, _ = MTPModel.from_pretrained(tmp_path / "old")
    assert loaded.trunk.d_model == 8
    tokens = torch.arange(9)[None]
    assert torch.equal(loaded(tokens)[0], model(8)(tokens)[0])


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "whole")
    whole, dice = model().state_dict(), random.Random(4)
    for name in ("model.safetensors", "config.json") * times(30, 200):
        shutil.copytree(tmp_path / "whole", tmp_path / "damaged", dirs_exist_ok=True)
        flipped(tmp_path / "damaged" / name, dice)
        try:
            loaded, _ = MTPModel.from_pretrained(tmp_path / "damaged")
        except ValueError as error:
            assert re.fullmatch(r"MTPModel: [^\n]+\.", str(error))  # noqa: PT017
        else:  # a flip that makes no difference: another space in JSON, or an unused key
            assert all(torch.equal(value, whole[key]) for key, value in loaded.state_dict().items())
            assert describe(loaded) == describe(model())


def test_a_configuration_that_was_changed_is_not_taken_for_the_saved_one(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["model"]["init_args"]["trunk"]["init_args"]["max_positions"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    sentence = f"{tmp_path / 'config.json'} is not what was saved with the weights; restore it, or take 'weights'"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        MTPModel.from_pretrained(tmp_path)
    del config["weights"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert positions_of(MTPModel.from_pretrained(tmp_path)[0]) == 5
