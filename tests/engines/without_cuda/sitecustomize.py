"""Let torchvision be imported beside a torch without CUDA; Python imports this module when it starts.

The torchvision that pip installs is linked to CUDA. Without it, its operators are missing, and two are needed to import
it. vLLM's models for images import it, and its Qwen3.5 is one of them; its engine starts processes of its own.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from typing import Any

_kept: list[Any] = []


class _Before(MetaPathFinder):
    """Declares the missing operators just before they are looked for."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        if name == "torchvision._meta_registrations" and not _kept:
            import torch

            try:
                torch.ops.torchvision.nms  # noqa: B018
            except AttributeError:
                library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _kept.append(library)


sys.meta_path.insert(0, _Before())
