"""How engines serve an export: the command, and what they do differently from this package."""

import json
import shlex
from pathlib import Path
from typing import NamedTuple

from mtp_modules.heads import SequentialHeads
from mtp_modules.interop.base import BASE
from mtp_modules.layers.transformer import Attention
from mtp_modules.model import MTPModel

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of attention heads in vLLM 0.32 on a CPU. Those of its GPU backends are multiples of 8 up to 256, or more."""


class Exported(NamedTuple):
    """What was written, and how an engine serves it.

    Attributes:
        command: The command line that serves the folder, or decodes from it; ``None`` if nothing does as it is.
        notes: One sentence for each thing that the engine does otherwise, or for why nothing serves the folder.
    """

    command: str | None
    notes: tuple[str, ...]


def command_of(method: str, model: MTPModel, folder: Path, *, alone: bool, has_tokenizer: bool) -> str:
    """Return vLLM's command for a folder.

    Args:
        method: vLLM's name for the kind of heads.
        model: The model that was written.
        folder: Where it lies.
        alone: Whether the folder has the heads alone, beside the model without them.
        has_tokenizer: Whether the folder has a tokenizer.
    """
    drafts: dict[str, object] = {"method": method}
    if alone:
        drafts["model"] = str(folder)
    drafts["num_speculative_tokens"] = len(model.horizons) - 1
    dtype = str(model.unembedding.weight.dtype).removeprefix("torch.")
    words = ["vllm", "serve", str(folder / BASE if alone else folder), "--dtype", dtype]
    words += [] if has_tokenizer else ["--skip-tokenizer-init"]
    return shlex.join([*words, "--speculative-config", json.dumps(drafts)])


def notes_of(
    method: str, model: MTPModel, *, chain: str | None = None, state: str = "after_norm", masks_first: bool = False
) -> tuple[str, ...]:
    """Return what vLLM does otherwise than this package, a sentence each.

    Args:
        method: vLLM's name for the kind of heads.
        model: The model that was written.
        chain: Which state vLLM passes from one module to the next; ``None`` if there are no modules.
        state: Which state of the trunk vLLM gives to the first module.
        masks_first: Whether vLLM replaces the embedding at position 0 by zero.
    """
    heads, found = model.heads, []
    dtype = str(model.unembedding.weight.dtype).removeprefix("torch.")
    if dtype == "float64":
        found.append("vLLM has no float64: export the model in float32 or bfloat16.")
    if isinstance(heads, SequentialHeads):
        count = len(heads.steps)
        if count > 1:
            found.append(
                f"vLLM runs only the first of the {count} modules, for every draft, so later drafts are accepted less "
                "often: train one module for all horizons with shared=True."
            )
            found.append(f"vLLM takes num_speculative_tokens that are a multiple of the {count} modules only.")
        elif heads.num_horizons > 2:
            found.append(
                "vLLM keeps one KV cache for all drafts of a module, these heads one for each draft, so drafts beyond "
                "the first may be accepted a little more or less often; the output is the same."
            )
        trained = "after_norm" if heads.chain_norm else "before_norm"
        if chain is not None and chain != trained and (count > 1 or heads.num_horizons > 2):
            found.append(
                f"vLLM passes the state {_words(chain)} its norm from module to module, these heads were trained on "
                f"that {_words(trained)} it, so drafts beyond the first are accepted less often: train with "
                f"chain_norm={chain == 'after_norm'}."
            )
    if state == "before_norm":
        found.append(
            "vLLM gives the modules the trunk's state before its final norm, these heads were trained on the one after "
            "it, so drafts may be accepted less often; the output is the same."
        )
    if masks_first:
        found.append(
            "vLLM takes zero for the embedding at position 0 of a text, so drafts just after its beginning may be "
            "accepted less often; the output is the same."
        )
    if method == "medusa":
        found.append("vLLM 0.32 is the last version with Medusa heads.")
    if other := {part.head_dim for part in model.modules() if isinstance(part, Attention)} - set(HEAD_SIZES):
        sizes, given = ", ".join(map(str, HEAD_SIZES)), " and ".join(map(str, sorted(other)))
        found.append(f"vLLM on a CPU serves attention heads of width {sizes}, and these are {given} wide.")
    return tuple(found)


def _words(convention: str) -> str:
    return convention.removesuffix("_norm")
