"""What users may pass as prompts, seeds and numbers, and what is refused in a sentence before any work."""

import re
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from mtp_modules import AutoregressiveDecoder, SpeculativeDecoder
from mtp_modules.decoders import DynamicTree, LookupOrHeads, SamplingParams, StaticTree
from mtp_modules.decoders.request import make_request
from mtp_modules.decoders.sampling.parameters import GREEDY
from tests.drafting import clock
from tests.helpers import make_model

TEXTS = [[1, 2, 3], [4]]
WORDS = {f"w{token}": token for token in range(11)}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel(WORDS, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")


FORMS: dict[str, Any] = {
    "tuples": tuple(map(tuple, TEXTS)),
    "tensors": [torch.tensor(text) for text in TEXTS],
    "arrays": [np.array(text, dtype=np.int32) for text in TEXTS],
    "numpy integers": [[np.int64(token) for token in text] for text in TEXTS],
    "a tokenizer's lists": {"input_ids": TEXTS},
    "padded on the right": {
        "input_ids": torch.tensor([[1, 2, 3], [4, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
    },
    "padded on the left": {
        "input_ids": np.array([[1, 2, 3], [0, 0, 4]]),
        "attention_mask": np.array([[1, 1, 1], [0, 0, 1]]),
    },
    "a real tokenizer's output": tokenizer()(["w1 w2 w3", "w4"], padding=True, return_tensors="pt"),
    "encodings": tokenizer().backend_tokenizer.encode_batch(["w1 w2 w3", "w4"]),
}


@pytest.mark.parametrize("name", FORMS)
def test_prompts_come_in_many_forms(name: str) -> None:
    model = clock(3)
    wanted = SpeculativeDecoder().generate(model, TEXTS, max_new_tokens=4).tokens
    assert SpeculativeDecoder().generate(model, FORMS[name], max_new_tokens=4).tokens == wanted


@pytest.mark.parametrize("prompts", [torch.tensor([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]], dtype=np.uint16)])
def test_a_rectangle_is_a_prompt_a_row(prompts: Any) -> None:
    wanted = AutoregressiveDecoder().generate(clock(1), [[1, 2], [3, 4]], max_new_tokens=3).tokens
    assert AutoregressiveDecoder().generate(clock(1), prompts, max_new_tokens=3).tokens == wanted


def test_a_single_text_of_a_tokenizer_is_one_prompt() -> None:
    generation = AutoregressiveDecoder().generate(clock(1), tokenizer()("w1 w2"), max_new_tokens=3)
    assert generation.tokens == [[3, 4, 5]]


def test_numbers_come_as_numpy_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no checks of types
    model, params = make_model("gru", "recurrent", 3), SamplingParams(temperature=1.5, top_k=np.int64(7))
    asked = {"max_new_tokens": 9, "sampling": params}
    wanted = SpeculativeDecoder().generate(model, [[1], [2]], seed=3, **asked).tokens
    asked["max_new_tokens"] = np.int64(9)
    assert SpeculativeDecoder().generate(model, [[1], [2]], seed=np.uint8(3), **asked).tokens == wanted
    assert SpeculativeDecoder().generate(model, [[1], [2]], seed=np.array([3, 4]), **asked).tokens == wanted
    assert SpeculativeDecoder().generate(model, [[1], [2]], seed=torch.tensor(3), **asked).tokens == wanted


def test_all_seeds_of_64_bits_are_different() -> None:
    model, seeds = make_model("gru", "linear", 1), [0, 1, 2**63 - 1, 2**63, 2**64 - 1]
    asked = {"max_new_tokens": 20, "sampling": SamplingParams(temperature=2.0)}
    found = AutoregressiveDecoder().generate(model, [[1]] * len(seeds), seed=seeds, **asked).tokens
    assert len({tuple(tokens) for tokens in found}) == len(seeds)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a number as a tensor": (
        {"prompts": torch.tensor(5)},
        "generate: prompts must be lists of token ids, got the numb",
    ),
    "no texts tokenized": ({"prompts": {"input_ids": [], "attention_mask": []}}, "generate: prompts is empty; give at"),
    "no ids at all": ({"prompts": {"input_ids": None}}, "generate: prompts must be lists of token ids, got NoneType;"),
    "a short mask": (
        {"prompts": {"input_ids": [[1, 2]], "attention_mask": [[1]]}},
        "generate: attention_mask must be of the same shape as input_ids; tokenize both together.",
    ),
    "an id beyond 63 bits": (
        {"prompts": np.array([[2**63 + 1]], dtype=np.uint64)},
        "generate: token 4611686018427387904 is outside the vocabulary 0..10;",
    ),
    "a flat list": ({"prompts": [1, 2]}, "generate: prompts is a flat list of token ids; give a list of prompts"),
    "a flat tensor": ({"prompts": torch.tensor([1, 2])}, "generate: prompts is a flat list of token ids"),
    "an empty tensor": ({"prompts": torch.zeros(0, 3)}, "generate: prompts is empty; give at least one."),
    "floats": (
        {"prompts": [[1.0, 2.0]]},
        "generate: prompt 0 must hold token ids, which are whole numbers, got torch.f",
    ),
    "a float among ids": ({"prompts": [[1], [1, 2.5]]}, "generate: prompt 1 must hold token ids, which are whole"),
    "booleans": (
        {"prompts": [[True]]},
        "generate: prompt 0 must hold token ids, which are whole numbers, got torch.bool",
    ),
    "text": ({"prompts": "w1"}, "generate: prompts must be lists of token ids, got str; encode texts first."),
    "texts": ({"prompts": ["w1"]}, "generate: prompt 0 is text, got 'w1'; encode it with the model's tokenizer."),
    "a number": ({"prompts": 5}, "generate: prompts must be lists of token ids, got int; encode texts first."),
    "no ids": ({"prompts": {"tokens": [[1]]}}, "generate: prompts is a mapping without input_ids, got the keys ['tok"),
    "nested lists": ({"prompts": [[[1, 2]]]}, "generate: prompt 0 must be a list of token ids, got 2 dimensions."),
    "a ragged nest": (
        {"prompts": [[[1], [2, 3]]]},
        "generate: prompt 0 must be a list of token ids, got [[1], [2, 3]].",
    ),
    "half a token": ({"max_new_tokens": 2.5}, "generate: max_new_tokens must be a whole number, got 2.5."),
    "a seed of text": ({"seed": "7"}, "generate: seed must be a whole number, got '7'."),
    "a seed of 65 bits": (
        {"seed": 2**64},
        "generate: the seed of every row must lie in -2**63..2**64-1, got 184467440737",
    ),
    "another rule": ({"stop": 5}, "generate: stop must be made of StopRule, got 5."),
    "other parameters": ({"sampling": 0.7}, "generate: sampling must be made of SamplingParams, got 0.7."),
}


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_any_work(arguments: dict[str, Any], sentence: str) -> None:
    asked = {"prompts": [[1]], "max_new_tokens": 3, "stop": None, "sampling": GREEDY, "seed": 0} | arguments
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        make_request(clock(3), **asked)


def test_a_model_in_training_mode_is_refused() -> None:
    model = clock(3)
    for part in ("trunk", "heads"):
        model.eval()
        getattr(model, part).train()
        sentence = rf"^generate: {type(getattr(model, part)).__name__} is in training mode, .*; call model\.eval\(\)\.$"
        with pytest.raises(ValueError, match=sentence):
            AutoregressiveDecoder().stream(model, [[1]], max_new_tokens=3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"tree": StaticTree(widths=[12])},
            "StaticTree: a token gets 12 children, but the vocabulary has only 11 tokens; make the tree narrower.",
        ),
        (
            {"tree": DynamicTree(depth=2, width=12)},
            "DynamicTree: a token gets 12 children, but the vocabulary has only 11 tokens; make the tree narrower.",
        ),
        ({"tree": DynamicTree(depth=3)}, "LinearHeads: num_drafts must lie in 1..2 for 3 horizons, got 3."),
        (
            {"drafter": LookupOrHeads(num_drafts=3)},
            "LookupOrHeads: num_drafts=3 is more than the 2 that LinearHeads can draft; lower it.",
        ),
    ],
)
def test_drafts_that_the_model_does_not_have_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        SpeculativeDecoder(**options).stream(clock(3), [[1]], max_new_tokens=3)
