"""Which published chunk is evicted first: the least recently used one of those that have no child on this disk.

Only leaves stand in the heap, and a parent inherits the recency of the last child that left it. So touching a chunk is
O(1), an eviction O(log n), and nothing walks a prefix. If a chunk was used since, its entry is late. It is put right
when it comes to the top: a bounded number at a time, because a million entries may be late.
"""

import heapq

from lmcache_trio_backends.disk.rows import ChunkRows

__all__ = ["EvictionHeap"]

_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1
_GLANCES = 500
"""Entries that one call of `victim` looks at: about 1 ms."""


class EvictionHeap:
    """The prefix tree over the *rows* in state *published*, and its leaves by recency."""

    def __init__(self, rows: ChunkRows, published: int) -> None:
        self._rows = rows
        self._published = published
        self._heap: list[int] = []  # recency << 32 | row
        self.searching = False
        """The last `victim` stopped early: ask again."""

    def link(self, row: int) -> None:
        """*row* is published, so its parent is not a leaf any more. Call `offer` once its whole group is linked."""
        rows = self._rows
        space = rows.space(row)
        space.chunks += 1
        if space.orphans:
            rows.children[row] += space.orphans.pop(rows.digest(row), 0)
        if parent := rows.parent(row):
            above = self._find(row, parent)
            if above >= 0 and above != row:
                rows.children[above] += 1
            else:
                space.orphans[parent] = space.orphans.get(parent, 0) + 1

    def unlink(self, row: int) -> None:
        """*row* is not published any more, and its name is removed."""
        rows = self._rows
        space = rows.space(row)
        space.chunks -= 1
        if space.gone:
            return  # with all its relations
        if rows.children[row]:
            space.orphans[rows.digest(row)] = rows.children[row]
        if not (parent := rows.parent(row)):
            return
        above = self._find(row, parent)
        if above >= 0:
            rows.children[above] -= 1
            rows.recency[above] = max(rows.recency[above], rows.recency[row])
            self.offer(above)
            return
        left = space.orphans.pop(parent, 0) - 1
        if left > 0:
            space.orphans[parent] = left

    def offer(self, row: int) -> None:
        """Put *row* into the heap if it is a leaf."""
        rows = self._rows
        if not rows.children[row] and not rows.queued[row]:
            rows.queued[row] = 1
            heapq.heappush(self._heap, rows.recency[row] << _ROW_BITS | row)

    def victim(self) -> int:
        """The leaf that is evicted first, taken out of the heap; -1: there is none, or `searching`."""
        rows, aside, victim, glances = self._rows, list[int](), -1, _GLANCES
        while self._heap and victim < 0 and glances:
            glances -= 1
            entry = heapq.heappop(self._heap)
            row = entry & _ROW_MASK
            rows.queued[row] = 0
            if rows.state[row] != self._published or rows.children[row] or rows.space(row).gone:
                continue
            if entry >> _ROW_BITS != rows.recency[row]:
                self.offer(row)
            elif rows.holders[row]:
                aside.append(row)
            else:
                victim = row
        self.searching = victim < 0 and not glances and len(aside) < _GLANCES
        for row in aside:
            self.offer(row)
        return victim

    def _find(self, row: int, digest: bytes) -> int:
        """The published row of *digest* beside *row*, or -1."""
        found = self._rows.space(row).find(digest)
        return found if found >= 0 and self._rows.state[found] == self._published else -1
