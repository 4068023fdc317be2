"""The chunks on one disk: where each lies, who uses it, and which is evicted first.

    ABSENT --reserve--> WRITING --publish--> PUBLISHED --evict / quarantine / forget--> DOOMED --erased--> ABSENT
                           |`--abort--> ABSENT                                            ^
                           `--forget------------------------------------------------------'

Rule 1: a chunk's bytes are written before its row stands in the index file, and its row is erased there before its
bytes are given to another chunk. So after a kill at any time, each row of the file names bytes of its own.
Rule 2: the name of a DOOMED chunk is not found any more. Its extent stays taken until its last holder has ended and its
row is erased. Rule 3: no I/O and no clock here.

A chunk is a *row* of flat arrays. Rows count from 0; -1 is no row. To the garbage collector a million rows are a few
arrays and dicts of bytes, so it has nothing to visit.

Only leaves are evicted: chunks without a child on this disk, the least recently used one first. A parent inherits the
recency of its last child. The leaves stand in a heap by recency. So a touch is O(1), an eviction O(log n), and nothing
walks a prefix. The entry of a chunk that was touched since is late. It is corrected when it comes to the top, and one
call corrects a bounded number, because a million entries may be late.

A forgotten namespace is absent at once; its rows are doomed a batch at a time, when `take_doomed` is called. The index
file keeps the generation up to which it was forgotten: rows that a kill leaves are dead, and their bytes are free.
"""

import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum

from lmcache_trio.abc import Arena, ChunkKey
from lmcache_trio_backends.disk.admission import Admission
from lmcache_trio_backends.disk.records import MAX_SHARDS, NAME, Doomed, Lost, Read, Row, Write, extent_of, index_cost
from lmcache_trio_backends.disk.scanner import SLICE, SlabScanner, by_place

__all__ = ["ChunkTable", "Refusal"]

_FREE, _WRITING, _PUBLISHED, _DOOMED = range(4)
_TABLES = 256
"""Tables per namespace, by the digest's first byte: to grow or sort one of a million entries would stop the loop."""
_BLOCK = 256
"""Rows by which the arrays grow."""
_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1
_GLANCES = 500
"""Entries of the heap that one search for a victim looks at: about 1 ms."""


class Refusal(Enum):
    """Why a chunk gets no extent. Growth or eviction may end `NO_HOLE` and `NO_INDEX_ROOM`; else it is `NO_SPACE`."""

    PUBLISHED = "published"
    WRITING = "writing"
    SIZE = "size"
    ADMISSION = "admission"
    NO_INDEX_ROOM = "no_index_room"
    NO_HOLE = "no_hole"
    NO_SPACE = "no_space"


class _Names:
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

    def pop(self) -> int:
        """Remove a name. Returns its row, about in the index file's order; -1 if no name is left."""
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


class ChunkTable:
    """All chunks of one disk. *capacity* is in bytes of slabs, *index_room* of the index file, see `index_cost`.

    *left* is called with each PUBLISHED chunk that becomes DOOMED, unless its whole namespace is forgotten.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        capacity: int,
        index_room: int,
        left: Callable[[ChunkKey], None] = lambda key: None,
    ) -> None:
        self._arena, self._left = arena, left
        self._capacity = capacity
        self._index_room = index_room
        self._index_used = 0
        self._chunks = 0
        self._clock = 0
        self._last_generation = 0
        # rows
        self._state = bytearray()
        self._offset = array("q")
        self._extent = array("q")
        self._generation = array("q")
        self._recency = array("q")
        self._children = array("i")  # published ones
        self._holders = array("i")  # readers, and the writer
        self._namespace = array("i")
        self._digest = bytearray()
        self._parent = bytearray()
        self._has_parent = bytearray()
        self._shape = array("i")
        self._place = array("i")  # among the checksums of its shape
        self._queued = bytearray()  # stands in the heap
        self._count = 0  # rows that were ever in use
        self._free: list[int] = []
        self._by_name: dict[bytes, _Names] = {}
        self._namespaces: dict[int, _Names] = {}
        self._by_lengths: dict[tuple[int, ...], _Shape] = {}
        self._shapes: dict[int, _Shape] = {}
        # leaving
        self._heap: list[int] = []  # recency << 32 | row
        self.searching = False
        """`evict` stopped early, after about 1 ms: call it again. Else, if it gave 0, no chunk can be evicted."""
        self._touched: set[int] = set()
        self._doomed: list[int] = []
        self._forgotten: list[_Names] = []  # their rows that go by a name are to be doomed
        # rebuilding
        self._buried: dict[bytes, int] = {}  # namespace -> generation up to which the index file's rows are dead
        self._erased: set[bytes] = set()  # those of them that have none left
        self._unusable = 0
        self.overlaid = 0
        """Rows that `rebuild` found to name bytes of another."""
        self.lost = 0
        """Rows that `rebuild` found to name bytes that the slabs do not have any more."""

    # ---- reading

    def contains(self, key: ChunkKey) -> bool:
        """Whether *key* is published."""
        return self._published(key.namespace, key.digest) >= 0

    def begin_read(self, key: ChunkKey, lengths: tuple[int, ...]) -> Read | None:
        """Hold *key*'s extent in place; None if it is absent or of other *lengths*."""
        row = self._published(key.namespace, key.digest)
        if row < 0:
            return None
        shape = self._shapes[self._shape[row]]
        if shape.lengths != lengths:
            return None
        self._holders[row] += 1
        at = self._place[row] * len(shape.lengths)
        sums = tuple(shape.sums[at : at + len(shape.lengths)])
        return Read(key, row, self._offset[row], self._generation[row], shape.lengths, sums)

    def end_read(self, read: Read) -> bool:
        """Let go of it. False if the chunk was not there the whole time: its bytes must not be served."""
        row = read.number
        if row >= 0:
            self._holders[row] -= 1
            if not self._holders[row] and self._state[row] == _DOOMED:
                self._doomed.append(row)
        return self._row_of(read) >= 0

    def touch(self, key: ChunkKey) -> None:
        """*key* was used now."""
        row = self._published(key.namespace, key.digest)
        if row >= 0:
            self._clock += 1
            self._recency[row] = self._clock
            self._touched.add(row)

    def take_touched(self, limit: int) -> list[tuple[int, bytes, int]]:
        """Up to *limit* (recency, name, generation) that the index file does not have yet, in the file's order."""
        taken = [self._touched.pop() for _ in range(min(limit, len(self._touched)))]
        live = [
            (self._recency[row], self._name_of(row), self._generation[row])
            for row in taken
            if self._state[row] == _PUBLISHED
        ]
        return sorted(live, key=lambda t: t[1])

    # ---- writing

    def reserve(
        self, key: ChunkKey, parent: bytes, lengths: tuple[int, ...], admit: Admission | None = None
    ) -> Write | Refusal:
        """An extent for *key*, of the shards' *lengths*, or the reason why not.

        *admit* is asked last among the checks whose refusal is final, so a retry leaves it out.
        """
        row = self._find(key.namespace, key.digest)
        if row >= 0:
            return Refusal.PUBLISHED if self._state[row] == _PUBLISHED else Refusal.WRITING
        shape = self._by_lengths.get(lengths)
        extent = extent_of(lengths) if shape is None else shape.extent
        cost = index_cost(len(lengths)) if shape is None else shape.cost
        if len(lengths) > MAX_SHARDS or not 0 < extent <= self._capacity:
            return Refusal.SIZE
        if admit is not None and not admit(key):
            return Refusal.ADMISSION
        if self._index_used + cost > self._index_room:
            return Refusal.NO_INDEX_ROOM
        offset = self._arena.allocate(extent)
        if offset is None:
            return Refusal.NO_HOLE
        self._last_generation += 1
        self._clock += 1
        name, sums = key.namespace + key.digest, (0,) * len(lengths)
        record = Row(name, parent, offset, self._last_generation, self._clock, lengths, sums)
        row = self._add(record, _WRITING)
        self._holders[row] = 1
        return Write(row, record)

    def publish(self, write: Write, sums: Sequence[int]) -> bool:
        """Its row stands in the index file now. False: it was forgotten meanwhile, and is to be erased again."""
        row = write.number
        self._holders[row] = 0
        if self._state[row] == _DOOMED:
            self._doomed.append(row)
        elif self._namespaces[self._namespace[row]].gone:
            self._doom(row)
        else:
            at = self._place[row] * len(sums)
            self._shapes[self._shape[row]].sums[at : at + len(sums)] = array("Q", sums)
            self._state[row] = _PUBLISHED
            self._chunks += 1
            self._link(row)
            self._offer(row)
            return True
        return False

    def abort(self, write: Write) -> None:
        """Free the extent of a chunk that is not in the index file, and that no thread writes any more."""
        if self._state[write.number] == _WRITING:
            self._remove_name(write.number)
        self._release(write.number)

    # ---- leaving

    def evict(self, length: int) -> int:
        """Doom the least recent leaves until they hold *length* bytes of slabs. How many; 0: see `searching`."""
        count = 0
        while length > 0 and (row := self._victim()) >= 0:
            length -= self._extent[row]
            self._doom(row)
            count += 1
        return count

    def quarantine(self, read: Read) -> bool:
        """Doom a chunk that failed verification, unless another chunk has its name now."""
        row = self._row_of(read)
        if row < 0:
            return False
        self._doom(row)
        return True

    def forget(self, namespace: bytes) -> int:
        """All of *namespace* is absent from now on, and `take_doomed` gives its rows. Returns the newest generation."""
        names = self._by_name.pop(namespace, None)
        if names is not None:
            names.gone = True
            self._forgotten.append(names)
            self._chunks -= names.chunks
        return self._last_generation

    @property
    def has_doomed(self) -> bool:
        """Whether `take_doomed` has something to look at."""
        return bool(self._doomed or self._forgotten)

    def take_doomed(self, limit: int) -> list[Doomed]:
        """Up to *limit* records to be erased from the index file; then call `erased`."""
        while self._forgotten and len(self._doomed) < limit:
            row = self._forgotten[-1].pop()
            if row < 0:
                self._forgotten.pop()
            else:
                self._doom(row)
        taken = [self._doomed.pop() for _ in range(min(limit, len(self._doomed)))]
        return [Doomed(row, self._name_of(row), self._generation[row]) for row in taken]

    def erased(self, doomed: Iterable[Doomed]) -> None:
        """Free the extents of records whose rows are gone from the index file."""
        for one in doomed:
            self._release(one.number)

    # ---- rebuilding

    def bury(self, namespace: bytes, generation: int) -> None:
        """*namespace* was forgotten up to *generation*. Before `restore`."""
        self._buried[namespace] = generation
        self._erased.add(namespace)
        self._last_generation = max(self._last_generation, generation)

    def is_dead(self, row: Row) -> bool:
        """Whether *row* was forgotten, and a kill came before it was erased."""
        return bool(self._buried) and row.generation <= self._buried.get(row.name[:NAME], -1)

    def restore(self, found: Iterable[Row]) -> None:
        """Add rows of the index file, before anything else but reads; `rebuild` ends it."""
        for record in found:
            self._last_generation = max(self._last_generation, record.generation)
            self._clock = max(self._clock, record.recency)
            row = self._add(record, _PUBLISHED)
            if self.is_dead(record):
                self._erased.discard(record.name[:NAME])
                self._remove_name(row)
                self._state[row], self._extent[row] = _DOOMED, 0  # another chunk may have its bytes already
                self._doomed.append(row)
            else:
                self._chunks += 1

    def take_erased(self) -> list[bytes]:
        """Buried namespaces without a row that was left to restore. After `rebuild`."""
        taken, self._erased = list(self._erased), set()
        return taken

    def order(self) -> "array[int]":
        """All rows by their place on the disk, for `rebuild`. May run in a thread: nothing else changes before that."""
        return by_place(self._offset[: self._count])

    def rebuild(self, taken: int, order: "array[int]", lost: Sequence[Lost] = ()) -> Iterator[None]:
        """Find the holes in the *taken* bytes of slabs, the parents and the leaves; in steps of about 2 ms.

        A row is doomed if its bytes lie outside of the slabs, in the *lost* parts, or over another row's. Rule 1 leaves
        no such row; a smaller disk does, or a file that was changed from outside.
        """
        scanner = SlabScanner(self._offset, self._extent, self._arena, lost)
        yield from scanner.claim(taken, order)
        self.overlaid = scanner.overlaid
        self.lost = len(scanner.strays) - scanner.overlaid
        self._unusable = sum(one.end - one.start for one in lost if not one.usable)
        for do in (self._link, self._offer):
            for i in range(0, self._count, SLICE):
                for row in range(i, min(i + SLICE, self._count)):
                    if self._state[row] == _PUBLISHED:
                        do(row)
                yield
        for row in scanner.strays:
            self._extent[row] = 0  # it has no bytes to give back
            self._doom(row)

    def grow(self, taken: int) -> None:
        """The slabs have *taken* bytes now."""
        self._arena.grow(taken)

    def statistics(self) -> dict[str, int]:
        """What is held."""
        return {
            "chunks": self._chunks,
            "bytes_used": self._arena.used - self._unusable,
            "bytes_index_planned": self._index_used,
        }

    # ---- the order of eviction: the tree of prefixes, and its leaves by recency

    def _link(self, row: int) -> None:
        """*row* is published, so its parent is not a leaf any more. `_offer` it once its whole group is linked."""
        namespace = self._namespaces[self._namespace[row]]
        namespace.chunks += 1
        if namespace.orphans:
            self._children[row] += namespace.orphans.pop(self._digest_of(row), 0)
        if parent := self._parent_of(row):
            above = self._published(namespace.name, parent)
            if above >= 0 and above != row:
                self._children[above] += 1
            else:
                namespace.orphans[parent] = namespace.orphans.get(parent, 0) + 1

    def _doom(self, row: int) -> None:
        """Remove *row*'s name, and take it out of the tree. Its parent may become a leaf, with its recency."""
        namespace = self._namespaces[self._namespace[row]]
        was_published = self._state[row] == _PUBLISHED
        self._remove_name(row)
        self._state[row] = _DOOMED
        if not self._holders[row]:
            self._doomed.append(row)
        if not was_published or namespace.gone:
            return  # a namespace goes with its whole tree, and its chunks were subtracted at once
        self._left(ChunkKey(namespace.name, self._digest_of(row)))
        self._chunks -= 1
        namespace.chunks -= 1
        if self._children[row]:
            namespace.orphans[self._digest_of(row)] = self._children[row]
        parent = self._parent_of(row)
        above = self._published(namespace.name, parent) if parent else -1
        if above >= 0:
            self._children[above] -= 1
            self._recency[above] = max(self._recency[above], self._recency[row])
            self._offer(above)
        elif (left := namespace.orphans.pop(parent, 0) - 1) > 0:
            namespace.orphans[parent] = left

    def _offer(self, row: int) -> None:
        """Put *row* into the heap if it is a leaf."""
        if not self._children[row] and not self._queued[row]:
            self._queued[row] = 1
            heapq.heappush(self._heap, self._recency[row] << _ROW_BITS | row)

    def _victim(self) -> int:
        """The leaf that is evicted first, taken out of the heap; -1: there is none, or `searching`."""
        aside, victim, glances = list[int](), -1, _GLANCES
        while self._heap and victim < 0 and glances:
            glances -= 1
            entry = heapq.heappop(self._heap)
            row = entry & _ROW_MASK
            self._queued[row] = 0
            if self._state[row] != _PUBLISHED or self._children[row] or self._namespaces[self._namespace[row]].gone:
                continue
            if entry >> _ROW_BITS != self._recency[row]:
                self._offer(row)
            elif self._holders[row]:
                aside.append(row)
            else:
                victim = row
        self.searching = victim < 0 and not glances and len(aside) < _GLANCES
        for row in aside:
            self._offer(row)
        return victim

    # ---- rows

    def _find(self, namespace: bytes, digest: bytes) -> int:
        """The row of this name, or -1."""
        names = self._by_name.get(namespace)
        return -1 if names is None else names.tables[digest[0]].get(digest, -1)

    def _published(self, namespace: bytes, digest: bytes) -> int:
        """The row of this name if it is published, or -1."""
        row = self._find(namespace, digest)
        return row if row >= 0 and self._state[row] == _PUBLISHED else -1

    def _row_of(self, read: Read) -> int:
        """The row of the very chunk that is read; -1 if it was doomed, even if another chunk has its name now."""
        row = self._published(read.key.namespace, read.key.digest)
        return row if row >= 0 and self._generation[row] == read.generation else -1

    def _digest_of(self, row: int) -> bytes:
        return bytes(self._digest[row * NAME : (row + 1) * NAME])

    def _parent_of(self, row: int) -> bytes:
        """Its parent's digest; empty if it has none."""
        return bytes(self._parent[row * NAME : (row + 1) * NAME]) if self._has_parent[row] else b""

    def _name_of(self, row: int) -> bytes:
        """Its name as the index file has it."""
        return self._namespaces[self._namespace[row]].name + self._digest_of(row)

    def _remove_name(self, row: int) -> None:
        digest = self._digest_of(row)
        self._namespaces[self._namespace[row]].tables[digest[0]].pop(digest, None)

    def _add(self, record: Row, state: int) -> int:
        """A new row, which has its name from now on."""
        if not self._free and self._count == len(self._state):
            self._lengthen()
        row = self._free.pop() if self._free else self._count
        self._count = max(self._count, row + 1)
        name, digest = record.name[:NAME], record.name[NAME:]
        if (namespace := self._by_name.get(name)) is None:
            namespace = self._by_name[name] = _Names(name, _vacant(self._namespaces))
            self._namespaces[namespace.number] = namespace
        if (shape := self._by_lengths.get(record.lengths)) is None:
            shape = self._by_lengths[record.lengths] = _Shape(record.lengths, _vacant(self._shapes))
            self._shapes[shape.number] = shape
        self._state[row] = state
        self._offset[row], self._extent[row] = record.offset, shape.extent
        self._generation[row], self._recency[row] = record.generation, record.recency
        at = row * NAME
        self._digest[at : at + NAME] = digest
        self._has_parent[row] = bool(record.parent)
        if record.parent:
            self._parent[at : at + NAME] = record.parent
        self._namespace[row], self._shape[row] = namespace.number, shape.number
        place = self._place[row] = shape.free.pop() if shape.free else shape.rows
        at = place * len(record.sums)
        shape.sums[at : at + len(record.sums)] = array("Q", record.sums)
        namespace.rows += 1
        shape.rows += 1
        self._index_used += shape.cost
        namespace.tables[digest[0]][digest] = row
        return row

    def _release(self, row: int) -> None:
        """Free *row* and its extent; its name was removed before."""
        if self._extent[row]:
            self._arena.free(self._offset[row], self._extent[row])
        namespace, shape = self._namespaces[self._namespace[row]], self._shapes[self._shape[row]]
        shape.free.append(self._place[row])
        shape.rows -= 1
        self._index_used -= shape.cost
        if not shape.rows:
            del self._by_lengths[shape.lengths], self._shapes[shape.number]
        namespace.rows -= 1
        if not namespace.rows:
            if not namespace.gone:
                del self._by_name[namespace.name]
            del self._namespaces[namespace.number]
        self._state[row] = _FREE
        self._children[row] = self._holders[row] = 0
        self._free.append(row)

    def _lengthen(self) -> None:
        for small in (self._state, self._queued, self._has_parent):
            small += bytes(_BLOCK)
        for name in (self._digest, self._parent):
            name += bytes(NAME * _BLOCK)
        for numbers in (self._offset, self._extent, self._generation, self._recency):
            numbers.frombytes(bytes(8 * _BLOCK))
        for counts in (self._children, self._holders, self._namespace, self._shape, self._place):
            counts.frombytes(bytes(4 * _BLOCK))


def _vacant(numbered: dict[int, _Names] | dict[int, _Shape]) -> int:
    """A number that is not taken; few ever are."""
    return next(number for number in range(len(numbered) + 1) if number not in numbered)
