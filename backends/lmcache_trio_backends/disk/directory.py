"""What the disk tier knows and decides, without waiting: which chunk lies where, who uses it, and what goes first.

    ABSENT --reserve--> WRITING --publish--> PUBLISHED --evict / quarantine / forget--> DOOMED --erased--> ABSENT
                           |`--abort--> ABSENT                                            ^
                           `--forget------------------------------------------------------'

Rule 1: a chunk's bytes are written before its row stands in the index file, and its row is gone from there before its
bytes are given to another. So whenever a kill comes, each row of the file names bytes that nobody else was given.
Rule 2: a DOOMED chunk is out of the directory at once; its extent stays taken until its last holder let go of it and
its row is erased. Rule 3: no I/O and no clock here.

A namespace that is forgotten is absent at once; its rows are doomed a batch at a time, as `take_doomed` is asked for
them. The index file keeps up to which generation it was: what a kill leaves of it is dead, and its bytes are free.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence

from lmcache_trio.abc import Arena, ChunkKey
from lmcache_trio.errors import Misuse
from lmcache_trio_backends.disk.eviction import Leaves
from lmcache_trio_backends.disk.records import Doomed, Lost, Read, Row, Write, extent_of, index_cost
from lmcache_trio_backends.disk.rows import FREE, Rows, Space
from lmcache_trio_backends.disk.scanner import SLICE, Places, by_place

__all__ = ["Directory"]

_WRITING, _PUBLISHED, _DOOMED = range(FREE + 1, FREE + 4)


class Directory:
    """All chunks of one disk. *index_room* is in bytes of the index file, see `index_cost`."""

    def __init__(self, arena: Arena, index_room: int) -> None:
        self._arena = arena
        self._index_room = index_room
        self._rows = Rows()
        self._leaves = Leaves(self._rows, _PUBLISHED)
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

    def knows(self, key: ChunkKey) -> bool:
        """Whether *key* is published or being written."""
        return self._rows.find(key.namespace, key.digest) >= 0

    def begin_read(self, key: ChunkKey, lengths: Sequence[int]) -> Read | None:
        """Hold *key*'s extent in place; None if it is absent or of other *lengths*."""
        rows = self._rows
        row = rows.find(key.namespace, key.digest)
        if row < 0 or rows.state[row] != _PUBLISHED:
            return None
        if rows.lengths(row) != tuple(lengths):
            return None
        rows.holders[row] += 1
        return self._read(key, row, row)

    def glance(self, key: ChunkKey, lengths: Sequence[int]) -> Read | None:
        """As `begin_read` before the end of `rebuild`, when nothing can be evicted: nothing is held."""
        row = self._rows.find(key.namespace, key.digest)
        return self._read(key, row, -1) if row >= 0 and self._rows.lengths(row) == tuple(lengths) else None

    def end_read(self, read: Read) -> bool:
        """Let go of it. Whether the chunk was there the whole time: False, and its bytes must not be served."""
        if read.row >= 0:
            self._let_go(read.row)
        return self._is_current(read)

    def touch(self, key: ChunkKey) -> None:
        """*key* was used now."""
        row = self._rows.find(key.namespace, key.digest)
        if row >= 0:
            self._clock += 1
            self._rows.recency[row] = self._clock
            self._touched.add(row)

    def take_touched(self, limit: int) -> list[tuple[int, bytes, int]]:
        """Up to *limit* (recency, key, generation) that the index file does not have yet, in the file's order."""
        rows = self._rows
        taken = [self._touched.pop() for _ in range(min(limit, len(self._touched)))]
        live = [(rows.recency[r], rows.key(r), rows.generation[r]) for r in taken if rows.state[r] == _PUBLISHED]
        return sorted(live, key=lambda t: t[1])

    # ---- writing

    def has_index_room(self, shards: int) -> bool:
        """Whether the index file can take one more record."""
        return self._rows.index_used + index_cost(shards) <= self._index_room

    def reserve(self, key: ChunkKey, parent: bytes, lengths: Sequence[int]) -> Write | None:
        """An extent for *key*, of the shards' *lengths*; None when no hole is large enough, or the index is full."""
        if self.knows(key):
            raise Misuse(f"chunk {key.digest.hex()} is known already: ask `knows` first")
        if not self.has_index_room(len(lengths)):
            return None
        extent = extent_of(lengths)
        offset = self._arena.allocate(extent)
        if offset is None:
            return None
        self._last_generation += 1
        self._clock += 1
        write = Write(-1, key, parent, tuple(lengths), offset, self._last_generation, self._clock)
        row = self._rows.add(write.as_row([0] * len(lengths)), _WRITING)
        self._rows.holders[row] = 1
        return Write(row, key, parent, write.lengths, offset, write.generation, write.recency)

    def publish(self, write: Write, sums: Sequence[int]) -> bool:
        """Its row stands in the index file now. False when it was forgotten meanwhile: it is to be erased again."""
        rows, row = self._rows, write.row
        published = rows.state[row] == _WRITING and not rows.space(row).gone
        if published:
            rows.set_sums(row, sums)
            rows.state[row] = _PUBLISHED
            self._chunks += 1
            self._leaves.link(row)
            self._leaves.offer(row)
        elif rows.state[row] == _WRITING:
            self._doom(row)
        self._let_go(row)
        return published

    def abort(self, write: Write) -> None:
        """Nothing of it stands in the index file, and nobody writes it any more: its extent is free."""
        if self._rows.state[write.row] == _WRITING:
            self._rows.remove_name(write.row)
        self._release(write.row)

    # ---- leaving

    def evict(self, length: int) -> int:
        """Doom the least recent leaves until *length* bytes of slabs go with them. How many; 0: see `searching`."""
        count = 0
        while length > 0 and (row := self._leaves.victim()) >= 0:
            length -= self._rows.extent[row]
            self._doom(row)
            count += 1
        return count

    @property
    def searching(self) -> bool:
        """`evict` stopped early, after about 1 ms: call it again. Else, when it gave 0, nothing can go."""
        return self._leaves.searching

    def quarantine(self, read: Read) -> bool:
        """Doom what failed verification, unless another goes by its name now."""
        if not self._is_current(read):
            return False
        self._doom(self._rows.find(read.key.namespace, read.key.digest))
        return True

    def forget(self, namespace: bytes) -> int:
        """All of *namespace* is absent from now on, and `take_doomed` gives it. Returns its newest generation."""
        space = self._rows.forget(namespace)
        if space is not None:
            self._forgotten.append(space)
            self._chunks -= space.chunks
        return self._last_generation

    @property
    def has_doomed(self) -> bool:
        """Whether `take_doomed` has something to look at."""
        return bool(self._doomed or self._forgotten)

    @property
    def has_touched(self) -> bool:
        """Whether `take_touched` would give something."""
        return bool(self._touched)

    def take_doomed(self, limit: int) -> list[Doomed]:
        """Up to *limit* records to be erased from the index file; then call `erased`."""
        while self._forgotten and len(self._doomed) < limit:
            row = self._forgotten[-1].pop()
            if row < 0:
                self._forgotten.pop()
            else:
                self._doom(row)
        taken = [self._doomed.pop() for _ in range(min(limit, len(self._doomed)))]
        return [Doomed(row, self._rows.key(row), self._rows.generation[row]) for row in taken]

    def erased(self, doomed: Iterable[Doomed]) -> None:
        """Their rows are gone from the index file: their extents are free."""
        for one in doomed:
            self._release(one.row)

    # ---- rebuilding

    def bury(self, namespace: bytes, generation: int) -> None:
        """*namespace* was forgotten up to *generation*. Before `restore`."""
        self._buried[namespace] = generation
        self._erased.add(namespace)
        self._last_generation = max(self._last_generation, generation)

    def is_dead(self, row: Row) -> bool:
        """Whether it was forgotten, and a kill came before it was erased."""
        return bool(self._buried) and row[3] <= self._buried.get(row[0][:32], -1)

    def restore(self, found: Iterable[Row]) -> None:
        """Add rows of the index file, before anything else; `rebuild` ends it."""
        rows = self._rows
        for row in found:
            self._last_generation = max(self._last_generation, row[3])
            self._clock = max(self._clock, row[4])
            there = rows.add(row, _PUBLISHED)
            if self.is_dead(row):
                self._erased.discard(row[0][:32])
                rows.remove_name(there)
                rows.state[there], rows.extent[there] = _DOOMED, 0  # its bytes may be another's already
                self._doomed.append(there)
            else:
                self._chunks += 1

    def take_erased(self) -> list[bytes]:
        """Namespaces that were buried, and of which no row was left to restore. After `rebuild`."""
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
        rows, places = self._rows, Places(self._rows, _PUBLISHED, self._arena, lost)
        yield from places.claim(taken, order)
        self.overlaid = places.overlaid
        self.lost = len(places.strays) - places.overlaid
        self._unusable = sum(one.end - one.start for one in lost if not one.usable)
        for do in (self._leaves.link, self._leaves.offer):
            for i in range(0, rows.count, SLICE):
                for row in range(i, min(i + SLICE, rows.count)):
                    if rows.state[row] == _PUBLISHED:
                        do(row)
                yield
        for row in places.strays:
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

    def _let_go(self, row: int) -> None:
        self._rows.holders[row] -= 1
        if not self._rows.holders[row] and self._rows.state[row] == _DOOMED:
            self._doomed.append(row)

    def _release(self, row: int) -> None:
        if self._rows.extent[row]:
            self._arena.free(self._rows.offset[row], self._rows.extent[row])
        self._rows.drop(row)
