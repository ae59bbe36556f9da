"""Hidden states on disk: training from them is training with the trunk, and nothing stale is ever read."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mtp_modules import (
    EarlyExitHeads,
    FusedFeatureHeads,
    MultiTokenLoss,
    RecurrentHeads,
    RecurrentTrunk,
    TransformerTrunk,
)
from mtp_modules.core import Heads, Trunk, TrunkOutput
from mtp_modules.data import CachedStates, TextDataModule
from mtp_modules.training import MTPModule
from tests.unit.training.running import trainer


def data(corpus: Path, cached: CachedStates | None = None, **options: object) -> TextDataModule:
    sizes = {"window": 16, "lookahead": 3, "batch_size": 2, "val_share": 0.2, "test_share": 0.0}
    sizes |= {"random_offsets": False}
    return TextDataModule(sources=[str(corpus)], cached_states=cached, **sizes | options)


def read_inner_layers(kind: type[Heads]) -> Heads:
    more = {"num_heads": 2, "max_positions": 32} if kind is FusedFeatureHeads else {}
    return kind(d_model=16, num_horizons=3, num_features=2, **more)


def module(
    trunk: Trunk | None = None, freeze: tuple[str, ...] = ("trunk",), inner: type[Heads] | None = None
) -> MTPModule:
    torch.manual_seed(0)
    layers = {"num_layers": 3, "feature_layers": [0, 1]} if inner else {"num_layers": 1}
    made = TransformerTrunk(vocab_size=256, d_model=16, num_heads=2, max_positions=32, **layers)
    return MTPModule(
        trunk=trunk or made,
        heads=read_inner_layers(inner) if inner else RecurrentHeads(d_model=16, num_horizons=3),
        loss=MultiTokenLoss(distillation=0.9, total_variation=0.5),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        freeze=freeze,
        num_draft_tokens=32,
    )


def weights_after(folder: Path, trained: MTPModule, given: TextDataModule) -> dict[str, torch.Tensor]:
    trainer(folder, max_steps=6).fit(trained, given)
    return {name: tensor for name, tensor in trained.model.state_dict().items() if not name.startswith("trunk")}


@pytest.mark.parametrize("inner", [None, EarlyExitHeads, FusedFeatureHeads])
def test_training_from_the_cache_is_training_with_the_trunk(
    corpus: Path, tmp_path: Path, inner: type[Heads] | None
) -> None:
    wanted = weights_after(
        tmp_path, module(inner=inner), data(corpus, CachedStates(folder=str(tmp_path / "one"), dtype="float32"))
    )
    stored = json.loads((tmp_path / "one" / "index.json").read_text())
    assert stored["written"] == stored["shape"][0] > 4
    assert stored["shape"][1] == (3 if inner else 1)

    uncached = data(corpus)
    uncached.rows("train").epoch_ids = lambda generator: generator.permutation(uncached.rows("train").fixed_ids())
    plain = weights_after(tmp_path, module(inner=inner), uncached)
    torch.testing.assert_close(plain, wanted, rtol=1e-4, atol=1e-6)


def test_a_second_run_does_not_need_the_trunk(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, rows = module().trunk, data(corpus).rows("train")
    made.requires_grad_(False)
    cache = CachedStates(folder=str(tmp_path / "states"), max_windows=5, rows_per_pass=2)
    first = cache.rows(rows, made, window=16)
    ids = first.epoch_ids(np.random.default_rng(0))
    assert sorted(ids.tolist()) == first.fixed_ids().tolist()
    assert len(ids) == first.num_rows == 5
    batch = first.batch(ids[:3])
    given = {name: tensor[:, :16] for name, tensor in batch.items() if name != "hidden"}
    hidden = made(given["tokens"], document_ids=given.get("document_ids")).hidden
    assert torch.equal(batch["hidden"], hidden.half())
    monkeypatch.setattr(type(made), "forward", lambda *_, **__: pytest.fail("the trunk ran"))
    assert torch.equal(cache.rows(rows, made, window=16).batch(ids[:3])["hidden"], batch["hidden"])


def test_a_run_that_was_stopped_goes_on(corpus: Path, tmp_path: Path) -> None:
    made, rows = module().trunk.requires_grad_(False), data(corpus).rows("train")
    cache = CachedStates(folder=str(tmp_path), dtype="float32", rows_per_pass=1)
    whole = cache.rows(rows, made, window=16).batch(rows.fixed_ids())["hidden"]
    index = tmp_path / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "written": 3}))
    torch.from_file(str(tmp_path / "states.bin"), shared=True, size=whole.numel())[3 * 16 * 16 :] = 0
    assert torch.equal(cache.rows(rows, made, window=16).batch(rows.fixed_ids())["hidden"], whole)


def test_the_trunk_reads_in_the_precision_of_the_run(corpus: Path, tmp_path: Path) -> None:
    rows, trained = data(corpus).rows("train"), module()
    cache = CachedStates(folder=str(tmp_path / "states"), dtype="float32")
    trainer(tmp_path, max_steps=1, precision="bf16-mixed").fit(trained, data(corpus, cache))
    trained.trunk.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        found = cache.rows(rows, trained.trunk, window=16).batch(rows.fixed_ids()[:2])
        given = {name: tensor[:, :16] for name, tensor in found.items() if name != "hidden"}
        wanted = trained.trunk(given["tokens"], document_ids=given.get("document_ids")).hidden
    assert torch.equal(found["hidden"], wanted.float())
    assert not torch.equal(found["hidden"], trained.trunk(given["tokens"]).hidden)
    elsewhere = r"^CachedStates: .* of another trunk, other layers, text, cut or precision; name another"
    with pytest.raises(ValueError, match=elsewhere):
        cache.rows(rows, trained.trunk, window=16)


def test_what_is_refused(corpus: Path, tmp_path: Path) -> None:
    rows, cache = data(corpus).rows("train"), CachedStates(folder=str(tmp_path / "states"))
    with pytest.raises(ValueError, match=r"^CachedStates: the trunk is trained, so its hidden states change"):
        cache.rows(rows, module(freeze=()).trunk, window=16)
    cache.rows(rows, module().trunk, window=16)
    other = RecurrentTrunk(vocab_size=256, d_model=16).requires_grad_(False)
    elsewhere = r"^CachedStates: .* holds the states of another trunk, other layers, text, cut or precision"
    with pytest.raises(ValueError, match=elsewhere):
        cache.rows(rows, other, window=16)
    with pytest.raises(ValueError, match=r"^TextDataModule: cached_states hold what the trunk says of one cut of the"):
        data(corpus, cache, random_offsets=True)
    with pytest.raises(ValueError, match=r"^CachedStates: dtype must be one of float32, float16, bfloat16, got"):
        CachedStates(folder=str(tmp_path), dtype="int8")
    inner = module(inner=EarlyExitHeads)
    with pytest.raises(ValueError, match=elsewhere):
        cache.rows(rows, inner.trunk, window=16)
    tokens, hidden = torch.zeros(2, 19, dtype=torch.long), torch.zeros(2, 16, 16)
    with pytest.raises(ValueError, match=r"^MTPModel: known holds 0 inner layers, but EarlyExitHeads read 2; read the"):
        inner.model(tokens, known=TrunkOutput(hidden))
    with pytest.raises(ValueError, match=r"^MTPModel: known has shape \(2, 16, 8\), these tokens need \(2, 16, 16\);"):
        module().model(tokens, known=TrunkOutput(torch.zeros(2, 16, 8)))
