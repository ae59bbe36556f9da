"""Where the messages of a conversation stand in what a chat template writes.

The template is also given marks instead of the contents. What stands between the marks is the template's own text; the
same pieces, found again in the real conversation, tell the contents apart from it, whatever the contents are.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from mtp_modules.data.huggingface import HuggingFaceTokenizer

Span = tuple[int, int]
Messages = Sequence[Mapping[str, Any]]

_MARK = re.compile("\ue000([0-9]+)\ue001")  # of the private use area, so no template changes it


class Located(NamedTuple):
    """A conversation as its template writes it.

    Attributes:
        text: All of it.
        learned: Characters that are trained on: what some roles say, with the special token that ends the turn.
        contents: Characters that come out of messages.
    """

    text: str
    learned: list[Span]
    contents: list[Span]


class _Slot(NamedTuple):
    """A part of the marked text that stands for what messages say.

    Attributes:
        start: In the marked text.
        end: In the marked text.
        end_of_turn: Behind the special token that ends the turn, in the marked text.
        message: Which one it is.
    """

    start: int
    end: int
    end_of_turn: int
    message: int


def locate(
    messages: Messages, roles: Sequence[str], tokenizer: HuggingFaceTokenizer, *, prompt: bool = False
) -> Located | None:
    """Return the text of a conversation, and what of it comes out of messages; ``None`` if that cannot be told.

    Args:
        messages: With ``role`` and ``content``.
        roles: Whose turns are trained on.
        tokenizer: Whose chat template writes them.
        prompt: Whether a turn of the assistant begins at the end.

    Raises:
        ValueError: If the template rejects the messages.
    """
    text = tokenizer.render(messages, prompt=prompt)
    said: list[str] = []
    marked = [_marked(message, said, tokenizer.special_spellings) for message in messages]
    skeleton = _rendered(marked, tokenizer, prompt=prompt)
    if skeleton is None:
        return None
    slots = _slots(marked, roles, skeleton, tokenizer)
    if slots is None:
        return None
    found = _aligned(text, skeleton, slots, said, tokenizer.special_spellings)
    if found is None:
        return None
    places, contents = found
    learned = [
        (start, end_of_turn)
        for slot, (start, end_of_turn) in zip(slots, places, strict=True)
        if messages[slot.message]["role"] in roles and end_of_turn > start
    ]
    return Located(text, learned, contents)


def turn_end(tokenizer: HuggingFaceTokenizer) -> str:
    """Return the special token that the chat template writes behind what the assistant says; empty if there is none.

    Args:
        tokenizer: One with a chat template.
    """
    asked, answered = "first turn", "second turn"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    _, found, behind = (_rendered(turns, tokenizer, prompt=False) or "").rpartition(answered)
    closing = tokenizer.special_spellings.match(behind.lstrip()) if found else None
    return closing[0] if closing else ""


def _marked(message: Mapping[str, Any], said: list[str], special: re.Pattern[str]) -> dict[str, Any]:
    """Return a message with marks for its texts, which are appended to ``said``.

    Of other fields, such as calls of tools, only texts that spell special tokens get marks: templates look at the rest.
    """

    def mark(text: str) -> str:
        if not text.strip():
            return text
        said.append(text)
        return f"\ue000{len(said) - 1}\ue001"

    content = message["content"]
    if isinstance(content, str):
        content = mark(content)
    elif isinstance(content, list):
        content = [
            {**part, "text": mark(part["text"])} if isinstance(part.get("text"), str) else part for part in content
        ]

    def within(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: within(part) for name, part in value.items()}
        if isinstance(value, list):
            return [within(part) for part in value]
        return mark(value) if isinstance(value, str) and special.search(value) else value

    return {name: content if name == "content" else within(value) for name, value in message.items()}


def _marks(value: Any) -> list[str]:
    """Return the numbers of the marks in a message, or in a part of one."""
    if isinstance(value, str):
        return _MARK.findall(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [number for part in parts for number in _marks(part)]


def _rendered(messages: Messages, tokenizer: HuggingFaceTokenizer, *, prompt: bool) -> str | None:
    """Return the text of some turns; ``None`` if the template does not write them alone."""
    if not messages:
        return None
    try:
        return tokenizer.render(messages, prompt=prompt)
    except ValueError:
        return None


def _slots(
    marked: Messages, roles: Sequence[str], skeleton: str, tokenizer: HuggingFaceTokenizer
) -> list[_Slot] | None:
    """Return where messages speak, in order: contents, and whole turns of the assistant."""
    behind_a_mark = re.compile(rf"\s*(?:{tokenizer.special_spellings.pattern})")
    owner = {number: index for index, message in enumerate(marked) for number in _marks(message)}
    shown, end = set(_MARK.findall(skeleton)), turn_end(tokenizer)
    slots: list[_Slot] = []
    for index, message in enumerate(marked):
        own = _marks(message["content"])
        if message["role"] in roles and own and not shown.intersection(own):
            return None  # the template does not write what is to be learned
        if message["role"] == "assistant":
            turn = _assistant_turn(marked, index, skeleton, tokenizer, end)
            if turn is None and not own and "assistant" in roles:
                return None  # a turn without content, such as a call of a tool, and nothing says where it begins
            slots += [turn] if turn else []
    turns = list(slots)
    for mark in _MARK.finditer(skeleton):
        if not any(turn.start <= mark.start() < turn.end for turn in turns):
            behind = behind_a_mark.match(skeleton, mark.end())
            slots.append(_Slot(*mark.span(), behind.end() if behind else mark.end(), owner[mark[1]]))
    slots.sort()
    overlapping = any(one.end > other.start for one, other in pairwise(slots))
    return None if overlapping else slots


def _assistant_turn(
    marked: Messages, index: int, skeleton: str, tokenizer: HuggingFaceTokenizer, end: str
) -> _Slot | None:
    """Return what is generated of a turn: from the generation prompt to the token that ends the turn."""
    before = _rendered(marked[:index], tokenizer, prompt=True)
    if before is None or not skeleton.startswith(before):
        return None
    start = len(before)
    if before == _rendered(marked[:index], tokenizer, prompt=False):  # the template does not begin a turn
        first = _MARK.search(skeleton, start)
        if first is None or skeleton[start : first.start()].strip():
            return None  # and writes something in front of what is said
    if end:
        own = set(_marks(marked[index]))
        others = (mark.start() for mark in _MARK.finditer(skeleton, start) if mark[1] not in own)
        closing_at = skeleton.find(end, start, next(others, len(skeleton)))
        if closing_at >= 0:
            return _Slot(start, closing_at, closing_at + len(end), index)
    whole = _rendered(marked[: index + 1], tokenizer, prompt=False)
    if whole is None or not whole.startswith(before) or not skeleton.startswith(whole.rstrip()):
        return None
    closing = re.compile(rf"(?:\s*(?:{tokenizer.special_spellings.pattern}))?\s*\Z").search(whole, start)
    assert closing is not None  # it matches nothing, too
    return _Slot(start, closing.start(), len(whole.rstrip()) if closing[0].strip() else closing.start(), index)


def _aligned(
    text: str, skeleton: str, slots: Sequence[_Slot], said: Sequence[str], special: re.Pattern[str]
) -> tuple[list[Span], list[Span]] | None:
    """Return where each slot stands in the text, its end of turn included, and where contents do."""
    places: list[Span] = []
    contents: list[Span] = []
    at = slots[0].start if slots else len(skeleton)
    if not text.startswith(skeleton[:at]):
        return None
    for slot, following in pairwise([*slots, None]):
        assert slot is not None
        fixed = skeleton[slot.end : len(skeleton) if following is None else following.start]
        written = _written(skeleton[slot.start : slot.end], said, text, at)
        exact = next((spans for spans in written if _goes_on(text, spans[-1][1], fixed, last=following is None)), None)
        if exact is not None:
            end = exact[-1][1]
            contents += exact[:-1]
        else:  # the template changes what the message says
            end = _end_before(text, at, fixed, last=following is None)
            if end < 0 or (following is not None and text.count(fixed, at) != skeleton.count(fixed, slot.end)):
                return None  # or the content holds the template's own text, and nothing tells which is which
            if any(special.search(each) for each in said):
                contents.append((at, end))
        places.append((at, end + slot.end_of_turn - slot.end))
        at = end + len(fixed)
    return places, contents


def _written(part: str, said: Sequence[str], text: str, at: int) -> Iterator[list[Span]]:
    """Yield the spans of contents in a part of the text and then the part's own; nothing if it is not written so."""
    for change in (str, str.strip, str.lstrip, str.rstrip):
        spans: list[Span] = []
        expected, last = "", 0
        for mark in _MARK.finditer(part):
            expected += part[last : mark.start()]
            content = change(said[int(mark[1])])
            spans.append((at + len(expected), at + len(expected) + len(content)))
            expected, last = expected + content, mark.end()
        expected += part[last:]
        if text.startswith(expected, at):
            yield [*spans, (at, at + len(expected))]


def _goes_on(text: str, end: int, fixed: str, *, last: bool) -> bool:
    return text[end:] == fixed if last else text.startswith(fixed, end)


def _end_before(text: str, at: int, fixed: str, *, last: bool) -> int:
    """Return where the template's next text begins; -1 if that cannot be told."""
    if last:
        return len(text) - len(fixed) if text.endswith(fixed) and len(text) - len(fixed) >= at else -1
    return text.find(fixed, at) if fixed.strip() else -1
