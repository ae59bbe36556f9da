"""``python -m mtp_modules``."""

import os
import sys

from mtp_modules.commands.front import answered
from mtp_modules.threads import prepare_threads


def main() -> None:
    """Answer what needs no torch; else prepare its threads, then run the command that ``sys.argv`` names."""
    if answered([argument for argument in sys.argv[1:] if argument != "--debug"]):
        return
    prepare_threads(os.environ)
    from mtp_modules.cli import main as run  # imports torch

    run()


if __name__ == "__main__":
    main()
