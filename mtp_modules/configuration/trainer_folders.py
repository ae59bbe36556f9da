"""Where the ``trainer`` section of a configuration says that a run's files go."""

from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from mtp_modules.training.last_checkpoint import LastCheckpoint

CHECKPOINTS = "checkpoints"
_WITH_FOLDERS = ("TensorBoardLogger", "CSVLogger")


def checkpoint_folders(trainer: Namespace) -> list[Path]:
    """Return the folders that callbacks of a configuration save to, whatever the folder of the run.

    Args:
        trainer: The ``trainer`` section.
    """
    given = trainer.get("callbacks")
    callbacks = given if isinstance(given, list) else [given]
    named = (one.get("init_args.dirpath") for one in callbacks if isinstance(one, Namespace))
    return [Path(folder) for folder in named if folder and "://" not in str(folder)]


def configured_folder(trainer: Namespace) -> Path:
    """Return the folder that the ``trainer`` section of a configuration names.

    Args:
        trainer: The section.
    """
    for logger in _folder_loggers(trainer):
        return _folder_of(logger)
    for logger in _other_loggers(trainer):
        name, place = logger.init_args.get("name"), logger.init_args.get("save_dir") or "."
        if name or str(place) != ".":  # Weights & Biases writes to the working directory if no folder is given
            # The configuration of a run, which use_folder has changed, means the folder of that run.
            return Path(place) if name in (None, "", Path(place).name) else Path(place, name)
    return Path(trainer.get("default_root_dir") or "runs/fit")


def use_folder(trainer: Namespace, folder: Path) -> None:
    """Change the ``trainer`` section of a configuration so that everything of the run goes to a folder.

    Args:
        trainer: The section.
        folder: Of the run.
    """
    wanted, named = configured_folder(trainer), {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
    if trainer.get("logger") in (None, True):  # Lightning would make a folder in the folder
        trainer.logger = Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=Namespace())  # type: ignore[no-untyped-call]
        wanted = _folder_of(trainer.logger)
    for logger in _folder_loggers(trainer):
        if _folder_of(logger) == wanted:
            for name, value in named.items():
                logger.init_args[name] = value
    for logger in _other_loggers(trainer):
        if "save_dir" in logger.init_args:
            logger.init_args["save_dir"] = str(folder)
            if logger.init_args.get("name"):
                logger.init_args["name"] = folder.name
    if not _folder_loggers(trainer):
        trainer.default_root_dir = str(folder)


def save_in(folder: Path, trainer: Trainer) -> None:
    """Let checkpoints go to a run's folder, where the logger, asked by Lightning, would name one of its own.

    That of the last step goes where others are told to go, if any are.

    Args:
        folder: Of the run.
        trainer: Before its callbacks are set up.
    """
    if all(getattr(callback, "dirpath", None) is None for callback in trainer.checkpoint_callbacks):
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.dirpath = str(folder.absolute() / CHECKPOINTS)
    first = trainer.loggers[0] if trainer.loggers else None
    if first is None or isinstance(first, TensorBoardLogger | CSVLogger):
        return
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(folder.absolute() / CHECKPOINTS)


def _folder_loggers(trainer: Namespace) -> list[Namespace]:
    """Return the configured loggers that write to a folder ``save_dir/name/version``."""
    return [one for one in _loggers(trainer) if one.class_path.rpartition(".")[2] in _WITH_FOLDERS]


def _other_loggers(trainer: Namespace) -> list[Namespace]:
    """Return the others, such as Weights & Biases, with the arguments that they are given."""
    others = [one for one in _loggers(trainer) if one.class_path.rpartition(".")[2] not in _WITH_FOLDERS]
    for logger in others:
        logger.init_args = logger.get("init_args") or Namespace()  # type: ignore[no-untyped-call]
    return others


def _loggers(trainer: Namespace) -> list[Namespace]:
    found = trainer.get("logger")
    return [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, Namespace)]


def _folder_of(logger: Namespace) -> Path:
    given, version = logger.init_args, logger.init_args.get("version")
    named = f"version_{version}" if isinstance(version, int) else version or ""
    folder = Path(given.get("save_dir") or ".", given.get("name") or "", named)
    return folder if folder.name else folder / "run"
