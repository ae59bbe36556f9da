"""Jobs in processes of their own: what is heard of them, and that none is left."""

import multiprocessing
import os
import time
from contextlib import closing
from typing import Any

from mtp_modules.core.checks import refuse
from mtp_modules.studies.pool import Job, run_jobs


def add(first: int, second: int, *, device: int | None, report_step: Any) -> tuple[int, int]:
    report_step(1)
    return first + second, os.getpid()


def fail(how: str, *, device: int | None, report_step: Any) -> None:
    if how == "refuse":
        refuse("job", "will not.")
    if how == "wrapped":
        try:
            refuse("job", "will not, inside.")
        except ValueError as error:
            raise RuntimeError("outer") from error
    if how == "die":
        os._exit(7)
    raise KeyError(how)


def sleep(*, device: int | None, report_step: Any) -> None:
    time.sleep(600)


def test_jobs_return_their_results_from_processes_of_their_own() -> None:
    events = list(run_jobs([Job(f"{n}", add, (n, 1)) for n in range(3)], workers=2))
    done = {event.job.name: event.value for event in events if event.kind == "done"}
    assert {name: value for name, (value, _) in done.items()} == {"0": 1, "1": 2, "2": 3}
    assert len({os.getpid(), *(process for _, process in done.values())}) == 4
    assert {event.kind for event in events} == {"step", "done"}


def test_a_job_that_fails_is_told_and_the_others_go_on() -> None:
    jobs = [Job(how, fail, (how,)) for how in ("refuse", "wrapped", "die", "raise")] + [Job("good", add, (1, 1))]
    ended = {event.job.name: (event.kind, event.value) for event in run_jobs(jobs, workers=1) if event.kind != "step"}
    assert ended["refuse"] == ("refused", "job: will not.")
    assert ended["wrapped"] == ("refused", "job: will not, inside.")
    assert ended["die"] == ("failed", "its process died with exit code 7.")
    assert ended["raise"][0] == "failed"
    assert ended["raise"][1].strip().endswith("KeyError: 'raise'")
    assert ended["good"][0] == "done"


def test_closing_ends_every_process() -> None:
    with closing(
        run_jobs([Job("short", add, (1, 1)), *(Job(f"{n}", sleep, ()) for n in range(3))], workers=2)
    ) as events:
        assert next(event for event in events if event.kind == "done").job.name == "short"
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()
