"""What a stop rule may be given, and which strings it accepts."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from mtp_modules.data import ByteTokenizer
from mtp_modules.decoders import StopRule
from mtp_modules.decoders.sampling.stopping import _ids
from tests.small_tokenizers import small_tokenizer


@pytest.mark.parametrize("given", [2.5, None, True, np.bool_(False), np.float32(2.0)], ids=repr)
def test_what_is_no_token_is_refused(given: Any) -> None:
    sentence = f"StopRule: tokens must be token ids, got {given!r}; give a list of whole numbers."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        _ids(StopRule(), given)


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (5, {5}),
        (np.int64(5), {5}),
        ([], set()),
        ((3, 5, 3), {3, 5}),
        ({3, np.uint16(5)}, {3, 5}),
        (np.array([3, 5]), {3, 5}),
        (torch.tensor([3, 5]), {3, 5}),
        (range(2), {0, 1}),
    ],
    ids=repr,
)
def test_tokens_may_be_given_in_any_form(given: Any, ids: set[int]) -> None:
    found = StopRule(tokens=given).tokens
    assert found == ids
    assert {type(token) for token in found} <= {int}


def test_a_single_string_is_one_string() -> None:
    rule = StopRule(strings="end", tokenizer=ByteTokenizer())
    assert rule.strings == ("end",)
    matcher = rule.new()
    assert [matcher.ends(token) for token in b"ende"] == [False, False, True, False]


WRITABLE = [
    ("bytes", "e\u0301"),
    ("words", " dog"),
    ("words", "dog "),
    ("words", "og. The c"),
    ("words", "ark"),
    ("byte-level-around", "cats"),
    ("byte-level-around", " é→😀"),
    ("fallback-bpe-around", "dog"),
    ("fallback-bpe-around", "x  é"),
    ("fallback-unigram", "\n→ dog"),
    ("unigram-around", "ing the"),
    ("unigram", "</s>"),
    ("word-level-around", "the dog"),
    ("word-level", "t 12 <"),
    ("word-piece-around", "barkings"),
    ("word-piece", "king d"),
]
UNWRITABLE = [
    ("words", "thedog"),
    ("words", "  "),
    ("words", " ."),
    ("unigram-around", "→"),
    ("word-level-around", "catran"),
    ("word-level", "\n"),
    ("word-piece", "cat  dog"),
    ("bytes", "\ud83d"),
    ("byte-level", "\ud83d"),
]


@pytest.mark.parametrize(("kind", "string"), WRITABLE, ids=ascii)
def test_a_string_that_can_come_out_is_accepted(kind: str, string: str) -> None:
    assert StopRule(strings=[string], tokenizer=small_tokenizer(kind)).strings == (string,)


@pytest.mark.parametrize(("kind", "string"), UNWRITABLE, ids=ascii)
def test_a_string_that_never_comes_out_is_refused(kind: str, string: str) -> None:
    sentence = f"StopRule: strings holds {string!r}, which the tokenizer cannot write; give a text that it can encode."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        StopRule(strings=[string], tokenizer=small_tokenizer(kind))
