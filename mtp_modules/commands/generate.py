"""``python -m mtp_modules generate``: decode a prompt with a checkpoint."""

import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mtp_modules.commands.common import encode, load_on
from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.decoders import (
    AutoregressiveDecoder,
    Decoder,
    Generation,
    SamplingParams,
    SpeculativeDecoder,
    StopRule,
    StreamingDetokenizer,
    compile_for_decoding,
)
from mtp_modules.decoders.graphs.compiled import CompiledModel
from mtp_modules.decoders.request import DecodableModel
from mtp_modules.interop import with_own_trunk

_OWN = "\033[0m"
_SHADES = (46, 40, 34, 28, 22)
"""Green shades of a 256-colour terminal, from light to dark, for the depth at which a token was drafted."""


def generate(
    ckpt_path: str,
    prompt: str = "def ",
    max_new_tokens: int = 300,
    num_drafts: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: list[str] | None = None,
    compare: bool = False,
    repeats: int = 3,
    compile: bool = False,
    device: str = "cpu",
) -> None:
    """Continue a prompt with a trained model, and print tokens as they are generated.

    In a terminal, accepted drafts are green, darker for greater depth. Sampled tokens are those that plain decoding
    samples with the same seed.

    Args:
        ckpt_path: A checkpoint file, the folder of a run, or a folder that save_pretrained wrote.
        prompt: Text to continue; token ids separated by spaces if the model has no tokenizer.
        max_new_tokens: Largest number of tokens to generate.
        num_drafts: Largest number of drafts per forward pass; as many as the heads can draft if null.
        temperature: Sampling temperature; 0 is greedy decoding, 1 samples from the model's distribution.
        top_k: Sample from the top_k most likely tokens.
        top_p: Sample from the smallest set of most likely tokens with at least this probability.
        seed: Seed of the samples.
        stop: Stop after any of these strings.
        compare: Also run plain decoding; print speed, tokens per forward, acceptance by depth, and if outputs agree.
        repeats: Number of runs of each decoder with compare; medians are printed.
        compile: Compile the decoding rounds, which takes minutes before the first token and then decodes faster. A
            Hugging Face trunk is replaced by our own trunk with the same weights.
        device: Device to run on, such as cpu or cuda.
    """
    at_least("generate", "repeats", repeats, 1)
    model, tokenizer = load_on(ckpt_path, device)
    tokens = encode(prompt, tokenizer)
    end = [] if tokenizer is None or tokenizer.end_token is None else [tokenizer.end_token]
    rule = StopRule(tokens=end, strings=stop or (), tokenizer=tokenizer)
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    decoder: Decoder = AutoregressiveDecoder()
    if len(model.horizons) > 1:
        decoder = SpeculativeDecoder(num_drafts=num_drafts)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    sys.stdout.write(prompt)
    written = _Writer(tokenizer, colour, tokens)
    used: DecodableModel = model
    if compile:
        used = compile_for_decoding(with_own_trunk(model), freeze=device == "cpu")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": rule, "sampling": sampling, "seed": seed}
    for done in decoder.stream(used, [tokens], **options):
        for token, depth in zip(done.tokens[0], done.depths[0], strict=True):
            if token not in end:
                sys.stdout.write(written.write(token, depth=depth))
        sys.stdout.flush()
    sys.stdout.write(written.flush() + "\n")
    if compare:
        if len(model.horizons) == 1:
            refuse("compare", f"{type(model.heads).__name__} with one horizon cannot draft; omit compare.")
        _compare(used, decoder, tokens, options, repeats)


class _Writer:
    """Turn tokens into text as soon as it is certain, each character in the colour of its last token."""

    def __init__(self, tokenizer: Tokenizer | None, colour: bool, prompt: Sequence[int] = ()) -> None:
        self.text = None if tokenizer is None else StreamingDetokenizer(tokenizer, prompt=prompt)
        self.colour = colour
        self.depth = 0

    def write(self, token: int, *, depth: int) -> str:
        """Return what can be shown now."""
        text = f" {token}" if self.text is None else self.text.push(token)
        return self._shown(text, depth) if text else ""

    def flush(self) -> str:
        """Return what is left, and the terminal's own colour."""
        left = "" if self.text is None else self.text.finish()
        return left + self._shown("", 0)

    def _shown(self, text: str, depth: int) -> str:
        if not self.colour or depth == self.depth:
            return text
        self.depth = depth
        colour = f"\033[38;5;{_SHADES[min(depth, len(_SHADES)) - 1]}m" if depth else _OWN
        return colour + text


def _compare(model: DecodableModel, decoder: Decoder, prompt: list[int], options: dict[str, Any], repeats: int) -> None:
    """Alternate plain and speculative decoding, and print medians."""
    decoders: dict[str, Decoder] = {"plain": AutoregressiveDecoder(), "self-speculative": decoder}
    runs: dict[str, list[Generation]] = {name: [] for name in decoders}
    if isinstance(model, CompiledModel):
        for one in decoders.values():
            one.generate(model, [prompt], **options)  # compiles the graphs that are still missing
    for _ in range(repeats):
        for name, one in decoders.items():
            runs[name].append(one.generate(model, [prompt], **options))
    table = Table(title=f"{len(runs['plain'][0].tokens[0])} new tokens, median of {repeats}")
    for column in ("decoding", "tokens/s", "tokens per forward", "forwards"):
        table.add_column(column, justify="right")
    speeds = {}
    for name, generations in runs.items():
        stats = generations[0].stats
        speeds[name] = statistics.median(run.stats.tokens / run.stats.seconds for run in generations)
        table.add_row(name, f"{speeds[name]:.0f}", f"{stats.tokens_per_forward:.2f}", str(stats.forwards))
    console = Console()
    console.print(table)
    stats = runs["self-speculative"][0].stats
    depths = "  ".join(f"{depth}: {share:.0%}" for depth, share in enumerate(stats.acceptance, start=1))
    console.print(f"accepted by depth   {depths}")
    console.print(f"speed-up            {speeds['self-speculative'] / speeds['plain']:.2f}x")
    plain, drafted = (runs[name][0].tokens[0] for name in ("plain", "self-speculative"))
    console.print(f"outputs             {_difference(plain, drafted)}")


def _difference(plain: list[int], drafted: list[int]) -> str:
    if plain == drafted:
        return "identical"
    first = next(
        (i for i, (a, b) in enumerate(zip(plain, drafted, strict=False)) if a != b), min(len(plain), len(drafted))
    )
    precision = torch.get_default_dtype()
    return f"differ from token {first + 1} on: two logits there are closer than the rounding error of {precision}"
