"""Models of transformers as trunks: the laws of every trunk, and their own logits."""

import copy
import gc
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtp_modules import (
    AutoregressiveDecoder,
    MTPModel,
    MultiTokenLoss,
    RecurrentTrunk,
    ResidualHeads,
    SpeculativeDecoder,
    TransformerTrunk,
    build,
    describe,
)
from mtp_modules.core import DecodingState
from mtp_modules.data import ProgressionDataModule
from mtp_modules.decoders import DynamicTree, SamplingParams
from mtp_modules.training import MTPModule, materialize
from mtp_modules.training.blocks import prepare_blocks
from mtp_modules.trunks import HuggingFaceTrunk
from tests.helpers import HEADS, VOCAB, WIDTH, assert_same, float64, gradients, random_tokens, randomise
from tests.huggingface import CONFIGS, REPLAYED, make_trunk, save_model
from tests.unit.training.running import trainer

CLOSE = 2e-5
"""Norms and rotations of transformers are made in float32, whatever the weights are."""
LLAMA = CONFIGS["llama"]
UNLIKE = ["qwen3", "gpt2", "gemma3", "gemma2", "mixtral", "mamba"]
"""Whose positions, attention or memory are not those of Llama."""
KEEPING = [name for name in CONFIGS if name not in REPLAYED]


def fresh(trunk: HuggingFaceTrunk, row: list[int]) -> tuple[Tensor, Tensor]:
    """Read a row without a state; return hidden states and the feature."""
    found = trunk(torch.tensor([row]))
    return found.hidden[0], found.features[0][0]


def check_chunk(trunk: HuggingFaceTrunk, state: DecodingState, kept: list[list[int]], chunk: Tensor) -> None:
    """Append a chunk and compare every row with a fresh forward pass."""
    found = trunk(chunk, state=state)
    for b, row in enumerate(kept):
        hidden, feature = fresh(trunk, row + chunk[b].tolist())
        assert_same(found.hidden[b], hidden[len(row) :], CLOSE)
        assert_same(found.features[0][b], feature[len(row) :], CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_keep_equals_a_fresh_prefill(name: str) -> None:
    """Ragged rows, longer than a window of four; rows are dropped, and one forks."""
    trunk = make_trunk(name, feature_layers=[0])
    assert trunk.keeps_keys == (name not in REPLAYED)
    for keep in ([0, 3], [3, 1], [2, 2]):
        state, kept = trunk.new_state(2, 20), [[], []]
        chunks = [
            (random_tokens(2, 6), [6, 5]),
            (random_tokens(2, 3, seed=1), keep),
            (random_tokens(2, 2, seed=2), [1, 2]),
        ]
        for chunk, count in chunks:
            check_chunk(trunk, state, kept, chunk)
            state.commit(count)
            kept = [row + tokens[:some] for row, tokens, some in zip(kept, chunk.tolist(), count, strict=True)]
        assert state.lengths == [len(row) for row in kept]
        state.select([1, 0, 1])
        kept = [kept[1], kept[0], kept[1]]
        check_chunk(trunk, state, kept, random_tokens(3, 1, seed=3))
        state.commit([1, 1, 0])


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_forward_passes_of_their_own(name: str) -> None:
    trunk = make_trunk(name, feature_layers=[0])
    ids = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1], [1, 2, 2, 1, 1, 1, 3, 3], [5, 5, 5, 5, 5, 5, 5, 5]])
    tokens = random_tokens(*ids.shape)
    found = trunk(tokens, document_ids=ids)
    for b, row in enumerate(ids.tolist()):
        start = 0
        for _, run in itertools.groupby(row):
            end = start + len(list(run))
            hidden, feature = fresh(trunk, tokens[b, start:end].tolist())
            assert_same(found.hidden[b, start:end], hidden, CLOSE)
            assert_same(found.features[0][b, start:end], feature, CLOSE)
            start = end


@pytest.mark.parametrize("name", CONFIGS)
def test_what_comes_later_is_not_seen(name: str) -> None:
    trunk, tokens = make_trunk(name), random_tokens(1, 9)
    before = trunk(tokens).hidden[0]
    for changed in (0, 4, 8):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCAB
        pairs = zip(before, trunk(other).hidden[0], strict=True)
        moved = [not torch.allclose(was, now, rtol=0, atol=1e-9) for was, now in pairs]
        assert moved[:changed] == [False] * changed
        assert moved[changed]


@pytest.mark.parametrize("name", KEEPING)
def test_a_tree_is_read_as_each_of_its_paths_would_be(name: str) -> None:
    trunk = make_trunk(name, feature_layers=[0])
    prompt, tokens = random_tokens(2, 5), random_tokens(2, 6, seed=1)
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2], [-1, 0, 1, 2, 0, 4]])
    paths = [
        [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5]],
        [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 4], [0, 4, 5]],
    ]
    state = trunk.new_state(2, 20)
    trunk(prompt, state=state)
    state.commit([5, 3])
    kept = [prompt[0].tolist(), prompt[1, :3].tolist()]
    state.expect_tree(parents, 3)
    hidden = trunk(tokens, state=state).hidden
    for b, row in enumerate(kept):
        for path in paths[b]:
            assert_same(hidden[b, path[-1]], fresh(trunk, row + tokens[b, path].tolist())[0][-1], CLOSE)
    state.commit([3, 2], torch.tensor([[0, 2, 5], [0, 4, 4]]))
    kept = [kept[0] + tokens[0, [0, 2, 5]].tolist(), kept[1] + tokens[1, [0, 4]].tolist()]
    check_chunk(trunk, state, kept, random_tokens(2, 2, seed=2))


def make_model(name: str, heads: str, num_horizons: int = 3) -> MTPModel:
    with float64():
        made = HEADS[heads](num_horizons)
        deeper = {"num_hidden_layers": 3} if made.num_features else {}
        trunk = HuggingFaceTrunk(config=CONFIGS[name] | deeper, feature_layers=range(made.num_features))
        model = MTPModel(trunk=trunk, heads=made).eval()
    randomise(model)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "heads"), [*((name, "recurrent") for name in UNLIKE), *(("llama", heads) for heads in HEADS)]
)
def test_speculative_decoding_equals_plain_decoding(name: str, heads: str) -> None:
    model, prompts = make_model(name, heads), [[1, 2, 3, 4, 5, 6], [7], [3, 3]]
    params = [SamplingParams(temperature=temperature) for temperature in (0.0, 1.0, 0.7)]
    how = {"max_new_tokens": [4, 6, 5], "sampling": params, "seed": [1, 2, 3]}
    plain = AutoregressiveDecoder().generate(model, prompts, **how)
    assert plain.stats.tokens == 15
    assert SpeculativeDecoder(num_drafts=2).generate(model, prompts, **how).tokens == plain.tokens
    if model.trunk.supports_trees:
        tree = SpeculativeDecoder(tree=DynamicTree(depth=2, width=2, nodes=5))
        assert tree.generate(model, prompts, **how).tokens == plain.tokens
    greedy = AutoregressiveDecoder().generate(model, prompts[:1], max_new_tokens=3).tokens[0]
    text = list(prompts[0])
    for token in greedy:
        states = model(torch.tensor([text + [0] * model.lookahead]))[0]
        assert int(model.unembedding.logits(states[0, -1]).argmax()) == token
        text.append(token)


def test_a_tree_on_a_trunk_without_keys_is_refused() -> None:
    model = make_model("mamba", "recurrent")
    with pytest.raises(ValueError, match="tree"):
        SpeculativeDecoder(tree=DynamicTree(depth=2)).generate(model, [[1]], max_new_tokens=4)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models_own_also_after_saving(name: str, tmp_path: Path) -> None:
    """Of a trained model, by heads whose horizon 1 is the trunk's state; then without the place it came from."""
    own = save_model(name, tmp_path / "theirs")
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        wanted = own(tokens).logits
    trunk = HuggingFaceTrunk(pretrained=str(tmp_path / "theirs"))
    tied = own.get_output_embeddings().weight is own.get_input_embeddings().weight
    heads = ResidualHeads(d_model=WIDTH, num_horizons=3)
    bias = own.get_output_embeddings().bias is not None
    model = MTPModel(trunk=trunk, heads=heads, tie_embeddings=tied, output_bias=bias, own_unembeddings=True).eval()
    text = torch.cat((tokens, tokens[:, : model.lookahead]), dim=1)

    def logits(model: MTPModel) -> list[Tensor]:
        return [model.unembedding.logits(state, index) for index, state in enumerate(model(text))]

    with torch.no_grad():
        for found in logits(model):  # the far horizons start as copies
            assert_same(found, wanted, 1e-5)
        model.save_pretrained(tmp_path / "ours")
        shutil.rmtree(tmp_path / "theirs")
        again, _ = MTPModel.from_pretrained(tmp_path / "ours")
        for found in logits(again):
            assert_same(found, wanted, 1e-5)
    told = json.dumps(describe(model))
    assert "theirs" not in told
    assert describe(again) == describe(model)


def test_an_output_matrix_that_is_not_the_embedding_is_not_lost(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "untied")
    save_model("phi", tmp_path / "biased")
    heads = ResidualHeads(d_model=WIDTH, num_horizons=2)
    trunk = HuggingFaceTrunk(pretrained=str(tmp_path / "untied"))
    with pytest.raises(
        ValueError,
        match=r"^MTPModel: the HuggingFaceTrunk was trained with an output matrix that is not its embedding, which "
        r"tie_embeddings would lose; set it to false\.$",
    ):
        MTPModel(trunk=trunk, heads=heads)
    biased = HuggingFaceTrunk(pretrained=str(tmp_path / "biased"))
    with pytest.raises(ValueError, match=r"^MTPModel: the HuggingFaceTrunk was trained with a bias on its logits; set"):
        MTPModel(trunk=biased, heads=heads, tie_embeddings=False)


def test_an_untied_copy_of_a_tied_matrix_is_a_copy(tmp_path: Path) -> None:
    save_model("llama_tied", tmp_path)
    trunk = HuggingFaceTrunk(pretrained=str(tmp_path))
    model = MTPModel(trunk=trunk, heads=ResidualHeads(d_model=WIDTH, num_horizons=2), tie_embeddings=False).eval()
    assert torch.equal(model.unembedding.weight, trunk.embedding.weight)
    assert model.unembedding.weight.data_ptr() != trunk.embedding.weight.data_ptr()


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_an_output_matrix_is_handed_over_and_not_kept(name: str, tmp_path: Path) -> None:
    """Nothing but the unembedding refers to it, so sharding that replaces it frees it."""
    save_model(name, tmp_path)
    trunk = HuggingFaceTrunk(pretrained=str(tmp_path))
    options = {"tie_embeddings": False, "output_bias": name == "phi"}
    model = MTPModel(trunk=trunk, heads=ResidualHeads(d_model=WIDTH, num_horizons=2), **options)
    place = model.unembedding.weight.data_ptr()
    assert place in {tensor.data_ptr() for tensor in tensors_alive()}
    model.unembedding.weight = torch.nn.Parameter(torch.zeros(VOCAB, WIDTH))
    assert place not in {tensor.data_ptr() for tensor in tensors_alive()}
    sentence = r"^HuggingFaceTrunk: its output matrix is in another model already; make a trunk for each model\.$"
    with pytest.raises(ValueError, match=sentence):
        MTPModel(trunk=trunk, heads=ResidualHeads(d_model=WIDTH, num_horizons=2), **options)
    assert copy.deepcopy(trunk).take_trained_output(tied=False, bias=True) is None


def tensors_alive() -> list[Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]


def test_a_matrix_that_is_the_embedding_serves_every_model(tmp_path: Path) -> None:
    save_model("llama_tied", tmp_path)
    trunk = HuggingFaceTrunk(pretrained=str(tmp_path))
    for _ in range(2):
        model = MTPModel(trunk=trunk, heads=ResidualHeads(d_model=WIDTH, num_horizons=2))
        assert model.unembedding.weight is trunk.embedding.weight


def test_what_is_refused_takes_nothing(tmp_path: Path) -> None:
    own = save_model("llama", tmp_path)
    trunk = HuggingFaceTrunk(pretrained=str(tmp_path))
    heads = ResidualHeads(d_model=WIDTH, num_horizons=2)
    wrong = ResidualHeads(d_model=2 * WIDTH, num_horizons=2)
    for options in ({"heads": heads}, {"heads": wrong, "tie_embeddings": False}):
        with pytest.raises(ValueError, match="MTPModel"):
            MTPModel(trunk=trunk, **options)
    model = MTPModel(trunk=copy.deepcopy(trunk), heads=heads, tie_embeddings=False)
    assert torch.equal(model.unembedding.weight, own.get_output_embeddings().weight)


def test_a_trunk_that_was_converted_hands_over_what_it_computes_in(tmp_path: Path) -> None:
    save_model("phi", tmp_path)
    trunk = HuggingFaceTrunk(pretrained=str(tmp_path)).to(torch.bfloat16)
    heads = ResidualHeads(d_model=WIDTH, num_horizons=3).to(torch.bfloat16)
    model = MTPModel(trunk=trunk, heads=heads, tie_embeddings=False, output_bias=True, own_unembeddings=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert MultiTokenLoss()(model, random_tokens(1, 8)).loss.isfinite()


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_pretrained_trunk_starts_in_evaluation_mode(pretrained: bool, tmp_path: Path) -> None:
    save_model("gpt2", tmp_path)
    trunk = HuggingFaceTrunk(pretrained=str(tmp_path)) if pretrained else HuggingFaceTrunk(config=CONFIGS["gpt2"])
    assert {module.training for module in trunk.modules()} == {not pretrained}


class Modes(Callback):
    """Remembers the modes of the trunk's modules in a step, and after the validation before it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: MTPModule, *_: object) -> None:
        self.seen = {module.training for module in pl_module.trunk.modules()}


@pytest.mark.parametrize("freeze", [(), ("trunk",)])
def test_a_fit_trains_a_pretrained_trunk_and_leaves_a_frozen_one_quiet(freeze: tuple[str, ...], tmp_path: Path) -> None:
    save_model("llama_tied", tmp_path)
    trunk = HuggingFaceTrunk(pretrained=str(tmp_path))
    heads = ResidualHeads(d_model=WIDTH, num_horizons=2)
    rows = ProgressionDataModule(batch_size=2, lookahead=2, vocab_size=VOCAB, length=3, num_train=4, num_val=2)
    modes = Modes()
    made = MTPModule(trunk=trunk, heads=heads, loss=MultiTokenLoss(), freeze=freeze)
    trainer(tmp_path, modes, max_steps=2, max_epochs=-1, num_sanity_val_steps=1).fit(made, rows)
    assert modes.seen == {not freeze}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_step_reaches_every_parameter(name: str) -> None:
    model = make_model(name, "recurrent").train()
    tokens, ids = random_tokens(2, 12), torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    terms = MultiTokenLoss()(model, tokens, document_ids=ids)
    terms.loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_layers_can_be_recomputed(name: str) -> None:
    model, tokens = make_model(name, "linear"), random_tokens(2, 9)
    found = []
    for mode in (None, "full"):
        prepare_blocks(model, activation_checkpointing=mode)
        found.append(gradients(model, MultiTokenLoss()(model, tokens).loss))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3"])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    trunk = HuggingFaceTrunk(config=CONFIGS[name])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trunk(random_tokens(1, 4))
    assert trunk.flops(4) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_token_goes_to_some_experts_only() -> None:
    few, all_ = (HuggingFaceTrunk(config=CONFIGS["mixtral"] | {"num_experts_per_tok": count}) for count in (1, 3))
    experts = 2 * 3 * WIDTH * 12  # of two layers: gate, up and down
    assert all_.flops(1) - few.flops(1) == 2 * 2 * experts


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "mamba"])
def test_a_trunk_of_the_meta_device_gets_values(name: str) -> None:
    with torch.device("meta"):
        trunk = HuggingFaceTrunk(config=CONFIGS[name])
    materialize(trunk, torch.device("cpu"))
    other = HuggingFaceTrunk(config=CONFIGS[name])
    for (key, made), usual in zip(trunk.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(made, usual), key
    other.load_state_dict(trunk.state_dict())
    assert torch.equal(trunk.eval()(random_tokens(1, 5)).hidden, other.eval()(random_tokens(1, 5)).hidden)


def test_rotary_frequencies_keep_their_precision() -> None:
    trunk = HuggingFaceTrunk(config=LLAMA)
    before = {name: buffer.clone() for name, buffer in trunk.named_buffers()}
    trunk.to(torch.bfloat16)
    assert trunk.embedding.weight.dtype == torch.bfloat16
    assert before
    for name, buffer in trunk.named_buffers():
        assert torch.equal(buffer, before[name])
    with torch.device("cpu"):
        assert copy.deepcopy(trunk)(random_tokens(1, 4)).hidden.dtype == torch.bfloat16


def test_precision_and_parts() -> None:
    trunk = HuggingFaceTrunk(config=CONFIGS["gemma3"], dtype="bfloat16", max_positions=20)
    assert {parameter.dtype for parameter in trunk.parameters()} == {torch.bfloat16}
    assert len(trunk.blocks) == 2
    assert (trunk.d_model, trunk.embedding_width, trunk.vocab_size, trunk.max_positions) == (WIDTH, WIDTH, VOCAB, 20)
    assert trunk.embedding is trunk.model.embed_tokens
    assert build(describe(trunk)).max_positions == 20


def test_a_length_beyond_which_keys_would_turn_otherwise() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    assert HuggingFaceTrunk(config=LLAMA | {"rope_parameters": rope}).max_positions == 16


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, r"needs a model, pretrained, or a config with a model_type such as llama; give one of them\."),
        ({"config": {"vocab_size": 5}}, r"needs a model, pretrained, or a config with a model_type"),
        ({"config": {"model_type": "llamma"}}, r"config\.model_type 'llamma' is unknown to transformers 5"),
        ({"config": {"model_type": "clip"}}, r"transformers has no causal language model of type 'clip'; take one"),
        (
            {"config": LLAMA, "gguf_file": "a.gguf"},
            r"gguf_file is 'a\.gguf', but pretrained is not given; name the folder",
        ),
        ({"config": LLAMA, "dtype": "float8"}, r"dtype must be one of float64, float32, .*, got 'float8'\."),
        (
            {"config": LLAMA, "feature_layers": [1]},
            r"feature_layers must ascend within 0\.\.0, got \[1\]\.",
        ),
        (
            {"config": LLAMA | {"num_hidden_layers": 3}, "feature_layers": [1, 0]},
            r"feature_layers must ascend within 0\.\.1, got \[1, 0\]\.",
        ),
        ({"config": LLAMA, "max_positions": 0}, r"max_positions must be at least 1, got 0\."),
        (
            {"config": LLAMA, "max_positions": 49},
            r"max_positions must be at most 48 for this model, got 49\.",
        ),
        (
            {"config": CONFIGS["gemma2"] | {"final_logit_softcapping": 30.0}},
            r"gemma2 caps its logits \(final_logit_softcapping is 30\.0\), which an output matrix cannot; .*"
            r"so load it with config=\{'final_logit_softcapping': None\} if that is enough\.$",
        ),
    ],
    ids=str,
)
def test_arguments_that_are_refused(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^HuggingFaceTrunk: {sentence}"):
        HuggingFaceTrunk(**arguments)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^HuggingFaceTrunk: pretrained '.*nowhere' cannot be read \("):
        HuggingFaceTrunk(pretrained=str(tmp_path / "nowhere"))
    save_model("llama", tmp_path)
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"^HuggingFaceTrunk: config\.hidden is not in the configuration of"):
        HuggingFaceTrunk(pretrained=str(tmp_path), config={"hidden": 3})
    whole = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(whole | {"num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"^HuggingFaceTrunk: the weights of '.*' do not fit its configuration: missing .*layers\.2\."
    ):
        HuggingFaceTrunk(pretrained=str(tmp_path))
    path.write_text(json.dumps(whole), encoding="utf-8")
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^HuggingFaceTrunk: the weights of '.*' cannot be read \("):
        HuggingFaceTrunk(pretrained=str(tmp_path))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3"])
def test_a_chunk_may_reach_beyond_the_last_position_but_not_stay_there(name: str) -> None:
    trunk, tokens = make_trunk(name, max_positions=8), random_tokens(2, 12)
    state = trunk.new_state(2, 14)
    trunk(tokens[:, :7], state=state)
    state.commit([7, 4])
    found = trunk(tokens[:, 7:], state=state).hidden
    assert_same(found[0, :1], trunk(tokens[:1, :8]).hidden[0, 7:], CLOSE)
    wanted = trunk(torch.cat((tokens[1:, :4], tokens[1:, 7:11]), dim=1)).hidden
    assert_same(found[1, :4], wanted[0, 4:], CLOSE)
    with pytest.raises(ValueError, match=r"State: a row of 9 tokens is longer than max_positions=8; keep fewer tokens"):
        state.commit([2, 4])


def test_what_does_not_go_with_a_state() -> None:
    trunk, tokens = make_trunk("llama"), random_tokens(1, 3)
    with pytest.raises(ValueError, match=r"^HuggingFaceTrunk: document_ids cannot be combined with a state;"):
        trunk(tokens, document_ids=tokens, state=trunk.new_state(1, 6))
    sizes = {"vocab_size": VOCAB, "d_model": WIDTH}
    others = [RecurrentTrunk(**sizes), TransformerTrunk(**sizes, num_layers=1, num_heads=2), make_trunk("mamba")]
    for other in others:
        with pytest.raises(ValueError, match=r"^HuggingFaceTrunk: state must come from this trunk's new_state, got "):
            trunk(tokens, state=other.new_state(1, 6))
    for name in ("llama", "mamba"):
        with pytest.raises(ValueError, match="a sequence of 49 tokens is longer than max_positions=48"):
            make_trunk("llama" if name == "llama" else "gemma2")(random_tokens(1, 49))
