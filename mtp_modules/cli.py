"""The command line: one command, its errors as one sentence."""

import logging
import sys
import warnings

from mtp_modules.commands.catalogue import OWN
from mtp_modules.commands.errors import sentence_for
from mtp_modules.commands.front import ALL, answered
from mtp_modules.commands.running import run_command
from mtp_modules.commands.trainer import MTPCLI

_HARMLESS = (
    ".*does not have many workers",
    "Couldn't infer the batch indices",
    "Precision bf16-mixed is not supported by the model summary",
    "FSDP2-wrapped module .* returned a view",
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "Total length of `.*` across ranks is zero",  # data without a test split, of which the table says so
    "(Checkpoint|Experiment logs) directory .* exists and is not empty",
)
_ASIDE = ("\N{ELECTRIC LIGHT BULB} Tip:", "Trainer already configured with model summary callbacks")


def _of_the_run(record: logging.LogRecord) -> bool:
    """Return whether a message is about the run, and not about other products or Lightning itself."""
    return not record.getMessage().startswith(_ASIDE)


def main() -> None:
    """Run the command that ``sys.argv`` names."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    warnings.filterwarnings("ignore", message="|".join(_HARMLESS))
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_of_the_run)
    if answered(sys.argv[1:]):
        return
    command = sys.argv[1]
    try:
        if command in OWN:
            run_command(command, sys.argv[2:])
        else:
            sys.argv = ["--help" if argument == ALL else argument for argument in sys.argv]
            MTPCLI()
    except Exception as error:
        told = sentence_for(error)
        if told is None or debug:
            raise
        sys.exit(f"error: {told}")
