"""Conversations, written by the tokenizer's chat template."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mtp_modules.core.checks import refuse
from mtp_modules.core.tokenizer import Tokenizer
from mtp_modules.data.documents import Document, DocumentSource, FileHash
from mtp_modules.data.huggingface import HuggingFaceTokenizer
from mtp_modules.data.sources.chat_spans import Span, locate

_Ids: TypeAlias = npt.NDArray[np.int64]
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


class Chat(DocumentSource):
    """Conversations of another source as the tokenizer's chat template writes them, trained on what the assistant says.

    The token that ends a turn is trained on, white space that the template puts behind it is not. Nothing is added to
    what the template writes. Special tokens that are spelled out in a message are text. Messages have ``role`` and
    ``content``, or ``from`` and ``value``.

    Args:
        source: Gives messages, such as :class:`~mtp_modules.data.JsonLines` with ``field: messages``.
        roles: Whose turns are trained on; ``["assistant"]`` if ``None``.

    Raises:
        ValueError: In ``documents``, if the tokenizer has no chat template, the template rejects a conversation, or a
            document holds no messages.
    """

    def __init__(self, *, source: DocumentSource, roles: Sequence[str] | None = None) -> None:
        self.source = source
        self.roles = ("assistant",) if roles is None else tuple(roles)
        self.skipped = {}

    def documents(self, tokenizer: Tokenizer) -> Iterator[Document]:
        """Yield every conversation that has a turn of the roles, as tokens with a loss mask.

        Raises:
            ValueError: If there is no chat template, or a document does not fit it.
        """
        if not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.chat_template is None:
            refuse(
                self,
                f"{type(tokenizer).__name__} has no chat template; take the HuggingFaceTokenizer of a chat model, or "
                "give it a chat_template.",
            )
        self.skipped = {}
        for document in self.source.documents(tokenizer):
            if document.messages is None:
                refuse(self, f"{document.name!r} holds no messages; name the field that does.")
            messages = [_message(self, document.name, message) for message in document.messages]
            found = locate(messages, self.roles, tokenizer)
            if found is None:
                self.skipped.setdefault("whose messages are not found in what the template writes", []).append(
                    document.name
                )
            elif not found.learned:
                self.skipped.setdefault(f"without a turn of {' or '.join(self.roles)}", []).append(document.name)
            else:
                tokens, starts, ends = encode_rendered(found.text, found.contents, tokenizer)
                mask = np.zeros(len(tokens), dtype=bool)
                for start, end in found.learned:
                    mask |= (starts >= start) & (starts < end)
                    for place in np.flatnonzero((starts < start) & (ends > start)):
                        mask[place] |= not found.text[starts[place] : start].strip()  # it begins with white space
                yield Document(document.name, tokens=tokens, loss_mask=mask, key=document.key)
        for reason, names in self.source.skipped.items():
            self.skipped.setdefault(reason, []).extend(names)

    def fingerprint(self, hash_file: FileHash) -> str:
        """Return the roles and the fingerprint of the source."""
        return f"{' '.join(self.roles)}\n{self.source.fingerprint(hash_file)}"

    def num_documents(self) -> int | None:
        """Return that of the source."""
        return self.source.num_documents()

    def size(self) -> int | None:
        """Return that of the source."""
        return self.source.size()


def _message(owner: object, name: str, message: Mapping[str, Any]) -> dict[str, Any]:
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or (content is not None and not isinstance(content, str | list)):
        refuse(owner, f"{name!r} has a message without role and content: {dict(message)!r:.80}; repair it.")
    if isinstance(content, list) and not all(isinstance(part, Mapping) for part in content):
        refuse(owner, f"{name!r} has a message whose content is a list of something else than parts: {content!r:.80}.")
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {**others, "role": _ROLES.get(role, role), "content": content or ""}


def encode_rendered(text: str, contents: Sequence[Span], tokenizer: HuggingFaceTokenizer) -> tuple[_Ids, _Ids, _Ids]:
    """Return token ids, and the characters that each begins and ends at.

    Special tokens that are spelled out in contents are text.

    Args:
        text: As a chat template writes it.
        contents: Where the contents of its messages stand.
        tokenizer: Whose template it is.
    """
    special = tokenizer.special_spellings
    literal = [match.span() for start, end in contents for match in special.finditer(text, start, end)]
    ids: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    reached = 0
    for start, end in [*literal, (len(text), len(text))]:
        part, offsets = tokenizer.encode_template(text[reached:start])
        ids += part
        starts += [reached + first for first, _ in offsets]
        ends += [reached + behind for _, behind in offsets]
        if end > start:
            (inside,) = tokenizer.encode_batch([text[start:end]])
            ids += inside.tolist()
            starts += [start] * len(inside)
            ends += [end] * len(inside)
        reached = end
    found, begins, behinds = (np.array(each, dtype=np.int64) for each in (ids, starts, ends))
    return found, begins, behinds
