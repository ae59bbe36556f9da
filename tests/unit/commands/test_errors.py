"""Which errors become one sentence."""

import errno

from lightning.fabric.utilities.exceptions import MisconfigurationException

from mtp_modules.commands.errors import sentence_for
from mtp_modules.core.checks import InputError


def test_known_errors_become_one_sentence_and_bugs_do_not() -> None:
    wrapped = RuntimeError("instantiation failed")
    wrapped.__cause__ = InputError("Trunk: too\nnarrow.")
    late = ValueError(
        " `val_check_interval` (5000) must be less than or equal to the number of the training batches (40)."
    )
    missing = ModuleNotFoundError(
        "Requirement 'wandb>=0.12.10' not met. HINT: Try running `pip install -U 'wandb>=0.12.10'`"
    )
    board = ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available. Try `pip install`ing either.")
    for error, sentence in [
        (wrapped, "Trunk: too narrow."),
        (MisconfigurationException("`devices`\n must be 1."), "trainer: `devices` must be 1."),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a.ckpt"),
            "runs/a.ckpt: No space left on device; free some space, or take another place.",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs"),
            "runs: Permission denied; free some space, or take another place.",
        ),
        (
            RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/3: file write failed"),
            "a file could not be written ([enforce fail] . PytorchStreamWriter failed writing file data/3: file write "
            "failed); free some space, or take another place.",
        ),
        (
            missing,
            "trainer.logger: needs wandb>=0.12.10, which is not installed; install it with: "
            "pip install 'wandb>=0.12.10'.",
        ),
        (
            board,
            "trainer.logger: needs tensorboard, which is not installed; install it with: pip install 'tensorboard'.",
        ),
        (
            late,
            "trainer.val_check_interval: is 5000, but an epoch has 40 training batches; lower it, or set "
            "check_val_every_n_epoch to null to count batches over all epochs.",
        ),
        (ValueError("some bug"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ModuleNotFoundError("No module named 'mtp_modules.nothing'"), None),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), None),
    ]:
        assert sentence_for(error) == sentence
