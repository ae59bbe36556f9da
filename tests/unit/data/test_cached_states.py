"""Hidden states on disk: training from them is training with the trunk, and nothing stale is ever read."""

import json
import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

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
from mtp_modules.data.cached_states import CachedRows
from mtp_modules.data.loaders import EvalLoader
from mtp_modules.data.rows import TokenRows
from mtp_modules.training import MTPModule, WarmupDecay, choose_draft_tokens
from mtp_modules.training.cached_states import read_once
from tests.unit.training.running import SaveAt, trainer


def data(corpus: Path, cached: CachedStates | None = None, **options: object) -> TextDataModule:
    sizes = {"window": 16, "lookahead": 3, "batch_size": 2, "val_share": 0.2, "test_share": 0.0}
    sizes |= {"random_offsets": False}
    return TextDataModule(sources=[str(corpus)], cached_states=cached, **sizes | options)


def read_inner_layers(kind: type[Heads]) -> Heads:
    more = {"num_heads": 2, "max_positions": 32} if kind is FusedFeatureHeads else {}
    return kind(d_model=16, num_horizons=3, num_features=2, **more)


def module(
    trunk: Trunk | None = None,
    freeze: tuple[str, ...] = ("trunk",),
    inner: type[Heads] | None = None,
    seed: int = 0,
) -> MTPModule:
    torch.manual_seed(seed)
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


def read(cache: CachedStates, rows: TokenRows, trunk: Trunk) -> CachedRows:
    """Return rows with the hidden states that a trunk has of them."""
    kept = CachedRows(rows, window=16, kept=cache)
    read_once(kept, trunk)
    return kept


def weights_after(folder: Path, trained: MTPModule, given: TextDataModule) -> dict[str, torch.Tensor]:
    choose_draft_tokens(trained.model, given)
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


def test_a_resumed_run_reads_by_the_weights_of_its_checkpoint(corpus: Path, tmp_path: Path) -> None:
    """The trunk that is made for it has others until the checkpoint is loaded; a schedule asks for the data early."""

    def run(folder: Path, *callbacks: Callback, seed: int = 0, **options: object) -> dict[str, torch.Tensor]:
        trained, given = module(seed=seed), data(corpus, CachedStates(folder=str(tmp_path / "states")))
        trained.lr_schedule = WarmupDecay(warmup_steps=1)
        if "ckpt_path" not in options:
            choose_draft_tokens(trained.model, given)
        options = {"ckpt_path": None} | options
        trainer(folder, *callbacks, max_steps=6).fit(trained, given, weights_only=True, **options)
        return trained.model.state_dict()

    wanted = run(tmp_path / "whole", SaveAt(tmp_path / "three.ckpt", 3))
    stored = (tmp_path / "states" / "states.bin").read_bytes()
    torch.testing.assert_close(run(tmp_path / "rest", seed=1, ckpt_path=tmp_path / "three.ckpt"), wanted)
    assert (tmp_path / "states" / "states.bin").read_bytes() == stored


def test_workers_that_start_before_training_have_the_states_too(corpus: Path, tmp_path: Path) -> None:
    rows = data(corpus, CachedStates(folder=str(tmp_path), max_windows=4)).training_rows()
    batches = iter(EvalLoader(rows=rows, batch_size=2, num_workers=1))
    read_once(rows, module().trunk)
    assert [batch["hidden"].shape for batch in batches] == [(2, 16, 16)] * 2


def test_rows_that_no_trunk_has_read_are_tokens(corpus: Path, tmp_path: Path) -> None:
    given = data(corpus, CachedStates(folder=str(tmp_path), max_windows=4))
    assert all(batch.keys() <= {"tokens", "document_ids"} for batch in given.train_dataloader())
    assert len(list(given.train_dataloader())) == 2


def test_a_second_run_does_not_need_the_trunk(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, rows = module().trunk, data(corpus).rows("train")
    made.requires_grad_(False)
    cache = CachedStates(folder=str(tmp_path / "states"), max_windows=5, rows_per_pass=2)
    first = read(cache, rows, made)
    ids = first.epoch_ids(np.random.default_rng(0))
    assert sorted(ids.tolist()) == first.fixed_ids().tolist()
    assert len(ids) == first.num_rows == 5
    batch = first.batch(ids[:3])
    given = {name: tensor[:, :16] for name, tensor in batch.items() if name != "hidden"}
    hidden = made(given["tokens"], document_ids=given.get("document_ids")).hidden
    assert torch.equal(batch["hidden"], hidden.half())
    monkeypatch.setattr(type(made), "forward", lambda *_, **__: pytest.fail("the trunk ran"))
    assert torch.equal(read(cache, rows, made).batch(ids[:3])["hidden"], batch["hidden"])


def test_a_run_that_was_stopped_goes_on(corpus: Path, tmp_path: Path) -> None:
    made, rows = module().trunk.requires_grad_(False), data(corpus).rows("train")
    cache = CachedStates(folder=str(tmp_path), dtype="float32", rows_per_pass=1)
    whole = read(cache, rows, made).batch(rows.fixed_ids())["hidden"]
    index = tmp_path / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "written": 3}))
    torch.from_file(str(tmp_path / "states.bin"), shared=True, size=whole.numel())[3 * 16 * 16 :] = 0
    assert torch.equal(read(cache, rows, made).batch(rows.fixed_ids())["hidden"], whole)


def _shorten(folder: Path) -> None:
    os.truncate(folder / "states.bin", 40 * 16 * 16 * 4)


def _damage(folder: Path) -> None:
    with (folder / "states.bin").open("rb+") as file:
        file.seek(5000)
        file.write(b"\xff")


def _lose(folder: Path) -> None:
    (folder / "states.bin").unlink()


def _forget_checksums(folder: Path) -> None:
    known = json.loads((folder / "index.json").read_text())
    del known["checksums"]
    (folder / "index.json").write_text(json.dumps(known))


HARM = {_shorten: 30, _damage: 32, _lose: 62, _forget_checksums: 62}


@pytest.mark.parametrize(("harm", "lost"), HARM.items(), ids=[harm.__name__ for harm in HARM])
def test_damaged_states_are_computed_again(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None], lost: int
) -> None:
    made, rows = module().trunk.requires_grad_(False), data(corpus).rows("train")
    cache = CachedStates(folder=str(tmp_path), dtype="float32", max_windows=62)
    whole = read(cache, rows, made).batch(rows.fixed_ids()[:20])["hidden"].clone()
    everything, index = (tmp_path / "states.bin").read_bytes(), json.loads((tmp_path / "index.json").read_text())
    capsys.readouterr()
    harm(tmp_path)
    again = read(cache, rows, made).batch(rows.fixed_ids()[:20])["hidden"]
    assert torch.equal(again, whole)
    assert (tmp_path / "states.bin").read_bytes() == everything
    assert json.loads((tmp_path / "index.json").read_text()) == index
    assert capsys.readouterr().err.splitlines()[0] == (
        f"CachedStates: {lost} of 62 windows in {tmp_path} are missing or damaged; the trunk reads them again."
    )
    read(cache, rows, made)
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_one_sentence(corpus: Path, tmp_path: Path) -> None:
    """The states were a hole in the file, and writing into it killed the process."""
    made, rows = module().trunk.requires_grad_(False), data(corpus).rows("train")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(
            ValueError,
            match=r"^CachedStates: the states need 6\.35e-05 GB, but .* has no room for them \(.* GB are free\);",
        ):
            read(CachedStates(folder=str(tmp_path), dtype="float32", max_windows=62), rows, made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "states.bin").stat().st_size == 0


def test_what_nobody_can_vouch_for_is_refused(corpus: Path, tmp_path: Path) -> None:
    made, rows = module().trunk.requires_grad_(False), data(corpus).rows("train")
    cache = CachedStates(folder=str(tmp_path), dtype="float32", max_windows=8)
    unseen = CachedRows(rows, window=16, kept=cache)
    with pytest.raises(ValueError, match=r"^CachedStates: this process does not see in .* what process 0 wrote; name"):
        read_once(unseen, made, writes=False)
    read(cache, rows, made)
    read_once(unseen, made, writes=False)
    (tmp_path / "index.json").write_text('{"of": ')
    with pytest.raises(ValueError, match=r"^CachedStates: .*index\.json is damaged, so nothing says whose"):
        read(cache, rows, made)


def test_the_trunk_reads_in_the_precision_of_the_run(corpus: Path, tmp_path: Path) -> None:
    rows, trained = data(corpus).rows("train"), module()
    cache = CachedStates(folder=str(tmp_path / "states"), dtype="float32")
    choose_draft_tokens(trained.model, data(corpus))
    trainer(tmp_path, max_steps=1, precision="bf16-mixed").fit(trained, data(corpus, cache))
    trained.trunk.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        found = read(cache, rows, trained.trunk).batch(rows.fixed_ids()[:2])
        given = {name: tensor[:, :16] for name, tensor in found.items() if name != "hidden"}
        wanted = trained.trunk(given["tokens"], document_ids=given.get("document_ids")).hidden
    assert torch.equal(found["hidden"], wanted.float())
    assert not torch.equal(found["hidden"], trained.trunk(given["tokens"]).hidden)
    elsewhere = r"^CachedStates: .* of another trunk, other layers, text, windows or precision; name another"
    with pytest.raises(ValueError, match=elsewhere):
        read(cache, rows, trained.trunk)


def test_what_is_refused(corpus: Path, tmp_path: Path) -> None:
    rows, cache = data(corpus).rows("train"), CachedStates(folder=str(tmp_path / "states"))
    with pytest.raises(ValueError, match=r"^CachedStates: the trunk is trained, so its hidden states change"):
        read(cache, rows, module(freeze=()).trunk)
    read(cache, rows, module().trunk)
    other = RecurrentTrunk(vocab_size=256, d_model=16).requires_grad_(False)
    elsewhere = r"^CachedStates: .* holds the states of another trunk, other layers, text, windows or precision"
    with pytest.raises(ValueError, match=elsewhere):
        read(cache, rows, other)
    with pytest.raises(ValueError, match=r"^TextDataModule: cached_states belong to one fixed set of windows; "):
        data(corpus, cache, random_offsets=True)
    with pytest.raises(ValueError, match=r"^CachedStates: dtype must be one of float32, float16, bfloat16, got"):
        CachedStates(folder=str(tmp_path), dtype="int8")
    inner = module(inner=EarlyExitHeads)
    with pytest.raises(ValueError, match=elsewhere):
        read(cache, rows, inner.trunk)
    tokens, hidden = torch.zeros(2, 19, dtype=torch.long), torch.zeros(2, 16, 16)
    with pytest.raises(
        ValueError, match=r"^MTPModel: known holds 0 inner layers, but EarlyExitHeads read 2; recompute"
    ):
        inner.model(tokens, known=TrunkOutput(hidden))
    with pytest.raises(ValueError, match=r"^MTPModel: known has shape \(2, 16, 8\), these tokens need \(2, 16, 16\);"):
        module().model(tokens, known=TrunkOutput(torch.zeros(2, 16, 8)))
