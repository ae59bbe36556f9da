"""The tokenizer of a Hugging Face model. ``transformers`` and ``tokenizers`` are imported when one is made."""

from collections.abc import Mapping
from typing import Any

from mtp_modules.core.budget import check_growth
from mtp_modules.core.checks import content_only, refuse
from mtp_modules.core.component import redescribe
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.core.tokenizer import known_tokens

_MISSING = (
    "needs the packages transformers and tokenizers; install mtp_modules with the extra hf: pip install -e '.[hf]'."
)


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer that a Hugging Face model was trained with.

    ``encode`` adds the special tokens that the model expects, such as one at the beginning; special tokens that are
    spelled out in a text are parsed as such. :func:`~mtp_modules.core.describe` returns the whole content of the
    tokenizer, so a saved model needs no other file.

    Args:
        pretrained: A folder, or a name on the hub.
        gguf_file: Name of a GGUF file in that folder.
        revision: Of a model on the hub: a branch, a tag or a commit.
        tokenizer_json: Content of a ``tokenizer.json``, instead of all of these.
        end_token: The id that ends a document; that of ``pretrained`` if ``None``.

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
            tokenizer_json, found_end = _content(self, pretrained, gguf_file=gguf_file, revision=revision)
            end_token = found_end if end_token is None else end_token
        assert tokenizer_json is not None
        try:
            self._fast = Fast.from_str(tokenizer_json)
        except Exception as error:  # the only class that the package has for errors
            refuse(self, f"tokenizer_json is no content of a tokenizer.json ({error}).")
        self._fast.no_truncation()
        self._fast.no_padding()  # a file could ask for any length
        self._vocab_size = 1 + max(self._fast.get_vocab(with_added_tokens=True).values())
        if end_token is not None and not 0 <= end_token < self._vocab_size:
            refuse(self, f"end_token must lie in 0..{self._vocab_size - 1}, got {end_token}.")
        self._end_token = end_token
        redescribe(
            self, pretrained=None, gguf_file=None, revision=None, tokenizer_json=tokenizer_json, end_token=end_token
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

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return list(self._fast.encode(text).ids)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, special tokens spelled out; unknown ids decode to nothing.

        Raises:
            ValueError: If an id is negative.
        """
        try:
            return str(self._fast.decode(tokens, skip_special_tokens=False))
        except OverflowError:  # one is negative, or larger than ids can be
            return str(self._fast.decode(known_tokens(self, tokens), skip_special_tokens=False))


def _content(owner: object, pretrained: str, *, gguf_file: str | None, revision: str | None) -> tuple[str, int | None]:
    """Return the content of a tokenizer and the id that ends a document."""
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
    return str(fast.to_str()), loaded.eos_token_id
