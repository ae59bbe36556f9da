"""Train and decode for a long time, and look for what grows.

``python -m tests.faults.soak --minutes 60 --prompts 10000``.

Training: memory, open files and the CPU time of a step, in the last tenth of the time against the second tenth.
Decoding: ragged batches with random prompts and settings; every row must be the one that plain decoding gives.
"""

import argparse
import gc
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mtp_modules import GeometricWeights, LinearHeads, MultiTokenLoss, TransformerTrunk
from mtp_modules.data import ProgressionDataModule
from mtp_modules.decoders import (
    AutoregressiveDecoder,
    ConfidentDepth,
    FixedDepth,
    LookupOrHeads,
    PromptLookup,
    SamplingParams,
    SpeculativeDecoder,
    StopRule,
)
from mtp_modules.training import MTPModule
from tests.helpers import TRUNKS_WITH_EVERY_HEADS, make_model

VOCAB, LONGEST = 11, 12


class Growth(NamedTuple):
    """Bytes of memory, open files and CPU seconds of a step, early and late."""

    memory: tuple[float, float]
    files: tuple[float, float]
    seconds: tuple[float, float]


_EVERY = 20  # steps: what is noted at each step grows itself


class Usage(Callback):
    """Notes what this process uses, every 20 steps."""

    def __init__(self) -> None:
        self.found: list[tuple[float, int, int, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step % _EVERY:
            return
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        used = pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
        self.found.append((time.monotonic(), *used, time.process_time()))


def train(minutes: float) -> Growth:
    """Train a tiny model, with validations and checkpoints all the while."""
    usage = Usage()
    module = MTPModule(
        trunk=TransformerTrunk(vocab_size=64, d_model=16, num_layers=1, num_heads=2, max_positions=32),
        heads=LinearHeads(d_model=16, num_horizons=3),
        loss=MultiTokenLoss(weights=GeometricWeights(gamma=0.5), share_of_positions=0.5),
    )
    sizes = {"num_train": 64, "num_val": 16, "num_test": 16, "length": 12}
    data = ProgressionDataModule(batch_size=8, lookahead=3, vocab_size=64, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        saver = ModelCheckpoint(dirpath=folder, monitor="val/loss/head_1", filename="best", save_last=True)
        trainer = Trainer(
            max_epochs=-1,
            max_time=timedelta(minutes=minutes),
            default_root_dir=folder,
            callbacks=[saver, usage],
            logger=False,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, data)
    tenth = len(usage.found) // 10
    early, late = usage.found[tenth : 2 * tenth], usage.found[-tenth:]

    def median(part: list[Any], place: int) -> float:
        return float(statistics.median(row[place] for row in part))

    def step(part: list[Any]) -> float:
        return statistics.median((after[3] - before[3]) / _EVERY for before, after in itertools.pairwise(part))

    pairs = [(median(early, place), median(late, place)) for place in (1, 2)]
    return Growth(*pairs, (step(early), step(late)))


def decode(prompts: int, seed: int) -> tuple[int, int]:
    """Decode random batches; return how many rows there were, and how many were wrong."""
    dice, rows, wrong = random.Random(seed), 0, 0
    while rows < prompts:
        trunk, heads = dice.choice(TRUNKS_WITH_EVERY_HEADS).values
        model = make_model(trunk, heads, dice.randint(2, 4), seed=dice.randrange(5))
        for _ in range(20):
            size = dice.randint(1, 6)
            texts = [[dice.randrange(VOCAB) for _ in range(dice.randint(1, LONGEST))] for _ in range(size)]
            settings = {
                "max_new_tokens": [dice.randint(1, 16) for _ in texts],
                "sampling": dice.choice([None, SamplingParams(temperature=dice.choice([0.3, 1.0, 2.0]), top_k=4)]),
                "seed": dice.randrange(10**6),
                "stop": dice.choice([None, StopRule(tokens=[dice.randrange(VOCAB)])]),
            }
            given = {name: value for name, value in settings.items() if value is not None}
            drafter = dice.choice([None, PromptLookup(num_drafts=3), LookupOrHeads(longest=3, shortest=1)])
            policy = dice.choice([FixedDepth(), ConfidentDepth(threshold=0.3)]) if drafter is None else FixedDepth()
            plain = AutoregressiveDecoder().generate(model, texts, **given)
            drafted = SpeculativeDecoder(drafter=drafter, policy=policy).generate(model, texts, **given)
            rows += size
            wrong += sum(one != other for one, other in zip(plain.tokens, drafted.tokens, strict=True))
    return rows, wrong


def main(minutes: float, prompts: int, seed: int) -> None:
    """Do both, print the figures, and end with status 1 if something grew or was wrong."""
    growth = train(minutes)
    gc.collect()
    for name, (early, late) in growth._asdict().items():
        print(f"{name}: {early:.6g} early, {late:.6g} late, {late / early:.3f} times")
    rows, wrong = decode(prompts, seed)
    print(f"rows: {rows} decoded, {wrong} wrong")
    grew = growth.memory[1] > 1.05 * growth.memory[0] or growth.files[1] > growth.files[0]
    if grew or growth.seconds[1] > 1.5 * growth.seconds[0] or wrong:
        sys.exit("soak: something grew or was wrong")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
