"""Decoders: prompts to new tokens."""

from mtp_modules.core.detokenizing import StreamingDetokenizer
from mtp_modules.decoders.autoregressive import AutoregressiveDecoder
from mtp_modules.decoders.beam.decoders import (
    BeamDecoder,
    BeamGeneration,
    BeamSearchDecoder,
    DraftedBeamDecoder,
    JointBeamDecoder,
)
from mtp_modules.decoders.beam.hypotheses import Beam
from mtp_modules.decoders.drafting.drafter import Drafter, HeadsDrafter
from mtp_modules.decoders.drafting.lookup import LookupOrHeads, PromptLookup
from mtp_modules.decoders.drafting.policies import ConfidentDepth, CostAwareDepth, DraftPolicy, FixedDepth
from mtp_modules.decoders.drafting.trees import DraftTree, DynamicTree, StaticTree
from mtp_modules.decoders.generation import Decoder, Generation
from mtp_modules.decoders.graphs.compiled import CompiledModel, compile_for_decoding
from mtp_modules.decoders.graphs.continued import ContinuedExecutor
from mtp_modules.decoders.graphs.warming import warm_up
from mtp_modules.decoders.results import DecodingStats, Round, RoundArrays, RoundDistributions
from mtp_modules.decoders.sampling.parameters import SamplingParams
from mtp_modules.decoders.sampling.stopping import StopRule
from mtp_modules.decoders.speculative import SpeculativeDecoder
from mtp_modules.decoders.verification.rules import (
    Acceptance,
    BlockVerification,
    ExactMatch,
    RejectionSampling,
    TopKAcceptance,
    TypicalAcceptance,
)

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
    "ContinuedExecutor",
    "CostAwareDepth",
    "Decoder",
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
    "RejectionSampling",
    "Round",
    "RoundArrays",
    "RoundDistributions",
    "SamplingParams",
    "SpeculativeDecoder",
    "StaticTree",
    "StopRule",
    "StreamingDetokenizer",
    "TopKAcceptance",
    "TypicalAcceptance",
    "compile_for_decoding",
    "warm_up",
]
