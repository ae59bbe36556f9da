"""Decoders: prompts to new tokens."""

from mtp_modules.decoders.autoregressive import AutoregressiveDecoder
from mtp_modules.decoders.generation import Decoder, DecodingStats, Generation, Round
from mtp_modules.decoders.speculative import SpeculativeDecoder

__all__ = ["AutoregressiveDecoder", "Decoder", "DecodingStats", "Generation", "Round", "SpeculativeDecoder"]
