"""The quickstart's training step: tokens per second, and its share of the machine's matrix-multiply peak.

Both are measured in one process, alternating; medians. Floating-point operations are counted by torch, not estimated.

    python tests/benchmarks/training.py --threads 2
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from mtp_modules import AuxiliaryWeights, MTPModel, MultiTokenLoss, RecurrentHeads, TransformerTrunk
from mtp_modules.training import MuonWithAdamW, muon_parameter_groups

WINDOW, BATCH, SIZE = 256, 4, 1024


def seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    trunk = TransformerTrunk(
        vocab_size=256,
        d_model=160,
        num_layers=6,
        num_heads=2,
        num_kv_heads=1,
        num_previous=3,
        embedding_std=1.0,
    )
    model = MTPModel(trunk=trunk, heads=RecurrentHeads(d_model=160, num_horizons=8), tie_embeddings=False)
    loss = MultiTokenLoss(weights=AuxiliaryWeights(weight=0.1), share_of_positions=0.25, distillation=0.5)
    optimizer = MuonWithAdamW(muon_parameter_groups(model), lr=0.01, adamw_lr=0.01)
    tokens = torch.randint(256, (BATCH, WINDOW + model.lookahead))
    left, right = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)

    def step() -> None:
        optimizer.zero_grad()
        loss(model, tokens).loss.backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step()
    steps, products = [], []
    for _ in range(options.repeats):
        steps.append(seconds(step))
        products.append(seconds(lambda: left @ right))
    took, peak = statistics.median(steps), 2 * SIZE**3 / statistics.median(products)
    rate = counter.get_total_flops() / took
    print(
        f"{options.threads} threads: {BATCH * WINDOW / took:.0f} tokens/s, {rate / 1e9:.0f} GFLOP/s in the step, "
        f"{peak / 1e9:.0f} GFLOP/s in a {SIZE}x{SIZE} product: {rate / peak:.0%} of the peak"
    )


if __name__ == "__main__":
    main()
