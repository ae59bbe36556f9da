"""Start a new run from the weights of a trained model."""

from pathlib import Path

from mtp_modules.core.checks import InputError, refuse
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.loading import check_weights, find_checkpoint, is_sharded, read_checkpoint
from mtp_modules.model import MTPModel
from mtp_modules.pretrained import FORMAT_KEY, load_pretrained, read_model
from mtp_modules.training.descriptions import check_same_model, own_description

_OWNER = "init_from"


def init_from(model: MTPModel, path: str | Path, *, tokenizer: Tokenizer | None = None) -> None:
    """Load weights alone, for a new run: at step 0, with any optimizer and data.

    The command ``fit --init_from PATH`` does this; a script of your own calls it before ``Trainer.fit``.

    Args:
        model: As configured; its weights are replaced, and its draft vocabulary if it has one.
        path: A checkpoint, the folder of a run (its best checkpoint), or what ``save_pretrained`` wrote.
        tokenizer: Of the data, to compare with the one that the weights were trained with.

    Raises:
        ValueError: If there is no such model, it is sharded, or it is another model than the configured one.

    Example:
        >>> import tempfile
        >>> from mtp_modules import LinearHeads, RecurrentTrunk
        >>> def small():
        ...     return MTPModel(
        ...         trunk=RecurrentTrunk(vocab_size=9, d_model=8), heads=LinearHeads(d_model=8, num_horizons=2)
        ...     )
        >>> trained, model = small(), small()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trained.save_pretrained(folder)
        ...     init_from(model, folder)
        >>> bool((model.trunk.embedding.weight == trained.trunk.embedding.weight).all())
        True
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        refuse(_OWNER, "the model is on the meta device, which holds no weights; set init_on_meta to false.")
    try:
        found = find_checkpoint(path)
        if is_sharded(found):
            refuse(
                _OWNER,
                f"{found} is a folder of shards; let the run save one file with save_distributed_checkpoint: false.",
            )
        if found.is_dir():
            _from_pretrained(model, found, tokenizer)
            return
        checkpoint = read_checkpoint(found)
        check_same_model(model, tokenizer, own_description(checkpoint), _OWNER)
        prefix, stored = "model.", checkpoint["state_dict"]
        state = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
        check_weights(model, state, found)
        model.load_state_dict(state)
    except InputError as error:  # those who look for checkpoints name the other option
        refuse(_OWNER, str(error).partition(": ")[2])


def _from_pretrained(model: MTPModel, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Load what ``save_pretrained`` wrote, without building anything that its configuration names."""
    config, _, _, checksums = read_model(_OWNER, folder)
    check_same_model(model, tokenizer, {**config, "format": config[FORMAT_KEY]}, _OWNER)
    load_pretrained(_OWNER, model, folder, checksums)
