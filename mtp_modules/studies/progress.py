"""How far a study is, over all its runs, and how long it will still take."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars


class Progress:
    """Bars in a terminal, one for all runs and one for each that is running; elsewhere a line a finished run.

    The time left is what the plan expects of the runs that are left, corrected by how long those that are done took.

    Args:
        name: Of the study.
        console: Where to write; the terminal if ``None``.
    """

    def __init__(self, name: str, console: Console | None = None) -> None:
        self.name, self.console = name, console or Console()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        self.bars = Bars(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.expected: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self.share: dict[str, float] = {}
        self.total = self.calibrations = 0
        self.tasks: dict[str, object] = {}

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def calibrate(self, cells: int) -> None:
        """Begin to measure."""
        if cells:
            self.say(f"{self.name}: measuring what a step costs, {cells} configurations.")
            self.calibrations = cells
            self._all = self.bars.add_task("measuring", total=cells, note="")

    def calibrated(self) -> None:
        """One is measured."""
        self.bars.advance(self._all)

    def plan(
        self,
        seconds: dict[str, float],
        *,
        done: int,
        expected: float,
        steps: dict[str, int],
        scale: float,
        workers: int,
    ) -> None:
        """Begin to train.

        Args:
            seconds: Expected of each run that is left.
            done: Runs whose results are there.
            expected: Seconds until the end.
            steps: Of each run.
            scale: Of all lengths.
            workers: Processes at a time.
        """
        if self.calibrations:
            self.bars.remove_task(self._all)
        self.expected, self.steps, self.workers = seconds, steps, workers
        self.share = dict.fromkeys(seconds, 0.0)
        self.total, self.before, self.began = done + len(seconds), done, time.monotonic()
        self.expected_duration = expected
        shorter = "" if scale == 1.0 else f", lengths scaled to {scale:.3g} by the budget"
        kept = f", {done} of them are there already" if done else ""
        left = f", about {_time(expected)}" if seconds else ""
        self.say(f"{self.name}: {self.total} runs{kept}{shorter}; {workers} at a time{left}.")
        self._all = self.bars.add_task("all runs", total=self.total, completed=done, note="")

    def step(self, label: str, step: int) -> None:
        """A run has come to a step."""
        if label not in self.tasks:
            self.tasks[label] = self.bars.add_task(label, total=self.steps[label], note="")
        self.share[label] = step / self.steps[label]
        self.bars.update(self.tasks[label], completed=step, note=f"{step}/{self.steps[label]}")  # type: ignore[arg-type]
        self._show()

    def done(self, label: str) -> None:
        """A run has ended well."""
        self._end(label, "done")

    def failed(self, label: str, why: str) -> None:
        """A run has failed."""
        self._end(label, f"FAILED: {why.splitlines()[-1]}")

    def left(self) -> float:
        """Return the seconds that are left."""
        work = sum(self.expected.values())
        behind = sum(self.expected[label] * self.share[label] for label in self.expected)
        elapsed = time.monotonic() - self.began
        if behind < 0.02 * work or work == 0:
            return max(0.0, self.expected_duration - elapsed)
        return elapsed * (work - behind) / behind

    def _end(self, label: str, text: str) -> None:
        self.share[label] = 1.0
        if label in self.tasks:
            self.bars.remove_task(self.tasks.pop(label))  # type: ignore[arg-type]
        ended = self.before + sum(share == 1.0 for share in self.share.values())
        self.bars.update(self._all, completed=ended)
        self._show()
        if not self.console.is_terminal or text != "done":
            left = f"; {_time(self.left())} left" if ended < self.total else ""
            self.say(f"[{ended}/{self.total}] {label}: {text}{left}")

    def _show(self) -> None:
        self.bars.update(self._all, note=f"{_time(self.left())} left")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
