"""``python -m mtp_modules export`` and ``import``: models in the formats of other programs."""

from pathlib import Path

from mtp_modules.commands.held_out import data_section
from mtp_modules.core.checks import refuse
from mtp_modules.interop import Facts, export_model, import_model
from mtp_modules.interop.files import new_folder, read_json
from mtp_modules.loading import load_model


def export(
    format: str, ckpt_path: str, out: str, before: str | None = None, add: bool = False, measured: str | None = None
) -> None:
    """Write a trained model in the format of another program, with what an engine needs to serve it.

    Prints what the engine does otherwise than this program, and as the last line the command that serves the folder.

    Args:
        format: mtp_modules, deepseek, glm, qwen, mimo, speculators, medusa, medusa_vllm, eagle3, dflash, dspark or
            founding_paper.
        ckpt_path: A checkpoint file, the folder of a run, or a folder that save_pretrained wrote.
        out: New folder; with add, the folder of a transformers model.
        before: Checkpoint of the model before training, to detect heads that were never trained.
        add: Add the heads to the trunk stored in out; every existing file is kept.
        measured: File that diagnose --json wrote, whose accepted drafts are put on the model card.
    """
    if measured is not None and add:
        refuse("measured", f"is {measured}, but add=true writes no model card; leave out one of them.")
    acceptance, origin = (None, "") if measured is None else _acceptance(Path(measured))
    model, tokenizer = load_model(ckpt_path)
    earlier = None if before is None else load_model(before)[0]
    facts = Facts(data_section(ckpt_path), acceptance, origin)
    exported = export_model(model, out, format=format, before=earlier, add=add, tokenizer=tokenizer, facts=facts)
    print(f"{'Added to' if add else 'Written'}: {out}")
    for note in exported.notes:
        print(note if exported.command is None else f"Note: {note}")
    if exported.command is not None:
        print(f"Next: {exported.command}")


def _acceptance(path: Path) -> tuple[tuple[float, ...], str]:
    """Return the accepted share of the drafts at each depth, and how it was measured."""
    found = read_json("measured", path)
    try:
        shares = tuple(depth["accepted"] / max(1, depth["reached"]) for depth in found["depths"])
        return shares, str(found["origin"])
    except (KeyError, TypeError):
        refuse("measured", f"{path} holds no accepted drafts by depth; give a file that diagnose --json wrote.")


def import_(
    format: str,
    path: str,
    out: str,
    trunk: str | None = None,
    num_horizons: int | None = None,
    concatenation: str | None = None,
    trunk_state: str | None = None,
    chain_state: str | None = None,
    position_0: str | None = None,
) -> None:
    """Read a model, or heads, in the format of another program, and save it in the format of this one.

    Args:
        format: mtp_modules, deepseek, glm, qwen, mimo, speculators, medusa, medusa_vllm, eagle3, dflash, dspark or
            founding_paper.
        path: Folder of the checkpoint to read.
        out: New folder to write.
        trunk: A checkpoint of this program with the trunk of the heads; required if the format stores heads only.
        num_horizons: Number of horizons; more than the number of modules plus 1 applies a single module repeatedly.
        concatenation: embedding_first or state_first, if the checkpoint does not specify it.
        trunk_state: after_norm or before_norm, if the checkpoint does not specify it.
        chain_state: after_norm or before_norm, if the checkpoint does not specify it.
        position_0: token or zero, if the checkpoint does not specify it.
    """
    base, tokenizer = (None, None) if trunk is None else load_model(trunk)
    model = import_model(
        path,
        format=format,
        trunk=base,
        num_horizons=num_horizons,
        concatenation=concatenation,
        trunk_state=trunk_state,
        chain_state=chain_state,
        position_0=position_0,
    )
    new_folder("import", Path(out))
    model.save_pretrained(out, tokenizer=tokenizer)
    print(f"Written: {out}\nNext: python -m mtp_modules generate --ckpt_path {out}")
