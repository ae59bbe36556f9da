"""Metrics: what each head gets right and where, how long accepted drafts are, and which answers are right."""

from mtp_modules.metrics.answers import AnswerAccuracy
from mtp_modules.metrics.per_head import PerHeadMetrics
from mtp_modules.metrics.positions import PositionAccuracy

__all__ = ["AnswerAccuracy", "PerHeadMetrics", "PositionAccuracy"]
