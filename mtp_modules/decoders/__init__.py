"""Decoders: prompts to new tokens."""

from mtp_modules.decoders.autoregressive import AutoregressiveDecoder
from mtp_modules.decoders.beam import BeamDecoder, DraftedBeamDecoder, JointBeamDecoder
from mtp_modules.decoders.beam_generation import BeamGeneration, BeamSearchDecoder
from mtp_modules.decoders.compiled import CompiledModel, compile_for_decoding
from mtp_modules.decoders.draft_policy import ConfidentDepth, CostAwareDepth, DraftPolicy, FixedDepth
from mtp_modules.decoders.drafting import Drafter, HeadsDrafter
from mtp_modules.decoders.generation import Decoder, Generation
from mtp_modules.decoders.hypotheses import Beam
from mtp_modules.decoders.lookup import LookupOrHeads, PromptLookup
from mtp_modules.decoders.recorded import RecordedModel, record_for_decoding
from mtp_modules.decoders.rounds import DecodingStats, Round, RoundArrays, RoundLaws
from mtp_modules.decoders.sampling import SamplingLaw
from mtp_modules.decoders.speculative import SpeculativeDecoder
from mtp_modules.decoders.speed import DecodingSpeed, measure_speeds
from mtp_modules.decoders.stopping import StopRule
from mtp_modules.decoders.tree import DraftTree, DynamicTree, StaticTree
from mtp_modules.decoders.verification import (
    Acceptance,
    BlockVerification,
    ExactMatch,
    RejectionSampling,
    TopKAcceptance,
    TypicalAcceptance,
)
from mtp_modules.decoders.warming import warm_up

__all__ = [
    "Acceptance",
    "AutoregressiveDecoder",
    "Beam",
    "BeamDecoder",
    "BeamGeneration",
    "BeamSearchDecoder",
    "BlockVerification",
    "CompiledModel",
    "ConfidentDepth",
    "CostAwareDepth",
    "Decoder",
    "DecodingSpeed",
    "DecodingStats",
    "DraftPolicy",
    "DraftTree",
    "DraftedBeamDecoder",
    "Drafter",
    "DynamicTree",
    "ExactMatch",
    "FixedDepth",
    "Generation",
    "HeadsDrafter",
    "JointBeamDecoder",
    "LookupOrHeads",
    "PromptLookup",
    "RecordedModel",
    "RejectionSampling",
    "Round",
    "RoundArrays",
    "RoundLaws",
    "SamplingLaw",
    "SpeculativeDecoder",
    "StaticTree",
    "StopRule",
    "TopKAcceptance",
    "TypicalAcceptance",
    "compile_for_decoding",
    "measure_speeds",
    "record_for_decoding",
    "warm_up",
]
