"""What cannot be imported is refused in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mtp_modules import LinearHeads, ResidualHeads
from mtp_modules.interop import export_model, import_model
from tests import interop
from tests.interop import D, V, make, stored


def edited(folder: Path, **changes: Any) -> None:
    """Change a configuration; ``None`` removes."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def shifted(name: str, where: slice = slice(None)) -> Callable[[Path], None]:
    """Return what changes a tensor."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = stored(path)
        tensors[name] = tensors[name].clone()
        tensors[name][where] += 1
        save_file(tensors, path)

    return change


def without_words(folder: Path) -> None:
    (folder / "mtp_modules.json").unlink()


def as_pickle(folder: Path) -> None:
    torch.save(stored(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickle_in_disguise(folder: Path) -> None:
    torch.save(stored(folder / "model.safetensors"), folder / "model.safetensors")


def half(folder: Path) -> None:
    tensors = stored(folder / "model.safetensors")
    places = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    kept = {name: value for name, value in tensors.items() if places[name] == "model-0.safetensors"}
    save_file(kept, folder / "model-0.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()


GLM_TENSOR = "model.layers.2."
LATENTS = [
    (
        change,
        r"^deepseek: model\.layers\.[02]\.self_attn compresses keys and values, which our layers do not; this model "
        r"cannot be read\.$",
    )
    for change in (
        shifted("model.layers.0.self_attn.kv_a_proj_with_mqa.weight"),
        shifted("model.layers.2.self_attn.kv_a_layernorm.weight"),
        shifted("model.layers.2.self_attn.kv_b_proj.weight", slice(0, 1)),
    )
]
IMPORTS: dict[str, tuple[str, Callable[[Path], None], dict[str, Any], str]] = {
    **{f"real latents, {index}": ("deepseek", change, {}, told) for index, (change, told) in enumerate(LATENTS)},
    "compressed queries": (
        "deepseek",
        lambda folder: edited(folder, q_lora_rank=8),
        {},
        r"^deepseek: config\.json has q_lora_rank=8, our layers can represent latents with None only; this model",
    ),
    "an unknown format": ("glm", lambda _: None, {"format": "hf"}, r"^format: 'hf' is unknown\. Known: mtp_modules, "),
    "another format": (
        "glm",
        lambda _: None,
        {"format": "mimo"},
        r"^format: .* was written as glm, not as mimo; give format=glm\.$",
    ),
    "no folder": ("glm", lambda _: None, {"path": "nowhere"}, r"^path: there is no folder nowhere; give the folder"),
    "nothing said of the chain": (
        "glm",
        without_words,
        {"position_0": "token"},
        r"^glm: the file does not specify chain_state, and readers of this format disagree about it; "
        r"give chain_state: before_norm or after_norm\.$",
    ),
    "nothing said of position 0": (
        "glm",
        without_words,
        {"chain_state": "after_norm"},
        r"^glm: the file does not specify position_0, .* give position_0: token or zero\.$",
    ),
    "two answers": (
        "glm",
        lambda _: None,
        {"chain_state": "before_norm"},
        r"^glm: chain_state=before_norm was given, but the file has after_norm; omit chain_state, or give",
    ),
    "no such answer": (
        "glm",
        without_words,
        {"chain_state": "behind", "position_0": "token"},
        r"^glm: chain_state must be after_norm or before_norm or none, got behind\.$",
    ),
    "an answer of another format": (
        "glm",
        without_words,
        {"concatenation": "state_first"},
        r"^glm: concatenation must be embedding_first, got state_first\.$",
    ),
    "what our heads are not": (
        "glm",
        without_words,
        {"chain_state": "after_norm", "position_0": "zero"},
        r"^glm: SequentialHeads read the token's embedding at position 0, the file has position_0=zero\.$",
    ),
    "half a checkpoint": ("glm", half, {}, r"^glm: .*index.json names model-1.safetensors, which is missing; the "),
    "a pickle": (
        "glm",
        as_pickle,
        {},
        r"^glm: .* has pytorch_model.bin, a pickle, instead of model.safetensors, and pickles can run code;",
    ),
    "a pickle in disguise": ("glm", pickle_in_disguise, {}, r"^glm: .* is not safetensors \(a pickle under that name"),
    "a copy of the embedding that is none": (
        "glm",
        shifted(f"{GLM_TENSOR}embed_tokens.weight"),
        {},
        r"^glm: model\.layers\.2\.embed_tokens\.weight must be a copy of model\.embed_tokens\.weight, but its values",
    ),
    "a copy of the output matrix that is none": (
        "glm",
        shifted(f"{GLM_TENSOR}shared_head.head.weight"),
        {},
        r"^glm: model\.layers\.2\.shared_head\.head\.weight must be a copy of the output matrix",
    ),
    "tied, but not the same": (
        "glm",
        lambda folder: edited(folder, tie_word_embeddings=True),
        {},
        r"^glm: lm_head\.weight must be a copy of model\.embed_tokens\.weight, because tie_word_embeddings is true,",
    ),
    "another width": (
        "glm",
        lambda folder: edited(folder, vocab_size=V + 1),
        {},
        r"^glm: model\.embed_tokens\.weight has shape \(19, 16\), the configuration has \(20, 16\); correct either\.$",
    ),
    "a mixture of experts": (
        "glm",
        shifted(f"{GLM_TENSOR}mlp.experts.0.down_proj.weight"),
        {},
        r"^glm: model\.layers\.2\.mlp\.experts is a mixture of experts, and our layers are dense;",
    ),
    "a trunk of experts": (
        "glm",
        lambda folder: edited(folder, first_k_dense_replace=0),
        {},
        r"^glm: layers of the trunk are mixtures of experts, which ours do not support; give trunk\.$",
    ),
    "a part of the channels turns": (
        "glm",
        lambda folder: edited(folder, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        {},
        r"^glm: config\.json has partial_rotary_factor=0\.5, our layers have 1\.0; this model cannot be read\.$",
    ),
    "GLM's own part of the channels": (
        "glm",
        lambda folder: edited(folder, rope_parameters={"rope_theta": 1e4}, partial_rotary_factor=None),
        {},
        r"^glm: config\.json has partial_rotary_factor=0\.5, our layers have 1\.0; this model cannot be read\.$",
    ),
    "Qwen's own part of the channels": (
        "qwen",
        lambda folder: edited(folder, rope_parameters={"rope_theta": 1e4}, partial_rotary_factor=None),
        {},
        r"^qwen: config\.json has partial_rotary_factor=0\.25, our layers have 1\.0; this model cannot be read\.$",
    ),
    "no size": (
        "glm",
        lambda folder: edited(folder, hidden_size=None),
        {},
        r"^glm: config\.json has no hidden_size; give the folder of a complete checkpoint\.$",
    ),
    "biases": (
        "mimo",
        shifted("model.layers.0.self_attn.q_proj.bias"),
        {},
        r"^mimo: model\.layers\.0\.self_attn\.q_proj\.bias is not 0, and our layers have no biases;",
    ),
    "heads without a trunk": (
        "speculators",
        lambda _: None,
        {},
        r"^speculators: the format stores heads only; give trunk, a checkpoint of the model that they belong to\.$",
    ),
    "another width than the trunk's": (
        "medusa_vllm",
        lambda _: None,
        {"trunk": lambda: make(ResidualHeads(d_model=32, num_horizons=2), trunk={"d_model": 32})},
        r"^medusa_vllm: the heads have d_model=16, the trunk 32; give the model that they belong to\.$",
    ),
    "another vocabulary than the trunk's": (
        "medusa_vllm",
        lambda _: None,
        {"trunk": lambda: make(ResidualHeads(d_model=D, num_horizons=2), trunk={"vocab_size": 9})},
        r"^medusa_vllm: vocab_size is 19 here and 9 in the model given as trunk\.$",
    ),
    "a trunk whose horizon 1 has a module": (
        "medusa_vllm",
        lambda _: None,
        {"trunk": lambda: make(LinearHeads(d_model=D, num_horizons=2))},
        r"^medusa_vllm: LinearHeads of the model given as trunk have their own module for horizon 1, which",
    ),
}
MODELS = {
    "deepseek": interop.deepseek,
    "glm": interop.glm,
    "qwen": interop.qwen,
    "mimo": interop.mimo,
    "speculators": interop.qwen,
    "medusa_vllm": interop.medusa,
}


@pytest.mark.parametrize("case", IMPORTS)
def test_a_checkpoint_that_cannot_be_read_is_refused(case: str, tmp_path: Path) -> None:
    name, spoil, given, sentence = IMPORTS[case]
    export_model(MODELS[name](), tmp_path, format=name)
    spoil(tmp_path)
    asked = {"path": tmp_path, "format": name, **given}
    asked["trunk"] = asked["trunk"]() if "trunk" in asked else None
    with pytest.raises(ValueError, match=sentence):
        import_model(asked.pop("path"), **asked)


def test_a_pickle_with_more_than_tensors_is_never_unpickled(tmp_path: Path) -> None:
    export_model(interop.founding(), tmp_path, format="founding_paper")

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "trapped",))

    torch.save({"norm.weight": Trap()}, tmp_path / "consolidated.pth")
    with pytest.raises(ValueError, match=r"names .*getattr, and only tensors and plain values are loaded; load it"):
        import_model(tmp_path, format="founding_paper")
    assert not (tmp_path / "trapped").exists()
