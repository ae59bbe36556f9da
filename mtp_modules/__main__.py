"""``python -m mtp_modules``."""

import os

from mtp_modules.threads import prepare_threads


def main() -> None:
    """Prepare the threads of torch, then run the command that ``sys.argv`` names."""
    prepare_threads(os.environ)
    from mtp_modules.cli import main as run  # imports torch

    run()


if __name__ == "__main__":
    main()
