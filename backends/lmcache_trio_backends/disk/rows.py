"""The disk tier's records as rows of flat arrays.

A million rows are a few flat arrays, and dicts of bytes, to the garbage collector: it has nothing to visit. This module
keeps names and rows in order and decides nothing: what a state means, and when it changes, stands in `directory`.
"""

from array import array
from collections.abc import Sequence

from lmcache_trio_backends.disk.records import NAME, Row, extent_of, index_cost, unpack

__all__ = ["FREE", "Rows", "Space"]

FREE = 0
_TABLES = 256
"""Tables a namespace, by the digest's first byte: growing or sorting a million entries at once would stop the loop."""
_BLOCK = 256
"""Rows by which the arrays grow."""


class Space:
    """A namespace's names. *gone*: forgotten, its rows are on their way out, and its name may be another's."""

    __slots__ = ("_leaving", "chunks", "gone", "name", "number", "orphans", "rows", "tables")

    def __init__(self, name: bytes, number: int) -> None:
        self.name = name
        self.number = number
        self.gone = False
        self.rows = 0  # that are not free
        self.chunks = 0  # published ones
        self.orphans: dict[bytes, int] = {}  # digest of a parent that is not published -> its children that are
        self.tables: list[dict[bytes, int]] = [{} for _ in range(_TABLES)]
        self._leaving: list[tuple[bytes, int]] = []

    def find(self, digest: bytes) -> int:
        """The row that goes by this name, or -1."""
        return self.tables[digest[0]].get(digest, -1) if digest else -1

    def pop(self) -> int:
        """Take a name away and give its row, about in the index file's order; -1 when there is none."""
        while True:
            while self._leaving:
                digest, row = self._leaving.pop()
                if self.tables[digest[0]].pop(digest, -1) == row:
                    return row
            table = next(filter(None, self.tables), None)
            if table is None:
                return -1
            self._leaving = sorted(table.items(), reverse=True)


class _Shape:
    """Rows of the same shard lengths; their checksums lie side by side."""

    __slots__ = ("cost", "extent", "free", "lengths", "number", "rows", "sums")

    def __init__(self, lengths: tuple[int, ...], number: int) -> None:
        self.lengths = lengths
        self.number = number
        self.extent = extent_of(lengths)
        self.cost = index_cost(len(lengths))
        self.rows = 0
        self.sums = array("Q")
        self.free: list[int] = []


class Rows:
    """The arrays, public to the directory, and the names that lead to them. Rows are 0 and on; -1 is none."""

    def __init__(self) -> None:
        self.state = bytearray()
        self.queued = bytearray()  # stands in the heap of leaves
        self.offset = array("q")
        self.extent = array("q")
        self.generation = array("q")
        self.recency = array("q")
        self.children = array("i")  # published ones
        self.holders = array("i")  # readers, and the writer
        self.count = 0  # rows that were ever in use
        self.index_used = 0
        self._space = array("i")
        self._digest = bytearray()
        self._parent = bytearray()
        self._has_parent = bytearray()
        self._shape = array("i")
        self._place = array("i")  # among the checksums of its shape
        self._free: list[int] = []
        self._by_name: dict[bytes, Space] = {}
        self._spaces: list[Space | None] = []
        self._by_lengths: dict[tuple[int, ...], _Shape] = {}
        self._shapes: list[_Shape | None] = []

    def find(self, namespace: bytes, digest: bytes) -> int:
        """The row that goes by this name, or -1."""
        space = self._by_name.get(namespace)
        return -1 if space is None else space.find(digest)

    def space(self, row: int) -> Space:
        """Where its name stands."""
        space = self._spaces[self._space[row]]
        assert space is not None, "a row that is not free keeps its space"
        return space

    def digest(self, row: int) -> bytes:
        return bytes(self._digest[row * NAME : (row + 1) * NAME])

    def parent(self, row: int) -> bytes:
        """Its parent's digest; empty: none."""
        return bytes(self._parent[row * NAME : (row + 1) * NAME]) if self._has_parent[row] else b""

    def key(self, row: int) -> bytes:
        """Its name as the index file has it."""
        return self.space(row).name + self.digest(row)

    def lengths(self, row: int) -> tuple[int, ...]:
        """Bytes of each shard."""
        return self._shape_of(row).lengths

    def sums(self, row: int) -> tuple[int, ...]:
        """The shards' checksums."""
        shape = self._shape_of(row)
        at = self._place[row] * len(shape.lengths)
        return tuple(shape.sums[at : at + len(shape.lengths)])

    def set_sums(self, row: int, sums: Sequence[int]) -> None:
        """Now that they are known."""
        shape = self._shape_of(row)
        at = self._place[row] * len(shape.lengths)
        shape.sums[at : at + len(shape.lengths)] = array("Q", sums)

    def add(self, found: Row, state: int) -> int:
        """A new row that goes by its name from now on."""
        key, parent, offset, generation, recency, shards = found
        row = self._free.pop() if self._free else self._next()
        namespace, digest = key[:NAME], key[NAME:]
        space = self._by_name.get(namespace) or self._new_space(namespace)
        lengths, sums = unpack(shards)
        shape = self._by_lengths.get(lengths) or self._new_shape(lengths)
        self.state[row] = state
        self.offset[row], self.extent[row] = offset, shape.extent
        self.generation[row], self.recency[row] = generation, recency
        at = row * NAME
        self._digest[at : at + NAME] = digest
        self._has_parent[row] = bool(parent)
        if parent:
            self._parent[at : at + NAME] = parent
        self._space[row], self._shape[row] = space.number, shape.number
        if shape.free:
            self._place[row] = shape.free.pop()
            self.set_sums(row, sums)
        else:
            self._place[row] = shape.rows
            shape.sums.extend(sums)
        space.rows += 1
        shape.rows += 1
        self.index_used += shape.cost
        space.tables[digest[0]][digest] = row
        return row

    def forget(self, namespace: bytes) -> Space | None:
        """Nothing goes by a name in *namespace* any more, at once; the rows are still there, under the Space given."""
        space = self._by_name.pop(namespace, None)
        if space is not None:
            space.gone = True
        return space

    def remove_name(self, row: int) -> None:
        """It is not found any more."""
        digest = self.digest(row)
        self.space(row).tables[digest[0]].pop(digest, None)

    def drop(self, row: int) -> None:
        """The row is free for another; its name was removed before."""
        space, shape = self.space(row), self._shape_of(row)
        shape.free.append(self._place[row])
        shape.rows -= 1
        self.index_used -= shape.cost
        if not shape.rows:
            del self._by_lengths[shape.lengths]
            self._shapes[shape.number] = None
        space.rows -= 1
        if not space.rows:
            if not space.gone:
                del self._by_name[space.name]
            self._spaces[space.number] = None
        self.state[row] = FREE
        self.children[row] = self.holders[row] = 0
        self._free.append(row)

    def _shape_of(self, row: int) -> _Shape:
        shape = self._shapes[self._shape[row]]
        assert shape is not None, "a row that is not free keeps its shape"
        return shape

    def _new_space(self, name: bytes) -> Space:
        space = self._by_name[name] = Space(name, _vacant(self._spaces))
        self._spaces[space.number] = space
        return space

    def _new_shape(self, lengths: tuple[int, ...]) -> _Shape:
        shape = self._by_lengths[lengths] = _Shape(lengths, _vacant(self._shapes))
        self._shapes[shape.number] = shape
        return shape

    def _next(self) -> int:
        if self.count == len(self.state):
            for small in (self.state, self.queued, self._has_parent):
                small += bytes(_BLOCK)
            for name in (self._digest, self._parent):
                name += bytes(NAME * _BLOCK)
            for numbers in (self.offset, self.extent, self.generation, self.recency):
                numbers.frombytes(bytes(8 * _BLOCK))
            for counts in (self.children, self.holders, self._space, self._shape, self._place):
                counts.frombytes(bytes(4 * _BLOCK))
        self.count += 1
        return self.count - 1


def _vacant(places: "list[Space | None] | list[_Shape | None]") -> int:
    """The number of a free place; few are ever in use."""
    for number, there in enumerate(places):
        if there is None:
            return number
    places.append(None)
    return len(places) - 1
