"""Studies: questions about multi-token prediction, answered by reproducible training runs."""

from mtp_modules.studies.outcome import Outcome, read_outcome
from mtp_modules.studies.plan import Cost, Run, makespan, plan_runs, plan_within
from mtp_modules.studies.runner import Plan, StudyStoppedError, run_study
from mtp_modules.studies.spec import Decode, Study, Sweep, load_study, shipped
from mtp_modules.studies.speed import DecodingSpeed, measure_speeds
from mtp_modules.studies.statistics import Estimate, estimate

__all__ = [
    "Cost",
    "Decode",
    "DecodingSpeed",
    "Estimate",
    "Outcome",
    "Plan",
    "Run",
    "Study",
    "StudyStoppedError",
    "Sweep",
    "estimate",
    "load_study",
    "makespan",
    "measure_speeds",
    "plan_runs",
    "plan_within",
    "read_outcome",
    "run_study",
    "shipped",
]
