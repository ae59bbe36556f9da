"""One sentence for an error that a user can mend; other errors keep their traceback, which a bug report needs."""

import errno
import re

from lightning.fabric.utilities.exceptions import MisconfigurationException

from mtp_modules.configuration.parser import missing_package
from mtp_modules.core.checks import refusal_behind

_OF_THE_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}
_FULL_DISK = re.compile("no space left on device|PytorchStreamWriter failed writing|disk quota exceeded", re.IGNORECASE)
_LATE_VALIDATION = re.compile(r"`val_check_interval` \((\d+)\) must be .* training batches \((\d+)\)")


def sentence_for(error: BaseException) -> str | None:
    """Return what to tell a user, or ``None`` for an error that may be a bug.

    Args:
        error: What a command raised.
    """
    refused = refusal_behind(error)
    found = _foreign(error) if refused is None else str(refused)
    return None if found is None else " ".join(found.split())


def _foreign(error: BaseException) -> str | None:
    """Return a sentence for a known error of another library."""
    text = str(error)
    if isinstance(error, MisconfigurationException):
        return f"trainer: {text}"
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; free some space, or take another place."
    if isinstance(error, RuntimeError) and _FULL_DISK.search(text):
        return f"a file could not be written ({text.splitlines()[0]}); free some space, or take another place."
    if isinstance(error, ModuleNotFoundError | ValueError) and (missing := missing_package(text)):
        return missing
    if isinstance(error, ValueError) and (late := _LATE_VALIDATION.search(text)):
        return (
            f"trainer.val_check_interval: is {late[1]}, but an epoch has {late[2]} training batches; lower it, or set "
            "check_val_every_n_epoch to null to count batches over all epochs."
        )
    return None
