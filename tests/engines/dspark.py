"""Draft once with vLLM's DSpark model, which no model runner of its build for CPUs drafts with.

``python -m tests.engines.dspark JOBS RESULTS``: vLLM's loader reads every folder, and vLLM's modules compute the drafts
after a text whose features are given. Only attention is computed here, because vLLM's needs a runner. Nothing of this
package is imported.
"""

import argparse
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from tests.engines.serve import QUIET, mend_gains, options


def plain_attention(of: Any, causal: bool) -> Any:
    """Return a module that stands for vLLM's attention: it keeps what is written to the cache, and attends to it.

    Args:
        of: vLLM's attention of one layer.
        causal: Whether the slots of a block attend to earlier ones only.
    """
    import torch

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kv_cache, self.context = None, ()

        @property
        def impl(self) -> "Attention":
            return self

        def do_kv_cache_update(self, layer: Any, keys: Any, values: Any, cache: Any, slots: Any) -> None:
            self.context = keys, values

        def forward(self, queries: Any, keys: Any, values: Any) -> Any:
            count, before = len(queries), len(self.context[0])
            queries, keys, values = (part.view(count, -1, of.head_size) for part in (queries, keys, values))
            keys, values = torch.cat((self.context[0], keys)), torch.cat((self.context[1], values))
            groups = queries.shape[1] // keys.shape[1]
            scores = torch.einsum("qhd,khd->hqk", queries, keys.repeat_interleave(groups, 1)) * of.head_size**-0.5
            if causal:
                scores += torch.full((count, before + count), -torch.inf).triu(before + 1)
            return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.repeat_interleave(groups, 1)).flatten(1)

    return Attention()


def drafts(job: dict[str, Any], meeting_point: str) -> dict[str, Any]:
    """Load a folder, and return its greedy drafts after a text.

    Args:
        job: With ``command``, the trunk's ``features`` of the text, the ``token`` after it, the ``count`` of drafts.
        meeting_point: File for the distributed environment.
    """
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.worker.gpu.spec_decode.dspark.utils import load_dspark_model
    from vllm.v1.worker.gpu.spec_decode.utils import get_parallel_drafting_token_id

    torch.set_num_threads(1)
    mend_gains()
    VllmConfig._get_v1_model_runner_unsupported_features = lambda _: []  # it would reject DSpark: nothing runs here
    torch.accelerator.empty_cache = lambda: None  # raises without an accelerator
    config = EngineArgs(**options(job["command"]), enforce_eager=True, max_model_len=512).create_engine_config()
    with set_current_vllm_config(config), torch.inference_mode():
        init_distributed_environment(1, 0, f"file://{meeting_point}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = load_dspark_model(get_model(vllm_config=config), config)
        inner, found = model.model, config.speculative_config.draft_model_config.hf_config
        for layer in inner.layers:
            layer.self_attn.attn = plain_attention(layer.self_attn.attn, layer.self_attn.causal)
        inner._attn_layers = [layer.self_attn.attn for layer in inner.layers]
        context = model.combine_hidden_states(torch.tensor(job["features"]))
        places, count = torch.arange(len(context) + job["count"] + 1), job["count"]
        model.precompute_and_store_context_kv(context, places[: len(context)], places[: len(context)])
        from_anchor = getattr(found, "sample_from_anchor", True)
        block = [job["token"]] + [get_parallel_drafting_token_id(found)] * (count - 1 if from_anchor else count)
        states = model(torch.tensor(block), places[len(context) :][: len(block)])[-count:]
        token, tokens, logits, confidence = torch.tensor([job["token"]]), [], [], []
        for state in states.split(1):
            factors = model.markov_embed(token)
            logits.append(model.compute_draft_logits(state) + model.markov_bias(factors))
            token = model.map_draft_to_target(logits[-1].argmax(-1))
            tokens.append(int(token))
            if inner.confidence_head is not None:
                confidence.append(float(model.compute_confidence(state, factors)))
    return {"tokens": tokens, "logits": torch.cat(logits).tolist(), "confidence": confidence}


def main() -> None:
    """Read the jobs, and write what they resulted in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("results", type=Path)
    given = parser.parse_args()
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    import vllm

    results: dict[str, Any] = {"version": vllm.__version__}
    for name, job in json.loads(given.jobs.read_text(encoding="utf-8")).items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                results[name] = {"loads": True} | drafts(job, f"{folder}/meet")
        except BaseException:
            results[name] = {"loads": False, "error": traceback.format_exc()}
    given.results.write_text(json.dumps(results), encoding="utf-8")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
