"""Reports: measure a trained model, and show the results as tables and pages."""

from mtp_modules.reports.diagnosis import Depth, Diagnosis, NumberOfDrafts, diagnose
from mtp_modules.reports.draft_walk import DraftedText, draft_along

__all__ = ["Depth", "Diagnosis", "DraftedText", "NumberOfDrafts", "diagnose", "draft_along"]
