"""Where the time of a decoding round goes: its kernels by kind, and what the host does between them.

Rounds are recorded, so that every kernel is a call that can be timed. Milliseconds by the clock on one thread, medians
over the rounds of all prompts; kernels are timed in rounds of their own, for looking at the clock takes time too.

    python tests/benchmarks/where_time_goes.py --ckpt_path runs/quickstart --drafts 0 3 5 7
"""

import argparse
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mtp_modules import AutoregressiveDecoder, SpeculativeDecoder
from mtp_modules.data import TextDataModule
from mtp_modules.decoders import RecordedModel, kernels, record_for_decoding
from mtp_modules.decoders import tape as tapes
from mtp_modules.decoders.graphs import GraphModel
from mtp_modules.decoders.loop import _Run
from mtp_modules.decoders.replays import Replays
from mtp_modules.interop import with_own_trunk
from mtp_modules.training import load_model

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"),
    "attention": ("scaled_dot_product",),
    "norms": ("rms_norm", "layer_norm"),
    "keys and values": ("index_copy",),
}


def kind_of(kernel: Callable[[], object]) -> str:
    """Say what a recorded call computes."""
    function = getattr(kernel, "func", kernel)
    if function in (kernels.again_one, kernels.again):
        return kind_of(kernel.args[0])
    name = getattr(function, "__name__", str(function))
    return next((kind for kind, names in KINDS.items() if name.startswith(names)), "other kernels")


class Clock:
    """Times of the parts of each round."""

    def __init__(self) -> None:
        self.rounds: dict[str, list[float]] = defaultdict(list)
        self.kernels: dict[str, list[float]] = defaultdict(list)
        self.calls: Counter[str] = Counter()
        self.each_kernel = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch rounds, what is announced of them, and replays."""
        patched: list[tuple[Any, str, Any]] = []

        def watch(owner: Any, name: str, part: str) -> None:
            function = getattr(owner, name)

            def timed(*args: Any, **kwargs: Any) -> Any:
                started = time.perf_counter()
                result = function(*args, **kwargs)
                self.rounds[part].append(time.perf_counter() - started)
                return result

            patched.append((owner, name, function))
            setattr(owner, name, timed)

        watch(_Run, "round", "round")
        watch(GraphModel, "_announce", "announced")
        watch(Replays, "__call__", "replayed")
        record = tapes._record_kernels

        def recorded(function: Callable[[], object]) -> tuple[object, tapes.Recording]:
            result, recording = record(function)
            recording.replay = lambda: self.run([call.kernel for call in recording._calls])
            return result, recording

        patched.append((tapes, "_record_kernels", record))
        tapes._record_kernels = recorded
        try:
            yield
        finally:
            for owner, name, function in patched:
                setattr(owner, name, function)

    def run(self, calls: list[Callable[[], object]]) -> None:
        """Replay a round, and time all of it or each kernel."""
        started = time.perf_counter()
        if not self.each_kernel:
            for kernel in calls:
                kernel()
            self.rounds["kernels"].append(time.perf_counter() - started)
            return
        found: dict[str, float] = defaultdict(float)
        self.calls.clear()
        for kernel in calls:
            before = time.perf_counter()
            kernel()
            found[kind_of(kernel)] += time.perf_counter() - before
            self.calls[kind_of(kernel)] += 1
        for kind, seconds in found.items():
            self.kernels[kind].append(seconds)


def parts_of_a_round(model: RecordedModel, prompts: list[list[int]], num_drafts: int, tokens: int) -> dict[str, float]:
    """Return the median seconds of every part of a round."""
    decoder = SpeculativeDecoder(num_drafts=num_drafts) if num_drafts else AutoregressiveDecoder()
    clock, whole = Clock(), {}
    with clock.watching():
        for clock.each_kernel in (False, True):
            decoder.generate(model, [prompts[0]], max_new_tokens=tokens)  # records what is not recorded yet
            clock.rounds.clear()
            clock.kernels.clear()
            for prompt in prompts:
                decoder.generate(model, [prompt], max_new_tokens=tokens)
            whole = whole or {part: statistics.median(times) for part, times in clock.rounds.items()}
    by_kind = {kind: statistics.median(times) for kind, times in clock.kernels.items()}
    scale = whole["kernels"] / sum(by_kind.values())  # without the looks at the clock
    parts = {f"{kind} ({clock.calls[kind]})": by_kind[kind] * scale for kind in sorted(by_kind, key=by_kind.get)[::-1]}
    parts["states and masks"] = whole["announced"]
    parts["inputs to their places"] = whole["replayed"] - whole["kernels"]
    parts["the loop"] = whole["round"] - whole["replayed"] - whole["announced"]
    return {**parts, "a round": whole["round"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt_path", default="runs/quickstart")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 3, 5, 7])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.ckpt_path)
    data = TextDataModule(sources=["stdlib"], window=256, lookahead=model.lookahead, batch_size=8, tokenizer=tokenizer)
    prompts = data.prompts("test", options.prompts, options.prompt_length, seed=0)
    for num_drafts in options.drafts:
        parts = parts_of_a_round(record_for_decoding(with_own_trunk(model)), prompts, num_drafts, options.new_tokens)
        table = Table(title=f"a round with {num_drafts} drafts, one row")
        for column in ("part (calls)", "milliseconds", "share"):
            table.add_column(column, justify="right")
        for part, seconds in parts.items():
            table.add_row(part, f"{seconds * 1e3:.3f}", f"{seconds / parts['a round']:.0%}")
        Console(width=80).print(table)


if __name__ == "__main__":
    main()
