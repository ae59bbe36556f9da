"""Export to and import from the checkpoint formats of other programs, one file per format."""

from mtp_modules.interop.card import Facts
from mtp_modules.interop.conventions import Conventions
from mtp_modules.interop.dflash import DFlash
from mtp_modules.interop.dspark import DSpark
from mtp_modules.interop.eagle3 import Eagle3
from mtp_modules.interop.exchange import export_model, import_model
from mtp_modules.interop.format import Format
from mtp_modules.interop.founding_paper import FoundingPaper
from mtp_modules.interop.medusa import Medusa
from mtp_modules.interop.medusa_vllm import MedusaVLLM
from mtp_modules.interop.mimo import MiMo
from mtp_modules.interop.next_predict import GLM, DeepSeek
from mtp_modules.interop.own_trunk import with_own_trunk
from mtp_modules.interop.qwen import Qwen
from mtp_modules.interop.serving import Exported
from mtp_modules.interop.speculators import Speculators
from mtp_modules.interop.tensors import check_trained
from mtp_modules.interop.trunks import NamedTrunk

__all__ = [
    "GLM",
    "Conventions",
    "DFlash",
    "DSpark",
    "DeepSeek",
    "Eagle3",
    "Exported",
    "Facts",
    "Format",
    "FoundingPaper",
    "Medusa",
    "MedusaVLLM",
    "MiMo",
    "NamedTrunk",
    "Qwen",
    "Speculators",
    "check_trained",
    "export_model",
    "import_model",
    "with_own_trunk",
]
