"""Memory and time of every backend of linear + cross-entropy, forward and backward, beside the naive one's.

Times are CPU seconds of one thread, medians of runs that alternate between the backends in one process. Peak memory is
what a fresh process holds at most, beyond what it held before the call. Horizons share one output matrix.

    python tests/benchmarks/losses.py
    python tests/benchmarks/losses.py --cells 256:1,32768:4 --rows 256 --repeats 3
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mtp_modules.core.objective import LinearCrossEntropy, OutputMatrix
from mtp_modules.losses import (
    FusedLinearCrossEntropy,
    NaiveLinearCrossEntropy,
    RecomputeLinearCrossEntropy,
    SequentialLinearCrossEntropy,
    TorchLinearCrossEntropy,
)

BACKENDS: dict[str, Callable[[], LinearCrossEntropy]] = {
    "naive": NaiveLinearCrossEntropy,
    "fused": FusedLinearCrossEntropy,
    "sequential": SequentialLinearCrossEntropy,
    "recompute": RecomputeLinearCrossEntropy,
    "torch": TorchLinearCrossEntropy,
}
CELLS = [(vocab_size, heads) for vocab_size in (256, 32768, 131072) for heads in (1, 4, 8)]
NAIVE_BYTES = 10e9


def rows_that_fit(vocab_size: int, dtype: torch.dtype) -> int:
    """Return how many examples a head can have so that the naive backend stays within memory for eight heads."""
    per_logit = 20 if dtype == torch.bfloat16 else 16  # logits, their logarithms, and the gradients of both
    return min(2048, 1 << int(NAIVE_BYTES / (8 * per_logit * vocab_size)).bit_length() - 1)


def step(backend: LinearCrossEntropy, states: Tensor, matrix: OutputMatrix, heads: int, targets: Tensor) -> None:
    """Compute a loss and its gradients."""
    states.grad = matrix.weight.grad = None
    weights = torch.full((len(states),), 1 / len(states))
    sizes = [len(states) // heads] * heads
    backend(states, [matrix] * heads, sizes, targets, weights).loss.backward()


def inputs(
    options: argparse.Namespace, vocab_size: int, heads: int, rows: int
) -> tuple[Tensor, OutputMatrix, int, Tensor]:
    """Draw what a step needs."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    states = torch.randn(rows * heads, options.d_model).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, options.d_model) * options.d_model**-0.5).to(dtype).requires_grad_()
    return states, OutputMatrix(weight), heads, torch.randint(vocab_size, (rows * heads,))


def status(field: str) -> int:
    """Return a figure of this process in MiB, as Linux tells it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) // 1024


def measure_peak(options: argparse.Namespace, vocab_size: int, heads: int, backend: str) -> int:
    """Return the peak memory of one step in MiB beyond what was held before; for a process of its own."""
    made = BACKENDS[backend]()
    step(made, *inputs(options, 16, 1, 2))  # whatever libraries load at first use
    given = inputs(options, vocab_size, heads, options.rows)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    before = status("VmRSS")
    step(made, *given)
    return status("VmHWM") - before


def peak(options: argparse.Namespace, vocab_size: int, heads: int, backend: str, rows: int) -> int:
    """Have a fresh process measure the peak."""
    command = [sys.executable, __file__, "--child", backend, "--cells", f"{vocab_size}:{heads}", "--rows", str(rows)]
    command += ["--d-model", str(options.d_model), "--dtype", options.dtype]
    return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def cpu_seconds(
    options: argparse.Namespace, vocab_size: int, heads: int, backends: Sequence[str], rows: int
) -> dict[str, float]:
    """Return the median time of one step by each backend."""
    given = inputs(options, vocab_size, heads, rows)
    made = {name: BACKENDS[name]() for name in backends}
    times: dict[str, list[float]] = {name: [] for name in backends}
    for repeat in range(options.repeats + 1):
        for name, backend in made.items():
            started = time.process_time()
            step(backend, *given)
            if repeat:  # the first warms up
                times[name].append(time.process_time() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def parsed_cells(text: str) -> list[tuple[int, int]]:
    """Read ``256:1,32768:8``."""
    return [(int(vocab_size), int(heads)) for vocab_size, heads in (cell.split(":") for cell in text.split(","))]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=parsed_cells, default=CELLS, help="vocabulary:heads, separated by commas")
    parser.add_argument("--rows", type=int, help="examples a head; as many as let the naive backend fit if not given")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        print(json.dumps(measure_peak(options, *options.cells[0], options.child)))
        return
    names = options.backends.split(",")
    peaks: dict[tuple[int, int, str], int] = {}
    print("| V | heads | rows a head | backend | peak MiB | of naive | CPU s | of naive |")
    print("|---|---|---|---|---|---|---|---|")
    for vocab_size, heads in options.cells:
        rows = options.rows or rows_that_fit(vocab_size, getattr(torch, options.dtype))
        times = cpu_seconds(options, vocab_size, heads, names, rows)
        for name in names:
            held = peaks[vocab_size, heads, name] = peak(options, vocab_size, heads, name, rows)
            of_peak, of_time = held / max(1, peaks[vocab_size, heads, names[0]]), times[name] / times[names[0]]
            print(
                f"| {vocab_size} | {heads} | {rows} | {name} | {held} | {of_peak:.3f} "
                f"| {times[name]:.3f} | {of_time:.2f} |",
                flush=True,
            )
    for vocab_size, name in {(vocab_size, name): None for vocab_size, _, name in peaks}:
        if (vocab_size, 1, name) in peaks and (vocab_size, 8, name) in peaks:
            grown = peaks[vocab_size, 8, name] / max(1, peaks[vocab_size, 1, name])
            print(f"\nV={vocab_size}, {name}: the peak of 8 heads is {grown:.2f} times that of 1.")


if __name__ == "__main__":
    main()
