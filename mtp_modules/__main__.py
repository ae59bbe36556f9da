"""``python -m mtp_modules``."""

from mtp_modules.cli import main

if __name__ == "__main__":
    main()
