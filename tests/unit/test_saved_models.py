"""A saved model comes back whole or not at all."""

import re
from pathlib import Path

import pytest
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
