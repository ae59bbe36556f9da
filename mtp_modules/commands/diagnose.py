"""``python -m mtp_modules diagnose``: why drafts are accepted or rejected."""

import json as json_format
from dataclasses import asdict

import torch
from rich.console import Console

from mtp_modules.commands.common import load_on, writable
from mtp_modules.commands.held_out import data_for, held_out_batches, prompts_of
from mtp_modules.core.saving import write_text
from mtp_modules.reports import diagnose as measure
from mtp_modules.reports.diagnosis_page import diagnosis_page
from mtp_modules.reports.diagnosis_tables import show
from mtp_modules.reports.diagnosis_verdict import verdict


def diagnose(
    ckpt_path: str,
    data: str | None = None,
    sources: list[str] | None = None,
    split: str = "test",
    rows: int = 64,
    every: int = 4,
    num_drafts: int | None = None,
    prompts: int = 16,
    prompt_length: int = 64,
    new_tokens: int = 96,
    seed: int = 0,
    device: str = "cpu",
    html: str | None = None,
    json: str | None = None,
) -> None:
    """Report why drafts are accepted or rejected, and which number of drafts is fastest on this machine.

    Drafts along held-out text, then decodes held-out prompts with every number of drafts.

    Args:
        ckpt_path: A checkpoint file, the folder of a run, or a folder that save_pretrained wrote.
        data: A configuration of fit with a data section; the config.yaml of the run if null.
        sources: Files, folders or patterns to read instead, split as by TextDataModule; such as "[stdlib]".
        split: Split of the data, test or val; all reads every file of sources.
        rows: Number of rows of text, evenly spaced over the split.
        every: Draft after every EVERY-th token of the text.
        num_drafts: Largest number of drafts to try; as many as the heads are trained for if null.
        prompts: Number of prompts to decode.
        prompt_length: Number of tokens of each prompt.
        new_tokens: Number of tokens to generate after each prompt.
        seed: Seed of the sampled drafts.
        device: Device to run on, such as cpu or cuda.
        html: File for an HTML page; none if null.
        json: File for all measurements as JSON; none if null.
    """
    for name, path in (("html", html), ("json", json)):
        writable(name, path)
    model, tokenizer = load_on(ckpt_path, device)
    text = data_for(model, tokenizer, ckpt_path, data=data, sources=sources, split=split)
    batches = held_out_batches(text, split, rows)
    starts = prompts_of(batches, prompts, prompt_length)
    console = Console()
    with Console(stderr=True).status("reading text") as status:
        found = measure(
            model,
            [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches],
            starts,
            tokenizer=tokenizer,
            num_drafts=num_drafts,
            new_tokens=new_tokens,
            every=every,
            seed=seed,
            progress=status.update,
        )
    show(found, console)
    text_read = f"{ckpt_path}, {sum(len(batch['tokens']) for batch in batches)} rows of the {split} split"
    threads = f"{torch.get_num_threads()} CPU thread(s)"
    origin = f"{text_read}; {len(starts)} prompts; {device}, {threads}, torch {torch.__version__}"
    if json is not None:
        content = {"origin": origin, "verdict": verdict(found)} | asdict(found)
        write_text(json, json_format.dumps(content, indent=2) + "\n")
    if html is not None:
        write_text(html, diagnosis_page(found, origin))
        console.print(f"Page: {html}")
