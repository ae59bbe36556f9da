"""Token streams, and how they are put together."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtp_modules.data.encoding import Piece
from mtp_modules.data.rows import IntArray


@dataclass(frozen=True)
class TokenStream:
    """Concatenated documents.

    Attributes:
        tokens: All token ids, ``uint16`` or ``uint32``: an array, or shards that are indexed like one.
        document_starts: Where each document starts; ascending from 0.
        names: Name of each document.
        loss_mask: False at tokens that are not trained on; ``None`` if all are.
        hashes: Of the tokens of each document.
        known_digest: The digest, if it is known without reading the tokens.
    """

    tokens: Any
    document_starts: IntArray
    names: Sequence[str]
    loss_mask: Any = None
    hashes: npt.NDArray[np.uint64] | None = None
    known_digest: str | None = None

    def digest(self) -> str:
        """Return a short hash of the tokens, the document boundaries and the loss mask."""
        if self.known_digest is not None:
            return self.known_digest
        state = hashlib.blake2b(digest_size=16)
        for values in (self.tokens, self.document_starts, self.loss_mask):
            for start in range(0, 0 if values is None else len(values), 2**24):
                state.update(np.ascontiguousarray(values[start : start + 2**24]).data)
        return state.hexdigest()


class SplitBuffer:
    """Collects the pieces of one split.

    Args:
        dtype: Of token ids.
        open_digest: Of the document that an earlier buffer ended in; empty if it ended with a whole one.
    """

    def __init__(self, dtype: type[np.unsignedinteger[Any]], open_digest: bytes = b"") -> None:
        self.dtype = dtype
        self.num_tokens = 0
        self.open_digest = open_digest
        self._tokens: list[npt.NDArray[np.integer[Any]]] = []
        self._masks: list[npt.NDArray[np.bool_]] = []
        self.starts: list[int] = []
        self.names: list[str] = []
        self.hashes: list[int] = []
        self.masked = False

    def add(self, piece: Piece) -> None:
        """Add a piece; one without tokens is left out.

        Args:
            piece: In order.
        """
        if not len(piece.tokens):
            return
        if piece.first:
            self.starts.append(self.num_tokens)
            self.names.append(piece.name)
            self.open_digest = b""
        content = self.open_digest + piece.tokens.tobytes()
        self.open_digest = hashlib.blake2b(content, digest_size=8).digest()
        if piece.last:
            self.hashes.append(int.from_bytes(self.open_digest, "little"))
        self.masked |= piece.loss_mask is not None
        mask = np.ones(len(piece.tokens), dtype=bool) if piece.loss_mask is None else piece.loss_mask
        self._tokens.append(piece.tokens)
        self._masks.append(mask)
        self.num_tokens += len(piece.tokens)

    def tokens(self) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Return all tokens in one array."""
        return np.concatenate([np.empty(0, dtype=self.dtype), *self._tokens])

    def mask(self) -> npt.NDArray[np.bool_]:
        """Return the loss mask of all tokens."""
        return np.concatenate([np.empty(0, dtype=bool), *self._masks])

    def stream(self) -> TokenStream:
        """Return what was added."""
        return TokenStream(
            self.tokens(),
            np.array(self.starts, dtype=np.int64),
            tuple(self.names),
            self.mask() if self.masked else None,
            np.array(self.hashes, dtype=np.uint64),
        )


def duplicates(streams: Mapping[str, TokenStream]) -> list[str]:
    """Return one sentence for each two splits that share documents: how many, and the first by name.

    Args:
        streams: Of each split.
    """
    told = []
    found = {split: stream for split, stream in streams.items() if stream.hashes is not None}
    for index, (split, stream) in enumerate(found.items()):
        for other, following in list(found.items())[index + 1 :]:
            assert stream.hashes is not None
            assert following.hashes is not None
            (places,) = np.isin(following.hashes, stream.hashes).nonzero()
            if len(places):
                (first,) = (stream.hashes == following.hashes[places[0]]).nonzero()
                told.append(
                    f"{len(places)} of the {len(following.names)} documents of the {other} split are also in the "
                    f"{split} split, such as {following.names[places[0]]!r}, which equals {stream.names[first[0]]!r}."
                )
    return told
