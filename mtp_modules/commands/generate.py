"""``python -m mtp_modules generate``: decode a prompt with a checkpoint."""

import statistics
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mtp_modules.commands.common import encode, load_on
from mtp_modules.commands.decoding import decoder_for, end_tokens, sampling_for, stop_for
from mtp_modules.commands.writing import TokenWriter, in_colour
from mtp_modules.core.checks import at_least, refuse
from mtp_modules.decoders import (
    AutoregressiveDecoder,
    Decoder,
    ExactMatch,
    Generation,
    SamplingParams,
    SpeculativeDecoder,
    compile_for_decoding,
)
from mtp_modules.decoders.graphs.compiled import CompiledModel
from mtp_modules.decoders.request import DecodableModel
from mtp_modules.interop import with_own_trunk
from mtp_modules.model import MTPModel


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
    decoder: Decoder | None = None,
    sampling: SamplingParams | None = None,
    compare: bool = False,
    repeats: int = 3,
    compile: bool = False,
    device: str = "cpu",
) -> None:
    """Continue a prompt with a trained model, and print tokens as they are generated.

    In a terminal, accepted drafts are underlined, in a colour for each depth. Unless an acceptance rule is lossy,
    sampled tokens are those that plain decoding samples with the same seed.

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
        decoder: Class of the decoder, such as SpeculativeDecoder or BeamDecoder; its parts by class name too, such as
            --decoder.drafter PromptLookup, --decoder.policy, --decoder.tree and --decoder.acceptance.
        sampling: SamplingParams, for what has no option here, such as --sampling.min_p 0.05.
        compare: Also run plain decoding; print speed, tokens per forward, acceptance by depth, and if outputs agree.
        repeats: Number of runs of each decoder with compare; medians are printed.
        compile: Compile the decoding rounds, which takes minutes before the first token and then decodes faster. A
            Hugging Face trunk is replaced by our own trunk with the same weights.
        device: Device to run on, such as cpu or cuda.
    """
    at_least("generate", "repeats", repeats, 1)
    model, tokenizer = load_on(ckpt_path, device)
    tokens = encode(prompt, tokenizer)
    end, chosen = end_tokens(tokenizer), decoder_for(model, decoder, num_drafts)
    if compare and not isinstance(chosen, SpeculativeDecoder):
        who = f"{type(chosen).__name__} does not draft" if decoder else _cannot_draft(model)
        refuse("compare", f"{who}; omit compare.")
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "stop": stop_for(tokenizer, stop),
        "sampling": sampling_for(chosen, sampling, temperature, top_k, top_p),
        "seed": seed,
    }
    used: DecodableModel = model
    if compile:
        used = compile_for_decoding(with_own_trunk(model), freeze=device == "cpu")

    written = TokenWriter(tokenizer, in_colour(), tokens)
    rounds = chosen.stream(used, [tokens], **options)
    sys.stdout.write(prompt)
    for done in rounds:
        for token, depth in zip(done.tokens[0], done.depths[0], strict=True):
            if token not in end:
                sys.stdout.write(written.write(token, depth=depth))
        sys.stdout.flush()
    sys.stdout.write(written.flush() + "\n")
    if compare:
        assert isinstance(chosen, SpeculativeDecoder)
        _compare(used, chosen, tokens, options, repeats)


def _cannot_draft(model: MTPModel) -> str:
    return f"{type(model.heads).__name__} with one horizon cannot draft"


def _compare(
    model: DecodableModel, decoder: SpeculativeDecoder, prompt: list[int], options: dict[str, Any], repeats: int
) -> None:
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
    console.print(f"outputs             {_difference(plain, drafted, decoder)}")


def _difference(plain: list[int], drafted: list[int], decoder: SpeculativeDecoder | None = None) -> str:
    if plain == drafted:
        return "identical"
    first = next(
        (i for i, (a, b) in enumerate(zip(plain, drafted, strict=False)) if a != b), min(len(plain), len(drafted))
    )
    if decoder is not None and not isinstance(decoder.acceptance, ExactMatch):
        rule = decoder.acceptance
        why = "keeps the distribution, not the samples" if rule.lossless else "is lossy"
        return f"differ from token {first + 1} on: {type(rule).__name__} {why}"
    precision = torch.get_default_dtype()
    return f"differ from token {first + 1} on: two logits there are closer than the rounding error of {precision}"
