"""Write tokens as text while they are generated, accepted drafts in colours."""

import os
import sys
from collections.abc import Sequence

from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.decoders import StreamingDetokenizer

OWN = "\033[0m"
"""The terminal's own colour, without a line."""

COLOURS = (29, 63, 98, 163, 131)
"""Of a 256-colour terminal, for the depth at which a token was drafted: 29 is green, 131 brown.

Each has a contrast of at least 4.5:1 with black and with white, which leaves a narrow band of brightness.
"""


def in_colour() -> bool:
    """Return whether standard output is a terminal that may show colours."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


class TokenWriter:
    """Turn tokens into text as soon as it is certain, each character in the style of its last token.

    Args:
        tokenizer: Of the model; tokens are written as numbers without one.
        colour: Whether to show accepted drafts, underlined and in the colour of their depth.
        prompt: What the tokens follow.
    """

    def __init__(self, tokenizer: Tokenizer | None, colour: bool, prompt: Sequence[int] = ()) -> None:
        self.text = None if tokenizer is None else StreamingDetokenizer(tokenizer, prompt=prompt)
        self.colour = colour
        self.depth = 0

    def write(self, token: int, *, depth: int) -> str:
        """Return what can be shown now.

        Args:
            token: The next one.
            depth: At which it was drafted, from 1; 0 for the model's own.
        """
        text = f" {token}" if self.text is None else self.text.push(token)
        return self._shown(text, depth) if text else ""

    def flush(self) -> str:
        """Return what is left, and the terminal's own colour."""
        left = "" if self.text is None else self.text.finish()
        return left + self._shown("", 0)

    def _shown(self, text: str, depth: int) -> str:
        if not self.colour or depth == self.depth:
            return text
        self.depth = depth
        # The line shows accepted spaces. It is switched off first: terminals draw it in the colour that they have then.
        style = f"{OWN}\033[4;38;5;{COLOURS[min(depth, len(COLOURS)) - 1]}m" if depth else OWN
        return style + text
