"""What the disk tier knows and decides, without waiting: which chunk lies where, who uses it, and what goes first.

    ABSENT --reserve--> WRITING --publish--> PUBLISHED --evict / quarantine / forget--> DOOMED --erased--> ABSENT
                           |`--abort--> ABSENT                                            ^
                           `--forget------------------------------------------------------'

Rule 1: a chunk's bytes are written before its row stands in the index file, and its row is gone from there before its
bytes are given to another. So whenever a kill comes, each row of the file names bytes that nobody else was given.
Rule 2: a DOOMED chunk is out of the directory at once; its extent stays taken until its last holder let go of it and
its row is erased. Rule 3: no I/O and no clock here.

Eviction is leaf-first LRU: only chunks without children on this disk stand in the heap, and a parent inherits the
recency of the last child that left it. So touching a chunk is O(1), an eviction O(log n), and nothing walks a prefix.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lmcache_trio._core.arena import Arena
from lmcache_trio.abc import ChunkKey
from lmcache_trio.errors import Misuse
from lmcache_trio_backends._disk_rows import (
    ALIGNMENT,
    FREE,
    Doomed,
    Read,
    Row,
    Rows,
    Write,
    extent_of,
    index_cost,
    pack,
    unpack,
)

__all__ = ["Directory"]

_WRITING, _PUBLISHED, _DOOMED = range(FREE + 1, FREE + 4)
_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1
_SLICE = 400
"""Rows that one step of `rebuild` handles: about 2 ms of the loop."""


class Directory:
    """All chunks of one disk. *index_room* is in bytes of the index file, see `index_cost`."""

    def __init__(self, arena: Arena, index_room: int) -> None:
        self._arena = arena
        self._index_room = index_room
        self._rows = Rows()
        self._orphans: dict[bytes, int] = {}  # key of a parent that is not published -> its children that are
        self._leaves: list[int] = []  # heap of recency << 32 | row; an entry of another recency is late, and put right
        self._doomed: list[int] = []
        self._touched: set[int] = set()
        self._clock = 0
        self._last_generation = 0
        self._chunks = 0

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
        kept, sums = unpack(rows.shards[row])
        if kept != tuple(lengths):
            return None
        rows.holders[row] += 1
        return Read(key, row, rows.offset[row], rows.generation[row], kept, sums)

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
        row = self._rows.add(write.as_row([0] * len(lengths)), extent, _WRITING)
        self._rows.holders[row] = 1
        return Write(row, key, parent, write.lengths, offset, write.generation, write.recency)

    def publish(self, write: Write, sums: Sequence[int]) -> bool:
        """Its row stands in the index file now. False when it was forgotten meanwhile: it is to be erased again."""
        row = write.row
        published = self._rows.state[row] == _WRITING
        if published:
            self._rows.shards[row] = pack(write.lengths, sums)
            self._rows.state[row] = _PUBLISHED
            self._link(row)
        self._let_go(row)
        return published

    def abort(self, write: Write) -> None:
        """Nothing of it stands in the index file, and nobody writes it any more: its extent is free."""
        if self._rows.state[write.row] == _WRITING:
            self._rows.remove_name(write.row)
        self._release(write.row)

    # ---- leaving

    def evict(self, length: int) -> int:
        """Doom the least recent leaves until *length* bytes of slabs go with them. How many; 0: nothing can go."""
        count = 0
        while length > 0 and (row := self._victim()) >= 0:
            length -= self._rows.extent[row]
            self._doom(row)
            count += 1
        return count

    def quarantine(self, read: Read) -> bool:
        """Doom what failed verification, unless another goes by its name now."""
        if not self._is_current(read):
            return False
        self._doom(self._rows.find(read.key.namespace, read.key.digest))
        return True

    def forget(self, namespace: bytes) -> int:
        """Doom all of *namespace*: from now on it is absent. Returns how many."""
        rows = self._rows.of_namespace(namespace)
        for row in reversed(rows):  # `take_doomed` takes from the end, and the index file likes its own order
            self._doom(row)
        return len(rows)

    @property
    def has_doomed(self) -> bool:
        """Whether `take_doomed` would give something."""
        return bool(self._doomed)

    @property
    def has_touched(self) -> bool:
        """Whether `take_touched` would give something."""
        return bool(self._touched)

    def take_doomed(self, limit: int) -> list[Doomed]:
        """Up to *limit* records to be erased from the index file; then call `erased`."""
        taken = [self._doomed.pop() for _ in range(min(limit, len(self._doomed)))]
        return [Doomed(row, self._rows.key(row), self._rows.generation[row]) for row in taken]

    def erased(self, doomed: Iterable[Doomed]) -> None:
        """Their rows are gone from the index file: their extents are free."""
        for one in doomed:
            self._release(one.row)

    # ---- rebuilding

    def restore(self, found: Iterable[Row]) -> None:
        """Add rows of the index file, before anything else; `rebuild` ends it."""
        for row in found:
            self._rows.add(row, extent_of(unpack(row[5])[0]), _PUBLISHED)
            self._last_generation = max(self._last_generation, row[3])
            self._clock = max(self._clock, row[4])

    def order(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """All rows by their place on the disk, for `rebuild`. May run in a thread: nothing else changes before that."""
        offsets = self._rows.offset
        return np.argsort(np.frombuffer(offsets, np.int64)) if len(offsets) else np.empty(0, np.int64)

    def rebuild(self, taken: int, order: "np.ndarray[Any, np.dtype[np.int64]]") -> Iterator[None]:
        """Find the holes in the *taken* bytes of slabs, the parents and the leaves; in steps of about 2 ms.

        A row whose bytes lie outside of the slabs, or over another's, is doomed. Rule 1 leaves none such; a smaller
        disk or a file changed from outside does.
        """
        rows, strays, gaps, end = self._rows, list[int](), list[tuple[int, int]](), 0
        self._arena.grow(taken)
        for i in range(0, len(order), _SLICE):
            for row in order[i : i + _SLICE].tolist():
                start, extent = rows.offset[row], rows.extent[row]
                if start < end or start % ALIGNMENT or start + extent > taken or not extent:
                    strays.append(row)
                    continue
                if start > end:
                    gaps.append((end, start - end))
                    self._claim(end, start - end)
                self._claim(start, extent)
                end = start + extent
            yield
        for i, gap in enumerate(gaps):
            self._arena.free(*gap)
            if i % _SLICE == 0:
                yield
        for i in range(0, len(order), _SLICE):
            for row in order[i : i + _SLICE].tolist():
                self._link(row)
            yield
        for row in strays:
            rows.extent[row] = 0  # it has no bytes to give back
            self._doom(row)

    def _claim(self, offset: int, length: int) -> None:
        """From an arena whose only hole begins at *offset*, `allocate` gives exactly that."""
        given = self._arena.allocate(length)
        if given != offset:
            raise Misuse(f"the arena gave {given} where {offset} was to be claimed")

    def grow(self, taken: int) -> None:
        """The slabs have *taken* bytes now."""
        self._arena.grow(taken)

    def statistics(self) -> dict[str, int]:
        """What is held."""
        return {"chunks": self._chunks, "bytes_used": self._arena.used, "bytes_index_planned": self._rows.index_used}

    # ---- the tree

    def _is_current(self, read: Read) -> bool:
        row = self._rows.find(read.key.namespace, read.key.digest)
        if row < 0 or self._rows.state[row] != _PUBLISHED:
            return False
        return self._rows.generation[row] == read.generation

    def _parent(self, row: int) -> int:
        """The published parent of *row*, or -1."""
        above = self._rows.find(self._rows.namespace[row], self._rows.parent[row])
        return above if above >= 0 and self._rows.state[above] == _PUBLISHED else -1

    def _link(self, row: int) -> None:
        """It is published: its parent is no leaf any more, and it is one itself unless its children came first."""
        rows = self._rows
        self._chunks += 1
        rows.children[row] += self._orphans.pop(rows.key(row), 0)
        if rows.parent[row]:
            above = self._parent(row)
            if above >= 0 and above != row:
                rows.children[above] += 1
            else:
                name = rows.namespace[row] + rows.parent[row]
                self._orphans[name] = self._orphans.get(name, 0) + 1
        self._offer(row)

    def _unlink(self, row: int) -> None:
        rows = self._rows
        self._chunks -= 1
        if rows.children[row]:
            self._orphans[rows.key(row)] = rows.children[row]
        if not rows.parent[row]:
            return
        above = self._parent(row)
        if above >= 0:
            rows.children[above] -= 1
            rows.recency[above] = max(rows.recency[above], rows.recency[row])
            self._offer(above)
            return
        name = rows.namespace[row] + rows.parent[row]
        left = self._orphans.pop(name, 0) - 1
        if left > 0:
            self._orphans[name] = left

    def _offer(self, row: int) -> None:
        """Put it into the heap if it is a leaf."""
        rows = self._rows
        if not rows.children[row] and not rows.queued[row]:
            rows.queued[row] = 1
            heapq.heappush(self._leaves, rows.recency[row] << _ROW_BITS | row)

    def _victim(self) -> int:
        rows, aside, victim = self._rows, [], -1
        while self._leaves and victim < 0:
            entry = heapq.heappop(self._leaves)
            row = entry & _ROW_MASK
            rows.queued[row] = 0
            if rows.state[row] != _PUBLISHED or rows.children[row]:
                continue
            if entry >> _ROW_BITS != rows.recency[row]:
                self._offer(row)
            elif rows.holders[row]:
                aside.append(row)
            else:
                victim = row
        for row in aside:
            self._offer(row)
        return victim

    def _doom(self, row: int) -> None:
        rows = self._rows
        published = rows.state[row] == _PUBLISHED
        rows.remove_name(row)
        rows.state[row] = _DOOMED
        if published:
            self._unlink(row)
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
