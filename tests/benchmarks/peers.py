"""Our speculative decoding against that of other libraries, on the same weights.

``medusa``: ``ResidualHeads`` with output matrices of their own, against the Medusa of economize, on a Llama.
``mtp``: ``SequentialHeads``, against ``generate(use_mtp=True)`` of transformers, on a GLM-4.5 whose layers are dense:
its modules join [embedding; state] and hand on what is behind their norm. Transformers takes a mixture of experts for
every module's feed-forward layer; here it is replaced by the model's own dense one. Transformers also builds its
modules and reads their weights from disk at every call, which is left out.

The model is trained here, on phrases that follow one another at random, so that drafts are right inside a phrase and
often wrong at its end. Both sides of a ratio alternate in one process, on one thread. Times are CPU seconds; a ratio
is the median over the repeats. Outputs are compared, and so is what a forward pass of the trunk brings, for equal
weights must accept equal drafts. A peer that is not installed is named and left out.

    python tests/benchmarks/peers.py
    python tests/benchmarks/peers.py --compile --peers mtp
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from rich.console import Console
from torch import nn

from mtp_modules import (
    AutoregressiveDecoder,
    AuxiliaryWeights,
    MTPModel,
    MultiTokenLoss,
    ResidualHeads,
    SequentialHeads,
    SpeculativeDecoder,
    TransformerTrunk,
)
from mtp_modules.decoders import compile_for_decoding
from mtp_modules.layers.transformer import TransformerLayer

VOCAB, HEADS, KV_HEADS, POSITIONS = 256, 4, 2, 1024


@dataclass(frozen=True)
class Peer:
    """Another library's decoding, with our model's weights in it.

    Attributes:
        name: Of the library and its method.
        plain: Continues a prompt without drafts.
        drafting: Continues a prompt with drafts.
        counted: A module that runs once a forward pass of the trunk.
    """

    name: str
    plain: Callable[[list[int], int], list[int]]
    drafting: Callable[[list[int], int], list[int]]
    counted: nn.Module


def make_model(kind: str, options: argparse.Namespace) -> MTPModel:
    """Build an untrained model with the heads of a comparison."""
    trunk = TransformerTrunk(
        vocab_size=VOCAB,
        d_model=options.width,
        num_layers=options.layers,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        max_positions=POSITIONS,
    )
    if kind == "medusa":
        heads = ResidualHeads(d_model=options.width, num_horizons=options.drafts + 1)
        return MTPModel(trunk=trunk, heads=heads, tie_embeddings=False, own_unembeddings=True)
    sequential = SequentialHeads(
        d_model=options.width,
        num_horizons=options.drafts + 1,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        max_positions=POSITIONS,
        chain_norm=True,
    )
    return MTPModel(trunk=trunk, heads=sequential, tie_embeddings=False)


def texts(rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Draw rows of phrases; the 24 phrases themselves are always the same."""
    phrases = torch.randint(VOCAB, (24, 12), generator=torch.Generator().manual_seed(0))
    chosen = torch.randint(len(phrases), (rows, length // 12 + 2), generator=generator)
    start = int(torch.randint(12, (1,), generator=generator))
    return phrases[chosen].flatten(1)[:, start : start + length]


def train(model: MTPModel, steps: int) -> None:
    """Train on phrases, and print the losses."""
    loss, generator = MultiTokenLoss(weights=AuxiliaryWeights(weight=0.3)), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        terms = loss(model, texts(8, 64 + model.lookahead, generator))
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
    print("loss of every head, in nats:", " ".join(f"{value:.2f}" for value in terms.nll.tolist()))
    model.eval()


def layer_weights(layer: TransformerLayer, prefix: str) -> dict[str, torch.Tensor]:
    """Return a layer's weights under the names that Llama and GLM share."""
    attention, ffn = layer.attention, layer.ffn
    grouped = attention.qkv.weight.unflatten(0, (attention.num_kv_heads, -1, attention.head_dim))
    gate, up = (part.flatten(0, 1) for part in ffn.gate_up.weight.unflatten(0, (ffn.num_blocks, 2, -1)).unbind(1))
    return {
        f"{prefix}self_attn.q_proj.weight": grouped[:, :-2].flatten(0, 2),
        f"{prefix}self_attn.k_proj.weight": grouped[:, -2].flatten(0, 1),
        f"{prefix}self_attn.v_proj.weight": grouped[:, -1].flatten(0, 1),
        f"{prefix}self_attn.o_proj.weight": attention.out.weight,
        f"{prefix}mlp.gate_proj.weight": gate,
        f"{prefix}mlp.up_proj.weight": up,
        f"{prefix}mlp.down_proj.weight": ffn.down.weight,
        f"{prefix}input_layernorm.weight": layer.attention_norm.weight,
        f"{prefix}post_attention_layernorm.weight": layer.ffn_norm.weight,
    }


def trunk_weights(model: MTPModel) -> dict[str, torch.Tensor]:
    """Return the weights of trunk and output matrix under the names that Llama and GLM share."""
    state = {
        "model.embed_tokens.weight": model.trunk.embedding.weight,
        "model.norm.weight": model.trunk.norm.weight,
        "lm_head.weight": model.unembedding.weight,
    }
    for index, layer in enumerate(model.trunk.layers):
        state |= layer_weights(layer, f"model.layers.{index}.")
    return state


def sizes(model: MTPModel) -> dict[str, object]:
    """Return what configurations of Llama and GLM share."""
    first = model.trunk.layers[0]
    return {
        "vocab_size": VOCAB,
        "hidden_size": model.trunk.d_model,
        "intermediate_size": first.ffn.down.in_features,
        "num_hidden_layers": len(model.trunk.layers),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": first.attention_norm.eps,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def generated(theirs: nn.Module, prompt: list[int], new_tokens: int, **options: bool) -> list[int]:
    """Continue a prompt by transformers' ``generate``."""
    ids = torch.tensor([prompt])
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **options
    )
    return out[0, len(prompt) :].tolist()


def economize_medusa(model: MTPModel) -> Peer:
    """Put the weights into a Llama with economize's Medusa."""
    import economize
    from economize.techniques.medusa import MedusaConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(LlamaConfig(**sizes(model))).eval()
    llama.load_state_dict(trunk_weights(model))
    drafts = len(model.horizons) - 1
    medusa = economize.apply(
        llama,
        MedusaConfig(num_heads=drafts, head="own"),
        decoding=economize.DecodeConfig(cycle_length=drafts + 1),
    ).eval()
    state = {}
    for index, stack in enumerate(model.heads.stacks):
        state[f"heads.{index}.proj.weight"] = model.unembedding.own_weights[index]
        state |= {f"heads.{index}.blocks.{name}": value for name, value in stack.state_dict().items()}
    medusa.techniques["medusa"].load_state_dict(state)
    alone = economize.DecodeConfig(cycle_length=1)

    def drafting(prompt: list[int], new_tokens: int) -> list[int]:
        return medusa.decode(torch.tensor([prompt]), new_tokens).tokens.tolist()

    def plain(prompt: list[int], new_tokens: int) -> list[int]:
        return medusa.decode(torch.tensor([prompt]), new_tokens, decoding=alone).tokens.tolist()

    return Peer(f"economize {economize.__version__}, Medusa", plain, drafting, llama.model.layers[0])


def transformers_mtp(model: MTPModel) -> Peer:
    """Put the weights into a dense GLM-4.5 with modules for ``use_mtp``."""
    import transformers
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
    from transformers.modeling_layers import MtpModel

    drafts = len(model.horizons) - 1
    config = Glm4MoeConfig(
        **sizes(model),
        head_dim=model.trunk.layers[0].attention.head_dim,
        first_k_dense_replace=len(model.trunk.layers),
        num_mtp_layers=drafts,
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    )
    glm = Glm4MoeForCausalLM(config).eval()
    glm.load_state_dict(trunk_weights(model))
    modules = MtpModel(glm, drafts)
    state = {}
    for index, step in enumerate(model.heads.steps):
        modules.layers[index].mtp_block.mlp = type(glm.model.layers[0].mlp)(config)
        state |= layer_weights(step.layer, f"layers.{index}.mtp_block.") | {
            f"layers.{index}.enorm.weight": step.token_norm.weight,
            f"layers.{index}.hnorm.weight": step.state_norm.weight,
            f"layers.{index}.eh_proj.weight": step.merge.weight,
            f"layers.{index}.post_norm.weight": model.heads.norms[index].weight,
        }
    shared = {name: value for name, value in modules.state_dict().items() if not name.startswith("layers.")}
    modules.eval().load_state_dict(state | shared)

    def drafting(prompt: list[int], new_tokens: int) -> list[int]:
        with mock.patch.object(MtpModel, "from_pretrained", return_value=modules):
            return generated(glm, prompt, new_tokens, use_mtp=True)

    def plain(prompt: list[int], new_tokens: int) -> list[int]:
        return generated(glm, prompt, new_tokens)

    return Peer(f"transformers {transformers.__version__}, use_mtp", plain, drafting, glm.model.layers[0])


PEERS: dict[str, Callable[[MTPModel], Peer]] = {"medusa": economize_medusa, "mtp": transformers_mtp}


def compare(kind: str, options: argparse.Namespace, console: Console) -> None:
    """Train, put the weights into the peer, and print what each side needs."""
    torch.manual_seed(0)
    model = make_model(kind, options)
    train(model, options.steps)
    try:
        peer = PEERS[kind](model)
    except ImportError as error:
        console.print(f"{kind}: left out, for {error.name} is not installed")
        return
    drawn = texts(options.prompts, options.prompt_length, torch.Generator().manual_seed(2))
    prompts, new_tokens = drawn.tolist(), options.new_tokens
    used = compile_for_decoding(model, freeze=options.freeze) if options.compile else model
    decoders = {"ours, plain": AutoregressiveDecoder(), "ours": SpeculativeDecoder()}
    theirs = {"theirs, plain": peer.plain, "theirs": peer.drafting}
    outputs: dict[str, list[list[int]]] = {}
    forwards: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in (*decoders, *theirs)}
    passes = [0]
    peer.counted.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    for repeat in range(options.repeats + 1):
        for name in seconds:
            started = time.process_time()
            if name in decoders:
                made = [decoders[name].generate(used, [prompt], max_new_tokens=new_tokens) for prompt in prompts]
                outputs[name], forwards[name] = [g.tokens[0] for g in made], sum(g.stats.forwards for g in made)
            else:
                passes[0] = 0
                with torch.inference_mode():
                    outputs[name] = [theirs[name](prompt, new_tokens) for prompt in prompts]
                forwards[name] = passes[0]
            if repeat:
                seconds[name].append(time.process_time() - started)
    console.print(f"\n{kind}: {peer.name}; {len(prompts)} prompts x {new_tokens} tokens, {options.drafts} drafts")
    for name in seconds:
        same = sum(found == plain for found, plain in zip(outputs[name], outputs["ours, plain"], strict=True))
        rate = len(prompts) * new_tokens / statistics.median(seconds[name])
        brings = len(prompts) * new_tokens / forwards[name]
        console.print(
            f"  {name:14} {rate:7.0f} tokens/s, {brings:.3f} a forward pass, equal outputs {same}/{len(prompts)}"
        )
    for mine, other in (("ours", "theirs"), ("ours, plain", "theirs, plain")):
        ratio = statistics.median(b / a for a, b in zip(seconds[mine], seconds[other], strict=True))
        console.print(f"  {mine}{', compiled,' if options.compile else ''} over {other}: {ratio:.2f}x")


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt_length", type=int, default=48)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile our rounds")
    parser.add_argument("--freeze", action="store_true", help="with compile: take weights for constants")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in options.peers:
        compare(kind, options, Console(width=120))


if __name__ == "__main__":
    main()
