"""Contracts and conventions that all other packages share."""

from mtp_modules.core.component import Component, build, describe
from mtp_modules.core.drafts import Draft
from mtp_modules.core.interfaces import DecodingState, Heads, MixtureStates, Tokenizer, Trunk, TrunkOutput
from mtp_modules.core.targets import count_targets, future_targets, tokens_between

__all__ = [
    "Component",
    "DecodingState",
    "Draft",
    "Heads",
    "MixtureStates",
    "Tokenizer",
    "Trunk",
    "TrunkOutput",
    "build",
    "count_targets",
    "describe",
    "future_targets",
    "tokens_between",
]
