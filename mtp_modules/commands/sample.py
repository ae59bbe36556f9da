"""``python -m mtp_modules sample``: generate training data for self-distillation."""

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_modules.commands.common import writable
from mtp_modules.configuration import assemble, read_yaml
from mtp_modules.core.checks import at_least, refuse
from mtp_modules.data import TextDataModule
from mtp_modules.data.token_files import write_documents
from mtp_modules.decoders import AutoregressiveDecoder, SamplingParams, StopRule
from mtp_modules.interop import with_own_trunk
from mtp_modules.loading import load_model


def sample(
    config: str,
    output: str,
    ckpt_path: str | None = None,
    count: int = 256,
    prompt_tokens: int = 32,
    new_tokens: int = 224,
    temperature: float = 0.8,
    batch_size: int = 16,
    seed: int = 0,
    split: str = "train",
    device: str = "cpu",
) -> None:
    """Let a model continue prompts from its text, and write prompts and continuations to a token file.

    For self-distillation: heads that draft the model's output are best trained on the model's output. The file and its
    index are a source of TextDataModule: ``sources: [samples.bin]``.

    Args:
        config: A configuration of fit with the sections model and data; data must be a TextDataModule. Prompts are from
            its sources; where it has some, its train is not read, which may be the file that this writes.
        output: File to write; its name ends in .bin.
        ckpt_path: Checkpoint of a trained model; the initial model of the configuration if null.
        count: Number of documents.
        prompt_tokens: Number of tokens of text that each document begins with.
        new_tokens: Largest number of generated tokens; generation stops at the tokenizer's end token.
        temperature: Sampling temperature; 0 is greedy decoding, 1 samples from the model's distribution.
        batch_size: Number of documents per batch.
        seed: Seed of the prompts and the samples.
        split: Split of the data that the prompts come from: train, val or test.
        device: Device to run on, such as cpu or cuda.
    """
    writable("output", output)
    if Path(output).suffix != ".bin":
        refuse("output", f"must end in .bin, got {output!r}.")
    for name, value in (("count", count), ("new_tokens", new_tokens), ("batch_size", batch_size)):
        at_least("sample", name, value, 1)
    sampling = SamplingParams(temperature=temperature)
    if not Path(config).is_file():
        refuse("config", f"{config} does not exist; give a configuration of fit.")
    sections = read_yaml(config, Path(config))
    if not isinstance(sections, dict) or not {"model", "data"} <= sections.keys():
        refuse("config", f"{config} must have the sections model and data.")
    module, data = assemble(sections["model"], _without_train(sections["data"]))
    if not isinstance(data, TextDataModule):
        refuse("config", f"data must be a TextDataModule, which supplies the prompts, got {type(data).__name__}.")
    model = module.model if ckpt_path is None else load_model(ckpt_path)[0]
    with contextlib.suppress(ValueError):  # of another architecture: the model as it is
        model = with_own_trunk(model)  # the same, faster; a copy, which is made before it goes to the device
    model = model.to(device).eval()
    prompts = data.prompts(split, count, prompt_tokens, seed)
    end = data.tokenizer.end_token
    stop = StopRule(tokens=[] if end is None else [end])
    documents: list[list[int]] = []
    for start in range(0, count, batch_size):
        part = prompts[start : start + batch_size]
        generation = AutoregressiveDecoder().generate(
            model, part, max_new_tokens=new_tokens, sampling=sampling, seed=seed + start, stop=stop
        )
        documents += [[*prompt, *new] for prompt, new in zip(part, generation.tokens, strict=True)]
        print(f"sample: {len(documents)} of {count} documents", file=sys.stderr, flush=True)
    write_documents(Path(output), documents, vocab_size=data.tokenizer.vocab_size)
    print(f"{sum(map(len, documents))} tokens written to {output}")


def _without_train(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data without the sources of ``train``, where ``sources`` has a training split of its own."""
    given = dict(data.get("init_args") or {})
    if given.get("sources"):
        given = {name: value for name, value in given.items() if name not in ("train", "train_share")}
    return {**data, "init_args": given}
