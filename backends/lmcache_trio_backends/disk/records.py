"""The values that pass between the parts of the disk tier, and how much room a chunk takes."""

from collections.abc import Iterable
from typing import NamedTuple

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
    "key_of",
    "name_of",
]

ALIGNMENT = 4096
MAX_SHARDS = 256
"""Of one chunk: a record of so many takes one page beside its tree, and three of the log, which is planned for them."""
NAME = 32
"""Bytes of a namespace, and of a digest."""


class Row(NamedTuple):
    """A chunk as the index file keeps it: its *name* is namespace + digest, *parent* a digest or empty."""

    name: bytes
    parent: bytes
    offset: int
    generation: int
    recency: int
    lengths: tuple[int, ...]
    sums: tuple[int, ...]


def name_of(key: ChunkKey) -> bytes:
    """*key* as the index file has it."""
    return key.namespace + key.digest


def key_of(name: bytes) -> ChunkKey:
    """The key that the index file has as *name*."""
    return ChunkKey(name[:NAME], name[NAME:])


def extent_of(lengths: Iterable[int]) -> int:
    """Bytes that a chunk takes in the slabs: each shard begins on a 4 KiB boundary."""
    return sum(-(-length // ALIGNMENT) for length in lengths) * ALIGNMENT


def index_cost(shards: int) -> int:
    """Bytes of the index file that one record of at most `MAX_SHARDS` may take.

    SQLite fills the pages of its tree to a third at least. Of a record of more than 1,002 bytes it keeps 489 there, and
    the rest in a page of its own ("B-tree Cell Format" in its file format, for pages of 4,096 bytes).
    """
    size = 158 + 16 * shards
    return 3 * size if size - 20 <= 1002 else 3 * (489 + 20) + 4096


@attrs.frozen
class Write:
    """A chunk being written: the extent at *row.offset* is its own until it is published or aborted."""

    number: int
    row: Row


@attrs.frozen
class Read:
    """A chunk being read. *number* is -1 if its row is not in the table yet: then nothing holds the chunk."""

    key: ChunkKey
    number: int
    offset: int
    generation: int
    lengths: tuple[int, ...]
    sums: tuple[int, ...]


@attrs.frozen
class Doomed:
    """A record whose row is to be erased from the index file; a newer *generation* of that *name* is another record."""

    number: int
    name: bytes
    generation: int


@attrs.frozen
class Lost:
    """A part of the slabs, from *start* to *end*, whose bytes are gone. *usable*: the part was set aside anew."""

    start: int
    end: int
    usable: bool
