"""``python -m mtp_modules diagnose``: why drafts are accepted or not."""

import json as json_format
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from mtp_modules.commands.common import load_on, writable
from mtp_modules.commands.held_out import data_for, held_out_batches, prompts_of
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
    """Tell why drafts are accepted or not, and how many of them pay on this machine.

    Reads held-out text, lets the heads draft along it, then decodes held-out prompts with every number of drafts.

    Args:
        ckpt_path: A checkpoint file, the folder of a run, or a folder that save_pretrained wrote.
        data: A configuration as fit takes it, whose data section is read; the run's own config.yaml if null.
        sources: Read these files, folders or patterns instead, as TextDataModule splits them; "[stdlib]" is one.
        split: Which side of the data to read, test or val; all reads every file of sources.
        rows: How many rows of text, evenly spread over the split.
        every: Draft after every so many tokens of the text.
        num_drafts: Most drafts to try; as many as the heads are trained for if null.
        prompts: How many prompts to decode from.
        prompt_length: Tokens of each prompt.
        new_tokens: How many tokens to decode after each prompt.
        seed: Of what is drawn.
        device: Where to run, such as cpu or cuda.
        html: Also write a page here.
        json: Also write every figure here.
    """
    for name, path in (("html", html), ("json", json)):
        writable(name, path)
    model, tokenizer = load_on(ckpt_path, device)
    text = data_for(model, tokenizer, ckpt_path, data=data, sources=sources, split=split)
    batches = held_out_batches(text, split, rows)
    starts = prompts_of(batches, prompts, prompt_length)
    console = Console()
    with Console(stderr=True).status("reading") as status:
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
    read = f"{ckpt_path}, {sum(len(batch['tokens']) for batch in batches)} rows of the {split} split"
    origin = (
        f"{read}; {len(starts)} prompts; {device}, {torch.get_num_threads()} CPU thread(s), torch {torch.__version__}"
    )
    if json is not None:
        figures = {"origin": origin, "verdict": verdict(found)} | asdict(found)
        Path(json).write_text(json_format.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if html is not None:
        Path(html).write_text(diagnosis_page(found, origin), encoding="utf-8")
        console.print(f"Page: {html}")
