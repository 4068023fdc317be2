"""The chunks of the disk tier as rows of flat arrays, and the names that lead to them.

To the garbage collector a million rows are a few flat arrays and dicts of bytes, so it has nothing to visit. This
module decides nothing: `chunk_table` decides what a state means and when it changes.
"""

from array import array
from collections.abc import Sequence

from lmcache_trio_backends.disk.records import NAME, Row, extent_of, index_cost

__all__ = ["FREE", "ChunkRows", "Space"]

FREE = 0
_TABLES = 256
"""Tables per namespace, by the digest's first byte: to grow or sort one of a million entries would stop the loop."""
_BLOCK = 256
"""Rows by which the arrays grow."""


class Space:
    """The names of one namespace. *gone*: it was forgotten; its rows are to be erased, and its name may be reused."""

    __slots__ = ("_leaving", "chunks", "gone", "name", "number", "orphans", "rows", "tables")

    def __init__(self, name: bytes, number: int) -> None:
        self.name = name
        self.number = number
        self.gone = False
        self.rows = 0  # that are not free
        self.chunks = 0  # published ones
        self.orphans: dict[bytes, int] = {}  # digest of a parent that is not published -> its published children
        self.tables: list[dict[bytes, int]] = [{} for _ in range(_TABLES)]
        self._leaving: list[tuple[bytes, int]] = []

    def find(self, digest: bytes) -> int:
        """The row of this name, or -1."""
        return self.tables[digest[0]].get(digest, -1) if digest else -1

    def pop(self) -> int:
        """Take a name away and give its row, about in the index file's order; -1 if there is none."""
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
    """Rows with the same shard lengths; their checksums lie side by side."""

    __slots__ = ("cost", "extent", "free", "lengths", "number", "rows", "sums")

    def __init__(self, lengths: tuple[int, ...], number: int) -> None:
        self.lengths = lengths
        self.number = number
        self.extent = extent_of(lengths)
        self.cost = index_cost(len(lengths))
        self.rows = 0
        self.sums = array("Q")
        self.free: list[int] = []


class ChunkRows:
    """The arrays, and the names. Rows count from 0; -1 stands for none."""

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
        self._spaces: dict[int, Space] = {}
        self._by_lengths: dict[tuple[int, ...], _Shape] = {}
        self._shapes: dict[int, _Shape] = {}

    def find(self, namespace: bytes, digest: bytes) -> int:
        """The row of this name, or -1."""
        space = self._by_name.get(namespace)
        return -1 if space is None else space.tables[digest[0]].get(digest, -1)

    def space(self, row: int) -> Space:
        """The namespace of *row*."""
        return self._spaces[self._space[row]]

    def digest(self, row: int) -> bytes:
        return bytes(self._digest[row * NAME : (row + 1) * NAME])

    def parent(self, row: int) -> bytes:
        """Its parent's digest; empty if it has none."""
        return bytes(self._parent[row * NAME : (row + 1) * NAME]) if self._has_parent[row] else b""

    def name(self, row: int) -> bytes:
        """Its name as the index file has it."""
        return self.space(row).name + self.digest(row)

    def lengths(self, row: int) -> tuple[int, ...]:
        """Bytes of each shard."""
        return self._shapes[self._shape[row]].lengths

    def sums(self, row: int) -> tuple[int, ...]:
        """The shards' checksums."""
        shape = self._shapes[self._shape[row]]
        at = self._place[row] * len(shape.lengths)
        return tuple(shape.sums[at : at + len(shape.lengths)])

    def set_sums(self, row: int, sums: Sequence[int]) -> None:
        """Set the shards' checksums."""
        shape = self._shapes[self._shape[row]]
        at = self._place[row] * len(shape.lengths)
        shape.sums[at : at + len(shape.lengths)] = array("Q", sums)

    def add(self, found: Row, state: int) -> int:
        """A new row, which has its name from now on."""
        if not self._free and self.count == len(self.state):
            self._grow()
        row = self._free.pop() if self._free else self.count
        self.count = max(self.count, row + 1)
        namespace, digest = found.name[:NAME], found.name[NAME:]
        space = self._by_name.get(namespace) or self._new_space(namespace)
        shape = self._by_lengths.get(found.lengths) or self._new_shape(found.lengths)
        self.state[row] = state
        self.offset[row], self.extent[row] = found.offset, shape.extent
        self.generation[row], self.recency[row] = found.generation, found.recency
        at = row * NAME
        self._digest[at : at + NAME] = digest
        self._has_parent[row] = bool(found.parent)
        if found.parent:
            self._parent[at : at + NAME] = found.parent
        self._space[row], self._shape[row] = space.number, shape.number
        if shape.free:
            self._place[row] = shape.free.pop()
            self.set_sums(row, found.sums)
        else:
            self._place[row] = shape.rows
            shape.sums.extend(found.sums)
        space.rows += 1
        shape.rows += 1
        self.index_used += shape.cost
        space.tables[digest[0]][digest] = row
        return row

    def forget(self, namespace: bytes) -> Space | None:
        """No row has a name in *namespace* from now on. The rows are still there, in the Space that is returned."""
        space = self._by_name.pop(namespace, None)
        if space is not None:
            space.gone = True
        return space

    def remove_name(self, row: int) -> None:
        """It is not found any more."""
        digest = self.digest(row)
        self.space(row).tables[digest[0]].pop(digest, None)

    def drop(self, row: int) -> None:
        """Free the row; its name was removed before."""
        space, shape = self.space(row), self._shapes[self._shape[row]]
        shape.free.append(self._place[row])
        shape.rows -= 1
        self.index_used -= shape.cost
        if not shape.rows:
            del self._by_lengths[shape.lengths], self._shapes[shape.number]
        space.rows -= 1
        if not space.rows:
            if not space.gone:
                del self._by_name[space.name]
            del self._spaces[space.number]
        self.state[row] = FREE
        self.children[row] = self.holders[row] = 0
        self._free.append(row)

    def _new_space(self, name: bytes) -> Space:
        space = self._by_name[name] = Space(name, _vacant(self._spaces))
        self._spaces[space.number] = space
        return space

    def _new_shape(self, lengths: tuple[int, ...]) -> _Shape:
        shape = self._by_lengths[lengths] = _Shape(lengths, _vacant(self._shapes))
        self._shapes[shape.number] = shape
        return shape

    def _grow(self) -> None:
        for small in (self.state, self.queued, self._has_parent):
            small += bytes(_BLOCK)
        for name in (self._digest, self._parent):
            name += bytes(NAME * _BLOCK)
        for numbers in (self.offset, self.extent, self.generation, self.recency):
            numbers.frombytes(bytes(8 * _BLOCK))
        for counts in (self.children, self.holders, self._space, self._shape, self._place):
            counts.frombytes(bytes(4 * _BLOCK))


def _vacant(numbered: dict[int, Space] | dict[int, _Shape]) -> int:
    """A number that is not taken; few ever are."""
    return next(number for number in range(len(numbered) + 1) if number not in numbered)
