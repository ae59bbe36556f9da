"""Serve exported folders with vLLM, each in a process of its own; imports nothing of this package.

``python -m tests.engines.serve JOBS RESULTS``: vLLM is imported once, and the process forks for every job.
"""

import argparse
import json
import os
import shlex
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
ACCEPTED, ROUNDS = "vllm:spec_decode_num_accepted_tokens_per_pos", "vllm:spec_decode_num_drafts"


def options(command: str) -> dict[str, Any]:
    """Return the arguments of ``LLM`` that a command line of ``vllm serve`` stands for.

    Args:
        command: As ``export`` prints it.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("program", choices=["vllm"])
    parser.add_argument("action", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--dtype")
    parser.add_argument("--speculative-config", type=json.loads)
    return {name: value for name, value in vars(parser.parse_args(shlex.split(command))).items() if name in _TAKEN}


_TAKEN = ("model", "dtype", "speculative_config")


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """Load a folder and generate what a job asks for.

    Args:
        job: With ``command``, ``prompts``, ``max_tokens``; ``generate`` is false if loading is all; ``samples`` is the
            number of samples after the first prompt; ``mended`` names a function of :data:`MENDS`, or nothing.
    """
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(1)
    if job["mended"]:
        MENDS[job["mended"]]()
    llm = LLM(
        **options(job["command"]),
        enforce_eager=True,
        disable_log_stats=False,
        enable_prefix_caching=False,
        max_model_len=512,
        seed=0,
    )
    result: dict[str, Any] = {"loads": True}
    if not job["generate"]:
        return result
    greedy = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    made = llm.generate(prompts, greedy, use_tqdm=False)
    result["tokens"] = [list(each.outputs[0].token_ids) for each in made]
    found = {metric.name: metric for metric in llm.get_metrics()}
    if "--speculative-config" in job["command"]:
        result["rounds"], result["accepted"] = found[ROUNDS].value, list(found[ACCEPTED].values)
    if job["samples"]:
        sampled = SamplingParams(temperature=1.0, max_tokens=3, detokenize=False, ignore_eos=True, seed=None)
        many = llm.generate(prompts[:1] * job["samples"], sampled, use_tqdm=False)
        counts = [Counter(each.outputs[0].token_ids[place] for each in many) for place in range(3)]
        result["sampled"] = [{str(token): count for token, count in counter.items()} for counter in counts]
    return result


def mend_temperatures() -> None:
    """Give each draft the temperature of its request, which vLLM 0.32 converts, writes, and throws away on a CPU."""
    import torch
    from vllm.utils import cpu_triton_utils

    def expand(output: Any, of_requests: Any, ends: Any, replaced: Any, by: Any, _: Any) -> None:
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
        values = torch.where(of_requests == replaced, torch.full_like(of_requests, by), of_requests)
        output.copy_(values.repeat_interleave(counts))

    cpu_triton_utils._expand_kernel_impl = expand


def mend_gains() -> None:
    """Normalise the keys of a context with the gains of their layer; vLLM 0.32 takes the first layer's on a CPU."""
    import torch
    from vllm import _custom_ops
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    def normalised(self: Any, keys: Any) -> Any:
        every = torch.empty_like(keys)
        for out, of_layer, gains in zip(every, keys, self._k_norm_weights, strict=True):
            _custom_ops.rms_norm(out, of_layer, gains, self._rms_norm_eps)
        return every

    DFlashQwen3Model._normalize_context_k = normalised


MENDS = {"temperatures": mend_temperatures, "gains": mend_gains}
"""What mends a fault of the engine."""


def main() -> None:
    """Read the jobs, fork for each, and write what they resulted in."""
    jobs, out = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    import vllm
    from vllm import LLM  # noqa: F401  # imported before the fork, it is there in every child

    results: dict[str, Any] = {"version": vllm.__version__}
    for name, job in jobs.items():
        print(f"vLLM: {name}", flush=True)
        file = out.with_suffix(f".{len(results)}.json")
        child = os.fork()
        if child == 0:
            try:
                os.environ.update(job["environment"])
                result = serve(job)
            except BaseException:
                result = {"loads": False, "error": traceback.format_exc()}
            file.write_text(json.dumps(result), encoding="utf-8")
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        results[name] = json.loads(file.read_text(encoding="utf-8"))
    out.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
