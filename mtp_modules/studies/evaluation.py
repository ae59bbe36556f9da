"""Evaluate a trained model on held-out data."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtp_modules.core.checks import refuse
from mtp_modules.data.prompts import row_beginnings
from mtp_modules.decoders import AutoregressiveDecoder
from mtp_modules.metrics import AnswerAccuracy, PositionAccuracy
from mtp_modules.model import MTPModel
from mtp_modules.studies.speed import measure_speeds
from mtp_modules.training import MTPModule

ANSWER_MASK = "answer_mask"
"""Key of the batch's mask of horizon-1 targets that belong to an answer, ``(B, T)``."""


class Evaluation(NamedTuple):
    """Metrics on held-out data.

    Attributes:
        figures: Metrics of :class:`~mtp_modules.metrics.PerHeadMetrics` and
            :class:`~mtp_modules.metrics.AnswerAccuracy`, and ``bits/head_h``, the loss in bits.
        positions: Accuracy by position, a list of ``H`` fractions for each; ``None`` where there were no targets.
    """

    figures: dict[str, float]
    positions: list[list[float | None]]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode temporarily; every submodule gets its own mode back.

    Args:
        module: The module, with its submodules.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def evaluate(module: MTPModule, batches: Iterable[dict[str, Tensor]]) -> Evaluation:
    """Evaluate held-out batches on the module's device.

    Args:
        module: Model and loss.
        batches: Batches with ``tokens``, and optionally ``document_ids``, ``loss_mask`` and ``answer_mask``.

    Raises:
        ValueError: If there are no batches.
    """
    horizons = len(module.horizons)
    heads = module.objectives.metrics(horizons).to(module.device)
    answers = AnswerAccuracy().to(module.device)
    positions: PositionAccuracy | None = None
    with evaluating(module):
        for batch in batches:
            batch = {key: value.to(module.device) for key, value in batch.items()}
            terms = module(batch)
            heads.update(terms)
            if positions is None:
                length = terms.valid.shape[1]
                positions = PositionAccuracy(num_positions=length, num_horizons=horizons).to(module.device)
            positions.update(terms)
            if ANSWER_MASK in batch:
                answers.update(terms, batch[ANSWER_MASK])
    if positions is None:
        refuse("study", "the data has no validation batches; give it a validation split.")
    figures = {key: float(value) for key, value in heads.compute().items()}
    figures |= {f"bits/head_{h}": figures[f"loss/head_{h}"] / math.log(2) for h in range(1, horizons + 1)}
    if answers.update_called:
        figures |= {key: float(value) for key, value in answers.compute().items()}
    table = [[None if math.isnan(share) else share for share in row] for row in positions.compute()]
    return Evaluation(figures, table)


def decoded(model: MTPModel, batches: Iterable[dict[str, Tensor]], options: dict[str, Any]) -> dict[str, float]:
    """Decode held-out prompts greedily, compare with the true text, and optionally measure speed.

    ``written/distance_d`` is the accuracy of the ``d``-th generated token when the model reads its own tokens.
    ``decode/tokens_per_forward`` and ``decode/tokens_per_second`` are those of self-speculative decoding with batch
    size 1, without the prefill; ``decode/speedup`` is the speed relative to plain decoding on the same machine. See
    :func:`~mtp_modules.studies.measure_speeds`.

    Args:
        model: A model in evaluation mode.
        batches: Held-out batches.
        options: Attributes of :class:`~mtp_modules.studies.spec.Decode`.

    Raises:
        ValueError: If no row begins with enough tokens of one document.
    """
    prompt, far = int(options["prompt_length"]), int(options["distances"])
    texts = list(islice(row_beginnings(batches, length=prompt + far), int(options["prompts"])))
    if not texts:
        refuse(
            "study",
            f"decode needs held-out rows that begin with {prompt + far} tokens of one document, and there are none; "
            "lower prompt_length or distances.",
        )
    prompts = [text[:prompt] for text in texts]
    plain = AutoregressiveDecoder()
    found: dict[str, float] = {}
    if far:
        written = plain.generate(model, prompts, max_new_tokens=far).tokens
        right = torch.tensor([row[-far:] for row in written]) == torch.tensor([text[prompt:] for text in texts])
        shares = right.double().mean(dim=0).tolist()
        found |= {f"written/distance_{index + 1}": share for index, share in enumerate(shares)}
    if options["new_tokens"]:
        found |= _speed(model, prompts, int(options["new_tokens"]))
    return found


def _speed(model: MTPModel, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    """Measure decoding with all drafts that the heads are trained for; plain decoding with one horizon."""
    most = len(model.horizons) - 1
    speed = measure_speeds(model, prompts, num_drafts=[0, most] if most else [0], new_tokens=new_tokens)[-1]
    return {
        "decode/tokens_per_forward": speed.stats.tokens_per_forward,
        "decode/tokens_per_second": speed.stats.tokens / speed.stats.seconds,
        "decode/speedup": speed.speed_up,
    }
