"""Time and memory of tokenising text into a cache, against the tokenizer's own batch encoding.

Each of the two runs in a process of its own: ``python tests/benchmarks/tokenising.py --megabytes 1000``.
"""

import argparse
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mtp_modules.data import HuggingFaceTokenizer, TextFiles
from mtp_modules.data.shards import cached_streams

BATCH = 2**21


def make(folder: Path, megabytes: int) -> None:
    """Write copies of the standard library, each file with a number at its end, and train a tokenizer."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train([str(file) for file in files[:60]], trainer)
    fast.save(str(folder / "tokenizer.json"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    (folder / "texts").mkdir()
    left, number = megabytes * 1_000_000, 0
    while left > 0:
        text = f"{texts[number % len(texts)]}\n{number}"
        (folder / "texts" / f"{number:07}.txt").write_text(text, encoding="utf-8")
        left, number = left - len(text), number + 1


def alone(folder: Path) -> None:
    """Encode all texts in batches, and keep nothing; reading is not counted."""
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    batch: list[str] = []
    wall = cpu = size = 0.0
    for file in [*sorted((folder / "texts").iterdir()), None]:
        if file is not None:
            batch.append(file.read_text(encoding="utf-8"))
            size += len(batch[-1])
        if size >= BATCH or file is None:
            begun, worked = time.perf_counter(), time.process_time()
            fast.encode_batch_fast(batch, add_special_tokens=False)
            wall, cpu = wall + time.perf_counter() - begun, cpu + time.process_time() - worked
            batch, size = [], 0
    print(f"batch encoding alone: {wall:.1f} s, {cpu:.1f} s of CPU time")


def cached(folder: Path) -> None:
    """Tokenise into a cache."""
    tokenizer = HuggingFaceTokenizer(pretrained=str(folder / "tokenizer.json"))
    begun, worked = time.perf_counter(), time.process_time()
    source = TextFiles(paths=[str(folder / "texts")])
    cached_streams(folder / "cache", {"sources": [source]}, tokenizer, val_share=0.05, test_share=0.05)
    wall, cpu = time.perf_counter() - begun, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"into a cache: {wall:.1f} s, {cpu:.1f} s of CPU time, {peak:.0f} MiB at most")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--part", choices=["alone", "cached"])
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.part:
        {"alone": alone, "cached": cached}[given.part](given.folder)
    else:
        with tempfile.TemporaryDirectory() as name:
            make(Path(name), given.megabytes)
            for part in ("alone", "cached"):
                subprocess.run([sys.executable, __file__, "--part", part, "--folder", name], check=True)
