"""The software versions and the machine behind results."""

import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from mtp_modules import __version__
from mtp_modules.studies.pool import cores

_PACKAGES = ("torch", "lightning", "torchmetrics", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of its numerical dependencies."""
    own = {"python": platform.python_version(), "mtp_modules": __version__}
    return own | {name: metadata.version(name) for name in _PACKAGES}


def machine() -> dict[str, str]:
    """Return processor, cores, system and GPU as text."""
    found = {"processor": _processor(), "cores": str(cores()), "system": f"{platform.system()} {platform.machine()}"}
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return found


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if sys.platform == "linux" and information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
