"""A saved model comes back whole or not at all."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from mtp_modules import MTPModel
from tests.helpers import EVERY_HEADS, make_model


@pytest.mark.parametrize("heads", EVERY_HEADS)
def test_a_folder_without_some_of_the_weights_is_refused(heads: str, tmp_path: Path) -> None:
    model = make_model("gru", heads, 3)
    model.save_pretrained(tmp_path)
    path, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    whole = load_file(path)
    del config["weights"]  # other weights than those that were saved with it
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = [name for name in whole if name.startswith("heads.")]
    assert names
    for name in names:
        save_file({other: value for other, value in whole.items() if other != name}, path)
        with pytest.raises(
            ValueError, match=rf"(?s)does not fit the model in config\.json .*Missing.*{re.escape(name)}"
        ):
            MTPModel.from_pretrained(tmp_path)
    save_file(whole, path)
    MTPModel.from_pretrained(tmp_path)


def test_a_malformed_config_is_refused_in_one_sentence(tmp_path: Path) -> None:
    make_model("gru", "linear", 2).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    del whole["weights"]  # it is no longer the one that was saved with them
    trunk = whole["model"]["init_args"]["trunk"]

    def of_trunk(**changes: Any) -> dict[str, Any]:
        arguments = {**whole["model"]["init_args"], "trunk": {**trunk, **changes}}
        return {**whole, "model": {**whole["model"], "init_args": arguments}}

    for config, start in [
        ([], "MTPModel: .* was not written by save_pretrained"),
        ({"mtp_modules": whole["mtp_modules"]}, r"MTPModel: .*config\.json does not describe the model; save"),
        ({**whole, "model": 3}, r"MTPModel: .*config\.json does not describe the model; save"),
        ({**whole, "model": trunk}, "build: .*RecurrentTrunk' is not a MTPModel"),
        ({**whole, "tokenizer": "bytes"}, r"MTPModel: .*config\.json does not describe the tokenizer; save"),
        ({**whole, "model": {}}, "build: class '' is not from a trusted package"),
        (
            {**whole, "model": {**whole["model"], "init_args": [1]}},
            "build: the arguments of 'mtp_modules.model.MTPModel' have no names",
        ),
        ({**whole, "model": {**whole["model"], "init_args": {}}}, "build: 'mtp_modules.model.MTPModel' does not take"),
        (of_trunk(init_args={**trunk["init_args"], "d_model": "8"}), "RecurrentTrunk: d_model must be a whole number"),
        (of_trunk(init_args={**trunk["init_args"], "layers": 2}), "build: .*RecurrentTrunk' does not take"),
    ]:
        path.write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(ValueError, match=f"^{start}") as refused:
            MTPModel.from_pretrained(tmp_path)
        assert "\n" not in str(refused.value)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"^MTPModel: .* was not written by save_pretrained"):
        MTPModel.from_pretrained(tmp_path)
    without = {name: value for name, value in whole.items() if name != "tokenizer"}
    path.write_text(json.dumps(without), encoding="utf-8")
    assert MTPModel.from_pretrained(tmp_path)[1] is None


class FakeHub(HfApi):
    """A hub that is a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(endpoint="http://localhost:1", token=False)
        self.folder, self.made = folder, []

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.made.append((repo_id, options))

    def upload_folder(self, *, repo_id: str, folder_path: str, repo_type: str, commit_message: str) -> Any:
        assert repo_type == "model"
        assert commit_message
        for path in Path(folder_path).iterdir():
            (self.folder / path.name).write_bytes(path.read_bytes())
        return f"hub/{repo_id}"


def test_what_is_pushed_to_the_hub_is_what_is_saved(tmp_path: Path) -> None:
    model, hub = make_model("gru", "residual", 3), FakeHub(tmp_path)
    assert model.push_to_hub("me/mine", api=hub) == "hub/me/mine"
    assert hub.made == [("me/mine", {"repo_type": "model", "private": True, "exist_ok": True})]
    back, _ = MTPModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["mine", "me/", "/mine", "me/mine/again", ""])
def test_a_name_that_is_none_of_the_hubs_is_refused(name: str, tmp_path: Path) -> None:
    hub = FakeHub(tmp_path)
    with pytest.raises(ValueError, match=rf"MTPModel: repo_id must be 'owner/name', got '{name}'\."):
        make_model("gru", "residual", 2).push_to_hub(name, api=hub)
    assert hub.made == []


def test_without_huggingface_hub_a_push_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"needs huggingface_hub; install it with: pip install 'mtp_modules\[hub\]'\."):
        make_model("gru", "residual", 2).push_to_hub("me/mine")
