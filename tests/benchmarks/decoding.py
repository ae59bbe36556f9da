"""Self-speculative against plain decoding of a trained model, and both against Hugging Face ``generate``.

Both sides of a ratio alternate in one process, on one thread. Times are CPU seconds; medians over the repeats.

    python -m tests.benchmarks.decoding --ckpt_path runs/quickstart
    python -m tests.benchmarks.decoding --temperature 0.8 --decoders heads:7 rejection:7 block:7 --hugging_face 0
    python -m tests.benchmarks.decoding --batch 16 --decoders heads:7 cost:7 --hugging_face 0
    python -m tests.benchmarks.decoding --compile --decoders heads:3 heads:7
    python -m tests.benchmarks.decoding --compile --freeze --decoders heads:3 heads:7
    python -m tests.benchmarks.decoding --compile --freeze --prompt_sizes 64 --decoders heads:3 heads:7
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from mtp_modules import AutoregressiveDecoder, MTPModel, SpeculativeDecoder, TransformerTrunk
from mtp_modules.data import TextDataModule
from mtp_modules.decoders import (
    BlockVerification,
    ConfidentDepth,
    CostAwareDepth,
    Decoder,
    DynamicTree,
    Generation,
    LookupOrHeads,
    PromptLookup,
    RejectionSampling,
    SamplingParams,
    StaticTree,
    compile_for_decoding,
    warm_up,
)
from mtp_modules.decoders.graphs.compiled import CompiledModel
from mtp_modules.decoders.request import DecodableModel
from mtp_modules.interop import with_own_trunk
from mtp_modules.loading import load_model
from tests.benchmarks.unseen import held_out_prompts

DECODERS = ["heads:3", "heads:5", "heads:7", "cost:7", "tree:2,2,1,1,1", "dynamic:6,3,12", "lookup:7", "both:7"]


def decoder_of(name: str) -> Decoder:
    """Build a decoder from a name such as ``heads:7`` (drafts), ``both:4,8`` (of heads, of text) or ``tree:4,2,1``."""
    kind, _, sizes = name.partition(":")
    numbers = [int(size) for size in sizes.split(",")]
    made: dict[str, Callable[[], Decoder]] = {
        "heads": lambda: SpeculativeDecoder(num_drafts=numbers[0]),
        "rejection": lambda: SpeculativeDecoder(num_drafts=numbers[0], acceptance=RejectionSampling()),
        "block": lambda: SpeculativeDecoder(num_drafts=numbers[0], acceptance=BlockVerification()),
        "cost": lambda: SpeculativeDecoder(num_drafts=numbers[0], policy=CostAwareDepth()),
        "confident": lambda: SpeculativeDecoder(num_drafts=numbers[0], policy=ConfidentDepth()),
        "lookup": lambda: SpeculativeDecoder(drafter=PromptLookup(num_drafts=numbers[0])),
        "both": lambda: SpeculativeDecoder(drafter=LookupOrHeads(num_drafts=numbers[0], num_lookup=numbers[-1])),
        "tree": lambda: SpeculativeDecoder(tree=StaticTree(widths=numbers)),
        "dynamic": lambda: SpeculativeDecoder(tree=DynamicTree(depth=numbers[0], width=numbers[1], nodes=numbers[2])),
    }
    return made[kind]()


def alternate(sides: dict[str, Callable[[int], object]], parts: int, repeats: int) -> dict[str, list[float]]:
    """Run the sides in turn, part by part, so that both see the same minutes, and return the CPU seconds of every run.

    The first run, which compiles and fills caches, is left out.
    """
    seconds: dict[str, list[float]] = {name: [0.0] * (repeats + 1) for name in sides}
    for repeat in range(repeats + 1):
        for part in range(parts):
            for name, side in sides.items():
                started = time.process_time()
                side(part)
                seconds[name][repeat] += time.process_time() - started
    return {name: runs[1:] for name, runs in seconds.items()}


def pooled(generations: list[Generation]) -> tuple[float, float, list[float]]:
    """Return tokens per forward, the same without prompts and the token behind each, and acceptance by depth."""
    prompts = sum(len(g.tokens) for g in generations)
    tokens = sum(g.stats.tokens for g in generations)
    forwards = sum(g.stats.forwards for g in generations)
    depths = max(len(g.stats.drafted) for g in generations)
    drafted = [sum(g.stats.drafted[d] for g in generations if len(g.stats.drafted) > d) for d in range(depths)]
    accepted = [sum(g.stats.accepted[d] for g in generations if len(g.stats.accepted) > d) for d in range(depths)]
    shares = [a / d for a, d in zip(accepted, drafted, strict=True)]
    return tokens / forwards, (tokens - prompts) / (forwards - prompts), shares


def hugging_face_twin(model: MTPModel) -> torch.nn.Module | None:
    """Build a Llama with the same sizes; previous-token tables have no place in it and are left out on both sides."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    trunk = model.trunk
    assert isinstance(trunk, TransformerTrunk)
    first = trunk.layers[0]
    config = LlamaConfig(
        vocab_size=trunk.vocab_size,
        hidden_size=trunk.d_model,
        intermediate_size=first.ffn.down.in_features,
        num_hidden_layers=len(trunk.layers),
        num_attention_heads=first.attention.num_heads,
        num_key_value_heads=first.attention.num_kv_heads,
        max_position_embeddings=trunk.max_positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        rms_norm_eps=first.attention_norm.eps,
    )
    twin = LlamaForCausalLM(config).eval()
    twin.generation_config.eos_token_id = None
    state = {
        "model.embed_tokens.weight": trunk.embedding.weight,
        "model.norm.weight": trunk.norm.weight,
        "lm_head.weight": model.unembedding.weight,
    }
    for index, layer in enumerate(trunk.layers):
        attention, prefix = layer.attention, f"model.layers.{index}."
        grouped = attention.qkv.weight.unflatten(0, (attention.num_kv_heads, -1, attention.head_dim))
        query, key, value = grouped[:, :-2].flatten(0, 2), grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1)
        gate, up = (
            x.flatten(0, 1) for x in layer.ffn.gate_up.weight.unflatten(0, (layer.ffn.num_blocks, 2, -1)).unbind(1)
        )
        state |= {
            f"{prefix}self_attn.q_proj.weight": query,
            f"{prefix}self_attn.k_proj.weight": key,
            f"{prefix}self_attn.v_proj.weight": value,
            f"{prefix}self_attn.o_proj.weight": attention.out.weight,
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": up,
            f"{prefix}mlp.down_proj.weight": layer.ffn.down.weight,
            f"{prefix}input_layernorm.weight": layer.attention_norm.weight,
            f"{prefix}post_attention_layernorm.weight": layer.ffn_norm.weight,
        }
    twin.load_state_dict(state)
    return twin


def without_previous_tokens(model: MTPModel) -> MTPModel:
    """Return the same weights in a trunk without previous-token tables, which is a plain Llama."""
    first = model.trunk.layers[0]
    trunk = TransformerTrunk(
        vocab_size=model.trunk.vocab_size,
        d_model=model.trunk.d_model,
        num_layers=len(model.trunk.layers),
        num_heads=first.attention.num_heads,
        num_kv_heads=first.attention.num_kv_heads,
        ffn_width=first.ffn.down.in_features,
        max_positions=model.trunk.max_positions,
    )
    plain = MTPModel(trunk=trunk, heads=model.heads, tie_embeddings=False)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("trunk.previous")})
    return plain.eval()


def as_graphs(model: DecodableModel, options: argparse.Namespace, sizes: set[int]) -> CompiledModel:
    """Return the model with its rounds compiled."""
    return compile_for_decoding(model, batch_sizes=sizes, prompt_sizes=options.prompt_sizes, freeze=options.freeze)


def how_it_runs(options: argparse.Namespace) -> str:
    """Say what was done to the rounds."""
    return ", compiled" if options.compile else ""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt_path", default="runs/quickstart")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--unseen", type=int, default=0, help="leave out prompts that share so many tokens in a row")
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--decoders", nargs="+", default=DECODERS, help="kind:sizes, kinds as in the source")
    parser.add_argument("--compile", action="store_true", help="compile our rounds, plain ones too")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of all weights")
    parser.add_argument(
        "--prompt_sizes",
        type=int,
        nargs="*",
        default=[],
        help="with compile: of pieces that prompts are read in",
    )
    parser.add_argument("--freeze", action="store_true", help="with compile: take weights for constants")
    parser.add_argument("--hugging_face", type=int, default=8, help="prompts to compare with; 0 leaves it out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.ckpt_path)
    model = model.to(getattr(torch, options.dtype))
    data = TextDataModule(sources=["stdlib"], window=256, lookahead=model.lookahead, batch_size=8, tokenizer=tokenizer)
    prompts = held_out_prompts(data, options.prompts, options.prompt_length, options.unseen)
    batches = [prompts[start : start + options.batch] for start in range(0, len(prompts), options.batch)]
    console = Console(width=140)
    used: DecodableModel = model
    if options.compile:
        model = with_own_trunk(model)
        used = as_graphs(model, options, {max(options.batch // 4, 1), options.batch})

    decoders: dict[str, Decoder] = {"plain": AutoregressiveDecoder()}
    decoders |= {name: decoder_of(name) for name in options.decoders}
    found: dict[str, dict[int, Generation]] = {name: {} for name in decoders}
    params = SamplingParams(temperature=options.temperature)

    def run(name: str) -> Callable[[int], None]:
        def one_batch(index: int) -> None:
            found[name][index] = decoders[name].generate(
                used, batches[index], max_new_tokens=options.new_tokens, sampling=params, seed=index
            )

        return one_batch

    def prompts_alone(name: str) -> Callable[[int], None]:
        def one_batch(index: int) -> None:
            decoders[name].generate(used, batches[index], max_new_tokens=1, sampling=params, seed=index)

        return one_batch

    if isinstance(used, CompiledModel):
        for decoder in decoders.values():
            if isinstance(decoder, AutoregressiveDecoder | SpeculativeDecoder):
                warm_up(used, decoder, sampling=params)
    sides = {name: run(name) for name in decoders}
    sides |= {f"{name}, prompts": prompts_alone(name) for name in decoders}
    seconds = alternate(sides, len(batches), options.repeats)
    title = f"{len(prompts)} held-out prompts x {options.new_tokens} tokens, batch {options.batch}"
    title += f", {options.dtype}" + how_it_runs(options) + (", frozen" if options.freeze else "")
    table = Table(title=f"{title}, temperature {options.temperature}, one thread, CPU time")
    columns = (
        "decoding",
        "tokens/s",
        "tokens a forward",
        "speed-up",
        "share",
        "without prompts",
        "share",
        "equal outputs",
    )
    for column in (*columns, "acceptance by depth"):
        table.add_column(column, justify="right")
    plain = [tokens for g in found["plain"].values() for tokens in g.tokens]
    for name, by_batch in found.items():
        generations = list(by_batch.values())
        rate, rate_of_rounds, acceptance = pooled(generations)
        outputs = [tokens for g in generations for tokens in g.tokens]
        same = sum(tokens == p for tokens, p in zip(outputs, plain, strict=True))
        ratio = statistics.median(a / b for a, b in zip(seconds["plain"], seconds[name], strict=True))
        plain_rounds, rounds = (
            [a - b for a, b in zip(seconds[side], seconds[f"{side}, prompts"], strict=True)] for side in ("plain", name)
        )
        of_rounds = statistics.median(a / b for a, b in zip(plain_rounds, rounds, strict=True))
        table.add_row(
            name,
            f"{sum(len(p) for p in plain) / statistics.median(seconds[name]):.0f}",
            f"{rate:.2f}",
            f"{ratio:.2f}x",
            f"{ratio / rate:.0%}",
            f"{of_rounds:.2f}x",
            f"{of_rounds / rate_of_rounds:.0%}",
            f"{same}/{len(prompts)}",
            " ".join(f"{share:.0%}" for share in acceptance),
        )
    console.print(table)
    if options.hugging_face:
        compare_with_hugging_face(model, prompts[: options.hugging_face], options, console)


def compare_with_hugging_face(
    model: MTPModel, prompts: list[list[int]], options: argparse.Namespace, console: Console
) -> None:
    """Print ratios to ``generate``, plain and with its prompt look-up."""
    twin = hugging_face_twin(model)
    if twin is None:
        console.print("transformers is not installed: no comparison with Hugging Face (pip install -e '.[benchmark]')")
        return
    ours: DecodableModel = without_previous_tokens(model)
    with_heads: DecodableModel = model
    if options.compile:
        ours, with_heads = (as_graphs(part, options, {1}) for part in (ours, model))
    new_tokens = options.new_tokens
    outputs: dict[str, dict[int, list[int]]] = {}

    def side(name: str, decoder: Decoder, of: DecodableModel) -> Callable[[int], None]:
        def one(index: int) -> None:
            tokens = decoder.generate(of, [prompts[index]], max_new_tokens=new_tokens).tokens[0]
            outputs.setdefault(name, {})[index] = tokens

        return one

    def theirs(name: str, **kwargs: int) -> Callable[[int], None]:
        def one(index: int) -> None:
            given = torch.tensor([prompts[index]])
            tokens = twin.generate(given, max_new_tokens=new_tokens, do_sample=False, **kwargs)[0, given.shape[1] :]
            outputs.setdefault(name, {})[index] = tokens.tolist()

        return one

    sides = {
        "ours": side("ours", AutoregressiveDecoder(), ours),
        "our lookup": side("our lookup", SpeculativeDecoder(drafter=PromptLookup()), ours),
        "our heads": side("our heads", SpeculativeDecoder(), with_heads),
        "theirs": theirs("theirs"),
        "their lookup": theirs("their lookup", prompt_lookup_num_tokens=7),
    }
    seconds = alternate(sides, len(prompts), options.repeats)
    pairs = ("ours", "theirs"), ("our lookup", "their lookup"), ("our heads", "their lookup"), ("our heads", "theirs")
    for mine, other in pairs:
        ratio = statistics.median(b / a for a, b in zip(seconds[mine], seconds[other], strict=True))
        same = sum(outputs[mine][index] == outputs[other][index] for index in range(len(prompts)))
        console.print(
            f"{mine}{how_it_runs(options)} over {other} (Hugging Face, eager): {ratio:.2f}x; "
            f"equal outputs {same}/{len(prompts)}"
        )


if __name__ == "__main__":
    main()
