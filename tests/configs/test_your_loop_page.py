"""The code on the page about loops of one's own trains what it says it does."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_modules import AutoregressiveDecoder, MTPModel
from tests.architecture.imports import ROOT
from tests.distributed.loops import CODE, accelerated, names_of
from tests.distributed.ranks import run_ranks
from tests.helpers import assert_same, float64

CLOSE = 1e-6
PLAIN, NANOGPT, TRAINER = range(3)


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """What the first section defines."""
    torch.manual_seed(0)
    return names_of("plain")


def one_step(plain: dict[str, Any], batch_size: int, batches: int) -> MTPModel:
    """Train one step by the loop of the first section."""
    torch.manual_seed(0)
    with float64():
        model = plain["make_model"]()
        rows = torch.utils.data.DataLoader(plain["make_rows"](batch_size * batches), batch_size=batch_size)
        plain["train"](model, [list(rows)], lr=1e-2)
    return model


def test_accumulated_batches_train_as_one_batch_does(plain: dict[str, Any]) -> None:
    assert plain["terms"].nll.shape == (4,)
    many, one = one_step(plain, 2, 4), one_step(plain, 8, 1)
    assert_same(weights_of(many), weights_of(one), CLOSE)
    torch.manual_seed(0)
    with float64():
        start = weights_of(plain["make_model"]())
    assert any(not torch.equal(start[name], value) for name, value in weights_of(one).items())


def test_the_shortened_nanogpt_trains_decodes_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = names_of("nanogpt", tmp_path, monkeypatch)
    assert names["terms"].nll[0] < 2.5  # it begins at log 96, that is 4.6
    gpt, model, text = names["model"], names["faster"], names["data"][:10].tolist()
    plain = AutoregressiveDecoder().generate(model, [text], max_new_tokens=32).tokens[0]
    assert names["generation"].tokens[0] == plain
    for token in plain[:8]:
        assert int((gpt.hidden(torch.tensor([text]))[0, -1] @ gpt.lm_head.weight.T).argmax()) == token
        text.append(token)
    model.save_pretrained(tmp_path / "saved")
    again, _ = MTPModel.from_pretrained(tmp_path / "saved", trusted=("mtp_modules", "nanogpt"))
    assert_same(again.state_dict(), model.state_dict(), 0)


@pytest.mark.filterwarnings("ignore")  # of transformers and accelerate
def test_the_trainer_of_transformers_does_the_same_step(plain: dict[str, Any], tmp_path: Path) -> None:
    fit = names_of("trainer")["fit"]
    found = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = plain["make_model"]()
        settings = {"output_dir": str(tmp_path), "use_cpu": True, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
        settings |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate}
        loss = fit(model, plain["make_rows"](16), **settings, dataloader_pin_memory=False, disable_tqdm=True)
        assert 0 < loss < 4 * 5.6
        found.append(weights_of(model))
    assert_same(found[1], found[0], CLOSE)
    torch.manual_seed(0)
    assert not torch.equal(found[0]["trunk.embedding.weight"], plain["make_model"]().trunk.embedding.weight)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of accelerate
def test_two_processes_of_accelerate_train_as_one_does() -> None:
    one = accelerated(4)
    for found in run_ranks(accelerated, 2):
        assert_same(found, one, CLOSE)
    assert not torch.equal(one["trunk.embedding.weight"], one["before"])


def test_every_block_is_run_by_a_test() -> None:
    page = (ROOT / "docs/your_loop.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^```", page, re.M)) == 2 * sum(map(len, CODE.values()))
