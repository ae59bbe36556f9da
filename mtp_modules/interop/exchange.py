"""Export a model to a foreign format, and import one."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from mtp_modules.core.budget import Budget
from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.core.saving import write_text
from mtp_modules.core.shapes import Tensor
from mtp_modules.interop import files
from mtp_modules.interop.base import BASE, no_base, write_base
from mtp_modules.interop.card import CARD, Facts, card
from mtp_modules.interop.conventions import check_export, resolve
from mtp_modules.interop.dflash import DFlash
from mtp_modules.interop.dspark import DSpark
from mtp_modules.interop.eagle3 import Eagle3
from mtp_modules.interop.format import Format, Wanted
from mtp_modules.interop.founding_paper import FoundingPaper
from mtp_modules.interop.medusa import Medusa
from mtp_modules.interop.medusa_vllm import MedusaVLLM
from mtp_modules.interop.mimo import MiMo
from mtp_modules.interop.next_predict import GLM, DeepSeek
from mtp_modules.interop.qwen import Qwen
from mtp_modules.interop.serving import Exported
from mtp_modules.interop.speculators import Speculators
from mtp_modules.interop.tensors import Tensors, check_trained
from mtp_modules.interop.trunks import NamedTrunk
from mtp_modules.model import MTPModel

FORMATS: dict[str, Format] = {
    found.name: found
    for found in (
        *(DeepSeek(), GLM(), Qwen(), MiMo(), Speculators(), Medusa(), MedusaVLLM()),
        *(Eagle3(), DFlash(), DSpark(), FoundingPaper()),
    )
}
"""Every foreign format by its name."""

OWN = "mtp_modules"
"""The name of our own format, that of :meth:`~mtp_modules.MTPModel.save_pretrained`."""


def _format(name: str) -> Format:
    if name not in FORMATS:
        refuse("format", f"{name!r} is unknown. Known: {', '.join([OWN, *FORMATS])}.")
    return FORMATS[name]


def export_model(
    model: MTPModel,
    out: str | Path,
    *,
    format: str,
    before: MTPModel | None = None,
    add: bool = False,
    tokenizer: Tokenizer | None = None,
    facts: Facts | None = None,
) -> Exported:
    """Write a model in the format of another program, as a folder that is served as it is.

    Where the format stores heads alone, the model without heads is written beside them, in the folder ``base``. The
    conventions of the heads, which tensor names do not specify, are written to ``mtp_modules.json``.

    Args:
        model: The trained model.
        out: New folder; with ``add``, the folder of a transformers model.
        format: One of :data:`FORMATS`, or :data:`OWN`.
        before: The model before training, to detect heads that were never trained.
        add: Add the heads to the trunk stored in ``out``; every existing file is kept.
        tokenizer: Saved with the model, where other programs can read it.
        facts: What else is known of the model, for its card.

    Returns:
        How the folder is served, and what engines do otherwise than this package.

    Raises:
        ValueError: If the format is unknown or cannot represent the model, if heads were not trained, or if ``out``
            is not empty.
    """
    folder = Path(out)
    check_trained(model, before)
    if format == OWN:
        if add:
            refuse("add", f"only formats that store a trunk can be added to one, and {OWN} writes whole models.")
        files.new_folder("export", folder)
        model.save_pretrained(folder, tokenizer=tokenizer)
        exported = Exported(shlex.join(["python", "-m", "mtp_modules", "generate", "--ckpt_path", str(folder)]), ())
        _write_card(folder, model, OWN, exported, facts)
        return exported
    chosen = _format(format)
    if model.unembedding.bias is not None:
        refuse(chosen.name, "the format has no output bias; train with output_bias=False.")
    if model.unembedding.draft_tokens is not None and not chosen.draft_vocabulary:
        # vLLM 0.32 has names for them in other formats, but rejects the files that have them.
        count, all_tokens = len(model.unembedding.draft_tokens), model.trunk.vocab_size
        refuse(
            chosen.name,
            f"heads predict all {all_tokens} tokens here, and num_draft_tokens is {count}; train without it.",
        )
    if (stride := getattr(model.heads, "stride", 1)) != 1:
        refuse(chosen.name, f"readers of this format predict every next token, and stride is {stride}; train with 1.")
    conventions = chosen.conventions(model)
    check_export(chosen.name, chosen.takes, conventions)
    sidecar = {"format": chosen.name, "conventions": conventions._asdict()} | _horizons(model)
    if add:
        _add(chosen, model, folder)
    else:
        _write(chosen, model, folder, tokenizer)
    files.write_json(folder / files.SIDECAR, sidecar)
    served = folder if chosen.keeps_trunk else folder / BASE
    exported = chosen.serving(model, folder, has_tokenizer=(served / "tokenizer_config.json").is_file())
    if not add:
        _write_card(folder, model, chosen.name, exported, facts)
    return exported


def _write(chosen: Format, model: MTPModel, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Write heads and trunk, together or beside each other, and the tokenizer."""
    tensors, config = _whole(chosen, model)
    beside = None if chosen.keeps_trunk or no_base(model) is not None else write_base(chosen.name, model)
    files.new_folder("export", folder)
    if beside is not None:
        place = folder / BASE
        place.mkdir()
        files.write_tensors(place / files.WEIGHTS, beside[0])
        _write_tokenizer(place, beside[1], tokenizer)
        config = chosen.with_base(config, place, beside[1])
    chosen.store(folder, tensors, config)
    if chosen.method is not None and chosen.keeps_trunk:
        _write_tokenizer(folder, config, tokenizer)


def _write_tokenizer(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer | None) -> None:
    """Write a tokenizer, and a configuration that names the tokens with which a text begins and ends."""
    ends: dict[str, Any] = {}
    if tokenizer is not None:
        for name, content in tokenizer.foreign_files().items():
            write_text(folder / name, content)
        begin = tokenizer.begin_tokens
        ends = {"bos_token_id": begin[0]} if begin else {}
        ends |= {} if tokenizer.end_token is None else {"eos_token_id": tokenizer.end_token}
    files.write_json(folder / files.CONFIG, {**config, **ends})
    if ends:
        files.write_json(folder / "generation_config.json", ends)


def _write_card(folder: Path, model: MTPModel, name: str, exported: Exported, facts: Facts | None) -> None:
    read_back = ["python", "-m", "mtp_modules", "import", name, "--path", str(folder), "--out", "back"]
    if name in FORMATS and not FORMATS[name].keeps_trunk:
        read_back += ["--trunk", "CHECKPOINT_OF_THE_TRUNK"]
    write_text(folder / CARD, card(model, name, exported, shlex.join(read_back), facts or Facts()))


def _horizons(model: MTPModel) -> dict[str, Any]:
    return {"num_horizons": len(model.horizons), "max_positions": model.trunk.max_positions}


def _whole(chosen: Format, model: MTPModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all tensors and the whole configuration."""
    tensors: dict[str, Tensor]
    if chosen.keeps_trunk and isinstance(model.trunk, NamedTrunk):
        config = model.trunk.foreign_config()
        _check_type(chosen, config, "the trunk")
        tensors = model.trunk.foreign_state()
        if not model.unembedding.tied:
            tensors = tensors | {"lm_head.weight": model.unembedding.weight}
    else:
        tensors, config = chosen.trunk(model)
    head_tensors, head_config = chosen.heads(model, config)
    return tensors | head_tensors, config | head_config


def _check_type(chosen: Format, config: Mapping[str, Any], where: str) -> None:
    if config.get("model_type") not in chosen.model_types:
        known = " or ".join(chosen.model_types) or "nothing, because the format stores heads only"
        refuse(chosen.name, f"heads can be added to {known}; {where} is a {config.get('model_type')}.")


def _add(chosen: Format, model: MTPModel, folder: Path) -> None:
    """Add heads to the trunk stored in a folder."""
    config = files.read_json(chosen.name, folder / files.CONFIG)
    _check_type(chosen, config, str(folder))
    embedding = files.read_tensors(chosen.name, folder).get("model.embed_tokens.weight")
    ours = cast("Tensor", model.trunk.embedding.weight)
    if embedding is None or not torch.equal(embedding, ours.to(embedding.dtype)):
        refuse(
            chosen.name,
            f"the embedding in {folder} is not that of the model, so the heads were trained on another trunk; "
            "give the folder of their trunk.",
        )
    head_tensors, head_config = chosen.heads(model, config)
    files.add_tensors(chosen.name, folder, head_tensors)
    files.write_json(folder / files.CONFIG, config | head_config)


def import_model(
    path: str | Path,
    *,
    format: str,
    trunk: MTPModel | None = None,
    num_horizons: int | None = None,
    concatenation: str | None = None,
    trunk_state: str | None = None,
    chain_state: str | None = None,
    position_0: str | None = None,
) -> MTPModel:
    """Read a model, or heads for a trunk, that another program wrote.

    Args:
        path: Folder of the checkpoint.
        format: One of :data:`FORMATS`, or :data:`OWN`.
        trunk: The model whose trunk the heads belong to; required if the format stores heads only.
        num_horizons: Number of horizons. More than the number of modules plus 1 applies a single module repeatedly.
        concatenation: Convention of the heads, required where the file does not specify it and readers of the format
            disagree; see :class:`~mtp_modules.interop.conventions.Conventions`.
        trunk_state: See ``concatenation``.
        chain_state: See ``concatenation``.
        position_0: See ``concatenation``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If a file or a tensor is missing, damaged, unknown or of another shape, if our heads do not follow
            the conventions, or if a convention is not specified.
    """
    folder = Path(path)
    if not folder.is_dir():
        refuse("path", f"there is no folder {folder}; give the folder of a checkpoint.")
    if format == OWN:
        return MTPModel.from_pretrained(folder)[0]
    chosen = _format(format)
    sidecar = files.read_json(chosen.name, folder / files.SIDECAR) if (folder / files.SIDECAR).is_file() else {}
    if sidecar.get("format", chosen.name) != chosen.name:
        written = sidecar["format"]
        refuse("format", f"{folder} was written as {written}, not as {chosen.name}; give format={written}.")
    given = {
        "concatenation": concatenation,
        "trunk_state": trunk_state,
        "chain_state": chain_state,
        "position_0": position_0,
    }
    if num_horizons is not None:
        whole(chosen.name, "num_horizons", num_horizons, 2)
    found, config = chosen.open(folder)
    conventions = dict(sidecar.get("conventions") or {})
    with _sentence_for(chosen.name, folder):
        stated = chosen.stated(config)
    for name, value in stated.items():
        if conventions.setdefault(name, value) != value:
            refuse(
                chosen.name,
                f"config.json says {name}={value}, and {files.SIDECAR} {conventions[name]}; restore the one that was "
                "edited.",
            )
    wanted = Wanted(
        conventions=resolve(chosen.name, chosen.takes, conventions, given),
        num_horizons=sidecar.get("num_horizons") if num_horizons is None else num_horizons,
        trunk=trunk,
        max_positions=sidecar.get("max_positions"),
    )
    tensors = Tensors(chosen.name, found)
    shapes = [tensor.shape for tensor in (*found.values(), *(() if trunk is None else trunk.state_dict().values()))]
    with Budget(chosen.name, shapes) as budget:
        budget.check_counts([config, {"num_horizons": wanted.num_horizons}])
        with _sentence_for(chosen.name, folder):
            model = chosen.read(tensors, config, wanted)
    tensors.finish()
    return model


@contextmanager
def _sentence_for(owner: str, folder: Path) -> Iterator[None]:
    """Turn what Python says of a value of another kind into a sentence."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        refuse(
            owner,
            f"an entry of {folder / files.CONFIG}, or a tensor, is of another kind than the format has ({error}); "
            "restore it.",
        )
