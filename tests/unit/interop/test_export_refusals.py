"""What cannot be exported is refused in one sentence, before anything is written."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_modules import LinearHeads, MTPModel, ParallelHeads, RecurrentTrunk, ResidualHeads, SequentialHeads
from mtp_modules.interop import export_model
from tests import interop
from tests.interop import SIZES, D, V, make


def sequential(**options: Any) -> SequentialHeads:
    return SequentialHeads(**{"num_horizons": 3, **SIZES, "chain_norm": True, **options})


def recurrent() -> MTPModel:
    trunk = RecurrentTrunk(vocab_size=V, d_model=D)
    return MTPModel(trunk=trunk, heads=sequential(), tie_embeddings=False)


Refused = tuple[str, Callable[[], MTPModel], str]

EXPORTS: dict[str, Refused] = {
    "an unknown format": (
        "gguf",
        interop.glm,
        "format: 'gguf' is unknown. Known: mtp_modules, deepseek, glm, qwen, mimo, speculators, medusa, medusa_vllm, "
        "eagle3, dflash, dspark, founding_paper.",
    ),
    "other heads": (
        "glm",
        lambda: make(LinearHeads(d_model=D, num_horizons=2)),
        "glm: the format stores SequentialHeads, the model has LinearHeads; see docs/interop.md.",
    ),
    "other heads than Medusa's": (
        "medusa",
        interop.glm,
        "medusa: the format stores ResidualHeads, the model has SequentialHeads; see docs/interop.md.",
    ),
    "other heads than the paper's": (
        "founding_paper",
        interop.glm,
        "founding_paper: the format stores ParallelHeads, the model has SequentialHeads; see docs/interop.md.",
    ),
    "one horizon": (
        "glm",
        lambda: make(sequential(num_horizons=1)),
        "glm: the heads have no horizon beyond the first, so there is nothing to write.",
    ),
    "keys of several heads in latents": (
        "deepseek",
        interop.glm,
        "deepseek: all queries of this format share one rotated key, the layers have num_kv_heads=2; "
        "build trunk and heads with num_kv_heads=1.",
    ),
    "a gain that latents cannot undo": (
        "deepseek",
        lambda: _with(interop.deepseek(), "trunk.layers.1.attention_norm.weight", 0.0),
        "deepseek: a gain of model.layers.1.input_layernorm is 0, which latents cannot invert; use another format.",
    ),
    "another order": (
        "mimo",
        lambda: interop.mimo(embedding_first=True),
        "mimo: the heads have concatenation=embedding_first, readers of this format expect state_first; "
        "build and train heads with that convention, or use another format.",
    ),
    "another chain": (
        "qwen",
        lambda: interop.qwen(chain_norm=False),
        "qwen: the heads have chain_state=before_norm, readers of this format expect after_norm; "
        "build and train heads with that convention, or use another format.",
    ),
    "too many modules": (
        "qwen",
        lambda: interop.qwen(3, shared=False),
        "qwen: the format stores 1 module, the heads have 2; train with shared=True, or with num_horizons=2.",
    ),
    "a norm for all": (
        "glm",
        lambda: interop.glm(shared_norm=True),
        "glm: every module of this format has its own norm; train with shared_norm=False.",
    ),
    "no norms of queries": (
        "qwen",
        lambda: interop.qwen(qk_norm=False),
        "qwen: layers of this format have qk_norm=True, the trunk has qk_norm=False.",
    ),
    "no norms of queries in a draft model": (
        "speculators",
        lambda: interop.qwen(qk_norm=False),
        "speculators: the layer of this format normalises queries and keys; train heads with qk_norm=True.",
    ),
    "norms of queries": (
        "mimo",
        lambda: make(sequential(embedding_first=False, qk_norm=True), trunk={"qk_norm": True}),
        "mimo: layers of this format have qk_norm=False, the trunk has qk_norm=True.",
    ),
    "previous tokens": (
        "glm",
        lambda: interop.glm(trunk={"num_previous": 2}),
        "glm: the format has no embeddings of previous tokens, and num_previous is 2.",
    ),
    "wide heads": (
        "glm",
        lambda: interop.glm(trunk={"head_dim": 6}),
        "glm: the format requires head_dim = d_model / num_heads, and head_dim is 6.",
    ),
    "modules of another width than the last layer": (
        "glm",
        lambda: interop.glm(ffn_width=32),
        "glm: experts of the modules and of the trunk's last layer have one size in this format, but ffn_width is 32 "
        "for the heads and 24 for the trunk; train heads with the ffn_width of the trunk.",
    ),
    "latents that float16 cannot hold": (
        "deepseek",
        lambda: interop.deepseek().half(),
        "deepseek: latents are smaller than float16 has numbers; export the model in bfloat16 or float32.",
    ),
    "another eps than that of latents": (
        "deepseek",
        lambda: interop.deepseek(trunk={"norm_eps": 1e-5}, norm_eps=1e-5),
        "deepseek: the norm of latents adds 1e-06 in transformers and the eps of all norms in vLLM, and norm_eps is "
        "1e-05; build trunk and heads with norm_eps=1e-06.",
    ),
    "draft tokens": (
        "medusa",
        lambda: _trimmed(interop.medusa()),
        "medusa: heads predict all 19 tokens here, and num_draft_tokens is 3; train without it.",
    ),
    "draft tokens of modules": (
        "glm",
        lambda: _trimmed(interop.glm()),
        "glm: heads predict all 19 tokens here, and num_draft_tokens is 3; train without it.",
    ),
    "draft tokens that vLLM rejects": (
        "medusa_vllm",
        lambda: _trimmed(interop.medusa()),
        "medusa_vllm: heads predict all 19 tokens here, and num_draft_tokens is 3; train without it.",
    ),
    "leaps": (
        "medusa_vllm",
        lambda: make(ResidualHeads(d_model=D, num_horizons=3, stride=2)),
        "medusa_vllm: readers of this format predict every next token, and stride is 2; train with 1.",
    ),
    "leaps of parallel heads": (
        "founding_paper",
        lambda: make(ParallelHeads(d_model=D, num_horizons=3, num_heads=2, max_positions=40, stride=2)),
        "founding_paper: readers of this format predict every next token, and stride is 2; train with 1.",
    ),
    **{
        f"a bias of logits in {name}": (
            name,
            lambda build=build: make(build(), output_bias=True),
            f"{name}: the format has no output bias; train with output_bias=False.",
        )
        for name, build in {
            "medusa": lambda: ResidualHeads(d_model=D, num_horizons=3),
            "medusa_vllm": lambda: ResidualHeads(d_model=D, num_horizons=3),
            "speculators": lambda: sequential(num_horizons=2, qk_norm=True),
            "mimo": lambda: sequential(embedding_first=False),
            "founding_paper": lambda: interop.founding().heads,
        }.items()
    },
    "a bias of logits": (
        "glm",
        lambda: make(sequential(), output_bias=True),
        "glm: the format has no output bias; train with output_bias=False.",
    ),
    "no final norm": (
        "glm",
        lambda: interop.glm(trunk={"final_norm": False}),
        "glm: heads of this format read the hidden states after the final norm; build with final_norm=True.",
    ),
    "a final norm": (
        "founding_paper",
        lambda: make(interop.founding().heads, tie_embeddings=False),
        "founding_paper: the heads have trunk_state=after_norm, readers of this format expect before_norm; "
        "build and train heads with that convention, or use another format.",
    ),
    "another trunk": (
        "glm",
        recurrent,
        "glm: the format also stores the trunk, and has no names for a RecurrentTrunk.",
    ),
    "other layers": (
        "glm",
        lambda: interop.glm(num_kv_heads=4),
        "glm: one config.json describes trunk and heads, but num_kv_heads is 4 for the heads and 2 for the trunk; "
        "train heads with the sizes of the trunk.",
    ),
    "another rotation": (
        "mimo",
        lambda: interop.mimo(rope_base=500.0),
        "mimo: one config.json describes trunk and heads, but rope_base is 500.0 for the heads and "
        "10000.0 for the trunk; train heads with the sizes of the trunk.",
    ),
    "other layers than the paper's": (
        "founding_paper",
        lambda: make(interop.founding().heads, trunk={"final_norm": False}, tie_embeddings=False),
        "founding_paper: layers of trunk and heads have one shape in this format; give both the same num_heads, "
        "num_kv_heads, ffn_width, rope_base, norm_eps, and qk_norm=False.",
    ),
    "output matrices of their own": (
        "glm",
        lambda: make(sequential(), own_unembeddings=True),
        "glm: modules of this format share the output matrix; train with own_unembeddings=False.",
    ),
    "blocks that the original would repeat": (
        "medusa",
        lambda: interop.medusa(2),
        "medusa: the original code repeats one block, and num_layers is 2; train with num_layers=1, or use "
        "medusa_vllm.",
    ),
    "gains that a short type would round": (
        "qwen",
        lambda: _with(interop.qwen(), "heads.norms.0.weight", 0.1).to(torch.bfloat16),
        "qwen: mtp.norm.weight stores gains as 1 + w, which torch.bfloat16 would round; export the model in float32.",
    ),
    "heads that were never trained": (
        "medusa",
        lambda: MTPModel(trunk=interop.medusa().trunk, heads=ResidualHeads(d_model=D, num_horizons=2)),
        "export: all values of heads.stacks.0.0.linear.weight are 0: it was never trained.",
    ),
    "numbers that are none": (
        "glm",
        lambda: _with(interop.glm(), "trunk.embedding.weight", float("nan")),
        "export: trunk.embedding.weight holds values that are not finite; train again.",
    ),
}


def _with(model: MTPModel, name: str, value: float) -> MTPModel:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model


def _trimmed(model: MTPModel) -> MTPModel:
    model.trim_drafts([1, 2, 3])
    return model


@pytest.mark.parametrize("case", EXPORTS)
def test_a_model_that_the_format_cannot_say_is_refused(case: str, tmp_path: Path) -> None:
    name, build, sentence = EXPORTS[case]
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        export_model(build(), tmp_path / "out", format=name)
    assert not (tmp_path / "out").exists()


def test_heads_with_the_bytes_of_before_training_are_refused(tmp_path: Path) -> None:
    before, after = interop.glm(), interop.glm()
    with torch.no_grad():
        for name, value in after.named_parameters():
            if name != "heads.steps.1.merge.weight":
                value.add_(0.01)
    sentence = r"^export: training did not change heads\.steps\.1\.merge\.weight; export the checkpoint of"
    with pytest.raises(ValueError, match=sentence):
        export_model(after, tmp_path / "out", format="glm", before=before)
    with torch.no_grad():
        after.heads.steps[1].merge.weight.add_(0.01)
    export_model(after, tmp_path / "out", format="glm", before=before)
    with pytest.raises(ValueError, match=r"^export: before is another model: it has no heads\.steps\.0\.state_norm"):
        export_model(after, tmp_path / "more", format="glm", before=interop.medusa())


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"exists and is not empty; give a new folder, or add=true"):
        export_model(interop.glm(), tmp_path, format="glm")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
