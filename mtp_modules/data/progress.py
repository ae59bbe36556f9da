"""How far the building of a cache is."""

import sys
import time
from types import TracebackType


class ProgressBar:
    """A line on standard error that shows how much text was read: rewritten in a terminal, every half minute elsewhere.

    Nothing is shown for work that takes less than a second.
    """

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._shown = self._begun
        self._terminal = sys.stderr.isatty()
        self._wrote = False
        self._first: int | None = None

    def __enter__(self) -> "ProgressBar":
        return self

    def update(self, done: int, total: int | None) -> None:
        """Show how far it is, if that was not just shown.

        Args:
            done: Bytes that were read.
            total: All bytes, if they are known.
        """
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        if now - self._shown < (1 if self._terminal else 30):
            return
        self._shown = now
        speed = (done - self._first) / (now - self._begun)
        share = "" if not total else f" of {total / 1e6:.0f} MB ({min(done / total, 1):.0%})"
        left = "" if not total or not speed else f", {max(total - done, 0) / speed:.0f} s left"
        line = f"tokenising: {done / 1e6:.0f} MB{share}, {speed / 1e6:.1f} MB/s{left}"
        sys.stderr.write(f"\r\033[K{line}" if self._terminal else f"{line}\n")
        sys.stderr.flush()
        self._wrote = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the line."""
        if self._wrote and self._terminal:
            sys.stderr.write("\n")
