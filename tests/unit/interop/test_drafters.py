"""Drafters that read inner layers of the trunk: what their folders say, what is read, and what is refused."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mtp_modules import (
    ConfidenceHeads,
    ContextBlockHeads,
    HuggingFaceTrunk,
    LinearHeads,
    MTPModel,
    ResidualHeads,
    TransformerTrunk,
)
from mtp_modules.data import ByteTokenizer
from mtp_modules.interop import export_model, import_model
from mtp_modules.trunks import RecomputedTrunk
from tests import interop
from tests.interop import DRAFT_TOKENS, SIZES, D, V, all_logits, make, some_tokens, stored

MODELS: dict[str, Callable[..., MTPModel]] = {
    "eagle3": interop.eagle3,
    "dflash": interop.dflash,
    "dspark": interop.dspark,
}


class OnlyStates(RecomputedTrunk):
    """A trunk of another project, which returns no inner layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TransformerTrunk(vocab_size=V, num_layers=2, **SIZES)
        self.vocab_size, self.max_positions, self.d_model, self.embedding_width = V, 40, D, D
        self.embedding = self.inner.embedding

    def hidden_states(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.inner(tokens).hidden


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def edit(folder: Path, **changes: Any) -> None:
    """Change a configuration; ``None`` removes."""
    config = {**config_of(folder), **changes}
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a folder in place."""
    tensors = stored(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def same(model: MTPModel, back: MTPModel) -> None:
    tokens = some_tokens()
    assert all(torch.equal(a, b) for a, b in zip(all_logits(model, tokens), all_logits(back, tokens), strict=True))


def test_layers_are_numbered_by_what_comes_before_their_state(tmp_path: Path) -> None:
    for name, build in MODELS.items():
        export_model(build(), tmp_path / name, format=name)
        config = config_of(tmp_path / name)
        assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2]
        assert config["num_aux_hidden_states"] == 2
    assert config_of(tmp_path / "eagle3")["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 2]
    assert config_of(tmp_path / "dflash")["dflash_config"]["target_layer_ids"] == [0, 1]
    assert config_of(tmp_path / "dspark")["target_layer_ids"] == [0, 1]


def test_the_architecture_is_the_one_that_engines_know(tmp_path: Path) -> None:
    names = {"eagle3": "LlamaForCausalLMEagle3", "dflash": "DFlashDraftModel", "dspark": "Qwen3DSparkModel"}
    for name, build in MODELS.items():
        export_model(build(), tmp_path / name, format=name)
        assert config_of(tmp_path / name)["architectures"] == [names[name]]


def test_drafts_of_some_tokens_have_offsets(tmp_path: Path) -> None:
    for name, build in MODELS.items():
        export_model(build(draft_tokens=True), tmp_path / name, format=name)
        tensors = stored(tmp_path / name / "model.safetensors")
        assert (torch.arange(len(DRAFT_TOKENS)) + tensors["d2t"]).tolist() == list(DRAFT_TOKENS)
        assert tensors["t2d"].nonzero()[:, 0].tolist() == list(DRAFT_TOKENS)
        config = config_of(tmp_path / name)
        assert (config["draft_vocab_size"], config["has_own_lm_head"]) == (len(DRAFT_TOKENS), True)


def test_a_mask_that_is_a_token_is_named_and_another_is_one_row_more(tmp_path: Path) -> None:
    export_model(interop.dflash(mask_token=7), tmp_path / "token", format="dflash")
    config = config_of(tmp_path / "token")
    assert (config["dflash_config"]["mask_token_id"], config["vocab_size"]) == (7, V)
    model = interop.dflash()
    export_model(model, tmp_path / "own", format="dflash")
    config = config_of(tmp_path / "own")
    assert (config["dflash_config"]["mask_token_id"], config["vocab_size"], config["draft_vocab_size"]) == (V, V + 1, V)
    table = stored(tmp_path / "own" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(table, torch.cat((model.trunk.embedding.weight, model.heads.mask[None])))


@pytest.mark.parametrize("from_anchor", [True, False])
def test_the_anchor_and_the_confidence_are_in_the_configuration(from_anchor: bool, tmp_path: Path) -> None:
    for inside in ("inside", "around", ""):
        model = interop.dspark(inside, sample_from_anchor=from_anchor)
        export_model(model, tmp_path / f"_{inside}", format="dspark")
        config = config_of(tmp_path / f"_{inside}")
        assert (config["sample_from_anchor"], config["dspark_bonus_anchor"]) == (from_anchor, not from_anchor)
        assert config["block_size"] == (3 if from_anchor else 4)
        assert (config["enable_confidence_head"], config["confidence_head_with_markov"]) == (
            inside != "",
            inside == "around",
        )


def test_both_layers_of_a_block_have_the_heads_sizes(tmp_path: Path) -> None:
    model = interop.dflash(head_dim=6, norm_eps=1e-5, rope_base=500.0)
    export_model(model, tmp_path, format="dflash")
    config = config_of(tmp_path)
    assert (config["head_dim"], config["rms_norm_eps"], config["rope_theta"]) == (6, 1e-5, 500.0)
    same(model, import_model(tmp_path, format="dflash", trunk=model))


@pytest.mark.parametrize("name", MODELS)
def test_a_trunk_returns_the_layers_of_the_file(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    export_model(model, tmp_path / "out", format=name)
    base = make(ResidualHeads(d_model=D, num_horizons=2), tie_embeddings=False)
    base.load_state_dict({n: v for n, v in model.state_dict().items() if "heads" not in n}, strict=False)
    back = import_model(tmp_path / "out", format=name, trunk=base)
    assert (back.trunk.feature_layers, base.trunk.feature_layers) == ((0, 1), ())
    same(model, back)
    back.save_pretrained(tmp_path / "saved")
    same(model, MTPModel.from_pretrained(tmp_path / "saved")[0])


def test_a_trunk_of_transformers_has_drafters_too(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3", "vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 40,
    }  # fmt: skip
    for name, heads in (("eagle3", interop.eagle3().heads), ("dflash", interop.block())):
        trunk = HuggingFaceTrunk(config=config, feature_layers=[0, 1])
        model = MTPModel(trunk=trunk, heads=heads, tie_embeddings=False).float().eval()
        export_model(model, tmp_path / name, format=name)
        assert config_of(tmp_path / name / "base")["architectures"] == ["Qwen3ForCausalLM"]
        same(model, import_model(tmp_path / name, format=name, trunk=model))


def test_layers_that_a_trunk_does_not_have_are_refused(tmp_path: Path) -> None:
    model = interop.eagle3()
    export_model(model, tmp_path, format="eagle3")
    config = {
        "model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 40,
    }  # fmt: skip
    other = HuggingFaceTrunk(config=config)
    linear = ResidualHeads(d_model=D, num_horizons=2).to(other.embedding.weight)
    theirs = MTPModel(trunk=other, heads=linear, tie_embeddings=False)
    with pytest.raises(ValueError, match=r"^eagle3: feature_layers must ascend within 0\.\.0, got \[0, 1\]\.$"):
        import_model(tmp_path, format="eagle3", trunk=theirs)
    edit(tmp_path, eagle_aux_hidden_state_layer_ids=[0, 2])
    with pytest.raises(ValueError, match=r"^eagle3: feature_layers must ascend within 0\.\.1, got \[-1, 1\]\.$"):
        import_model(tmp_path, format="eagle3", trunk=model)
    wrapped = MTPModel(trunk=OnlyStates(), heads=ResidualHeads(d_model=D, num_horizons=2))
    with pytest.raises(
        ValueError, match=r"^eagle3: the heads read the layers \[-1, 1\] of the trunk, and a OnlyStates"
    ):
        import_model(tmp_path, format="eagle3", trunk=wrapped)


def test_without_numbers_the_layers_are_those_that_vllm_takes(tmp_path: Path) -> None:
    heads = interop.FusedFeatureHeads(**SIZES, num_horizons=3, num_features=3, merge=False)
    model = interop.drafter(heads, num_layers=8, feature_layers=[1, 3, 4])
    export_model(model, tmp_path, format="eagle3")
    edit(tmp_path, eagle_aux_hidden_state_layer_ids=None, eagle_config=None)
    back = import_model(tmp_path, format="eagle3", trunk=model)
    assert back.trunk.feature_layers == (1, 3, 4)  # numbers 2, 8 / 2 and 8 - 3
    same(model, back)


@pytest.mark.parametrize(
    "entries",
    [
        {"eagle_config": {"layer_ids": [1, 4, 8]}},
        {"dflash_config": {"layer_ids": [1, 4, 8]}},
        {"dspark_target_layer_ids": [0, 3, 7]},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_every_name_of_the_layers_that_vllm_reads_is_read(entries: dict[str, Any], tmp_path: Path) -> None:
    heads = interop.FusedFeatureHeads(**SIZES, num_horizons=3, num_features=3, merge=False)
    model = interop.drafter(heads, num_layers=9, feature_layers=[0, 3, 7])
    export_model(model, tmp_path, format="eagle3")
    edit(tmp_path, eagle_aux_hidden_state_layer_ids=None, eagle_config=None)
    edit(tmp_path, **entries)
    back = import_model(tmp_path, format="eagle3", trunk=model)
    assert back.trunk.feature_layers == (0, 3, 7)
    same(model, back)


def test_sizes_that_a_file_leaves_out_are_those_of_transformers(tmp_path: Path) -> None:
    model = interop.eagle3(rope_base=10000.0, norm_eps=1e-6)
    export_model(model, tmp_path, format="eagle3")
    edit(tmp_path, rope_theta=None, rope_parameters=None, rms_norm_eps=None)
    same(model, import_model(tmp_path, format="eagle3", trunk=model))
    edit(tmp_path, model_type="other")
    with pytest.raises(ValueError, match=r"^eagle3: config\.json has no rope_theta"):
        import_model(tmp_path, format="eagle3", trunk=model)


@pytest.mark.parametrize("name", MODELS)
def test_values_of_another_kind_are_a_sentence(name: str, tmp_path: Path) -> None:
    model = MODELS[name](draft_tokens=True)
    export_model(model, tmp_path / "whole", format=name)
    config = config_of(tmp_path / "whole")
    refused = 0
    for entry in config:
        for value in (0, "32", [None], 2**70, True):
            edit(tmp_path / "whole", **{entry: value})
            try:
                import_model(tmp_path / "whole", format=name, trunk=model)
            except ValueError as error:
                refused += str(error).startswith(f"{name}: ")
            edit(tmp_path / "whole", **config)
    assert refused > 50
    same(model, import_model(tmp_path / "whole", format=name, trunk=model))


def test_numbers_of_another_kind_are_a_sentence(tmp_path: Path) -> None:
    model = interop.eagle3(draft_tokens=True)
    export_model(model, tmp_path, format="eagle3")
    edit_tensors(tmp_path, lambda tensors: tensors.update({"d2t": tensors["d2t"].float()}))
    with pytest.raises(ValueError, match=r"^eagle3: d2t holds numbers of type torch\.float32; the checkpoint is of"):
        import_model(tmp_path, format="eagle3", trunk=model)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].long()}))
    with pytest.raises(ValueError, match=r"^eagle3: lm_head\.weight holds numbers of type torch\.int64"):
        import_model(tmp_path, format="eagle3", trunk=model)


@pytest.mark.parametrize("count", [1, 0])
def test_a_drafter_drafts(count: int, tmp_path: Path) -> None:
    export_model(interop.dflash(), tmp_path, format="dflash")
    with pytest.raises(ValueError, match=rf"^dflash: num_horizons must be at least 2, got {count}\.$"):
        import_model(tmp_path, format="dflash", trunk=interop.dflash(), num_horizons=count)


def test_a_markov_head_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    model = interop.dspark()
    with torch.no_grad():
        model.unembedding.transition.zero_()
    with pytest.raises(ValueError, match=r"all values of unembedding\.transition are 0: it was never trained\.$"):
        export_model(model, tmp_path / "zero", format="dspark")
    before, after = interop.dspark(), interop.dspark()
    with torch.no_grad():
        for name, value in after.named_parameters():
            if name != "unembedding.transition":
                value.mul_(1.25)
    with pytest.raises(ValueError, match=r"training did not change unembedding\.transition"):
        export_model(after, tmp_path / "same", format="dspark", before=before)


@pytest.mark.parametrize("name", MODELS)
def test_heads_take_the_precision_of_the_trunk(name: str, tmp_path: Path) -> None:
    model = MODELS[name](draft_tokens=True)
    export_model(model, tmp_path, format=name)
    model.to(torch.bfloat16)
    same(model, import_model(tmp_path, format=name, trunk=model))


@pytest.mark.parametrize("name", MODELS)
def test_files_of_speculators_are_read(name: str, tmp_path: Path) -> None:
    """Its configurations nest the sizes, number layers like EAGLE-3 and have defaults of their own."""
    options = {"eagle3": {"norm_before_residual": True}, "dspark": {"sample_from_anchor": False}}
    model = MODELS[name](draft_tokens=True, **options.get(name, {}))
    export_model(model, tmp_path, format=name)
    config = config_of(tmp_path)
    layer = {
        key: config[key]
        for key in (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "hidden_act"),
        )
    }
    theirs: dict[str, Any] = {
        "speculators_model_type": name,
        "draft_vocab_size": len(DRAFT_TOKENS),
        "transformer_layer_config": layer,
        "speculators_config": {"proposal_methods": [{"speculative_tokens": len(model.horizons) - 1}]},
    }
    if name == "eagle3":
        theirs["eagle_aux_hidden_state_layer_ids"] = [1, 2]
        edit_tensors(
            tmp_path, lambda t: [t.update({n.replace("midlayer", "layers.0"): t.pop(n)}) for n in list(t) if "mid" in n]
        )
    else:
        mask = config["dflash_config"]["mask_token_id"]
        theirs |= {"aux_hidden_state_layer_ids": [1, 2], "mask_token_id": mask, "block_size": len(model.horizons)}
    if name == "dspark":
        theirs |= {key: config[key] for key in ("markov_rank", "enable_confidence_head", "confidence_head_with_markov")}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    (tmp_path / "mtp_modules.json").unlink()
    same(model, import_model(tmp_path, format=name, trunk=model))


def test_a_released_dspark_samples_from_the_anchor_unless_it_says_otherwise(tmp_path: Path) -> None:
    model = interop.dspark(sample_from_anchor=True)
    export_model(model, tmp_path, format="dspark")
    edit(tmp_path, dflash_config=None, sample_from_anchor=None)
    (tmp_path / "mtp_modules.json").unlink()
    same(model, import_model(tmp_path, format="dspark", trunk=model))


@pytest.mark.parametrize("name", MODELS)
def test_the_last_line_is_the_command(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    exported = export_model(model, tmp_path, format=name, tokenizer=ByteTokenizer())
    assert exported.command is not None
    words = shlex.split(exported.command)
    assert words[:-1] == ["vllm", "serve", str(tmp_path / "base"), "--dtype", "float32", "--speculative-config"]
    drafts = len(model.horizons) - 1
    assert json.loads(words[-1]) == {"method": name, "model": str(tmp_path), "num_speculative_tokens": drafts}
    assert (tmp_path / "base" / "tokenizer.json").is_file()
    assert any("second model runner" in note for note in exported.notes) == (name == "dspark")
    assert any("gains of the first" in note for note in exported.notes) == (name == "dflash")
    one = export_model(interop.dflash(num_layers=1), tmp_path / "one", format="dflash")
    assert not any("gains of the first" in note for note in one.notes)


class Scaled(torch.nn.Embedding):
    """An embedding like Gemma's."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return 4 * super().forward(tokens)


def scaled(model: MTPModel) -> MTPModel:
    model.trunk.embedding.__class__ = Scaled
    with torch.no_grad():
        model.trunk.embedding.weight[0] = 0.0  # of the padding token
    return model


def test_widths_of_a_drafters_attention_are_looked_at_too(tmp_path: Path) -> None:
    exported = export_model(interop.eagle3(head_dim=6), tmp_path, format="eagle3")
    assert any(note.endswith("and these are 4 and 6 wide.") for note in exported.notes)


Refused = tuple[str, Callable[[], MTPModel], str]
EXPORTS: dict[str, Refused] = {
    "other heads than EAGLE-3's": (
        "eagle3",
        interop.dflash,
        "eagle3: the format stores FusedFeatureHeads, the model has ContextBlockHeads; see docs/interop.md.",
    ),
    "other heads than DFlash's": (
        "dflash",
        interop.dspark,
        "dflash: the format stores ContextBlockHeads, the model has ConfidenceHeads; see docs/interop.md.",
    ),
    "other heads than DSpark's": (
        "dspark",
        interop.dflash,
        "dspark: the format stores TransitionHeads around ContextBlockHeads, the model has ContextBlockHeads; see "
        "docs/interop.md.",
    ),
    "a confidence without a transition": (
        "dspark",
        lambda: interop.drafter(ConfidenceHeads(heads=interop.block())),
        "dspark: the format stores TransitionHeads around ContextBlockHeads, the model has ContextBlockHeads; see "
        "docs/interop.md.",
    ),
    "a whole transition": (
        "dspark",
        lambda: interop.dspark(rank=None),
        "dspark: the Markov head of this format has a low rank, and rank is None, the whole matrix; train with a rank.",
    ),
    "a merged layer": (
        "eagle3",
        lambda: interop.eagle3(merge=True),
        "eagle3: the layer of this format attends over token and state side by side, and merge is True; train with "
        "merge=False.",
    ),
    "an anchor that predicts": (
        "dflash",
        lambda: interop.dflash(sample_from_anchor=True),
        "dflash: the heads have anchor=predicts, readers of this format expect given; build and train heads with that "
        "convention, or use another format.",
    ),
    "no norms of queries": (
        "dflash",
        lambda: interop.dflash(qk_norm=False),
        "dflash: layers of this format normalise queries and keys; train heads with qk_norm=True.",
    ),
    "an embedding that is scaled": (
        "dflash",
        lambda: scaled(interop.dflash()),
        "dflash: drafters of this format read rows of the embedding, and the trunk's Scaled changes them; use another "
        "format.",
    ),
    "one horizon": (
        "eagle3",
        lambda: interop.eagle3(1),
        "eagle3: the heads have no horizon beyond the first, so there is nothing to write.",
    ),
    "an output matrix for each horizon": (
        "eagle3",
        lambda: interop.eagle3(4, own=True),
        "eagle3: all drafts of this format share one output matrix, and own_unembeddings made 3; train with "
        "own_unembeddings=False.",
    ),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_what_a_drafter_cannot_say_is_refused(case: str, tmp_path: Path) -> None:
    name, build, sentence = EXPORTS[case]
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        export_model(build(), tmp_path / "out", format=name)
    assert not (tmp_path / "out").exists()


IMPORTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "more layers": (
        "eagle3",
        lambda folder: edit(folder, num_hidden_layers=2),
        "eagle3: config.json has num_hidden_layers=2, our heads have 1; this drafter cannot be read.",
    ),
    "no features": (
        "eagle3",
        lambda folder: edit(folder, eagle_config={"use_aux_hidden_state": False}),
        "eagle3: config.json has use_aux_hidden_state=False, our heads have True; this drafter cannot be read.",
    ),
    "nothing said of drafts": (
        "eagle3",
        lambda folder: (folder / "mtp_modules.json").unlink(),
        "eagle3: the file does not say how many tokens are drafted; give num_horizons, one more than those.",
    ),
    "two answers": (
        "eagle3",
        lambda folder: edit(folder, norm_output=True),
        "eagle3: config.json says chain_state=after_norm, and mtp_modules.json before_norm; restore the one that was "
        "edited.",
    ),
    "interleaved rotations": (
        "dflash",
        lambda folder: edit(folder, is_neox_style=False),
        "dflash: config.json has is_neox_style=False, our heads have True; this drafter cannot be read.",
    ),
    "a window": (
        "dflash",
        lambda folder: edit(folder, dflash_config={**config_of(folder)["dflash_config"], "use_swa": True}),
        "dflash: config.json has use_swa=True, our heads have False; this drafter cannot be read.",
    ),
    "another Markov head": (
        "dspark",
        lambda folder: edit(folder, markov_head_type="gated"),
        "dspark: config.json has markov_head_type=gated, our heads have vanilla; this drafter cannot be read.",
    ),
    "no mask": (
        "dflash",
        lambda folder: edit(folder, dflash_config={**config_of(folder)["dflash_config"], "mask_token_id": 99}),
        "dflash: mask_token_id must lie in 0..19, the drafter's vocab_size, got 99.",
    ),
    "a mask in a pickle": (
        "dflash",
        lambda folder: (folder / "mask_embedding.pt").touch(),
        "dflash: {folder} has mask_embedding.pt, a pickle that replaces the embedding of the mask; write it to that "
        "row of embed_tokens.weight in model.safetensors, and delete it.",
    ),
    "the embedding of another trunk": (
        "dspark",
        lambda folder: edit_tensors(folder, lambda tensors: tensors["embed_tokens.weight"].add_(1)),
        "dspark: embed_tokens.weight is not the embedding of the model given as trunk, which our heads read; give the "
        "model that the heads belong to.",
    ),
    "tokens in disorder": (
        "eagle3",
        lambda folder: edit_tensors(folder, lambda tensors: tensors["d2t"].neg_()),
        "eagle3: d2t must map to ascending tokens in 0..18; the checkpoint is of another model.",
    ),
    "two sets of tokens": (
        "dspark",
        lambda folder: edit_tensors(folder, lambda tensors: tensors["t2d"].logical_not_()),
        "dspark: t2d and d2t disagree about the tokens of drafts; restore the one that was edited.",
    ),
    "no size of a block": (
        "dflash",
        lambda folder: ((folder / "mtp_modules.json").unlink(), edit(folder, block_size=None)),
        "dflash: config.json has no block_size; give num_horizons, one more than the tokens that are drafted.",
    ),
}


@pytest.mark.parametrize("case", IMPORTS)
def test_a_drafter_that_ours_cannot_be_is_refused(case: str, tmp_path: Path) -> None:
    name, spoil, sentence = IMPORTS[case]
    model = MODELS[name](draft_tokens=True)
    export_model(model, tmp_path, format=name)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence.replace('{folder}', str(tmp_path)))}$"):
        import_model(tmp_path, format=name, trunk=model)


def test_a_mask_in_another_folder_is_not_looked_for(tmp_path: Path) -> None:
    model = interop.dspark()
    export_model(model, tmp_path, format="dspark")
    (tmp_path / "mask_embedding.pt").touch()
    with pytest.raises(ValueError, match=r"^dspark: .* has mask_embedding\.pt, a pickle that replaces"):
        import_model(tmp_path, format="dspark", trunk=model)


def test_a_block_can_be_read_with_fewer_horizons(tmp_path: Path) -> None:
    model = interop.dflash()
    export_model(model, tmp_path, format="dflash")
    back = import_model(tmp_path, format="dflash", trunk=model, num_horizons=3)
    assert isinstance(back.heads, ContextBlockHeads)
    assert (back.horizons, back.heads.num_slots) == ((1, 2, 3), 3)


def test_a_vocabulary_is_that_of_the_trunk(tmp_path: Path) -> None:
    export_model(interop.eagle3(), tmp_path, format="eagle3")
    other = make(LinearHeads(d_model=D, num_horizons=2), trunk={"vocab_size": 9}, tie_embeddings=False)
    with pytest.raises(
        ValueError, match=r"^eagle3: embed_tokens\.weight is missing, and vocab_size is 19 here and 9 i"
    ):
        import_model(tmp_path, format="eagle3", trunk=other)
