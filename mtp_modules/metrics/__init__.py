"""Metrics: accuracy of each head, overall and by position, mean accepted length, and exact match of answers."""

from mtp_modules.metrics.answers import AnswerAccuracy
from mtp_modules.metrics.per_head import PerHeadMetrics
from mtp_modules.metrics.positions import PositionAccuracy

__all__ = ["AnswerAccuracy", "PerHeadMetrics", "PositionAccuracy"]
