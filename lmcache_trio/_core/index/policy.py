"""In which order chunks are evicted: `EvictionPolicy`, and the least-recently-used one.

A policy orders *rows* (small positive integers; 0 is none) and knows nothing else of them: not whether a chunk may be
evicted, not what it holds. The index takes a row out while its chunk is in use and puts it back after; a policy never
sees a row whose chunk is leased, pinned, held or being written.

The index keeps leaves before parents by the order in which it puts rows in: descendants first, ancestors after, so an
ancestor always stands nearer the recent end.
"""

from array import array
from collections.abc import Iterable
from typing import Protocol

__all__ = ["EvictionPolicy", "LeastRecentlyUsed"]


class EvictionPolicy(Protocol):
    """An order over rows. Every method takes constant time a row."""

    def extend(self, count: int) -> None:
        """*count* more rows exist, numbered on from row 0, which is there from the start. They are not in the order."""

    def touch(self, rows: Iterable[int]) -> None:
        """Bring *rows* to the recent end, in or out of the order before; the last one becomes the most recent."""

    def insert(self, row: int, below: int) -> None:
        """Put a *row* that is not in the order next to *below*, on its older side; 0: at the recent end."""

    def remove(self, rows: Iterable[int]) -> None:
        """Take *rows* out; those that are not in the order are left alone."""

    def __contains__(self, row: int) -> bool: ...

    def oldest(self) -> int:
        """The row that goes next; 0 when there is none."""
        ...


class LeastRecentlyUsed:
    """A doubly linked ring in two flat arrays: 8 bytes a row, nothing for the garbage collector.

    Row 0 is the ring's own: its older neighbour is the most recent row, its newer neighbour the oldest one.
    """

    def __init__(self) -> None:
        self._newer = array("i", [0])  # -1: not in the ring
        self._older = array("i", [0])

    def extend(self, count: int) -> None:
        out = array("i", [-1]) * count
        self._newer.extend(out)
        self._older.extend(out)

    def touch(self, rows: Iterable[int]) -> None:
        newer, older = self._newer, self._older
        top = older[0]
        for row in rows:
            after = newer[row]
            if after >= 0:
                if row == top:
                    continue
                before = older[row]
                newer[before] = after
                older[after] = before
            newer[top] = row
            older[row] = top
            newer[row] = 0
            top = row
        older[0] = top

    def insert(self, row: int, below: int) -> None:
        newer, older = self._newer, self._older
        before = older[below]
        newer[row] = below
        older[row] = before
        newer[before] = row
        older[below] = row

    def remove(self, rows: Iterable[int]) -> None:
        newer, older = self._newer, self._older
        for row in rows:
            after = newer[row]
            if after >= 0:
                before = older[row]
                newer[before] = after
                older[after] = before
                newer[row] = -1

    def __contains__(self, row: int) -> bool:
        return self._newer[row] >= 0

    def oldest(self) -> int:
        return self._newer[0]
