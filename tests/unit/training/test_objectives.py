"""Auxiliary objectives in runs: trained, logged, saved for resuming and left out of what decodes."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from mtp_modules import LinearHeads, MTPModel, MultiTokenLoss, RecurrentTrunk, load_model
from mtp_modules.core.auxiliary import AuxiliaryText
from mtp_modules.core.checks import InputError
from mtp_modules.core.trunk import TrunkOutput
from mtp_modules.loading import load_objectives
from mtp_modules.metrics import PerHeadMetrics
from mtp_modules.objectives import AuxiliaryObjective, FutureBagOfWords, NextSpan, TokenOrder
from mtp_modules.training import MTPModule, prepare_objectives, step_flops, training_flops
from tests.helpers import assert_same
from tests.unit.training.running import VOCAB, SaveAt, data, trainer

SIZES = {"d_model": 16, "vocab_size": VOCAB}


def module(*objectives: AuxiliaryObjective, **options: Any) -> MTPModule:
    torch.manual_seed(0)
    return MTPModule(
        trunk=RecurrentTrunk(vocab_size=VOCAB, d_model=16),
        heads=LinearHeads(d_model=16, num_horizons=3),
        loss=MultiTokenLoss(),
        optimizer=partial(torch.optim.AdamW, lr=0.02),
        objectives=objectives,
        **options,
    )


def both() -> list[AuxiliaryObjective]:
    torch.manual_seed(1)
    return [TokenOrder(**SIZES, window=5), FutureBagOfWords(**SIZES, window=5, weight=0.5)]


class Logged(Callback):
    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.figures |= {name: float(value) for name, value in trainer.callback_metrics.items()}


def fitted(folder: Path, *callbacks: Callback, **options: Any) -> MTPModule:
    made = module(*both())
    prepare_objectives(made, data())
    trainer(folder, *callbacks, **options).fit(made, data())
    return made


def test_a_run_trains_and_logs_them(tmp_path: Path) -> None:
    logged = Logged()
    made = fitted(tmp_path, logged, max_epochs=4)
    chance = torch.tensor(float(VOCAB)).log()
    assert logged.figures["val/token_order/loss"] < 0.8 * chance
    assert logged.figures["val/token_order/accuracy"] > 4 / VOCAB
    assert logged.figures["train/future_bag/recall"] > 0.5
    untouched = dict(module(*both()).objectives.named_parameters())
    for name, weight in made.objectives.named_parameters():
        assert not torch.equal(weight, untouched[name]), name
    parts = sum(logged.figures[f"train/{name}"] for name in ("loss/head_1", "loss/head_2", "loss/head_3"))
    added = logged.figures["train/token_order/loss"] + 0.5 * logged.figures["train/future_bag/loss"]
    assert logged.figures["train/loss"] == pytest.approx(parts + added, rel=1e-5)


def test_they_change_what_the_trunk_learns_and_a_weight_of_nothing_does_not(tmp_path: Path) -> None:
    runs = {}
    for name, objectives in (("none", ()), ("no weight", (TokenOrder(**SIZES, weight=0.0),)), ("one", both()[:1])):
        made = module(*objectives)
        trainer(tmp_path, max_steps=3).fit(made, data())
        runs[name] = made.model.state_dict()
    assert_same(runs["no weight"], runs["none"])
    assert not torch.equal(runs["one"]["trunk.embedding.weight"], runs["none"]["trunk.embedding.weight"])


def test_decoding_goes_without_and_whoever_asks_gets_them(tmp_path: Path) -> None:
    made = fitted(tmp_path, SaveAt(tmp_path / "run.ckpt", 4), max_steps=4)
    model, _ = load_model(tmp_path / "run.ckpt")
    assert_same(model.state_dict(), made.model.state_dict())
    kept = load_objectives(tmp_path / "run.ckpt")
    assert list(kept) == ["token_order", "future_bag"]
    for index, objective in enumerate(kept.values()):
        assert_same(objective.state_dict(), made.objectives[index].state_dict())
    made.model.save_pretrained(tmp_path / "saved")
    assert load_objectives(tmp_path / "saved") == {}
    assert set(MTPModel.from_pretrained(tmp_path / "saved")[0].state_dict()) == set(made.model.state_dict())


def test_a_resumed_run_ends_where_one_that_was_not_stopped_ends(tmp_path: Path) -> None:
    whole = fitted(tmp_path, SaveAt(tmp_path / "half.ckpt", 5), max_steps=10)
    resumed = module(*both())
    trainer(tmp_path, max_steps=10).fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert_same(resumed.state_dict(), whole.state_dict())
    with pytest.raises(InputError, match=r"objectives\.1\.summary"):
        trainer(tmp_path, max_steps=10).fit(
            module(*both()[:1]), data(), ckpt_path=tmp_path / "half.ckpt", weights_only=False
        )


def test_what_does_not_go_together_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^MTPModule: TokenOrder was built for d_model=8, but RecurrentTrunk has 16"):
        module(TokenOrder(d_model=8, vocab_size=VOCAB))
    with pytest.raises(InputError, match=r"^MTPModule: objectives holds 'token_order' twice; leave one out\.$"):
        module(TokenOrder(**SIZES), TokenOrder(**SIZES))
    with pytest.raises(InputError, match=r"^FutureBagOfWords: weighted is true, but the frequencies of tokens are unk"):
        trainer(tmp_path, max_steps=1).fit(module(*both()), data())
    with pytest.raises(InputError, match=r"^FutureBagOfWords: needs the frequencies of tokens, but the data is no Tok"):
        prepare_objectives(module(*both()), object())
    with pytest.raises(InputError, match=r"^FutureBagOfWords: counts must hold 24 numbers, got shape \(3,\)\.$"):
        both()[1].set_frequencies(torch.ones(3, dtype=torch.long))
    with pytest.raises(InputError, match=r"^NextSpan: level must be one of word, phrase, sentence, line, got 'page'"):
        NextSpan(**SIZES, level="page")
    with pytest.raises(InputError, match=r"^NextSpan: needs the texts of tokens, but the data has no tokenizer; call"):
        prepare_objectives(module(NextSpan(**SIZES, level="line")), data())
    with pytest.raises(InputError, match=r"^NextSpan: the texts of the tokens are unknown; call prepare_objectives"):
        trainer(tmp_path, max_steps=1).fit(module(NextSpan(**SIZES, level="line", weighted=False)), data())
    with pytest.raises(InputError, match=r"^NextSpan: texts must hold 24 texts, got 1\.$"):
        NextSpan(**SIZES, level="line").set_vocabulary(["a"])
    with pytest.raises(InputError, match=r"^FutureBagOfWords: window must be at least 2, got 1\.$"):
        FutureBagOfWords(**SIZES, window=1)


def test_they_read_cached_states_in_the_precision_of_the_weights() -> None:
    made = module(*both()[:1], freeze=["trunk"])
    tokens = torch.randint(VOCAB, (2, 9))
    hidden = made.model.read(tokens).hidden
    found = made({"tokens": tokens, "hidden": hidden.bfloat16()})
    torch.testing.assert_close(found.loss, made({"tokens": tokens}).loss, rtol=1e-2, atol=1e-2)
    found.loss.backward()
    assert made.objectives[0].unembedding.weight.grad.any()


def test_metrics_that_do_not_know_an_objective_say_so() -> None:
    made = module(*both()[:1])
    terms = made({"tokens": torch.randint(VOCAB, (2, 9))})
    with pytest.raises(InputError, match=r"^PerHeadMetrics: the loss has the objective 'token_order'; name it and its"):
        PerHeadMetrics(num_horizons=3).update(terms)


@pytest.mark.parametrize(
    ("level", "spans"),
    [
        ("word", ["One-", "two, ", "three. ", "Four!\n", "five"]),
        ("phrase", ["One-two, ", "three. ", "Four!\n", "five"]),
        ("sentence", ["One-two, three. ", "Four!\n", "five"]),
        ("line", ["One-two, three. Four!\n", "five"]),
    ],
)
def test_spans_end_where_a_reader_would_end_them(level: str, spans: list[str]) -> None:
    objective = NextSpan(d_model=1, vocab_size=128, level=level, window=40, weighted=False)
    objective.set_vocabulary([chr(code) for code in range(128)])
    text = "".join(spans)
    tokens = torch.tensor([list(text.encode())])
    found, inside = objective.upcoming(AuxiliaryText(tokens, length=len(text) - 1))
    seen = ["".join(map(chr, found[0, place][inside[0, place]].tolist())) for place in range(len(text) - 1)]
    assert list(dict.fromkeys(seen)) == [*spans[1:], ""]


def test_words_of_other_vocabularies_begin_with_white_space() -> None:
    objective = NextSpan(d_model=1, vocab_size=5, level="word", weighted=False)
    objective.set_vocabulary(["the", " cat", "s", " sat", "."])
    found, inside = objective.upcoming(AuxiliaryText(torch.tensor([[0, 1, 2, 3, 4]]), length=4))
    assert [found[0, place][inside[0, place]].tolist() for place in range(4)] == [[1, 2], [3, 4], [3, 4], []]


def test_rare_tokens_weigh_more_and_sum_to_one() -> None:
    bag = FutureBagOfWords(d_model=4, vocab_size=3)
    bag.set_frequencies(torch.tensor([90, 0, 9]))
    common, unseen, rare = bag.token_weights.tolist()
    assert common < rare < unseen
    assert common + unseen + rare == pytest.approx(1)


def test_a_batch_without_examples_has_no_loss_and_no_gradient_that_is_not_finite() -> None:
    for objective in both():
        hidden = torch.randn(2, 4, 16, requires_grad=True)
        text = AuxiliaryText(torch.full((2, 5), -100), length=4)
        if objective.reads_frequencies:
            objective.set_frequencies(torch.ones(VOCAB, dtype=torch.long))
        terms = objective(TrunkOutput(hidden), text)
        terms.loss.backward()
        assert terms.examples == 0
        assert terms.loss == 0
        assert not hidden.grad.any()


def test_their_operations_count() -> None:
    sizes = {"batch_size": 2, "length": 5}
    plain, added = module(), module(*both())
    more = 3 * 2 * 5 * 2 * (16 * VOCAB + 16 * (16 + VOCAB))
    assert step_flops(added, **sizes) == training_flops(plain.model, **sizes) + more
