"""An export is a folder that is served as it is: the tokenizer, the model without heads, a card, and a command."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules import HuggingFaceTrunk, MTPModel, RecurrentTrunk, ResidualHeads, SequentialHeads
from mtp_modules.core import Tokenizer
from mtp_modules.data import ByteTokenizer
from mtp_modules.interop import Exported, Facts, export_model
from tests import interop
from tests.command_line import refusal, run
from tests.helpers import randomise
from tests.interop import SIZES, D, V, make, some_tokens, stored
from tests.small_tokenizers import KINDS, small_tokenizer

CLOSE = {"atol": 2e-4, "rtol": 2e-4}
TEXTS = ["", "the dog", "  The cats ran.\n\tthe", "né 🙂", "a"]


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def written(tokenizer: Tokenizer, folder: Path) -> Any:
    """Write a tokenizer's files, and read them with transformers."""
    for name, content in tokenizer.foreign_files().items():
        (folder / name).write_text(content, encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bytes_of_transformers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return written(ByteTokenizer(), tmp_path_factory.mktemp("bytes"))


@given(text=st.text(max_size=30), tokens=st.lists(st.integers(0, 255), max_size=12))
def test_bytes_are_bytes_in_transformers(bytes_of_transformers: Any, text: str, tokens: list[int]) -> None:
    ours = ByteTokenizer()
    assert bytes_of_transformers.encode(text) == ours.encode(text)
    assert bytes_of_transformers.decode(tokens) == ours.decode(tokens)


def test_words_of_a_list_have_no_files() -> None:
    assert small_tokenizer("words").foreign_files() == {}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("bytes", "words")])
def test_a_tokenizer_of_hugging_face_stays_what_it_is(kind: str, tmp_path: Path) -> None:
    ours = small_tokenizer(kind)
    theirs = written(ours, tmp_path)
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert theirs.eos_token_id == ours.end_token is not None


def same_logits(folder: Path, model: MTPModel) -> None:
    """Read a folder with transformers, and compare horizon 1."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = some_tokens()
    with torch.no_grad():
        logits = theirs(tokens).logits
    whole = model.unembedding.logits(model.heads.first(model.trunk(tokens).hidden))
    torch.testing.assert_close(logits, whole, **CLOSE)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trunk", [{}, {"qk_norm": True}, {"head_dim": 6}, {"qk_norm": True, "head_dim": 6}])
def test_the_model_without_heads_says_the_same(trunk: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    model = make(ResidualHeads(d_model=D, num_horizons=3), trunk=trunk, tie_embeddings=tied)
    export_model(model, tmp_path, format="medusa", tokenizer=ByteTokenizer())
    same_logits(tmp_path / "base", model)
    assert read_json(tmp_path / "base" / "config.json")["model_type"] == ("qwen3" if "qk_norm" in trunk else "llama")
    assert read_json(tmp_path / "config.json")["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_trunk_of_transformers_is_written_whole(kind: str, tied: bool, tmp_path: Path) -> None:
    config = {
        "model_type": kind, "vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 40,
    }  # fmt: skip
    model = MTPModel(
        trunk=HuggingFaceTrunk(config=config), heads=ResidualHeads(d_model=D, num_horizons=3), tie_embeddings=tied
    )
    randomise(model, 0)
    model.float().eval()
    export_model(model, tmp_path, format="medusa_vllm")
    same_logits(tmp_path / "base", model)
    names = read_json(tmp_path / "base" / "config.json")["architectures"]
    assert names == [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]]


@pytest.mark.parametrize(
    ("trunk", "reason"),
    [
        (RecurrentTrunk(vocab_size=V, d_model=D), "no engine has a RecurrentTrunk"),
        (
            interop.TransformerTrunk(vocab_size=V, num_layers=1, num_previous=2, **SIZES),
            "no engine embeds previous tokens, and num_previous is 2",
        ),
    ],
)
def test_heads_of_a_trunk_that_no_engine_has_are_written_alone(
    trunk: torch.nn.Module, reason: str, tmp_path: Path
) -> None:
    model = MTPModel(trunk=trunk, heads=ResidualHeads(d_model=D, num_horizons=3))
    randomise(model, 0)
    exported = export_model(model.eval(), tmp_path, format="medusa")
    assert exported == Exported(None, (f"Heads alone were written, and no engine serves their trunk: {reason}.",))
    assert not (tmp_path / "base").exists()


def test_values_are_not_rescaled_where_hidden_states_are_small(tmp_path: Path) -> None:
    model = interop.deepseek()
    with torch.no_grad():
        model.trunk.embedding.weight.mul_(1e-3)  # a mean square near eps, so that a second norm would double values
    export_model(model, tmp_path, format="deepseek")
    same_logits(tmp_path, model)


def test_the_verifier_of_speculators_is_beside_its_draft_model(tmp_path: Path) -> None:
    model = interop.qwen(3)
    exported = export_model(model, tmp_path, format="speculators")
    verifier = read_json(tmp_path / "config.json")["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": str(tmp_path / "base"), "architectures": ["Qwen3ForCausalLM"]}
    same_logits(tmp_path / "base", model)
    assert exported.command is None
    assert exported.notes == (
        "vLLM 0.32 rejects MTP drafts of speculators; to serve these heads, export them in the format qwen.",
    )


def test_biases_of_medusa_are_announced(tmp_path: Path) -> None:
    for name in ("medusa", "medusa_vllm"):
        export_model(interop.medusa(), tmp_path / name, format=name)
        config = read_json(tmp_path / name / "config.json")
        assert (config["model_type"], config["medusa_fc_bias"]) == ("medusa", True)


def test_mimo_is_a_qwen2_that_vllm_knows(tmp_path: Path) -> None:
    export_model(interop.mimo(), tmp_path, format="mimo")
    config = read_json(tmp_path / "config.json")
    assert (config["model_type"], config["architectures"]) == ("qwen2", ["MiMoForCausalLM"])
    assert "model.norm.weight" in stored(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("name", "build"), [("glm", interop.glm), ("deepseek", interop.deepseek)])
def test_an_output_matrix_is_there_for_readers_that_do_not_tie(name: str, build: Any, tmp_path: Path) -> None:
    model = build(tied=True)
    export_model(model, tmp_path, format=name)
    tensors = stored(tmp_path / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], model.unembedding.weight)
    assert read_json(tmp_path / "config.json")["tie_word_embeddings"] is True
    same_logits(tmp_path, model)


def test_the_end_of_a_text_is_in_both_configurations(tmp_path: Path) -> None:
    model = interop.qwen()
    export_model(model, tmp_path / "bytes", format="qwen", tokenizer=ByteTokenizer())
    assert read_json(tmp_path / "bytes" / "config.json")["eos_token_id"] == 0
    assert read_json(tmp_path / "bytes" / "generation_config.json") == {"eos_token_id": 0}
    export_model(model, tmp_path / "none", format="qwen")
    assert read_json(tmp_path / "none" / "config.json")["eos_token_id"] is None
    assert not (tmp_path / "none" / "generation_config.json").exists()


def sequential(num_horizons: int = 3, **options: Any) -> MTPModel:
    sizes = {**SIZES, "num_heads": 1, "num_kv_heads": 1, "d_model": 32}
    heads = SequentialHeads(num_horizons=num_horizons, **{**sizes, **options})
    return make(heads, trunk=sizes, tie_embeddings=False)


MASKED = (
    "vLLM takes zero for the embedding at position 0 of a text, so drafts just after its beginning may be accepted "
    "less often; the output is the same."
)
ONE_CACHE = (
    "vLLM keeps one KV cache for all drafts of a module, these heads one for each draft, so drafts beyond the first "
    "may be accepted a little more or less often; the output is the same."
)
NOTES: dict[str, tuple[str, MTPModel, int, list[str]]] = {
    "nothing": ("qwen", make(
        SequentialHeads(num_horizons=3, shared=True, qk_norm=True, chain_norm=True, **{**SIZES, "num_heads": 1,
        "num_kv_heads": 1, "d_model": 32}),
        trunk={**SIZES, "num_heads": 1, "num_kv_heads": 1, "d_model": 32, "qk_norm": True},
    ), 2, [ONE_CACHE]),
    "one module": ("glm", sequential(shared=True), 2, [ONE_CACHE, MASKED]),
    "several modules": ("glm", sequential(), 2, [
        "vLLM runs only the first of the 2 modules, for every draft, so later drafts are accepted less often: train "
        "one module for all horizons with shared=True.",
        "vLLM takes num_speculative_tokens that are a multiple of the 2 modules only.",
        MASKED,
    ]),
    "another chain": ("glm", sequential(shared=True, chain_norm=True), 2, [
        ONE_CACHE,
        "vLLM passes the state before its norm from module to module, these heads were trained on that after it, so "
        "drafts beyond the first are accepted less often: train with chain_norm=False.",
        MASKED,
    ]),
    "a single draft has no chain": ("glm", sequential(2, chain_norm=True), 1, [MASKED]),
    "DeepSeek's chain": ("deepseek", sequential(shared=True), 2, [
        ONE_CACHE,
        "vLLM passes the state after its norm from module to module, these heads were trained on that before it, so "
        "drafts beyond the first are accepted less often: train with chain_norm=True.",
        MASKED,
        "vLLM 0.32 loads this format on a CPU, but gives other tokens there, and no GPU was tried: to serve on a CPU, "
        "export the same heads in the format glm.",
    ]),
    "the state before the norm": ("mimo", sequential(shared=True, chain_norm=True, embedding_first=False), 2, [
        ONE_CACHE,
        "vLLM gives the modules the trunk's state before its final norm, these heads were trained on the one after it, "
        "so drafts may be accepted less often; the output is the same.",
        MASKED,
    ]),
    "heads that vLLM has no attention for": ("medusa", interop.medusa(), 3, [
        "vLLM 0.32 is the last version with Medusa heads.",
        "vLLM on a CPU serves attention heads of width 32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512, and these "
        "are 4 wide.",
    ]),
    "float64": ("glm", sequential(shared=True).double(), 2, [
        "vLLM has no float64: export the model in float32 or bfloat16.", ONE_CACHE, MASKED,
    ]),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTES)
def test_what_vllm_does_otherwise_is_said(case: str, tmp_path: Path) -> None:
    name, model, drafts, notes = NOTES[case]
    exported = export_model(model, tmp_path, format=name, tokenizer=ByteTokenizer())
    assert exported.command is not None
    assert list(exported.notes) == notes
    words = shlex.split(exported.command)
    served = tmp_path / "base" if name == "medusa" else tmp_path
    dtype = "float64" if case == "float64" else "float32"
    assert words[:-1] == ["vllm", "serve", str(served), "--dtype", dtype, "--speculative-config"]
    given = json.loads(words[-1])
    assert given == {
        "method": "medusa" if name == "medusa" else "mtp",
        **({"model": str(tmp_path)} if name == "medusa" else {}),
        "num_speculative_tokens": drafts,
    }


def test_without_a_tokenizer_token_ids_are_served(tmp_path: Path) -> None:
    exported = export_model(interop.glm(), tmp_path, format="glm")
    assert exported.command is not None
    assert "--skip-tokenizer-init" in shlex.split(exported.command)
    assert exported.notes[-1] == (
        "Without a tokenizer of bytes or of Hugging Face, vLLM takes and returns token ids only."
    )


def test_a_card_has_what_is_known(tmp_path: Path) -> None:
    facts = Facts({"class_path": "TextDataModule"}, (0.75, 0.5), "64 rows.")
    exported = export_model(interop.glm(), tmp_path, format="glm", facts=facts)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert str(exported.command) in text
    for part in (
        "`SequentialHeads(d_model=16, num_horizons=3,",
        '"class_path": "TextDataModule"',
        "| 1 | 75.0% |\n| 2 | 50.0% |",
        "Of the drafts verified at that depth. 64 rows.",
        f"python -m mtp_modules import glm --path {tmp_path} --out back",
        *exported.notes,
    ):
        assert part in text


def test_a_card_says_what_is_not_known(tmp_path: Path) -> None:
    export_model(interop.glm(), tmp_path, format="glm")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Not known." in text
    assert "Not measured: `python -m mtp_modules diagnose --json FILE` does" in text


def test_the_command_line_ends_with_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interop.glm().save_pretrained(tmp_path / "ours", tokenizer=ByteTokenizer())
    (tmp_path / "diagnosis.json").write_text(
        json.dumps({"origin": "here", "depths": [{"reached": 8, "accepted": 6}, {"reached": 6, "accepted": 0}]})
    )
    asked = ("--ckpt_path", tmp_path / "ours", "--out", tmp_path / "out", "--measured", tmp_path / "diagnosis.json")
    run("export", "glm", *asked)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Written: {tmp_path / 'out'}"
    assert lines[-1].startswith(f"Next: vllm serve {tmp_path / 'out'} --dtype float32 --speculative-config ")
    assert all(line.startswith("Note: vLLM") for line in lines[1:-1])
    assert "| 1 | 75.0% |\n| 2 | 0.0% |" in (tmp_path / "out" / "README.md").read_text()


def test_our_own_format_ends_with_our_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interop.glm().save_pretrained(tmp_path / "ours")
    run("export", "mtp_modules", "--ckpt_path", tmp_path / "ours", "--out", tmp_path / "out")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"Next: python -m mtp_modules generate --ckpt_path {tmp_path / 'out'}"
    MTPModel.from_pretrained(tmp_path / "out")


def test_a_file_without_accepted_drafts_is_refused(tmp_path: Path) -> None:
    interop.glm().save_pretrained(tmp_path / "ours")
    (tmp_path / "other.json").write_text("{}")
    asked = ("export", "glm", "--ckpt_path", tmp_path / "ours", "--out", tmp_path / "out")
    said = refusal(*asked, "--measured", tmp_path / "other.json")
    assert said == (
        f"measured: {tmp_path / 'other.json'} holds no accepted drafts by depth; give a file that diagnose "
        "--json wrote."
    )
    said = refusal(*asked, "--measured", tmp_path / "other.json", "--add", "true")
    assert said == (
        f"measured: is {tmp_path / 'other.json'}, but add=true writes no model card; leave out one of them."
    )
    assert not (tmp_path / "out").exists()
