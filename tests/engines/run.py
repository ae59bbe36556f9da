"""Train tiny models, export them, serve every folder unedited with vLLM, compare, and write the table of the docs.

``python -m tests.engines.run --folder FOLDER``: what was trained there before is not trained again. Ends with status 1
if a reader loads what it should not, or fails to, or gives other tokens or accepts other drafts than this package.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

from mtp_modules.loading import load_model
from tests.engines.models import CASES, SHIPPED, command, train
from tests.engines.ours import PROMPTS, Ours, decode, distance, distributions, drafted
from tests.engines.server import complete

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/interop.md"
BEGIN, END = "<!-- engines: begin -->", "<!-- engines: end -->"
NEW, STEPS, SAMPLES = 64, 200, 3000
LOADED_ONLY = {"deepseek": {"VLLM_MLA_DISABLE": "1"}}
"""What vLLM loads on a CPU but cannot compute: its latent attention there has fixed widths. And how it is loaded."""
OTHER_GAINS = ("dflash",)
"""Drafters that vLLM computes otherwise on a CPU: their tokens must be ours, their accepted drafts only once mended."""
CLOSE = 1e-4
"""How far logits of the same weights may be apart in float32."""
SERVED = {"eagle3": ("eagle3",), "serve_qwen": ("qwen",), "retrofit_eagle3": ("eagle3",)}
"""Models that the server is asked for text from, and their formats."""
BYTES = [list(prompt.encode()) for prompt in PROMPTS]
SAMPLED = "medusa"
WITH_DRAFTS = f"{SAMPLED}, {SAMPLED}"
WITHOUT_DRAFTS, MENDED = f"{SAMPLED}, without drafts", f"{SAMPLED}, temperatures mended"


def export(run: Path, format: str) -> tuple[Path, str | None]:
    """Export a trained model through the command line; return the folder and the command that serves it.

    Args:
        run: Folder of the run.
        format: Name of the format.
    """
    out = Path(tempfile.mkdtemp(dir=run.parent)) / f"{run.name}-{format}"
    said = command("export", format, "--ckpt_path", run, "--out", out)
    print(said, end="", flush=True)
    last = said.splitlines()[-1]
    return out, last.removeprefix("Next: ") if last.startswith("Next: ") else None


def row(format: str, model: str, engine: str, loads: str, equal: str, theirs: str, ours: str) -> str:
    """Return a row of the table."""
    cells = (f"`{format}`", model, engine, date.today().isoformat(), loads, equal, theirs, ours)
    return "| " + " | ".join(cells) + " |"


def counts(accepted: list[int], rounds: int) -> str:
    """Return accepted drafts by depth, of how many rounds."""
    return f"{', '.join(map(str, accepted))} of {rounds}"


def judge(name: str, format: str, result: dict[str, Any], ours: Ours | None, engine: str) -> tuple[str, list[str]]:
    """Return a row of the table, and what is wrong."""
    label = f"{name}, {format}"
    if not result["loads"]:
        return row(format, name, engine, "no", "", "", ""), [f"{label}: not loaded\n{result['error']}"]
    if ours is None:
        return row(format, name, engine, "yes", "not run", "", ""), []
    same = result["tokens"] == ours.tokens
    theirs = (result["accepted"], result["rounds"])
    wrong = [] if same else [f"{label}: other tokens than plain greedy decoding"]
    if theirs != (ours.accepted, ours.rounds) and name not in OTHER_GAINS:
        wrong.append(f"{label}: accepted {theirs}, ours {(ours.accepted, ours.rounds)}")
    given = (counts(*theirs), counts(ours.accepted, ours.rounds))
    return row(format, name, engine, "yes", "all" if same else "no", *given), wrong


def write_table(rows: list[str], said: str) -> None:
    """Put the table, and what was sampled, between the markers."""
    text = PAGE.read_text(encoding="utf-8")
    head = (
        "| format | model | engine | date | loads | tokens equal | accepted by depth | ours, drafting as it does |",
        "|---|---|---|---|---|---|---|---|",
    )
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text("\n".join((before + BEGIN, "", *head, *rows, "", said, "", END + after)), encoding="utf-8")


def main() -> None:
    """Do all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="where models are trained, and kept")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each model")
    every = [*CASES, *SHIPPED]
    parser.add_argument("--models", nargs="*", default=every, help="some of the models; the table is not written")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp())
    jobs: dict[str, dict[str, Any]] = {}
    expected: dict[str, tuple[str, str, Ours | None]] = {}
    texts: dict[str, str] = {}
    commands: dict[str, str] = {}
    drafts: dict[str, Path] = {}
    alone: dict[str, dict[str, Any]] = {}
    for name in given.models:
        print(f"training {name}", flush=True)
        run = train(name, folder, given.steps)
        model, tokenizer = load_model(run)
        assert tokenizer is not None
        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
        for format in CASES[name].formats if name in CASES else (SHIPPED[name],):
            ours = decode(model, prompts, NEW, format)
            out, serves = export(run, format)
            if serves is None:
                drafts[name] = out
                continue
            if format == "dspark":
                alone[name] = {"command": serves} | drafted(model, prompts[0])
                continue
            label, loaded_only = f"{name}, {format}", format in LOADED_ONLY
            expected[label] = (name, format, None if loaded_only else ours)
            commands[label] = serves
            if format in SERVED.get(name, ()):
                texts[label] = tokenizer.decode(ours.tokens[0])
            jobs[label] = {
                "command": serves,
                "prompts": prompts,
                "max_tokens": NEW,
                "generate": not loaded_only,
                "samples": SAMPLES if label == WITH_DRAFTS else 0,
                "environment": LOADED_ONLY.get(format, {}),
                "mended": "",
            }
            if name in OTHER_GAINS:
                expected[f"{label}, mended"] = (f"{name}, mended", format, ours)
                jobs[f"{label}, mended"] = jobs[label] | {"mended": "gains"}
    if WITH_DRAFTS in jobs:
        without = commands[WITH_DRAFTS].partition(" --speculative-config")[0]
        jobs[WITHOUT_DRAFTS] = jobs[WITH_DRAFTS] | {"command": without}
        jobs[MENDED] = jobs[WITH_DRAFTS] | {"mended": "temperatures"}
    results = serve(jobs, folder)
    rows, wrong = [], []
    for label, (name, format, known) in expected.items():
        made, found = judge(name, format, results[label], known, f"vLLM {results['version']}")
        rows.append(made)
        wrong += found
    if alone:
        made_alone, found = check_dspark(alone, folder)
        rows += made_alone
        wrong += found
    for name, out in drafts.items():
        made, found = check_speculators(name, out, folder, BYTES)
        rows.append(made)
        wrong += found
    said = ""
    if WITH_DRAFTS in jobs:
        said, found = check_samples(results, folder, BYTES[0])
        wrong += found
    wrong += check_server(commands, texts, folder)
    print("\n".join((*rows, said)), flush=True)
    if given.models == every and not wrong:
        write_table(rows, said)
    if wrong:
        sys.exit("\n".join(wrong))


def serve(jobs: dict[str, Any], folder: Path, module: str = "serve") -> dict[str, Any]:
    """Run vLLM on all jobs, in a process that has nothing of this package."""
    asked, answered = folder / f"jobs-{module}.json", folder / f"results-{module}.json"
    asked.write_text(json.dumps(jobs), encoding="utf-8")
    subprocess.run([sys.executable, "-m", f"tests.engines.{module}", str(asked), str(answered)], cwd=ROOT, check=True)
    found: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    return found


def check_speculators(name: str, out: Path, folder: Path, prompts: list[list[int]]) -> tuple[str, list[str]]:
    """Load a draft model with speculators, which finds the verifier beside it, and compare all logits with ours."""
    from importlib.metadata import version

    import torch
    from speculators.models.mtp import MTPDraftModel

    model, theirs = load_model(folder / name)[0], MTPDraftModel.from_pretrained(out).eval()
    furthest = 0.0
    with torch.no_grad():
        for prompt in prompts:
            tokens = torch.tensor([prompt])
            states, (logits, _, _) = model(tokens), theirs(tokens, model.trunk(tokens).hidden)
            for index, (state, other) in enumerate(zip(states[1:], logits, strict=True), 1):
                ours = model.unembedding.logits(state, index)
                furthest = max(furthest, (other[:, : ours.shape[1]] - ours).abs().max().item())
    equal = furthest < CLOSE
    engine = f"speculators {version('speculators')}"
    made = row("speculators", name, engine, "yes", "logits" if equal else "no", "", "")
    return made, [] if equal else [f"{name}, speculators: logits differ by {furthest}"]


def check_dspark(jobs: dict[str, dict[str, Any]], folder: Path) -> tuple[list[str], list[str]]:
    """Compare the drafts that vLLM's DSpark model makes after a prompt with ours; return rows, and what is wrong."""
    results = serve(jobs, folder, "dspark")
    rows, wrong = [], []
    for name, job in jobs.items():
        theirs, ours, engine = results[name], job["ours"], f"modules of vLLM {results['version']}"
        if not theirs["loads"]:
            rows.append(row("dspark", name, engine, "no", "", "", ""))
            wrong.append(f"{name}, dspark: not loaded\n{theirs['error']}")
            continue
        numbers = [[*chain(*made["logits"]), *made["confidence"]] for made in (theirs, ours)]
        furthest = max(abs(one - other) for one, other in zip(*numbers, strict=True))
        equal = theirs["tokens"] == ours["tokens"] and furthest < CLOSE
        rows.append(row("dspark", name, engine, "yes", "logits" if equal else "no", "", ""))
        wrong += [] if equal else [f"{name}, dspark: other drafts than ours"]
    return rows, wrong


def check_samples(results: dict[str, Any], folder: Path, prompt: list[int]) -> tuple[str, list[str]]:
    """Compare samples with the exact distributions of the first two tokens; return a sentence, and what is wrong.

    No draft stands behind the first token. That the engine as it is samples from another distribution with drafts is
    reported; it must not without drafts, or where its fault is mended.
    """
    exact = distributions(load_model(folder / SAMPLED)[0], prompt)
    parts, wrong = [], []
    cases = ((WITHOUT_DRAFTS, "without drafts"), (WITH_DRAFTS, "with drafts"), (MENDED, "with drafts, mended"))
    for label, how in cases:
        if "sampled" not in results[label]:
            wrong.append(f"{label}: nothing was sampled\n{results[label]['error']}")
            continue
        for place in range(2):
            statistic, limit = distance(results[label]["sampled"][place], exact[place])
            parts.append(f"| {how} | {place + 1} | {statistic:.1f} | {limit:.1f} |")
            if statistic > limit and label != WITH_DRAFTS:
                wrong.append(f"{label}: token {place + 1} has another distribution")
    head = (
        f"| {SAMPLES:,} samples of `{SAMPLED}` | token | Pearson's statistic | at most, by chance |",
        "|---|---|---|---|",
    )
    return "\n".join((*head, *parts)), wrong


def check_server(commands: dict[str, str], texts: dict[str, str], folder: Path) -> list[str]:
    """Compare the text of the OpenAI-compatible server with ours."""
    wrong = []
    for label, ours in texts.items():
        text = complete(commands[label], PROMPTS[0], NEW, folder / "server.log")
        print(f"served: {text!r}", flush=True)
        if text != ours:
            wrong.append(f"{label}: the server says {text!r}, we say {ours!r}")
    return wrong


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    main()
