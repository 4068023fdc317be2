"""The queue of chunks to be written to one tier. It is bounded in bytes, and drops chunks beyond.

    offered --take--> being written --written--> (done)
       `--too much, forget, clear--> dropped

No chunk waits for room. When a chunk does not fit, the oldest leaf is dropped: the oldest queued chunk that no queued
chunk extends. That may be the new chunk itself. So the beginning of a prompt is written, which later prompts share. A
chunk is taken after the chunks that it extends.

Every chunk is under a hold, which the caller ends: `offer`, `forget` and `clear` return the holds of dropped chunks.
Rule: no I/O and no clock here.
"""

from collections import Counter, deque
from heapq import heapify, heappop, heappush

import attrs

from lmcache_trio._core.index.grants import Hold
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio.errors import Misuse

__all__ = ["Writeback"]


@attrs.define(eq=False)
class _Queued:
    hold: Hold
    number: int
    size: int
    parent: ChunkKey | None
    children: int = 0  # of those queued
    gone: bool = False


class Writeback:
    """One tier's queue. A chunk that is larger than the bound is accepted alone, or it could never be written."""

    def __init__(self) -> None:
        self._queued: dict[ChunkKey, _Queued] = {}
        self._order: deque[_Queued] = deque()  # by number; some are gone
        self._leaves: list[tuple[int, _Queued]] = []  # a heap; some are gone, or not leaves any more
        self._children: Counter[ChunkKey] = Counter()
        self._numbers = 0
        self._writing: dict[int, int] = {}
        self.bytes_queued = 0
        self.bytes_writing = 0
        self.dropped = 0
        """Chunks that were dropped for want of room, or by `clear`, ever."""

    def __len__(self) -> int:
        return len(self._queued)

    def has(self, key: ChunkKey) -> bool:
        """Whether *key* is queued."""
        return key in self._queued

    @property
    def idle(self) -> bool:
        """Whether no chunk is queued or being written."""
        return not self._queued and not self._writing

    def offer(self, hold: Hold, limit: int) -> list[Hold]:
        """Queue the chunk of *hold*. Returns the holds of chunks that are dropped to keep within *limit* bytes."""
        if hold.key in self._queued:
            return [hold]  # its chunk is queued under another hold, and will be written
        parent = ChunkKey(hold.key.namespace, hold.parent) if hold.parent else None
        self._numbers += 1
        entry = _Queued(hold, self._numbers, sum(hold.lengths), parent, self._children[hold.key])
        self._queued[hold.key] = entry
        self._order.append(entry)
        self.bytes_queued += entry.size
        if not entry.children:
            heappush(self._leaves, (entry.number, entry))
        if parent is not None:
            self._children[parent] += 1
            if (above := self._queued.get(parent)) is not None:
                above.children += 1
        # Entries that are gone leave the two orders when they are met, or here if there are many: O(1) amortised.
        if len(self._order) > 2 * len(self._queued) + 64:
            self._order = deque(entry for entry in self._order if not entry.gone)
        if len(self._leaves) > 2 * len(self._queued) + 64:
            self._leaves = [leaf for leaf in self._leaves if not leaf[1].gone and not leaf[1].children]
            heapify(self._leaves)
        dropped = []
        while self.bytes_queued + self.bytes_writing > limit and self._leaves:
            if len(self._queued) == 1 and not self._writing:
                break
            _, leaf = heappop(self._leaves)
            if not leaf.gone and not leaf.children:
                self._remove(leaf)
                self.dropped += 1
                dropped.append(leaf.hold)
        return dropped

    def take(self, most_bytes: int) -> list[Hold]:
        """The oldest chunks, up to *most_bytes* but at least one, to be written now: `written` follows for each."""
        taken: list[Hold] = []
        size = 0
        while self._order:
            entry = self._order[0]
            if not entry.gone:
                if taken and size + entry.size > most_bytes:
                    break
                self._remove(entry)
                size += entry.size
                self._writing[entry.hold.number] = entry.size
                self.bytes_writing += entry.size
                taken.append(entry.hold)
            self._order.popleft()
        return taken

    def written(self, hold: Hold) -> None:
        """The attempt to write the chunk of *hold* has ended, well or not."""
        size = self._writing.pop(hold.number, None)
        if size is None:
            raise Misuse("written was said of a chunk that is not being written")
        self.bytes_writing -= size

    def forget(self, namespace: bytes) -> list[Hold]:
        """Drop the queued chunks of *namespace*, which was reset. They are not counted."""
        return self._take_out([entry for key, entry in self._queued.items() if key.namespace == namespace])

    def clear(self) -> list[Hold]:
        """Drop all queued chunks: the tier takes none now."""
        self.dropped += len(self._queued)
        return self._take_out(list(self._queued.values()))

    def _take_out(self, entries: list[_Queued]) -> list[Hold]:
        for entry in entries:
            self._remove(entry)
        return [entry.hold for entry in entries]

    def _remove(self, entry: _Queued) -> None:
        entry.gone = True
        del self._queued[entry.hold.key]
        self.bytes_queued -= entry.size
        if entry.parent is not None:
            self._children[entry.parent] -= 1
            if not self._children[entry.parent]:
                del self._children[entry.parent]
            above = self._queued.get(entry.parent)
            if above is not None:
                above.children -= 1
                if not above.children:
                    heappush(self._leaves, (above.number, above))
