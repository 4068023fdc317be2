"""What the disk tier knows and decides, without waiting: where each chunk lies, who uses it, and what is evicted first.

    ABSENT --reserve--> WRITING --publish--> PUBLISHED --evict / quarantine / forget--> DOOMED --erased--> ABSENT
                           |`--abort--> ABSENT                                            ^
                           `--forget------------------------------------------------------'

Rule 1: a chunk's bytes are written before its row stands in the index file, and its row is erased there before its
bytes are given to another chunk. So after a kill at any time, each row of the file names bytes of its own.
Rule 2: the name of a DOOMED chunk is not found any more. Its extent stays taken until its last holder has ended and its
row is erased. Rule 3: no I/O and no clock here.

A forgotten namespace is absent at once; its rows are doomed a batch at a time, when `take_doomed` is called. The index
file keeps the generation up to which it was forgotten: rows that a kill leaves are dead, and their bytes are free.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum

from lmcache_trio.abc import Arena, ChunkKey
from lmcache_trio_backends.disk.admission import Admission
from lmcache_trio_backends.disk.eviction import EvictionHeap
from lmcache_trio_backends.disk.records import MAX_SHARDS, NAME, Doomed, Lost, Read, Row, Write, extent_of, index_cost
from lmcache_trio_backends.disk.rows import FREE, ChunkRows, Space
from lmcache_trio_backends.disk.scanner import SLICE, SlabScanner, by_place

__all__ = ["ChunkTable", "Refusal"]

_WRITING, _PUBLISHED, _DOOMED = range(FREE + 1, FREE + 4)


class Refusal(Enum):
    """Why a chunk gets no extent. Growth or eviction may end `NO_HOLE` and `NO_INDEX_ROOM`; else it is `NO_SPACE`."""

    PUBLISHED = "published"
    WRITING = "writing"
    SIZE = "size"
    ADMISSION = "admission"
    NO_INDEX_ROOM = "no_index_room"
    NO_HOLE = "no_hole"
    NO_SPACE = "no_space"


class ChunkTable:
    """All chunks of one disk. *capacity* is in bytes of slabs, *index_room* of the index file, see `index_cost`."""

    def __init__(self, arena: Arena, *, capacity: int, index_room: int) -> None:
        self._arena = arena
        self._capacity = capacity
        self._index_room = index_room
        self._rows = ChunkRows()
        self._leaves = EvictionHeap(self._rows, _PUBLISHED)
        self._doomed: list[int] = []
        self._forgotten: list[Space] = []  # their rows that go by a name are to be doomed
        self._buried: dict[bytes, int] = {}  # namespace -> generation up to which the index file's rows are dead
        self._erased: set[bytes] = set()  # those of them that have none left
        self._touched: set[int] = set()
        self._clock = 0
        self._last_generation = 0
        self._chunks = 0
        self._unusable = 0
        self.overlaid = 0
        """Rows that `rebuild` found to name bytes of another."""
        self.lost = 0
        """Rows that `rebuild` found to name bytes that are not there any more."""

    # ---- reading

    def contains(self, key: ChunkKey) -> bool:
        """Whether *key* is published."""
        row = self._rows.find(key.namespace, key.digest)
        return row >= 0 and self._rows.state[row] == _PUBLISHED

    def begin_read(self, key: ChunkKey, lengths: Sequence[int]) -> Read | None:
        """Hold *key*'s extent in place; None if it is absent or of other *lengths*."""
        row = self._rows.find(key.namespace, key.digest)
        if row < 0 or self._rows.state[row] != _PUBLISHED or self._rows.lengths(row) != tuple(lengths):
            return None
        self._rows.holders[row] += 1
        return self._read(key, row, row)

    def glance(self, key: ChunkKey, lengths: Sequence[int]) -> Read | None:
        """As `begin_read` before the end of `rebuild`, when nothing can be evicted: nothing is held."""
        row = self._rows.find(key.namespace, key.digest)
        return self._read(key, row, -1) if row >= 0 and self._rows.lengths(row) == tuple(lengths) else None

    def end_read(self, read: Read) -> bool:
        """Let go of it. Returns whether the chunk was there the whole time: if not, its bytes must not be served."""
        if read.number >= 0:
            self._rows.holders[read.number] -= 1
            if not self._rows.holders[read.number] and self._rows.state[read.number] == _DOOMED:
                self._doomed.append(read.number)
        return self._is_current(read)

    def touch(self, key: ChunkKey) -> None:
        """*key* was used now."""
        row = self._rows.find(key.namespace, key.digest)
        if row >= 0:
            self._clock += 1
            self._rows.recency[row] = self._clock
            self._touched.add(row)

    def take_touched(self, limit: int) -> list[tuple[int, bytes, int]]:
        """Up to *limit* (recency, name, generation) that the index file does not have yet, in the file's order."""
        rows = self._rows
        taken = [self._touched.pop() for _ in range(min(limit, len(self._touched)))]
        live = [(rows.recency[r], rows.name(r), rows.generation[r]) for r in taken if rows.state[r] == _PUBLISHED]
        return sorted(live, key=lambda t: t[1])

    # ---- writing

    def reserve(
        self, key: ChunkKey, parent: bytes, lengths: Sequence[int], admit: Admission | None = None
    ) -> Write | Refusal:
        """An extent for *key*, of the shards' *lengths*, or the reason why not.

        *admit* is asked last among the checks whose refusal is final, so a retry leaves it out.
        """
        row = self._rows.find(key.namespace, key.digest)
        if row >= 0:
            return Refusal.PUBLISHED if self._rows.state[row] == _PUBLISHED else Refusal.WRITING
        extent = extent_of(lengths)
        if len(lengths) > MAX_SHARDS or not 0 < extent <= self._capacity:
            return Refusal.SIZE
        if admit is not None and not admit(key):
            return Refusal.ADMISSION
        if self._rows.index_used + index_cost(len(lengths)) > self._index_room:
            return Refusal.NO_INDEX_ROOM
        offset = self._arena.allocate(extent)
        if offset is None:
            return Refusal.NO_HOLE
        self._last_generation += 1
        self._clock += 1
        name, sums = key.namespace + key.digest, (0,) * len(lengths)
        record = Row(name, parent, offset, self._last_generation, self._clock, tuple(lengths), sums)
        row = self._rows.add(record, _WRITING)
        self._rows.holders[row] = 1
        return Write(row, key, record)

    def publish(self, write: Write, sums: Sequence[int]) -> bool:
        """Its row stands in the index file now. False: it was forgotten meanwhile, and is to be erased again."""
        rows, row = self._rows, write.number
        rows.holders[row] = 0
        if rows.state[row] == _DOOMED:
            self._doomed.append(row)
        elif rows.space(row).gone:
            self._doom(row)
        else:
            rows.set_sums(row, sums)
            rows.state[row] = _PUBLISHED
            self._chunks += 1
            self._leaves.link(row)
            self._leaves.offer(row)
            return True
        return False

    def abort(self, write: Write) -> None:
        """Free the extent of a chunk that is not in the index file, and that no thread writes any more."""
        if self._rows.state[write.number] == _WRITING:
            self._rows.remove_name(write.number)
        self._release(write.number)

    # ---- leaving

    def evict(self, length: int) -> int:
        """Doom the least recent leaves until they hold *length* bytes of slabs. How many; 0: see `searching`."""
        count = 0
        while length > 0 and (row := self._leaves.victim()) >= 0:
            length -= self._rows.extent[row]
            self._doom(row)
            count += 1
        return count

    @property
    def searching(self) -> bool:
        """`evict` stopped early, after about 1 ms: call it again. Else, if it gave 0, no chunk can be evicted."""
        return self._leaves.searching

    def quarantine(self, read: Read) -> bool:
        """Doom a chunk that failed verification, unless another chunk has its name now."""
        if not self._is_current(read):
            return False
        self._doom(self._rows.find(read.key.namespace, read.key.digest))
        return True

    def forget(self, namespace: bytes) -> int:
        """All of *namespace* is absent from now on, and `take_doomed` gives its rows. Returns the newest generation."""
        space = self._rows.forget(namespace)
        if space is not None:
            self._forgotten.append(space)
            self._chunks -= space.chunks
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
        return [Doomed(row, self._rows.name(row), self._rows.generation[row]) for row in taken]

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
        """Add rows of the index file, before anything else; `rebuild` ends it."""
        rows = self._rows
        for row in found:
            self._last_generation = max(self._last_generation, row.generation)
            self._clock = max(self._clock, row.recency)
            there = rows.add(row, _PUBLISHED)
            if self.is_dead(row):
                self._erased.discard(row.name[:NAME])
                rows.remove_name(there)
                rows.state[there], rows.extent[there] = _DOOMED, 0  # its bytes may be another's already
                self._doomed.append(there)
            else:
                self._chunks += 1

    def take_erased(self) -> list[bytes]:
        """Buried namespaces without a row that was left to restore. After `rebuild`."""
        taken, self._erased = list(self._erased), set()
        return taken

    def order(self) -> "array[int]":
        """All rows by their place on the disk, for `rebuild`. May run in a thread: nothing else changes before that."""
        return by_place(self._rows)

    def rebuild(self, taken: int, order: "array[int]", lost: Sequence[Lost] = ()) -> Iterator[None]:
        """Find the holes in the *taken* bytes of slabs, the parents and the leaves; in steps of about 2 ms.

        A row whose bytes lie outside of the slabs, in what is *lost* of them, or over another's, is doomed. Rule 1
        leaves none such; a smaller disk or a file changed from outside does.
        """
        rows, scanner = self._rows, SlabScanner(self._rows, _PUBLISHED, self._arena, lost)
        yield from scanner.claim(taken, order)
        self.overlaid = scanner.overlaid
        self.lost = len(scanner.strays) - scanner.overlaid
        self._unusable = sum(one.end - one.start for one in lost if not one.usable)
        for do in (self._leaves.link, self._leaves.offer):
            for i in range(0, rows.count, SLICE):
                for row in range(i, min(i + SLICE, rows.count)):
                    if rows.state[row] == _PUBLISHED:
                        do(row)
                yield
        for row in scanner.strays:
            rows.extent[row] = 0  # it has no bytes to give back
            self._doom(row)

    def grow(self, taken: int) -> None:
        """The slabs have *taken* bytes now."""
        self._arena.grow(taken)

    def statistics(self) -> dict[str, int]:
        """What is held."""
        return {
            "chunks": self._chunks,
            "bytes_used": self._arena.used - self._unusable,
            "bytes_index_planned": self._rows.index_used,
        }

    # ---- inside

    def _read(self, key: ChunkKey, row: int, held: int) -> Read:
        rows = self._rows
        return Read(key, held, rows.offset[row], rows.generation[row], rows.lengths(row), rows.sums(row))

    def _is_current(self, read: Read) -> bool:
        row = self._rows.find(read.key.namespace, read.key.digest)
        if row < 0 or self._rows.state[row] != _PUBLISHED:
            return False
        return self._rows.generation[row] == read.generation

    def _doom(self, row: int) -> None:
        rows = self._rows
        published = rows.state[row] == _PUBLISHED
        rows.remove_name(row)
        rows.state[row] = _DOOMED
        if published:
            self._chunks -= not rows.space(row).gone  # else they were all subtracted at once
            self._leaves.unlink(row)
        if not rows.holders[row]:
            self._doomed.append(row)

    def _release(self, row: int) -> None:
        if self._rows.extent[row]:
            self._arena.free(self._rows.offset[row], self._rows.extent[row])
        self._rows.drop(row)
