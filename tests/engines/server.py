"""Serve a folder through vLLM's OpenAI-compatible server, and ask it for text."""

import json
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.engines.serve import QUIET

PORT = 8417
_WAIT = 300


def complete(command: str, prompt: str, max_tokens: int, log: Path) -> str:
    """Return the greedy continuation of a text by a server that is started with a command of ``export``.

    The ``vllm`` program of the build for CPUs does not start, the module behind it does. The texts go to this machine.

    Args:
        command: As ``export`` prints it.
        prompt: The text.
        max_tokens: How many tokens to generate.
        log: File for what the server prints.

    Raises:
        RuntimeError: If the server ends, or does not answer in time.
    """
    words = shlex.split(command)
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", *words[2:], "--enforce-eager"]
    environment = {**os.environ, **{name: value for name, value in QUIET.items() if "MULTIPROCESSING" not in name}}
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(
            [sys.executable, *arguments, "--max-model-len", "512", "--host", "127.0.0.1", "--port", str(PORT)],
            env=environment,
            stdout=output,
            stderr=output,
        )
        try:
            _wait(server, log)
            body = {"model": words[2], "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0}
            request = urllib.request.Request(
                f"http://127.0.0.1:{PORT}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=_WAIT) as answer:
                text: str = json.load(answer)["choices"][0]["text"]
                return text
        finally:
            server.terminate()
            server.wait(60)


def _wait(server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return when the server answers."""
    for _ in range(_WAIT):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended; see {log}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise RuntimeError(f"the server did not answer within {_WAIT} s; see {log}")
