"""Tiny models for the formats of other programs."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mtp_modules import (
    ConfidenceHeads,
    ContextBlockHeads,
    FusedFeatureHeads,
    MTPModel,
    ParallelHeads,
    ResidualHeads,
    SequentialHeads,
    TransformerTrunk,
    TransitionHeads,
)
from tests.helpers import randomise

V, D, F, L, POSITIONS = 19, 16, 24, 2, 40
DRAFT_TOKENS = (1, 2, 5, 11, 18)
SIZES: dict[str, Any] = {"d_model": D, "num_heads": 4, "num_kv_heads": 2, "ffn_width": F, "max_positions": POSITIONS}


def make(heads: torch.nn.Module, *, trunk: dict[str, Any] | None = None, seed: int = 0, **options: bool) -> MTPModel:
    """Build a model in float32 whose every number matters; gains lie between 1/2 and 2."""
    built = TransformerTrunk(**{"vocab_size": V, "num_layers": L, **SIZES, **(trunk or {})})
    model = MTPModel(trunk=built, heads=heads, **options)
    randomise(model, seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.clamp_(0.5, 2.0)
    return model.eval()


def glm(
    num_horizons: int = 3, *, tied: bool = False, trunk: dict[str, Any] | None = None, seed: int = 0, **options: Any
) -> MTPModel:
    heads = SequentialHeads(num_horizons=num_horizons, **{**SIZES, "chain_norm": True, **options})
    return make(heads, trunk=trunk, seed=seed, tie_embeddings=tied)


def deepseek(num_horizons: int = 3, *, trunk: dict[str, Any] | None = None, **options: Any) -> MTPModel:
    return glm(num_horizons, trunk={"num_kv_heads": 1, **(trunk or {})}, num_kv_heads=1, **options)


def qwen(num_horizons: int = 2, **options: Any) -> MTPModel:
    options = {"qk_norm": True, "chain_norm": True, "shared": num_horizons > 2, **options}
    heads = SequentialHeads(num_horizons=num_horizons, **SIZES, **options)
    return make(heads, trunk={"qk_norm": options["qk_norm"]}, tie_embeddings=True)


def mimo(num_horizons: int = 3, **options: Any) -> MTPModel:
    options = {"chain_norm": True, "embedding_first": False, **options}
    return make(SequentialHeads(num_horizons=num_horizons, **SIZES, **options), tie_embeddings=False)


def medusa(num_layers: int = 1, *, own: bool = True) -> MTPModel:
    heads = ResidualHeads(d_model=D, num_horizons=4, num_layers=num_layers)
    return make(heads, tie_embeddings=False, own_unembeddings=own)


def founding(num_horizons: int = 3, **options: Any) -> MTPModel:
    options = {"rope_base": 500.0, "norm_eps": 1e-5, **options}
    heads = ParallelHeads(num_horizons=num_horizons, **SIZES, **options)
    return make(heads, trunk={"final_norm": False, **options}, tie_embeddings=False)


def eagle3(num_horizons: int = 3, *, draft_tokens: bool = False, own: bool = False, **options: Any) -> MTPModel:
    heads = FusedFeatureHeads(num_horizons=num_horizons, **{**SIZES, "num_features": 2, "merge": False, **options})
    return drafter(heads, draft_tokens, own)


def block(**options: Any) -> ContextBlockHeads:
    return ContextBlockHeads(**{**SIZES, "num_horizons": 4, "num_features": 2, **options})


def dflash(*, mask_token: int | None = None, draft_tokens: bool = False, **options: Any) -> MTPModel:
    model = drafter(block(**options), draft_tokens)
    if mask_token is not None:
        with torch.no_grad():
            model.heads.mask.copy_(model.trunk.embedding.weight[mask_token])
    return model


def dspark(confidence: str = "around", *, draft_tokens: bool = False, rank: int | None = 3, **options: Any) -> MTPModel:
    heads: torch.nn.Module = block(**options)
    heads = ConfidenceHeads(heads=heads) if confidence == "inside" else heads
    heads = TransitionHeads(heads=heads, vocab_size=V, rank=rank)
    return drafter(ConfidenceHeads(heads=heads) if confidence == "around" else heads, draft_tokens)


def drafter(heads: torch.nn.Module, draft_tokens: bool = False, own: bool = False, **trunk: Any) -> MTPModel:
    """Build heads that read both layers of the trunk; if wanted, drafts are some tokens only."""
    options: dict[str, Any] = {"num_draft_tokens": len(DRAFT_TOKENS)} if draft_tokens else {}
    trunk = {"feature_layers": [0, 1], **trunk}
    model = make(heads, trunk=trunk, tie_embeddings=False, own_unembeddings=own, **options)
    if draft_tokens:
        model.unembedding.draft_tokens.copy_(torch.tensor(DRAFT_TOKENS))
    return model


def all_logits(model: MTPModel, tokens: Tensor) -> list[Tensor]:
    """Return the logits of every horizon."""
    with torch.no_grad():
        return [model.unembedding.logits(state, index) for index, state in enumerate(model(tokens))]


def stored(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, which may then be overwritten."""
    return {name: value.clone() for name, value in load_file(path).items()}


def some_tokens(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))
