"""What the disk tier says of one chunk: the row that its index file keeps, and the values that pass between its parts.

It knows how a record is written down and what it takes, and neither where others are nor what becomes of it.
"""

import struct
from collections.abc import Iterable, Sequence

import attrs

from lmcache_trio.abc import ChunkKey

__all__ = [
    "ALIGNMENT",
    "MAX_SHARDS",
    "NAME",
    "Doomed",
    "Lost",
    "Read",
    "Row",
    "Write",
    "extent_of",
    "index_cost",
    "is_sound",
    "name_of",
    "pack",
    "round_up",
    "unpack",
]

ALIGNMENT = 4096
MAX_SHARDS = 256
"""Of one chunk: a record of so many takes one page beside its tree, and three of the log, which is planned for them."""
NAME = 32
"""Bytes of a namespace, and of a digest."""
_SHARD = struct.Struct("<QQ")
_LIMIT = 1 << 61
"""No generation, recency or place is as large. A flipped bit below it leaves room to count on from there."""

Row = tuple[bytes, bytes, int, int, int, bytes]
"""A row of the index file: key (namespace + digest), parent, offset, generation, recency, packed shards."""


def name_of(key: ChunkKey) -> bytes:
    """*key* as the index file has it."""
    return key.namespace + key.digest


def round_up(length: int) -> int:
    """*length* in whole 4 KiB pages."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def extent_of(lengths: Iterable[int]) -> int:
    """Bytes that a chunk takes in the slabs: each shard begins on a 4 KiB boundary."""
    return sum(round_up(length) for length in lengths)


def index_cost(shards: int) -> int:
    """Bytes of the index file that one record of at most `MAX_SHARDS` may take.

    SQLite fills the pages of its tree to a third at least. Of a record of more than 1,002 bytes it keeps 489 there, and
    the rest in a page of its own ("B-tree Cell Format" in its file format, for pages of 4,096 bytes).
    """
    size = 158 + _SHARD.size * shards
    return 3 * size if size - 20 <= 1002 else 3 * (489 + 20) + 4096


def pack(lengths: Sequence[int], sums: Sequence[int]) -> bytes:
    """Shard lengths and checksums as the index file keeps them."""
    return b"".join(_SHARD.pack(length, total) for length, total in zip(lengths, sums, strict=True))


def unpack(packed: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The inverse of `pack`."""
    numbers = struct.unpack(f"<{len(packed) // 8}Q", packed)
    return numbers[::2], numbers[1::2]


def is_sound(row: Row) -> bool:
    """Whether we may have written *row*. Where other rows lie, and where the slabs end, it can't tell.

    A million rows are looked at when a server starts, so this is written for speed.
    """
    key, parent, offset, generation, recency, shards = row
    if len(key) != 2 * NAME or len(parent) not in (0, NAME):
        return False
    if not 0 < len(shards) <= MAX_SHARDS * _SHARD.size or len(shards) % _SHARD.size:
        return False
    if not (0 <= offset < _LIMIT and 0 < generation < _LIMIT and 0 <= recency < _LIMIT) or offset % ALIGNMENT:
        return False
    if any(shards[6::16]) or any(shards[7::16]):  # a shard of 2**48 bytes or more
        return False
    return any(shards[:6]) or any(unpack(shards)[0])


@attrs.frozen
class Write:
    """A chunk being written: *offset* in the slabs is its own until it is published or aborted."""

    row: int
    key: ChunkKey
    parent: bytes
    lengths: tuple[int, ...]
    offset: int
    generation: int
    recency: int

    def as_row(self, sums: Sequence[int]) -> Row:
        """What the index file is to keep; *sums* are the shards' checksums."""
        return name_of(self.key), self.parent, self.offset, self.generation, self.recency, pack(self.lengths, sums)


@attrs.frozen
class Read:
    """A chunk being read. *row* is -1 for one that was found before the directory was rebuilt: nothing holds it."""

    key: ChunkKey
    row: int
    offset: int
    generation: int
    lengths: tuple[int, ...]
    sums: tuple[int, ...]

    @classmethod
    def of_row(cls, found: Row) -> "Read":
        """From a row of the index file."""
        return cls(ChunkKey(found[0][:NAME], found[0][NAME:]), -1, found[2], found[3], *unpack(found[5]))


@attrs.frozen
class Doomed:
    """A record whose row is to be erased from the index file; a newer *generation* under its key is another's."""

    row: int
    key: bytes
    generation: int


@attrs.frozen
class Lost:
    """Bytes of the slabs, from *start* to *end*, that were there once. *usable*: they were set aside anew."""

    start: int
    end: int
    usable: bool
