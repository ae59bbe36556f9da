"""Progress of a study over all its runs, and the time left."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars


class Progress:
    """Progress bars in a terminal, one for all runs and one per active run; otherwise a line per finished run.

    The time left is the planned duration of the remaining runs, corrected by the measured duration of finished ones.

    Args:
        name: Name of the study.
        console: Console to write to; the terminal if ``None``.
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
        """Start the calibration bar."""
        if cells:
            self.say(f"{self.name}: measuring the cost of a step in {cells} configurations.")
            self.calibrations = cells
            self._all = self.bars.add_task("measuring", total=cells, note="")

    def calibrated(self) -> None:
        """Advance the calibration bar by one configuration."""
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
        """Start the bar of all runs.

        Args:
            seconds: Expected seconds of each remaining run.
            done: Number of runs that have results.
            expected: Expected seconds until the end.
            steps: Number of steps of each run.
            scale: Factor of all lengths.
            workers: Number of parallel processes.
        """
        if self.calibrations:
            self.bars.remove_task(self._all)
        self.expected, self.steps, self.workers = seconds, steps, workers
        self.share = dict.fromkeys(seconds, 0.0)
        self.total, self.before, self.began = done + len(seconds), done, time.monotonic()
        self.expected_duration = expected
        shorter = "" if scale == 1.0 else f", lengths scaled to {scale:.3g} by the budget"
        kept = f", {done} of them already done" if done else ""
        left = f", about {_time(expected)}" if seconds else ""
        self.say(f"{self.name}: {self.total} runs{kept}{shorter}; {workers} at a time{left}.")
        self._all = self.bars.add_task("all runs", total=self.total, completed=done, note="")

    def step(self, label: str, step: int) -> None:
        """Record the step that a run has reached."""
        if label not in self.tasks:
            self.tasks[label] = self.bars.add_task(label, total=self.steps[label], note="")
        self.share[label] = step / self.steps[label]
        self.bars.update(self.tasks[label], completed=step, note=f"{step}/{self.steps[label]}")  # type: ignore[arg-type]
        self._show()

    def done(self, label: str) -> None:
        """Record that a run has finished."""
        self._end(label, "done")

    def failed(self, label: str, why: str) -> None:
        """Record that a run has failed."""
        self._end(label, f"FAILED: {why.splitlines()[-1]}")

    def left(self) -> float:
        """Return the expected seconds until the end."""
        work = sum(self.expected.values())
        finished = sum(self.expected[label] * self.share[label] for label in self.expected)
        elapsed = time.monotonic() - self.began
        if finished < 0.02 * work or work == 0:
            return max(0.0, self.expected_duration - elapsed)
        return elapsed * (work - finished) / finished

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
