"""What extra heads cost: a whole training step with n heads against one with n = 1, at equal total layers.

As in the founding paper, every extra head takes its layer from the trunk. Both models are trained in one process, their
steps alternate, and medians of CPU time are compared.

    python tests/benchmarks/extra_heads.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from mtp_modules import MTPModel, MultiTokenLoss, ParallelHeads, TransformerTrunk

SIZES = {  # width, layers, attention heads, rows, window
    "small": (256, 8, 4, 4, 256),
    "base": (768, 12, 12, 1, 512),
}
CELLS = [("small", 256, 1.0), ("small", 32768, 0.25), ("base", 32768, 1.0), ("base", 32768, 0.25)]
"""Size, vocabulary, share of the positions that horizons beyond the first are trained on."""


def step_of(size: str, vocab_size: int, num_horizons: int, share: float) -> Callable[[], None]:
    """Return a function that trains for one step.

    Args:
        size: One of ``SIZES``.
        vocab_size: Number of token ids.
        num_horizons: Number of heads.
        share: Share of the positions of horizons beyond the first.
    """
    width, layers, heads, rows, window = SIZES[size]
    torch.manual_seed(0)
    trunk = TransformerTrunk(
        vocab_size=vocab_size, d_model=width, num_layers=layers - num_horizons, num_heads=heads, final_norm=False
    )
    model = MTPModel(trunk=trunk, heads=ParallelHeads(d_model=width, num_horizons=num_horizons, num_heads=heads))
    loss = MultiTokenLoss(share_of_positions=share)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(vocab_size, (rows, window + model.lookahead))

    def step() -> None:
        optimizer.zero_grad()
        loss(model, tokens).loss.backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_horizons", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"| width, layers | V | share of positions | n=1, s | n={options.num_horizons}, s | ratio |")
    print("|---|---|---|---|---|---|")
    for size, vocab_size, share in CELLS:
        steps = [step_of(size, vocab_size, n, share) for n in (1, options.num_horizons)]
        seconds: list[list[float]] = [[], []]
        for repeat in range(options.repeats + 1):
            for step, times in zip(steps, seconds, strict=True):
                started = time.process_time()
                step()
                if repeat:  # the first is a warm-up
                    times.append(time.process_time() - started)
        one, many = (statistics.median(times) for times in seconds)
        width, layers, *_ = SIZES[size]
        print(f"| {width}, {layers} | {vocab_size} | {share} | {one:.2f} | {many:.2f} | **{many / one:.2f}** |")


if __name__ == "__main__":
    main()
