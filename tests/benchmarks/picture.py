"""Draw the README's picture from a checkpoint: decoded text coloured by who proposed it, and every head's accuracy.

python tests/benchmarks/picture.py --ckpt_path runs/quickstart --out picture.png
"""

import argparse

import matplotlib as mpl
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from mtp_modules import MTPModel, MultiTokenLoss, PerHeadMetrics, SpeculativeDecoder
from mtp_modules.data import TextDataModule
from mtp_modules.loading import load_model

COLUMNS, LINES = 74, 16


def draw_text(axes: Axes, model: MTPModel, prompt: list[int]) -> float:
    """Write the prompt and its continuation, one character a cell; return the tokens per forward pass."""
    cells = [(token, "0.55") for token in prompt]
    tokens = forwards = 0
    for done in SpeculativeDecoder().stream(model, [prompt], max_new_tokens=700):
        for index, token in enumerate(done.tokens[0]):
            cells.append((token, "#0a7d32" if index < done.accepted[0] else "#c2410c"))
        tokens, forwards = tokens + len(done.tokens[0]), forwards + 1
    row = column = 0
    for token, colour in cells:
        if token == 10 or column >= COLUMNS:
            row, column = row + 1, 0
        if row >= LINES:
            break
        if token != 10:
            axes.text(column, -row, chr(token), color=colour, family="monospace", fontsize=8.5)
            column += 1
    axes.set(xlim=(0, COLUMNS), ylim=(-LINES, 1))
    axes.axis("off")
    return tokens / forwards


@torch.inference_mode()
def accuracies(model: MTPModel, data: TextDataModule) -> tuple[list[float], float]:
    """Return every head's accuracy on held-out text, and the accepted length."""
    metrics, loss = PerHeadMetrics(num_horizons=len(model.horizons)), MultiTokenLoss().eval()
    data.setup("test")
    for batch in data.test_dataloader():
        metrics.update(loss(model, **batch))
    figures = metrics.compute()
    heads = [float(figures[f"accuracy/head_{h}"]) for h in model.horizons]
    return heads, float(figures["accepted_length"])


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt_path", default="runs/quickstart")
    parser.add_argument("--out", default="runs/quickstart/picture.png")
    parser.add_argument("--prompt", type=int, default=0, help="which held-out prompt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.ckpt_path)
    data = TextDataModule(
        sources=["stdlib"],
        window=256,
        lookahead=model.lookahead,
        batch_size=16,
        tokenizer=tokenizer,
        max_eval_windows=256,
    )
    prompt = data.prompts("test", options.prompt + 1, 96, seed=0)[options.prompt]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=[2.6, 1], layout="constrained")
    rate = draw_text(left, model, prompt)
    legend = f"grey: held-out prompt, green: accepted drafts, orange: the rest; {rate:.1f} bytes a forward pass"
    left.set_title(legend, fontsize=9, loc="left")
    heads, length = accuracies(model, data)
    right.bar(range(1, len(heads) + 1), [100 * value for value in heads], color="#0a7d32")
    right.set(xlabel="horizon (bytes ahead)", ylabel="top-1 accuracy, %", ylim=(0, 100))
    right.set_title(fontsize=9, label=f"real text: {length:.1f} bytes a verification")
    figure.savefig(options.out, dpi=130)


if __name__ == "__main__":
    main()
