"""Hierarchical prediction: the next word, the next phrase, the next sentence, each as a whole."""

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from mtp_modules.core.auxiliary import AuxiliaryText
from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.shapes import Bool, Int, Tensor
from mtp_modules.objectives.bags import BagObjective

_CLOSES = {
    "word": re.compile(r"(\s|[^\w\s])$"),
    "phrase": re.compile(r"[,;:.!?)\]}\u2026]\s*$|\n"),
    "sentence": re.compile(r"[.!?\u2026][\"')\]]?\s*$|\n\s*$"),
    "line": re.compile(r"\n\s*$"),
}
"""What a token ends with that ends a span of each level."""

_OPENS = re.compile(r"^\s+\S")
"""A token with white space before a word begins a word, as those of byte-pair encodings do."""


class NextSpan(BagObjective):
    """Predict which tokens the next span of a level has: the next word, phrase, sentence or line.

    A span ends where the text says so: a word at white space or punctuation, a phrase at a comma, a full stop or a
    bracket that closes, a sentence at a full stop, question mark, exclamation mark or the end of a line; white space
    behind an end still belongs to it. The next span is the first one that begins behind position ``t``, so the rest of
    the present one is left out. Levels are
    objectives of their own: name one for each in ``objectives``. :class:`~mtp_modules.objectives.bags.BagObjective` has
    the formula.

    Args:
        d_model: Width ``D`` of the trunk's states.
        vocab_size: Number ``V`` of token ids.
        level: ``word``, ``phrase``, ``sentence`` or ``line``.
        window: How far to look; of a span that reaches beyond, what is within counts.
        weighted: Weigh tokens by their rarity; without, all alike.
        weight: Factor of the mean loss.

    Logs ``loss``, and ``recall``: the share of spans that have the token that is most likely in them.

    Raises:
        ValueError: If the level is unknown, a size too small or the weight negative; in training, if the texts of the
            tokens are unknown, because :func:`~mtp_modules.training.prepare_objectives` was not called.

    Example:
        >>> objective = NextSpan(d_model=16, vocab_size=6, level="word", weighted=False)
        >>> objective.set_vocabulary(["a", "b", " ", "c", ".", "d"])
        >>> tokens, inside = objective.upcoming(AuxiliaryText(torch.tensor([[0, 1, 2, 3, 5, 4]]), length=5))
        >>> [tokens[0, place][inside[0, place]].tolist() for place in range(3)]  # "ab cd."
        [[3, 5, 4], [3, 5, 4], [3, 5, 4]]
    """

    reads_vocabulary = True
    boundaries: Tensor
    vocabulary_known: Tensor

    def __init__(
        self,
        *,
        d_model: int,
        vocab_size: int,
        level: str,
        window: int = 64,
        weighted: bool = True,
        weight: float = 1.0,
    ) -> None:
        super().__init__(d_model=d_model, vocab_size=vocab_size, weighted=weighted, weight=weight)
        if level not in _CLOSES:
            refuse(self, f"level must be one of {', '.join(_CLOSES)}, got {level!r}.")
        self.level, self.window = level, whole(self, "window", window, 1)
        self.name = f"next_{level}"
        self.register_buffer("boundaries", torch.zeros(3, vocab_size, dtype=torch.bool))
        self.register_buffer("vocabulary_known", torch.zeros((), dtype=torch.bool))

    def set_vocabulary(self, texts: Sequence[str]) -> None:
        """Find the tokens that end a span, those that begin one, and those of white space alone.

        Raises:
            ValueError: If there is not one text for each token id.
        """
        if len(texts) != self.vocab_size:
            refuse(self, f"texts must hold {self.vocab_size} texts, got {len(texts)}.")
        closes = [bool(_CLOSES[self.level].search(text)) for text in texts]
        opens = [self.level == "word" and bool(_OPENS.search(text)) for text in texts]
        blank = [not text.strip() and bool(text) for text in texts]
        self.boundaries.copy_(torch.tensor([opens, closes, blank]))
        self.vocabulary_known.fill_(True)

    def upcoming(self, text: AuxiliaryText) -> tuple[Int[Tensor, "B T W"], Bool[Tensor, "B T W"]]:
        """Return the tokens within reach, and which of them are in the next span."""
        if not self.vocabulary_known:
            refuse(
                self,
                "the texts of the tokens are unknown; call prepare_objectives(module, data) of mtp_modules.training "
                "before the fit, or set_vocabulary(texts).",
            )
        tokens, valid = text.upcoming(self.window)
        own = self._numbers(text)
        numbers, _ = replace(text, tokens=own).upcoming(self.window)
        return tokens, valid & (numbers == own[:, : text.length, None] + 1)

    def _numbers(self, text: AuxiliaryText) -> Int[Tensor, "B L"]:
        """Number the spans of each row: white space behind an end belongs to the span that has ended."""
        opens, closes, blank = (part[text.tokens.clamp(min=0)] & (text.tokens >= 0) for part in self.boundaries)
        places = torch.arange(text.tokens.shape[1], device=text.tokens.device).expand_as(text.tokens)
        begins = torch.zeros_like(blank)
        if text.document_ids is not None:
            begins[:, 1:] = text.document_ids[:, 1:] != text.document_ids[:, :-1]
        last_end = torch.where(closes, places, -1).cummax(dim=1).values
        last_word = torch.where(~blank | begins, places, -1).cummax(dim=1).values
        ended = (last_end >= last_word) & (last_end >= 0)
        opens, begins = opens.clone(), begins.clone()
        begins[:, 1:] |= ended[:, :-1] & ~blank[:, 1:]
        return (begins | opens).cumsum(dim=1)
