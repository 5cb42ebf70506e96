"""Byte-pair encoding of one word: of its neighbouring tokens, the pair learned first merges first.

The method is that of Sennrich et al., 2016 (https://arxiv.org/abs/1508.07909), on bytes as in
GPT-2. A vocabulary file spells each byte as one printable character: the byte's own in Latin-1 if
that prints, otherwise one from U+0100 on (a space is `Ġ`).

Lesson: lessons/source/04_tokenizers.py.
"""

import heapq
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import add

from nanovlm.errors import NanoVLMError, quoted

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_SHIFTED = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_TO_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + i) for i, byte in enumerate(_SHIFTED)
}
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}
_TO_LATIN_1 = {ord(character): byte for character, byte in CHARACTER_TO_BYTE.items()}

REMOVED = -1  # no id, and part of no pair that merges
CACHED_WORDS = 1 << 17
CACHED_LENGTH = 64  # characters; a longer word rarely occurs twice


def bytes_to_token(raw: bytes) -> str:
    """Bytes as a vocabulary file spells them."""
    return raw.decode("latin-1").translate(BYTE_TO_CHARACTER)


def token_to_bytes(token: str) -> bytes:
    """The bytes that a token spells; one with any other character stands for its own text."""
    try:
        return bytes([CHARACTER_TO_BYTE[character] for character in token])
    except KeyError:
        return token.encode()


def merge(ids: list[int], ranks: dict[tuple[int, int], int], merged: list[int]) -> list[int]:
    """Merge neighbouring ids, lowest rank first, then leftmost, until no pair has a rank.

    `ranks` maps a pair to its rank, and `merged` a rank to the id of the merged token. `ids` is
    overwritten. O(n log n): a linked list holds the ids (the right one of a merged pair becomes
    REMOVED), a heap the pairs to merge.
    """
    length = len(ids)
    before, after = list(range(-1, length - 1)), list(range(1, length + 1))
    heap = [(ranks[pair], left) for left, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, left = heapq.heappop(heap)
        right = after[left]
        if right == length or ranks.get((ids[left], ids[right])) != rank:
            continue  # one of the two has been merged with its other neighbour since
        ids[left], ids[right] = merged[rank], REMOVED
        after[left] = following = after[right]
        if following < length:
            before[following] = left
            rank = ranks.get((ids[left], ids[following]))
            if rank is not None:
                heapq.heappush(heap, (rank, left))
        if (preceding := before[left]) >= 0:
            rank = ranks.get((ids[preceding], ids[left]))
            if rank is not None:
                heapq.heappush(heap, (rank, preceding))
    return [id for id in ids if id != REMOVED]


class _Neighbours(dict[str, bool]):
    """Whether any token holds two given characters side by side.

    If none does, no merge crosses the place between them, and the text can be split there. Chinese
    is written without spaces, so its "words" are whole clauses, nearly all of them new. Split at
    such places they become parts of a few characters, which occur often and are in the cache.
    """

    def __init__(self, tokens: Iterable[str]):
        # Of tokens that end inside a character: the two bytes around each character boundary.
        self._bytes: set[tuple[int, int]] = set()
        for token in tokens:
            if token.isascii():
                continue
            try:
                raw = token.translate(_TO_LATIN_1).encode("latin-1")
            except UnicodeEncodeError:
                continue  # does not spell bytes, so no merge makes it
            if raw.isascii():
                continue
            try:
                text = raw.decode()
                self.update(dict.fromkeys(map(add, text, text[1:]), True))
            except UnicodeDecodeError:
                self._bytes.update(pair for pair in pairwise(raw) if pair[1] & 0xC0 != 0x80)

    def __missing__(self, pair: str) -> bool:
        beside = pair.isascii() or (pair[0].encode()[-1], pair[1].encode()[0]) in self._bytes
        if len(self) < CACHED_WORDS:
            self[pair] = beside
        return beside


class BytePairEncoder:
    """Encodes words with a vocabulary (token to id) and its merges in the order of learning."""

    def __init__(self, vocab: dict[str, int], merges: Iterable[Sequence[str]]):
        missing = [byte for byte, character in BYTE_TO_CHARACTER.items() if character not in vocab]
        if missing:
            raise NanoVLMError(
                f"vocabulary lacks {len(missing)} of the 256 bytes (0x{missing[0]:02x}…); damaged?"
            )
        self._byte_ids = [vocab[BYTE_TO_CHARACTER[byte]] for byte in range(256)]
        self._ranks: dict[tuple[int, int], int] = {}
        self._merged: list[int] = []
        for rank, pair in enumerate(merges):
            try:
                left, right = pair
                self._ranks[vocab[left], vocab[right]] = rank
                self._merged.append(vocab[left + right])
            except (KeyError, TypeError, ValueError):
                raise NanoVLMError(
                    f"merge {rank}: {quoted(pair)} is not two tokens that make one; damaged?"
                ) from None
        self.reachable = {*self._byte_ids, *self._merged}  # every id that `encode` can give
        self._neighbours = _Neighbours(vocab)
        self._cache: dict[str, list[int]] = {}

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The merges as pairs of ids, in the order of learning."""
        return sorted(self._ranks, key=self._ranks.__getitem__)

    def encode(self, word: str) -> list[int]:
        """The ids of one word."""
        ids, start = [], 0
        if not word.isascii():
            neighbours = self._neighbours
            for position, pair in enumerate(map(add, word, word[1:]), 1):
                if not neighbours[pair]:
                    ids += self._encode_part(word[start:position])
                    start = position
        return ids + self._encode_part(word[start:])

    def _encode_part(self, part: str) -> list[int]:
        ids = self._cache.get(part)
        if ids is None:
            ids = merge([self._byte_ids[byte] for byte in part.encode()], self._ranks, self._merged)
            if len(part) <= CACHED_LENGTH:
                if len(self._cache) >= CACHED_WORDS:
                    self._cache.clear()
                self._cache[part] = ids
        return ids
