"""Contracts and conventions that all other packages share."""

from mtp_modules.core.component import Component, build, describe
from mtp_modules.core.drafts import Draft
from mtp_modules.core.interfaces import DecodingState, Heads, MixtureStates, Tokenizer, Trunk, TrunkOutput
from mtp_modules.core.targets import future_targets

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
    "describe",
    "future_targets",
]
