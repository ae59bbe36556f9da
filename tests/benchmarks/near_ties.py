"""How often rounding decides: greedy tokens of one-token passes beside those of longer chunks, in each precision.

In exact arithmetic a chunk of positions says what single positions say. In floating point they add up in different
orders, so where the two best tokens are nearly tied, the argmax can be another one.

    python tests/benchmarks/near_ties.py --ckpt_path runs/quickstart
"""

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mtp_modules import AutoregressiveDecoder, MTPModel, SpeculativeDecoder
from mtp_modules.data import TextDataModule
from mtp_modules.loading import load_model

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@torch.inference_mode()
def read(model: MTPModel, texts: Tensor, prompt_length: int, chunk: int) -> Tensor:
    """Return the logits of every position behind the prompts, which are read in chunks of this length."""
    states = model.trunk.new_state(len(texts), texts.shape[1]), model.heads.new_state(len(texts), texts.shape[1])
    found = []
    for part in (texts[:, :prompt_length], *texts[:, prompt_length:].split(chunk, dim=1)):
        output, embed = model.trunk(part, state=states[0]), model.trunk.embedding
        given = model.heads.features_of(output)
        first = model.heads.extend(output.hidden, states[1], tokens=part, embed=embed, **given)
        found.append(model.unembedding.logits(first))
        for state in states:
            state.commit([part.shape[1]] * len(texts))
    return torch.cat(found[1:], dim=1).double()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", default="runs/quickstart")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--num_drafts", type=int, nargs="*", default=[1, 3, 7])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.ckpt_path)
    data = TextDataModule(sources=["stdlib"], window=256, lookahead=model.lookahead, batch_size=8, tokenizer=tokenizer)
    prompts: Sequence[Sequence[int]] = data.prompts("test", options.prompts, options.prompt_length, seed=0)
    table = Table(title=f"{len(prompts)} held-out prompts x {options.new_tokens} tokens")
    for column in ("precision", "drafts", "largest difference of a logit", "other argmax", "other outputs"):
        table.add_column(column, justify="right")
    for name, dtype in DTYPES.items():
        model = model.to(dtype)
        plain = AutoregressiveDecoder().generate(model, prompts, max_new_tokens=options.new_tokens).tokens
        texts = torch.tensor([[*prompt, *new] for prompt, new in zip(prompts, plain, strict=True)])
        single = read(model, texts, options.prompt_length, 1)
        for num_drafts in options.num_drafts:
            chunked = read(model, texts, options.prompt_length, num_drafts + 1)
            others = single.argmax(dim=-1) != chunked.argmax(dim=-1)
            decoder = SpeculativeDecoder(num_drafts=num_drafts)
            fast = decoder.generate(model, prompts, max_new_tokens=options.new_tokens).tokens
            parted = sum(one != other for one, other in zip(plain, fast, strict=True))
            table.add_row(
                name,
                str(num_drafts),
                f"{float((single - chunked).abs().max()):.1e}",
                f"{int(others.sum())} of {others.numel()} ({float(others.double().mean()):.3%})",
                f"{parted} of {len(prompts)}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
