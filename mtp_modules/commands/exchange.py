"""``python -m mtp_modules export`` and ``import``: models in the formats of other programs."""

from pathlib import Path

from mtp_modules.interop import export_model, import_model
from mtp_modules.interop.files import new_folder
from mtp_modules.loading import load_model


def export(format: str, ckpt_path: str, out: str, before: str | None = None, add: bool = False) -> None:
    """Write a trained model, or its heads, as another program reads it.

    Args:
        format: mtp_modules, deepseek, glm, qwen, mimo, speculators, medusa, medusa_vllm or founding_paper.
        ckpt_path: A checkpoint file, the folder of a run, or a folder that save_pretrained wrote.
        out: New folder; with add the folder of a model of transformers.
        before: The model before it was trained, to find heads that never were.
        add: Add the heads to the trunk that lies in out, of which no file is lost.
    """
    model, tokenizer = load_model(ckpt_path)
    earlier = None if before is None else load_model(before)[0]
    export_model(model, out, format=format, before=earlier, add=add, tokenizer=tokenizer)
    print(f"{'Added to' if add else 'Written'}: {out}")


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
    """Read a model, or heads, that another program wrote, and save it so that every command here takes it.

    Args:
        format: mtp_modules, deepseek, glm, qwen, mimo, speculators, medusa, medusa_vllm or founding_paper.
        path: Folder of the checkpoint.
        out: New folder.
        trunk: Checkpoint of ours whose trunk the heads belong to; needed if the format keeps heads alone.
        num_horizons: To apply a single module again and again.
        concatenation: embedding_first or state_first, where the file does not say it.
        trunk_state: after_norm or before_norm, where the file does not say it.
        chain_state: after_norm or before_norm, where the file does not say it.
        position_0: token or zero, where the file does not say it.
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
