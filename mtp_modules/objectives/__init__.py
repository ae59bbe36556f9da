"""Auxiliary objectives: what else training may ask of the trunk's states, beside the horizons."""

from mtp_modules.core.auxiliary import AuxiliaryObjective, AuxiliaryTerms, AuxiliaryText
from mtp_modules.objectives.future_summary import FutureBagOfWords
from mtp_modules.objectives.next_span import NextSpan
from mtp_modules.objectives.token_order import TokenOrder

__all__ = ["AuxiliaryObjective", "AuxiliaryTerms", "AuxiliaryText", "FutureBagOfWords", "NextSpan", "TokenOrder"]
