"""Metrics: what each head gets right, and how long accepted drafts are."""

from mtp_modules.metrics.per_head import PerHeadMetrics

__all__ = ["PerHeadMetrics"]
