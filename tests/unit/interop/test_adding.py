"""Heads are added to a model of transformers without losing a file of it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from mtp_modules import HuggingFaceTrunk, MTPModel, SequentialHeads, TransformerTrunk
from mtp_modules.interop import export_model, files, import_model
from tests import interop
from tests.interop import V, all_logits, some_tokens, stored

HEADS = ("model.layers.2.", "model.layers.3.")


def shards(folder: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint by its index alone, as transformers does."""
    places = json.loads((folder / files.INDEX).read_text())["weight_map"]
    return {name: stored(folder / shard)[name] for name, shard in places.items()}


def trunk_alone(model: MTPModel, folder: Path, num_shards: int) -> dict[str, torch.Tensor]:
    """Write the trunk of a model as transformers does, in one file or in shards."""
    export_model(model, folder, format="glm")
    whole = {n: value for n, value in stored(folder / files.WEIGHTS).items() if not n.startswith(HEADS)}
    (folder / files.SIDECAR).unlink()
    config = json.loads((folder / files.CONFIG).read_text())
    del config["num_nextn_predict_layers"]
    (folder / files.CONFIG).write_text(json.dumps(config | {"kept": True}))
    if num_shards == 1:
        save_file(whole, folder / files.WEIGHTS)
        return whole
    (folder / files.WEIGHTS).unlink()
    places = {name: f"model-0000{index % num_shards}.safetensors" for index, name in enumerate(whole)}
    for shard in set(places.values()):
        save_file({n: value for n, value in whole.items() if places[n] == shard}, folder / shard)
    content = {"metadata": {"total_size": 1, "kept": True}, "weight_map": places}
    (folder / files.INDEX).write_text(json.dumps(content))
    return whole


def digests(folder: Path) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_tensor_of_the_trunk_stays_and_the_whole_is_read(num_shards: int, tmp_path: Path) -> None:
    model, tokens = interop.glm(), some_tokens()
    whole = trunk_alone(model, tmp_path, num_shards)
    before = digests(tmp_path)
    export_model(model, tmp_path, format="glm", add=True)
    assert before < digests(tmp_path)
    assert not (tmp_path / files.WEIGHTS).exists()
    found = shards(tmp_path)
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    assert {name for name in found if name not in whole} == {name for name in found if name.startswith(HEADS)}
    index = json.loads((tmp_path / files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    assert json.loads((tmp_path / files.CONFIG).read_text())["kept"] is True
    back = import_model(tmp_path, format="glm")
    assert all(torch.equal(a, b) for a, b in zip(all_logits(model, tokens), all_logits(back, tokens), strict=True))


def test_heads_that_were_added_are_replaced_by_others(tmp_path: Path) -> None:
    first, tokens = interop.glm(), some_tokens()
    whole = trunk_alone(first, tmp_path, 1)
    export_model(first, tmp_path, format="glm", add=True)
    second = MTPModel(trunk=first.trunk, heads=interop.glm(2, seed=4).heads, tie_embeddings=False)
    second.unembedding.load_state_dict(first.unembedding.state_dict())
    export_model(second.eval(), tmp_path, format="glm", add=True)
    assert len(list(tmp_path.glob("model-mtp-*.safetensors"))) == 1
    assert whole.keys() < shards(tmp_path).keys()
    back = import_model(tmp_path, format="glm")
    assert all(torch.equal(a, b) for a, b in zip(all_logits(second, tokens), all_logits(back, tokens), strict=True))


@pytest.mark.parametrize("step", range(6))
def test_a_run_that_dies_at_any_step_leaves_a_whole_checkpoint(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = interop.glm()
    whole = trunk_alone(model, tmp_path, 1)
    done, replace, unlink = [0], os.replace, Path.unlink

    def counted(call: Any) -> Any:
        def dying(*arguments: Any, **options: Any) -> Any:
            if done[0] == step:
                raise KeyboardInterrupt
            done[0] += 1
            return call(*arguments, **options)

        return dying

    monkeypatch.setattr(os, "replace", counted(replace))
    monkeypatch.setattr(Path, "unlink", counted(unlink))
    try:
        export_model(model, tmp_path, format="glm", add=True)
    except KeyboardInterrupt:
        assert done[0] == step
    single = tmp_path / files.WEIGHTS
    found = stored(single) if single.is_file() else shards(tmp_path)  # the one file comes first for transformers
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_trunk_that_is_another_is_refused(tmp_path: Path) -> None:
    model = interop.glm()
    trunk_alone(interop.glm(seed=1), tmp_path, 1)
    before = digests(tmp_path)
    with pytest.raises(ValueError, match=r"^glm: the embedding in .* is not that of the model, so the heads were"):
        export_model(model, tmp_path, format="glm", add=True)
    assert digests(tmp_path) == before


def test_heads_from_elsewhere_are_not_replaced(tmp_path: Path) -> None:
    model = interop.glm()
    export_model(model, tmp_path, format="glm")
    with pytest.raises(ValueError, match=r"^glm: .* already has model\.layers\.2\.eh_proj\.weight in another shard;"):
        export_model(model, tmp_path, format="glm", add=True)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("glm", {"model_type": "llama"}, r"^glm: heads can be added to glm4_moe; .* is a llama\.$"),
        ("mtp_modules", {}, r"^add: only formats that store a trunk can be added to one, and mtp_modules writes whole"),
        ("speculators", {}, r"^speculators: heads can be added to nothing, because the format stores heads only"),
        ("glm", {"n_shared_experts": 2}, r"^glm: the modules' ffn_width is 24, the shared expert of this model is 8 x"),
        ("glm", {"rms_norm_eps": 1e-5}, r"^glm: one config\.json describes trunk and heads, but norm_eps is 1e-06"),
        ("glm", {"vocab_size": V + 1}, r"^glm: one config\.json describes trunk and heads, but vocab_size is 19 for"),
    ],
)
def test_what_does_not_go_together_is_refused(
    name: str, changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    model = interop.qwen() if name == "speculators" else interop.glm()
    if name != "speculators":
        trunk_alone(model, tmp_path, 1)
        path = tmp_path / files.CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    else:
        (tmp_path / files.CONFIG).write_text("{}")
    with pytest.raises(ValueError, match=sentence):
        export_model(model, tmp_path, format=name, add=True)


class Named(TransformerTrunk):
    """A trunk that keeps names of its own, as one with a model of transformers inside does."""

    def foreign_state(self) -> dict[str, torch.Tensor]:
        return {"model.embed_tokens.weight": self.embedding.weight, "model.named.weight": self.norm.weight}

    def foreign_config(self) -> dict[str, Any]:
        return json.loads(self.config)


@pytest.mark.parametrize("dense", [1, 2])
def test_a_trunk_of_transformers_keeps_its_names(dense: int, tmp_path: Path) -> None:
    """One layer, or none, has experts."""
    config = {
        "model_type": "glm4_moe",
        **{"vocab_size": V, "hidden_size": 8, "intermediate_size": 12, "moe_intermediate_size": 24, "head_dim": 4},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "partial_rotary_factor": 1.0},
        **{"n_routed_experts": 2, "num_experts_per_tok": 1, "first_k_dense_replace": dense, "rms_norm_eps": 1e-6},
        "max_position_embeddings": 48,
    }
    heads = SequentialHeads(d_model=8, num_horizons=2, num_heads=2, num_kv_heads=1, ffn_width=24, max_positions=48)
    model = MTPModel(trunk=HuggingFaceTrunk(config=config), heads=heads, tie_embeddings=False).eval()
    export_model(model, tmp_path / "out", format="glm")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(9)[None]
    torch.testing.assert_close(read(tokens).logits, model.unembedding.logits(model.trunk(tokens).hidden))


def test_a_trunk_with_names_of_its_own_keeps_them(tmp_path: Path) -> None:
    model = interop.glm()
    export_model(model, tmp_path / "plain", format="glm")
    trunk = Named(vocab_size=V, num_layers=2, **interop.SIZES)
    trunk.config = (tmp_path / "plain" / files.CONFIG).read_text()
    trunk.load_state_dict(model.trunk.state_dict())
    named = MTPModel(trunk=trunk, heads=model.heads, tie_embeddings=False)
    export_model(named, tmp_path / "named", format="glm")
    found, plain = stored(tmp_path / "named" / files.WEIGHTS), stored(tmp_path / "plain" / files.WEIGHTS)
    heads = {name for name in plain if name.startswith(HEADS)}
    assert found.keys() == heads | {"model.embed_tokens.weight", "model.named.weight", "lm_head.weight"}
    assert torch.equal(found["model.named.weight"], model.trunk.norm.weight)
    trunk.config = json.dumps({"model_type": "gpt2"})
    with pytest.raises(ValueError, match=r"^glm: heads can be added to glm4_moe; the trunk is a gpt2\.$"):
        export_model(named, tmp_path / "other", format="glm")
