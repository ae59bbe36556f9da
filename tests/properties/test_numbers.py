"""Every number that a constructor takes is used, or refused in one sentence."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import torch

import mtp_modules.data
import mtp_modules.heads
from mtp_modules import MTPModel, MultiTokenLoss, PerHeadMetrics, RecurrentTrunk, TransformerTrunk
from mtp_modules import decoders as d
from mtp_modules import losses as lo
from mtp_modules.core.checks import InputError
from mtp_modules.core.interfaces import Heads
from mtp_modules.layers import transformer
from mtp_modules.training import GradientConflict, MuonWithAdamW, TokenThroughput, WarmupDecay
from tests.helpers import make_model, random_tokens

BAD = (-1, 0, 2.5, 1e300, math.nan, math.inf, -math.inf)


def _finite(*tensors: torch.Tensor) -> None:
    assert all(tensor.isfinite().all() for tensor in tensors), "not finite"


def _train(model: MTPModel) -> None:
    tokens = torch.arange(2 * (model.lookahead + 2)).reshape(2, -1) % model.trunk.vocab_size
    terms = MultiTokenLoss()(model, tokens)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _finite(terms.loss, *torch.autograd.grad(terms.loss, trained, allow_unused=True, materialize_grads=True))


def _trunk(trunk: Any) -> None:
    _train(MTPModel(trunk=trunk, heads=mtp_modules.heads.LinearHeads(d_model=trunk.d_model, num_horizons=2)))


def _heads(heads: Heads) -> None:
    layers = getattr(heads, "num_features", 0)
    width = getattr(heads, "d_model", 8)
    trunk = TransformerTrunk(
        vocab_size=11,
        d_model=width,
        num_layers=max(2, layers),
        num_heads=1,
        feature_layers=range(layers),
        max_positions=32,
    )
    _train(MTPModel(trunk=trunk, heads=heads, tie_embeddings=False))


def _weights(weights: Any) -> None:
    assert all(math.isfinite(weight) for weight in weights(3, 0.5))


def _loss(loss: MultiTokenLoss) -> None:
    _finite(loss(make_model("gru", "joint" if loss.balance else "linear"), random_tokens(2, 9)).loss)


def _decode(decoder: Any, **options: Any) -> None:
    generated = decoder.generate(make_model(), [[1, 2, 3, 1, 2]], max_new_tokens=4, **options)
    assert generated.tokens


def _data(data: Any) -> None:
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert (batch["tokens"] >= 0).all()


def _task(task: Any) -> None:
    _data(mtp_modules.data.TaskDataModule(task=task, batch_size=2, lookahead=2, num_train=4, num_val=2, num_test=2))


def _optimizer(optimizer: torch.optim.Optimizer) -> None:
    (parameter,) = optimizer.param_groups[0]["params"]
    torch.nn.init.ones_(parameter)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    _finite(parameter)


def _schedule(schedule: WarmupDecay) -> None:
    assert all(math.isfinite(schedule(step, 10)) for step in range(10))


def _layer(layer: torch.nn.Module) -> None:
    _finite(layer(torch.ones(1, 8)))


def _augmentation(augmentation: Any) -> None:
    _data(
        mtp_modules.data.ProgressionDataModule(
            batch_size=2, lookahead=2, vocab_size=24, length=5, num_train=4, augmentation=augmentation
        )
    )


def _metric(metric: PerHeadMetrics) -> None:
    metric.update(MultiTokenLoss()(make_model("gru", num_horizons=metric.num_horizons), random_tokens(2, 9)))
    _finite(*metric.compute().values())


HEADS: dict[str, dict[str, Any]] = {name: {"d_model": 8, "num_horizons": 3} for name in mtp_modules.heads.__all__}
HEADS["JointHeads"]["num_components"] = 2
for _name in ("BlockDiffusionHeads", "ChainedHeads", "FusedFeatureHeads", "ParallelHeads", "SequentialHeads"):
    HEADS[_name]["num_heads"] = 2
HEADS["ContextBlockHeads"]["num_heads"] = 2
for _name in ("ContextBlockHeads", "EarlyExitHeads", "FusedFeatureHeads"):
    HEADS[_name]["num_features"] = 2
_inner = mtp_modules.heads.LinearHeads(d_model=8, num_horizons=3)
HEADS["ConfidenceHeads"] = {"heads": _inner}
HEADS["TransitionHeads"] = {"heads": _inner, "vocab_size": 11, "rank": 4}
FOLDER = str(Path(__file__).parent)
SIZES = {"batch_size": 2, "lookahead": 2, "num_train": 4, "num_val": 2, "num_test": 2}
PARAMETER = [torch.nn.Parameter(torch.ones(2, 2))]

KINDS: list[tuple[Callable[..., Any], dict[str, Any], Callable[[Any], None]]] = [
    (TransformerTrunk, {"vocab_size": 11, "d_model": 8, "num_layers": 2, "num_heads": 2, "max_positions": 16}, _trunk),
    (RecurrentTrunk, {"vocab_size": 11, "d_model": 8}, _trunk),
    *((getattr(mtp_modules.heads, name), given, _heads) for name, given in HEADS.items()),
    (transformer.RMSNorm, {"width": 8}, _layer),
    (lo.AuxiliaryWeights, {"weight": 0.5}, _weights),
    (lo.GeometricWeights, {"gamma": 0.5}, _weights),
    (lo.HeadCurriculum, {"weights": lo.UniformWeights(), "direction": "forward"}, _weights),
    (lo.LinearWeightSchedule, {"start": lo.UniformWeights(), "end": lo.UniformWeights()}, _weights),
    (MultiTokenLoss, {}, _loss),
    *(
        (kind, {}, lambda backend: _loss(MultiTokenLoss(backend=backend)))
        for kind in (lo.FusedLinearCrossEntropy, lo.RecomputeLinearCrossEntropy, lo.TorchLinearCrossEntropy)
    ),
    (mtp_modules.data.ProgressionDataModule, {"vocab_size": 24, "length": 5, **SIZES}, _data),
    (mtp_modules.data.PolynomialTask, {}, _task),
    (mtp_modules.data.StarGraphTask, {}, _task),
    (mtp_modules.data.StoryTask, {}, _task),
    (mtp_modules.data.TaskDataModule, {"task": mtp_modules.data.StarGraphTask(), **SIZES}, _data),
    (mtp_modules.data.SpanShuffle, {}, _augmentation),
    (mtp_modules.data.TokenDropout, {}, _augmentation),
    (d.SamplingParams, {"temperature": 1.0}, lambda given: _decode(d.SpeculativeDecoder(), sampling=given)),
    (d.SpeculativeDecoder, {}, _decode),
    *((getattr(d, name), {}, _decode) for name in ("BeamDecoder", "DraftedBeamDecoder")),
    (MuonWithAdamW, {"params": PARAMETER}, _optimizer),
    (WarmupDecay, {}, _schedule),
    (d.PromptLookup, {}, lambda drafter: _decode(d.SpeculativeDecoder(drafter=drafter))),
    (d.LookupOrHeads, {}, lambda drafter: _decode(d.SpeculativeDecoder(drafter=drafter))),
    (d.ConfidentDepth, {}, lambda policy: _decode(d.SpeculativeDecoder(policy=policy))),
    (d.CostAwareDepth, {}, lambda policy: _decode(d.SpeculativeDecoder(policy=policy))),
    (d.TopKAcceptance, {"top_k": 2}, lambda rule: _decode(d.SpeculativeDecoder(acceptance=rule))),
    (
        d.TypicalAcceptance,
        {},
        lambda rule: _decode(d.SpeculativeDecoder(acceptance=rule), sampling=d.SamplingParams(temperature=1.0)),
    ),
    (
        d.DynamicTree,
        {"depth": 2, "width": 2, "nodes": 3},
        lambda tree: _decode(d.SpeculativeDecoder(tree=tree)),
    ),
    (
        mtp_modules.data.TextDataModule,
        {"sources": [FOLDER], "val_share": 0.0, "test_share": 0.0, "window": 8, "lookahead": 2, "batch_size": 2},
        _data,
    ),
    (GradientConflict, {}, lambda _: None),
    (TokenThroughput, {}, lambda _: None),
    (PerHeadMetrics, {"num_horizons": 3}, _metric),
]


def _numbers(kind: Callable[..., Any]) -> Iterator[str]:
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.annotation in (int, float, int | None, float | None):
            yield name


def test_every_number_is_used_or_refused() -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # wrong types must reach the constructors, nightly too
    wrong = []
    for kind, given, use in KINDS:
        use(kind(**given))
        for name, value in itertools.product(_numbers(kind), BAD):
            torch.manual_seed(0)
            try:
                use(kind(**given | {name: value}))
            except InputError as error:
                if "\n" in str(error):
                    wrong.append(f"{kind.__name__}({name}={value}): {error}")
            except Exception as error:
                wrong.append(f"{kind.__name__}({name}={value}): {type(error).__name__}: {str(error)[:100]}")
    assert wrong == []
