"""The disk tier's records as rows of flat arrays, and the values that pass between its parts.

A million rows are a few arrays and dicts of bytes to the garbage collector, not a million objects. This module keeps
links in order and decides nothing: what a state means, and when it changes, stands in `_disk_directory`.
"""

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence

import attrs

from lmcache_trio.abc import ChunkKey

__all__ = [
    "ALIGNMENT",
    "FREE",
    "Doomed",
    "Read",
    "Row",
    "Rows",
    "Write",
    "extent_of",
    "index_cost",
    "name_of",
    "pack",
    "round_up",
    "unpack",
]

ALIGNMENT = 4096
FREE = 0
_NAMESPACE = 32
_SHARD = struct.Struct("<QQ")
_TABLES = 64
"""Directory tables a namespace: growing one dict of a million entries would stop the loop for over 10 ms."""

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
    """Bytes of the index file that one record may take: SQLite fills the pages of its tree to a third at least."""
    return 3 * (150 + _SHARD.size * shards)


def pack(lengths: Sequence[int], sums: Sequence[int]) -> bytes:
    """Shard lengths and checksums as the index file keeps them."""
    return b"".join(_SHARD.pack(length, total) for length, total in zip(lengths, sums, strict=True))


def unpack(packed: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The inverse of `pack`."""
    pairs = list(_SHARD.iter_unpack(packed))
    return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)


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
    """A chunk being read. *row* is -1 for one that was found by query, before the directory was rebuilt."""

    key: ChunkKey
    row: int
    offset: int
    generation: int
    lengths: tuple[int, ...]
    sums: tuple[int, ...]

    @classmethod
    def of_row(cls, found: Row) -> "Read":
        """From a row of the index file."""
        return cls(ChunkKey(found[0][:_NAMESPACE], found[0][_NAMESPACE:]), -1, found[2], found[3], *unpack(found[5]))


@attrs.frozen
class Doomed:
    """A record whose row is to be erased from the index file; a newer *generation* under its key is another's."""

    row: int
    key: bytes
    generation: int


class Rows:
    """The arrays, public to the directory, and the names that lead to them. Rows are 0 and on; -1 is none."""

    def __init__(self) -> None:
        self.state = bytearray()
        self.queued = bytearray()  # stands in the heap of leaves
        self.offset = array("q")
        self.extent = array("q")
        self.generation = array("q")
        self.recency = array("q")
        self.children = array("l")  # published ones
        self.holders = array("l")  # readers, and the writer
        self.namespace: list[bytes] = []
        self.digest: list[bytes] = []
        self.parent: list[bytes] = []
        self.shards: list[bytes] = []
        self.index_used = 0
        self._free: list[int] = []
        self._spaces: dict[bytes, list[dict[bytes, int]]] = {}

    def find(self, namespace: bytes, digest: bytes) -> int:
        """The row that goes by this name, or -1."""
        tables = self._spaces.get(namespace)
        return -1 if tables is None or not digest else tables[digest[0] % _TABLES].get(digest, -1)

    def key(self, row: int) -> bytes:
        """Its name as the index file has it."""
        return self.namespace[row] + self.digest[row]

    def of_namespace(self, namespace: bytes) -> list[int]:
        """All rows that go by a name in *namespace*, in the index file's order."""
        named = [item for table in self._spaces.get(namespace, ()) for item in table.items()]
        return [row for _, row in sorted(named)]

    def add(self, found: Row, extent: int, state: int) -> int:
        """A new row that goes by its name from now on."""
        key, parent, offset, generation, recency, shards = found
        row = self._free.pop() if self._free else self._append()
        namespace, digest = key[:_NAMESPACE], key[_NAMESPACE:]
        tables = self._spaces.get(namespace)
        if tables is None:
            tables = self._spaces[namespace] = [{} for _ in range(_TABLES)]
        above = self.find(namespace, parent)
        self.state[row] = state
        self.offset[row], self.extent[row] = offset, extent
        self.generation[row], self.recency[row] = generation, recency
        self.namespace[row], self.digest[row] = namespace, digest
        self.parent[row] = self.digest[above] if above >= 0 else parent  # one object for both: a chain is half as large
        self.shards[row] = shards
        self.index_used += index_cost(len(shards) // _SHARD.size)
        tables[digest[0] % _TABLES][digest] = row
        return row

    def remove_name(self, row: int) -> None:
        """It is not found any more."""
        digest = self.digest[row]
        del self._spaces[self.namespace[row]][digest[0] % _TABLES][digest]

    def drop(self, row: int) -> None:
        """The row is free for another; its name was removed before."""
        self.index_used -= index_cost(len(self.shards[row]) // _SHARD.size)
        self.state[row] = FREE
        self.children[row] = self.holders[row] = 0
        self.namespace[row] = self.digest[row] = self.parent[row] = self.shards[row] = b""
        self._free.append(row)

    def __iter__(self) -> Iterator[int]:
        return (row for row, state in enumerate(self.state) if state != FREE)

    def _append(self) -> int:
        self.state.append(FREE)
        self.queued.append(0)
        for numbers in (self.offset, self.extent, self.generation, self.recency, self.children, self.holders):
            numbers.append(0)
        for values in (self.namespace, self.digest, self.parent, self.shards):
            values.append(b"")
        return len(self.state) - 1
