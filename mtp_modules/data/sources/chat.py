"""Conversations, written by the tokenizer's chat template."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mtp_modules.core.checks import refuse
from mtp_modules.core.tokenizer import Tokenizer
from mtp_modules.data.documents import Document, DocumentSource, FileHash
from mtp_modules.data.huggingface import HuggingFaceTokenizer

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
_Span = tuple[int, int]


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
            text, learned, contents = _written(messages, self.roles, tokenizer)
            if learned:
                tokens, starts = encode_rendered(text, contents, tokenizer)
                mask = np.zeros(len(tokens), dtype=bool)
                for start, end in learned:
                    mask |= (starts >= start) & (starts < end)
                yield Document(document.name, tokens=tokens, loss_mask=mask, key=document.key)
            else:
                self.skipped.setdefault(f"without a turn of {' or '.join(self.roles)}", []).append(document.name)
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
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {**others, "role": _ROLES.get(role, role), "content": content or ""}


def _written(
    messages: list[dict[str, Any]], roles: Sequence[str], tokenizer: HuggingFaceTokenizer
) -> tuple[str, list[_Span], list[_Span]]:
    """Return the text of a conversation, the characters that are trained on, and those of contents."""
    text = tokenizer.render(messages)
    special = tokenizer.special_texts()
    learned: list[_Span] = []
    contents = content_spans(messages, text)
    for index, (message, (start, end)) in enumerate(zip(messages, contents, strict=True)):
        if message["role"] not in roles:
            continue
        prompt = _rendered(messages[:index], tokenizer, prompt=True) if message["role"] == "assistant" else None
        if prompt is not None and text.startswith(prompt) and len(prompt) <= start:
            start = len(prompt)
        whole = _rendered(messages[: index + 1], tokenizer, prompt=False)
        if whole is not None and text.startswith(whole) and len(whole) >= end:
            end = len(whole)
        else:  # the template writes earlier turns differently: to the end of the turn, if that is next
            behind = re.match(rf"\s*(?:{'|'.join(map(re.escape, special)) or '(?!)'})", text[end:])
            end += behind.end() if behind else 0
        trimmed = text[start:end].rstrip()
        if any(trimmed.endswith(token) for token in special):
            end = start + len(trimmed)
        learned.append((start, end))
    return text, learned, contents


def content_spans(messages: Sequence[Mapping[str, Any]], text: str) -> list[tuple[int, int]]:
    """Return where the contents of messages stand in a conversation; one that is not found takes no room.

    Args:
        messages: Of the conversation.
        text: As the chat template writes it.
    """
    spans: list[_Span] = []
    reached = 0
    for message in messages:
        content = message["content"].strip() if isinstance(message["content"], str) else ""
        found = text.find(content, reached)
        start, reached = (found, found + len(content)) if found >= 0 else (reached, reached)
        spans.append((start, reached))
    return spans


def turn_end(tokenizer: HuggingFaceTokenizer) -> list[int]:
    """Return the special token that the chat template writes behind what the assistant says, if there is one.

    Args:
        tokenizer: One with a chat template.

    Raises:
        ValueError: If the template rejects a conversation of two turns.
    """
    asked, answered = "first turn", "second turn"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    behind = tokenizer.render(turns).rpartition(answered)[2].lstrip()
    special = [token for token in tokenizer.special_texts() if behind.startswith(token)]
    return tokenizer.encode_template(max(special, key=len))[0] if special else []


def _rendered(messages: list[dict[str, Any]], tokenizer: HuggingFaceTokenizer, *, prompt: bool) -> str | None:
    """Return the text of the first turns; ``None`` if the template does not write them alone."""
    if not messages:
        return None
    try:
        return tokenizer.render(messages, prompt=prompt)
    except ValueError:
        return None


def encode_rendered(text: str, contents: Sequence[_Span], tokenizer: HuggingFaceTokenizer) -> tuple[Any, Any]:
    """Return token ids and the character that each begins at. Special tokens that are spelled out in contents are text.

    Args:
        text: As a chat template writes it.
        contents: Where the contents of its messages stand.
        tokenizer: Whose template it is.
    """
    special = tokenizer.special_texts()
    spelled = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
    literal = [match.span() for start, end in contents for match in spelled.finditer(text, start, end)]
    ids: list[int] = []
    starts: list[int] = []
    reached = 0
    for start, end in [*literal, (len(text), len(text))]:
        part, offsets = tokenizer.encode_template(text[reached:start])
        ids += part
        starts += [reached + first for first, _ in offsets]
        if end > start:
            (inside,) = tokenizer.encode_batch([text[start:end]])
            ids += inside.tolist()
            starts += [start] * len(inside)
        reached = end
    return np.array(ids, dtype=np.int64), np.array(starts, dtype=np.int64)
