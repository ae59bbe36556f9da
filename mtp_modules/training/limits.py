"""Numbers of a trainer that Lightning takes without a look, or refuses in several lines."""

import math
from collections.abc import Mapping
from typing import Any

from mtp_modules.core.checks import at_least, finite, refuse, whole

_AT_LEAST = {
    "accumulate_grad_batches": 1,
    "max_steps": -1,
    "max_epochs": -1,
    "min_steps": 0,
    "min_epochs": 0,
    "log_every_n_steps": 0,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
}
_BATCHES = (*(f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict")), "overfit_batches")


def check_numbers(options: Mapping[str, Any]) -> None:
    """Raise an error for a number of a trainer that lies outside its range.

    Args:
        options: Arguments of a trainer; those that are missing or ``None`` pass.

    Raises:
        ValueError: If a number is below its smallest value, or is not a number.
    """
    for name, limit in _AT_LEAST.items():
        if options.get(name) is not None:
            whole("trainer", name, options[name], limit)
    if options.get("gradient_clip_val") is not None:
        finite("trainer", "gradient_clip_val", options["gradient_clip_val"], 0)
    for name in _BATCHES:
        value = options.get(name)
        if isinstance(value, int | float):
            at_least("trainer", name, value, 0)
            if isinstance(value, float) and value > 1 and not math.isinf(value):
                refuse("trainer", f"{name} must be a share up to 1.0 or a whole number of batches, got {value}.")
    interval = options.get("val_check_interval")
    if isinstance(interval, int):
        at_least("trainer", "val_check_interval", interval, 1)
    elif isinstance(interval, float) and not 0 <= interval <= 1:
        refuse("trainer", f"val_check_interval must be a share in 0..1 or a whole number of batches, got {interval}.")
