"""A saved model comes back whole or not at all."""

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
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
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
