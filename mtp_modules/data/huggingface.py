"""Tokenizers of Hugging Face. ``transformers`` and ``tokenizers`` are imported when one is made."""

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mtp_modules.core.budget import check_growth
from mtp_modules.core.checks import content_only, refuse
from mtp_modules.core.component import redescribe
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.core.tokenizer import known_tokens

_MISSING = (
    "needs the packages transformers and tokenizers; install mtp_modules with the extra hf: pip install -e '.[hf]'."
)
_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<end>", "<|end|>")
"""Names that tokens for the end of a text have, for a bare ``tokenizer.json``, which does not say which it is."""


class _Content(NamedTuple):
    """What a tokenizer consists of."""

    tokenizer_json: str
    end_token: int | None
    chat_template: str | None = None
    special_tokens: dict[str, str] | None = None


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer that a Hugging Face model was trained with, or one of your own.

    What its post-processor adds before a text (``begin_tokens``) begins prompts and documents. What it adds behind is
    left out of prompts, which go on; a document ends with one ``end_token`` in any case. Special tokens that are
    spelled out in a text are text. :func:`~mtp_modules.core.describe` returns the whole content of the tokenizer, so a
    saved model needs no other file.

    Args:
        pretrained: A folder, a ``tokenizer.json``, or a name on the hub.
        gguf_file: Name of a GGUF file in that folder.
        revision: Of a model on the hub: a branch, a tag or a commit.
        tokenizer_json: Content of a ``tokenizer.json``, instead of all of these.
        end_token: The id that ends a document; that of ``pretrained`` if ``None``.
        chat_template: Template of conversations; that of ``pretrained`` if ``None``.
        special_tokens: Special tokens by their roles (``bos_token``, ``eos_token``), which the template may name; those
            of ``pretrained`` if ``None``.
        parse_special: Whether special tokens that are spelled out in a text are those tokens.

    Raises:
        ValueError: If a package is missing, the tokenizer does not exist or is not a fast one, or it is given twice or
            not at all.
    """

    def __init__(
        self,
        *,
        pretrained: str | None = None,
        gguf_file: str | None = None,
        revision: str | None = None,
        tokenizer_json: str | None = None,
        end_token: int | None = None,
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
        parse_special: bool = False,
    ) -> None:
        if (pretrained is None) == (tokenizer_json is None):
            refuse(self, "needs either pretrained, the place of a tokenizer, or tokenizer_json, its content.")
        for name, value in (("gguf_file", gguf_file), ("revision", revision)):
            if value is not None and pretrained is None:
                refuse(self, f"{name} is {value!r}, but pretrained is not given; name the folder or model.")
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            refuse(self, _MISSING)
        if pretrained is not None:
            found = _content(self, pretrained, gguf_file=gguf_file, revision=revision)
            tokenizer_json = found.tokenizer_json
            end_token = found.end_token if end_token is None else end_token
            chat_template = found.chat_template if chat_template is None else chat_template
            special_tokens = found.special_tokens if special_tokens is None else special_tokens
        assert tokenizer_json is not None
        try:
            self._fast = Fast.from_str(tokenizer_json)
        except Exception as error:  # the only class that the package has for errors
            refuse(self, f"tokenizer_json is no content of a tokenizer.json ({error}).")
        self._fast.no_truncation()
        self._fast.no_padding()  # a file could ask for any length
        self._fast.encode_special_tokens = not parse_special
        self._of_templates: Any = None
        self._vocab_size = 1 + max(self._fast.get_vocab(with_added_tokens=True).values())
        if end_token is not None and not 0 <= end_token < self._vocab_size:
            refuse(self, f"end_token must lie in 0..{self._vocab_size - 1}, got {end_token}.")
        self._end_token = end_token
        self.chat_template, self.special_tokens = chat_template, dict(special_tokens or {})
        self.parse_special = parse_special
        self._begin_tokens = self._added_before()
        redescribe(
            self,
            pretrained=None,
            gguf_file=None,
            revision=None,
            tokenizer_json=tokenizer_json,
            end_token=end_token,
            chat_template=chat_template,
            special_tokens=special_tokens,
        )

    @classmethod
    def check_stored(cls, arguments: Mapping[str, Any]) -> None:
        """Raise an error for a tokenizer that is not described by its content."""
        content_only(cls.__name__, arguments, "the content of a tokenizer")
        check_growth(cls.__name__, str(arguments.get("tokenizer_json") or ""))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included. The model's embedding may have more rows."""
        return self._vocab_size

    @property
    def end_token(self) -> int | None:
        """The id that ends a document, or ``None``."""
        return self._end_token

    @property
    def begin_tokens(self) -> tuple[int, ...]:
        """What the post-processor adds before every text."""
        return self._begin_tokens

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text that goes on: ``begin_tokens`` first, and nothing behind it."""
        return [*self._begin_tokens, *self._ids([text])[0]]

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer[Any]]]:
        """Return the token ids of texts alone, encoded in parallel."""
        return [np.array(ids, dtype=np.int64) for ids in self._ids(texts)]

    def encode_template(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids of a text in which special tokens are spelled out, and the characters that each stands for.

        Args:
            text: As a chat template gives it; nothing is added.
        """
        if self._of_templates is None:  # an own one: a thread may be encoding text with the other meanwhile
            self._of_templates = copy.deepcopy(self._fast)
            self._of_templates.encode_special_tokens = False
        encoded = self._of_templates.encode(text, add_special_tokens=False)
        return list(encoded.ids), list(encoded.offsets)

    @cached_property
    def special_spellings(self) -> re.Pattern[str]:
        """What finds special tokens as they are spelled, the longest first; nothing if there are none."""
        added = (token for token in self._fast.get_added_tokens_decoder().values() if token.special)
        spelled = sorted({token.content for token in added}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spelled)) or "(?!)")

    def render(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str:
        """Return a conversation as the chat template writes it.

        Args:
            messages: With ``role`` and ``content``.
            prompt: Whether to begin a turn of the assistant at its end.

        Raises:
            ValueError: If there is no template, or it rejects the messages.
        """
        if self.chat_template is None:
            refuse(self, "has no chat template; give chat_template, or take the tokenizer of a chat model.")
        from transformers import PreTrainedTokenizerFast

        if not hasattr(self, "_wrapped"):
            self._wrapped = PreTrainedTokenizerFast(tokenizer_object=self._fast, **self.special_tokens)
        try:
            rendered: str = self._wrapped.apply_chat_template(
                list(messages), chat_template=self.chat_template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template raises whatever its functions do
            refuse(self, f"the chat template rejects a conversation ({error!s:.200}); leave it out, or repair it.")
        return rendered

    def foreign_files(self) -> dict[str, str]:
        """Return its content; what a post-processor adds behind a text, which goes on, is left out."""
        content = json.loads(self._fast.to_str())
        encoded = self._fast.encode("a", add_special_tokens=True).ids
        if encoded != self.encode("a"):
            content["post_processor"] = self._adds_before()
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        if self._end_token is not None:
            config.setdefault("eos_token", self._fast.id_to_token(self._end_token))
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return {
            "tokenizer.json": json.dumps(content, ensure_ascii=False) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }

    def _adds_before(self) -> dict[str, Any] | None:
        """Return a post-processor that adds ``begin_tokens`` and nothing else."""
        if not self._begin_tokens:
            return None
        names = {index: str(self._fast.id_to_token(index)) for index in self._begin_tokens}
        before = [{"SpecialToken": {"id": names[index], "type_id": 0}} for index in self._begin_tokens]
        first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        special = {name: {"id": name, "ids": [index], "tokens": [name]} for index, name in names.items()}
        return {
            "type": "TemplateProcessing",
            "single": [*before, first],
            "pair": [*before, first, second],
            "special_tokens": special,
        }

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # or forked workers print a warning
        encoded = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in encoded]

    def _added_before(self) -> tuple[int, ...]:
        """Return the ids that the post-processor adds before a text: the special ones before the text's own first."""
        known = (self._fast.id_to_token(index) or "" for index in range(min(self._vocab_size, 1000)))
        for text in chain("a", known):  # the vocabulary may lack any letter
            encoded = self._fast.encode(text, add_special_tokens=True)
            own = [place for place, special in enumerate(encoded.special_tokens_mask) if not special]
            if own:
                return tuple(encoded.ids[: own[0]])
        return ()

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, special tokens spelled out; unknown ids decode to nothing.

        Raises:
            ValueError: If an id is negative.
        """
        try:
            return str(self._fast.decode(tokens, skip_special_tokens=False))
        except OverflowError:  # one is negative, or larger than ids can be
            return str(self._fast.decode(known_tokens(self, tokens), skip_special_tokens=False))


def _content(owner: object, pretrained: str, *, gguf_file: str | None, revision: str | None) -> _Content:
    """Return the content of a tokenizer, the id that ends a document, and what conversations need."""
    place = Path(pretrained)
    if place.suffix == ".json" and place.is_file():
        return _bare(owner, place)
    if (place / "tokenizer.json").is_file() and not (place / "tokenizer_config.json").is_file():
        return _bare(owner, place / "tokenizer.json")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        refuse(owner, _MISSING)
    origin: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    origin |= {"revision": revision} if revision else {}
    try:
        loaded = AutoTokenizer.from_pretrained(pretrained, trust_remote_code=False, **origin)
    except (OSError, ValueError, KeyError, ImportError) as error:
        refuse(owner, f"pretrained {pretrained!r} cannot be read ({str(error).strip().splitlines()[0].rstrip('.')}).")
    fast = getattr(loaded, "backend_tokenizer", None)
    if fast is None:
        refuse(owner, f"the tokenizer of {pretrained!r} is none of the fast ones, which alone can be saved as a whole.")
    template = loaded.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    named = {role: str(token) for role in ("bos_token", "eos_token") if (token := getattr(loaded, role)) is not None}
    return _Content(str(fast.to_str()), loaded.eos_token_id, template, named)


def _bare(owner: object, path: Path) -> _Content:
    """Return the content of a ``tokenizer.json`` alone; its end token is the only one with a name that they have."""
    try:
        content = path.read_text(encoding="utf-8")
        added = {token["content"]: token["id"] for token in json.loads(content)["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError):
        refuse(owner, f"{path} is no tokenizer.json; give the file that a trained tokenizer was saved to.")
    ends = [token for token in _ENDS if token in added]
    if len(ends) != 1:
        return _Content(content, None)
    return _Content(content, added[ends[0]], None, {"eos_token": ends[0]})
