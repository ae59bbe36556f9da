"""The folder of a run: a new one for every run, its own for a resumed one, and never two processes in one."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from mtp_modules.configuration.trainer_folders import CHECKPOINTS, checkpoint_folders
from mtp_modules.core.checks import refuse
from mtp_modules.core.saving import remove_partial, write_text
from mtp_modules.loading import find_checkpoint
from mtp_modules.training.last_checkpoint import LAST
from mtp_modules.training.signals import slurm_job

ORIGIN = ".configured_as"
"""File with the name of the folder that the run was configured with, before it got a number."""
_TRACES = ("config.yaml", "hparams.yaml", "metrics.csv", "events.out.tfevents.*", "*.ckpt", f"{CHECKPOINTS}/*.ckpt")
_BEFORE = ("config.yaml", "hparams.yaml", "events.out.tfevents.*")
"""What a run writes before its first step."""


class RunFolder:
    """Hold the folder of a run until the process ends.

    ``runs/name`` is used by the first run, ``runs/name-2`` by the second, and so on. A run that resumes from a
    checkpoint in one of them goes on there. A folder that another process holds is never used. On other ranks than 0,
    which write nothing of their own, nothing is locked and nothing chosen.

    Args:
        wanted: The configured folder.
        resumed: Checkpoint that the run resumes from; ``None`` for a new run.

    Raises:
        ValueError: If the run resumes in a folder that another process holds, or it cannot be created.
    """

    def __init__(self, wanted: Path, resumed: Path | None = None) -> None:
        self.path, self._lock, self._new = wanted, None, False
        if not _first_process():
            return
        own = None if resumed is None else run_of(resumed)
        if own is not None and any(own.resolve() == folder.resolve() for folder in runs_of(wanted)):
            self.path, self._lock = own, _locked(own)
            if self._lock is None:
                refuse(
                    "ckpt_path",
                    f"another process trains in {own}; wait for its end, or start anew with --init_from {resumed}.",
                )
            _keep_figures(own)
        else:
            for folder in _numbered(wanted):
                if _free(folder) and (lock := _locked(folder)) is not None:
                    self.path, self._lock = folder, lock
                    if not holds_run(folder):
                        break
                    self.release()
            self._new = True
            write_text(self.path / ORIGIN, wanted.name + "\n")
        remove_partial(self.path)

    def release(self, *, begun: bool = True) -> None:
        """Let other processes use the folder, and remove it if nothing came of the run.

        Args:
            begun: Whether the run made a step; otherwise its configuration and its empty logs are nothing to keep.
        """
        if self._lock is None:
            return
        there = sorted(self.path.rglob("*"), reverse=True)
        files = {place for place in there if not place.is_dir()}
        empty = set() if begun or not self._new else {file for name in _BEFORE for file in self.path.glob(name)}
        if files <= empty | {self.path / ORIGIN}:
            with suppress(OSError):
                for place in (*there, self.path):
                    place.unlink() if place in files else place.rmdir()
        if slurm_job() is None:  # a requeued job looks for its own
            _lock_of(self.path).unlink(missing_ok=True)
        self._lock.close()
        self._lock = None


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to.

    Args:
        checkpoint: Its path.
    """
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else checkpoint.parent


def holds_run(folder: Path) -> bool:
    """Return whether a folder has the files of a run.

    Args:
        folder: May not exist.
    """
    return any(next(folder.glob(trace), None) is not None for trace in _TRACES)


def _free(folder: Path) -> bool:
    """Whether a new run can have a folder: it is none yet, or has nothing of a run."""
    return not holds_run(folder) if folder.is_dir() else not os.path.lexists(folder)


def runs_of(wanted: Path) -> list[Path]:
    """Return the folders of all runs of a configuration, smallest number first.

    A folder that another configuration names, as its own ``config.yaml`` says, is not one of them.

    Args:
        wanted: The configured folder.
    """
    numbered = wanted.parent.glob(f"{_escaped(wanted.name)}-*") if wanted.name else ()
    numbers = {int(tail): folder for folder in numbered if (tail := folder.name.rpartition("-")[2]).isdecimal()}
    return [wanted, *(folder for number, folder in sorted(numbers.items()) if number > 1 and _of(folder, wanted))]


def _of(folder: Path, wanted: Path) -> bool:
    """Whether a numbered folder is of a configuration: a run writes down the folder that it was configured with."""
    note = folder / ORIGIN
    return not note.is_file() or note.read_text(encoding="utf-8").strip() == wanted.name


def check_fixed_folders(trainer: Namespace) -> None:
    """Raise an error for a new run whose callbacks would replace the checkpoints of another run.

    Args:
        trainer: The ``trainer`` section.

    Raises:
        ValueError: If a callback saves to a folder of its own, and a checkpoint is there.
    """
    for folder in checkpoint_folders(trainer) if _first_process() else ():
        if (found := next(iter(sorted(folder.glob("*.ckpt"))), None)) is not None:
            refuse(
                "trainer.callbacks",
                f"dirpath {folder} holds {found.name} of another run, which this one would replace; resume it with "
                "--ckpt_path last, name another folder, or leave dirpath out for a new folder every run.",
            )


def find_named(name: str, wanted: Path, fixed: Sequence[Path] = ()) -> Path:
    """Return the checkpoint that ``--ckpt_path last`` or ``best`` means: the newest one of any run.

    Args:
        name: ``last`` or ``best``.
        wanted: The configured folder of the run.
        fixed: Folders that its callbacks save to, whatever the folder of the run.

    Raises:
        ValueError: If no run has one.
    """
    places = (place for folder in runs_of(wanted) for place in (folder / CHECKPOINTS, folder))
    found = [file for place in (*places, *fixed) if (file := place / f"{name}.ckpt").exists()]
    if found:
        return find_checkpoint(max(found, key=lambda file: file.stat().st_mtime))
    refuse(
        "ckpt_path", f"no run in {wanted} has a {name}.ckpt; leave --ckpt_path out to start a new run, or give a file."
    )


def requeued_checkpoint(wanted: Path) -> Path | None:
    """Return the last checkpoint of the SLURM job that this process belongs to, if it was requeued.

    Args:
        wanted: The configured folder of the run.
    """
    job = slurm_job()
    for folder in runs_of(wanted) if job is not None else ():
        if (note := _lock_of(folder)).is_file() and note.read_text(encoding="utf-8") == job:
            return next((file for file in (folder / CHECKPOINTS / LAST, folder / LAST) if file.exists()), None)
    return None


class RunConfiguration(SaveConfigCallback):
    """Write ``config.yaml`` to the folder of the run, which a logger need not name."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, on rank 0."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is broadcast
        if trainer.is_global_zero and not self.already_saved:
            folder.mkdir(parents=True, exist_ok=True)
            path = str(folder / self.config_filename)
            self.parser.save(self.config, path, skip_unset=False, overwrite=self.overwrite, multifile=self.multifile)
            self.already_saved = True


def _numbered(wanted: Path) -> Iterator[Path]:
    yield wanted
    for number in count(2):
        yield wanted.with_name(f"{wanted.name}-{number}")


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _first_process() -> bool:
    """Whether this is rank 0, by what launchers tell the processes that they start."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
    known = next((rank for rank in ranks if rank is not None), None)
    if known is None:  # Lightning's own launcher
        return {os.environ.get("LOCAL_RANK", "0"), os.environ.get("NODE_RANK", "0")} == {"0"}
    return int(known) == 0


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")  # in the folder it would be taken for files of a logger


def _locked(folder: Path) -> IO[str] | None:
    """Lock a folder for this process; return ``None`` if another one holds it."""
    path = _lock_of(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        refuse(
            "trainer.logger", f"the run's folder {folder} cannot be written to ({error.strerror}); name another one."
        )
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:  # removed by who held it
            raise BlockingIOError
    except OSError:
        file.close()
        return None
    file.truncate(0)
    file.write(slurm_job() or "")
    file.flush()
    return file


def _keep_figures(folder: Path) -> None:
    """Give the file of a CSV logger another name, because Lightning's deletes it when a run goes on."""
    found = folder / "metrics.csv"
    if found.exists():
        found.rename(next(name for number in count(1) if not (name := folder / f"metrics-{number}.csv").exists()))
