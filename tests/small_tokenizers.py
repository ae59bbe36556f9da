"""One small tokenizer of each kind that models have, with and without tokens that it adds around every text."""

import json
from collections.abc import Callable, Sequence
from functools import cache

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mtp_modules import Tokenizer, describe
from mtp_modules.data import ByteTokenizer, HuggingFaceTokenizer, WordTokenizer

UNKNOWN, BEGIN, END = SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = [chr(letter) for letter in range(33, 127)]
WORDS = ["the", "The", "dog", "cat", "cats", "barked", "ran", "é", "12", ".", ",", "!", "?"]
MERGES = ["t h", "th e", "▁ the", "d o", "do g", "▁ dog", "c a", "ca t", "▁ cat", "b a", "ba r", "bar k", "e d"]
ACROSS_CHARACTERS = ["Ã ©", "ð Ł", "Ġ ðŁ", "e Ã", "© !", "© Ã", "Ł ĺ"]
"""Of byte-level letters: whole characters and parts, alone and together with what stands before or behind."""


def _letters_of_bytes() -> list[str]:
    """Return the letter that stands for each byte in byte-level vocabularies."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return [chr(byte if byte in shown else 256 + others.index(byte)) for byte in range(256)]


def _bpe(words: Sequence[str], merges: Sequence[str], *, fallback: bool) -> FastTokenizer:
    pairs = [tuple(merge.split()) for merge in merges]
    words = [*SPECIAL, *words, *map("".join, pairs)]
    vocab = {word: index for index, word in enumerate(words)}
    unknown = UNKNOWN if fallback else None
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=pairs, byte_fallback=fallback, unk_token=unknown))
    fast.add_special_tokens(SPECIAL)
    return fast


def _byte_level() -> FastTokenizer:
    """As GPT-2 and Llama 3 have it."""
    merges = [*(merge.replace("▁", "Ġ") for merge in MERGES), *ACROSS_CHARACTERS]
    fast = _bpe(_letters_of_bytes(), merges, fallback=False)
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return fast


def _fallback_bpe() -> FastTokenizer:
    """As Llama 2 has it: spaces begin words, and bytes write what the vocabulary lacks."""
    fast = _bpe([*BYTES, "▁", *LETTERS], MERGES, fallback=True)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast


def _unigram(*, fallback: bool) -> FastTokenizer:
    """As T5 has it; with a fallback to bytes, as SentencePiece can have it too."""
    words = ["▁", "▁▁", *(f"▁{word}" for word in WORDS), "ing", "ed", *LETTERS, *(BYTES if fallback else ["é"])]
    pieces = [*((word, 0.0) for word in SPECIAL), *((word, -10.0 / len(word)) for word in words)]
    fast = FastTokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=fallback))
    fast.add_special_tokens(SPECIAL)
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    if fallback:
        fast.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])
    return fast


def _word_level() -> FastTokenizer:
    """Whole words, written with one space between them."""
    vocab = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    fast = FastTokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    fast.add_special_tokens(SPECIAL)
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast


def _word_piece() -> FastTokenizer:
    """As BERT has it."""
    words = [*SPECIAL, *WORDS, "##ing", "##s", "##ed", "bark", "'", "t", "don", "##t"]
    vocab = {word: index for index, word in enumerate(words)}
    fast = FastTokenizer(models.WordPiece(vocab, unk_token=UNKNOWN))
    fast.add_special_tokens(SPECIAL)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    return fast


def _wrapped(fast: FastTokenizer, *, around: bool) -> HuggingFaceTokenizer:
    if around:
        ends = [(token, fast.token_to_id(token)) for token in (BEGIN, END)]
        fast.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=ends)
    return HuggingFaceTokenizer(tokenizer_json=fast.to_str(), end_token=fast.token_to_id(END))


_FAST: dict[str, Callable[[], FastTokenizer]] = {
    "byte-level": _byte_level,
    "fallback-bpe": _fallback_bpe,
    "unigram": lambda: _unigram(fallback=False),
    "fallback-unigram": lambda: _unigram(fallback=True),
    "word-level": _word_level,
    "word-piece": _word_piece,
}
KINDS = ["bytes", "words", *_FAST, *(f"{name}-around" for name in _FAST)]
"""Names of :func:`small_tokenizer`; ``-around`` adds a token before and one behind every text that is encoded."""

BYTE_KINDS = ["bytes", "byte-level", "byte-level-around"]
"""Those whose tokens are bytes, so that what a broken character becomes is a matter of UTF-8 alone."""

FALLBACK_KINDS = ["fallback-bpe", "fallback-unigram", "fallback-bpe-around", "fallback-unigram-around"]
"""Those that write every byte of a run with a broken character as one."""


@cache
def small_tokenizer(kind: str) -> Tokenizer:
    """Return a tokenizer.

    Args:
        kind: One of :data:`KINDS`.
    """
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "words":
        return WordTokenizer(words=WORDS)
    name = kind.removesuffix("-around")
    return _wrapped(_FAST[name](), around=name != kind)


@cache
def whole_tokens(kind: str) -> list[int]:
    """Return the tokens that are whole characters by themselves.

    Args:
        kind: One of :data:`KINDS`.
    """
    tokenizer = small_tokenizer(kind)
    return [token for token in range(tokenizer.vocab_size) if "\ufffd" not in tokenizer.decode([token])]


@cache
def byte_tokens(kind: str) -> list[int]:
    """Return the token of every byte.

    Args:
        kind: One of :data:`BYTE_KINDS` and :data:`FALLBACK_KINDS`.
    """
    if kind == "bytes":
        return list(range(256))
    vocab = json.loads(describe(small_tokenizer(kind))["init_args"]["tokenizer_json"])["model"]["vocab"]
    ids = vocab if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}
    return [ids[name] for name in (BYTES if kind in FALLBACK_KINDS else _letters_of_bytes())]


class Spelled(Tokenizer):
    """Tokens of any text; counts those that it is asked for. A subclass says how they are joined."""

    def __init__(self, *, texts: Sequence[str]) -> None:
        self.texts = list(texts)
        self.looked_at = 0

    @property
    def vocab_size(self) -> int:
        return len(self.texts)

    @property
    def end_token(self) -> int | None:
        return None

    def encode(self, text: str) -> list[int]:
        return [self.texts.index(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        self.looked_at += len(tokens)
        return "".join(self.texts[token] for token in tokens)


class SpelledBytes(Spelled):
    """Tokens of any bytes, each written as the letter of its number."""

    def decode(self, tokens: list[int]) -> str:
        return super().decode(tokens).encode("latin-1").decode(errors="replace")


TURNS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL = (  # earlier turns are written without what was thought in them
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content.split('=>')[-1] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str | None = CHATML) -> HuggingFaceTokenizer:
    """Return a tokenizer of bytes with a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(TURNS)
    begin = ("<s>", fast.token_to_id("<s>"))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    return HuggingFaceTokenizer(tokenizer_json=fast.to_str(), chat_template=template, special_tokens=roles)
