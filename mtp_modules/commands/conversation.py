"""What a conversation so far is, as tokens: one text, or messages in the tokenizer's chat template."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from mtp_modules.commands.common import encode, utf8
from mtp_modules.commands.decoding import end_tokens
from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.data.encoding import encode_continuation
from mtp_modules.data.huggingface import HuggingFaceTokenizer
from mtp_modules.data.sources.chat import encode_rendered
from mtp_modules.data.sources.chat_spans import locate, turn_end


class Conversation(ABC):
    """The tokens of a conversation so far.

    Attributes:
        tokens: What was typed and answered; without the token that ended the last answer.
        ends: Tokens, any of which ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.ends = end_tokens(tokenizer)
        self.tokens: list[int] = []

    @abstractmethod
    def prompt(self, typed: str) -> list[int]:
        """Return the tokens behind which the answer to a line begins.

        Args:
            typed: The line.

        Raises:
            ValueError: If the line cannot be written as tokens.
        """

    @abstractmethod
    def answered(self, typed: str, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Note an answer.

        Args:
            typed: The line.
            prompt: What ``prompt`` returned for it.
            answer: The tokens that were generated.
        """

    @abstractmethod
    def forget(self) -> None:
        """Begin anew."""

    def without_end(self, answer: Sequence[int]) -> list[int]:
        """Return the tokens of an answer, without the one that ended it.

        Args:
            answer: The tokens.
        """
        return list(answer[:-1] if answer and answer[-1] in self.ends else answer)


class OneText(Conversation):
    """Lines and answers behind each other, as a model that was trained on text alone continues them.

    Args:
        tokenizer: Of the model; numbers are typed without one.
        separator: Text between a line and its answer, and behind the answer.
    """

    def __init__(self, tokenizer: Tokenizer | None, separator: str) -> None:
        super().__init__(tokenizer)
        self.separator = "" if tokenizer is None else separator

    def prompt(self, typed: str) -> list[int]:
        """Return the text so far and the line."""
        if not self.tokens:
            return encode(typed + self.separator, self.tokenizer)
        if self.tokenizer is None:
            return [*self.tokens, *encode(typed, None)]
        return [*self.tokens, *encode_continuation(self.separator + utf8(typed) + self.separator, self.tokenizer)]

    def answered(self, typed: str, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Keep all of it."""
        self.tokens = [*prompt, *self.without_end(answer)]

    def forget(self) -> None:
        """Begin anew."""
        self.tokens = []


class Messages(Conversation):
    """Turns of a user and an assistant, as the tokenizer's chat template writes them.

    The tokens of earlier turns stay as they are where the template goes on behind them. A special token that is typed
    is text.

    Args:
        tokenizer: One with a chat template.
        system: What the system says first, if anything.

    Raises:
        ValueError: If the template rejects a message of the system.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, system: str | None = None) -> None:
        super().__init__(tokenizer)
        self.templated = tokenizer
        self.first = [] if system is None else [{"role": "system", "content": system}]
        end = turn_end(tokenizer)
        self.ends = sorted({*self.ends, *(tokenizer.encode_template(end)[0] if end else ())})
        self.forget()
        if self.first:
            self.prompt(".")  # an error now, not at the first line

    def prompt(self, typed: str) -> list[int]:
        """Return the conversation up to where the assistant speaks."""
        messages = [*self.messages, {"role": "user", "content": utf8(typed)}]
        found = locate(messages, (), self.templated, prompt=True)
        if found is None:
            refuse("chat", "the chat template writes messages in a way that hides them; set use_template to false.")
        known = len(self.text) if self.tokens and found.text.startswith(self.text) else 0
        spans = [(start - known, end - known) for start, end in found.contents if start >= known]
        tokens, _, _ = encode_rendered(found.text[known:], spans, self.templated)
        return [*(self.tokens if known else []), *tokens.tolist()]

    def answered(self, typed: str, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Note both messages, and the tokens that stand for them."""
        self.messages.append({"role": "user", "content": typed})
        text = self.templated.render(self.messages, prompt=True)
        kept = self.without_end(answer)
        said = self.templated.decode(kept)
        self.messages.append({"role": "assistant", "content": said})
        self.tokens, self.text = [*prompt, *kept], text + said

    def forget(self) -> None:
        """Begin anew, with what the system says."""
        self.messages, self.tokens, self.text = list(self.first), [], ""


def conversation(
    tokenizer: Tokenizer | None, *, separator: str, system: str | None, use_template: bool
) -> Conversation:
    """Return a conversation that has not begun.

    Args:
        tokenizer: Of the model.
        separator: As for :class:`OneText`.
        system: As for :class:`Messages`.
        use_template: Whether to take the tokenizer's chat template, if it has one.

    Raises:
        ValueError: If the system is to speak where there is no chat template.
    """
    if use_template and isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.chat_template is not None:
        return Messages(tokenizer, system)
    if system is not None:
        refuse("system", f"needs a chat template, got {system!r:.80}; leave it out, or begin with it as a line.")
    return OneText(tokenizer, separator)
