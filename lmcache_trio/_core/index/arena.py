"""The arena's allocator: best fit over coalesced holes, on 4 KiB boundaries.

It knows offsets and lengths alone: no file, no bytes, no chunks. Size classes were the other choice, but classes
calcify: with two chunk sizes, a class that owns all memory starves the other. The distinct lengths of holes, which are
few as chunk sizes are few, stand in a sorted list, so a call costs one bisection.

A range that is given back must be exactly a range that was handed out.
"""

from bisect import bisect_left, insort

from lmcache_trio._core.index.spread import spread
from lmcache_trio.errors import Misuse

__all__ = ["Arena"]

_KEYS = 4096
_TABLE_OF = spread(_KEYS, 64, first=0.5)
"""The number of the table that has a range, by some bits of a hash of the range's offset."""


class Arena:
    """Byte ranges in [0, taken).

    *alignment* is a power of two. Every range begins at a multiple of it and has a multiple of it as its length, so
    this is the only place that rounds lengths up.
    """

    def __init__(self, *, alignment: int = 4096) -> None:
        if alignment < 1 or alignment & (alignment - 1):
            raise Misuse(f"alignment is {alignment}: it must be a power of two")
        self._mask = alignment - 1
        self.taken = 0
        """Bytes that are backed by memory so far."""
        self.capacity = 0
        """Bytes that are handed out or can be: the largest range that an empty arena gives."""
        self.used = 0
        """Bytes that are handed out, rounded up, without the head."""
        self._head = 0
        self._given: list[dict[int, int]] = [{} for _ in range(_TABLE_OF[-1] + 1)]  # offset -> rounded length
        self._holes: dict[int, int] = {}  # first byte -> length
        self._ends: dict[int, int] = {}  # byte after the last -> first byte
        self._buckets: dict[int, dict[int, None]] = {}  # length -> first bytes, last freed last
        self._lengths: list[int] = []  # keys of _buckets, sorted

    @property
    def free_bytes(self) -> int:
        """Bytes in holes."""
        return self.capacity - self.used

    @property
    def largest_hole(self) -> int:
        """Length of the largest range that `allocate` would give now."""
        return self._lengths[-1] if self._lengths else 0

    def rounded(self, length: int) -> int:
        """The bytes that a range of *length* bytes occupies."""
        return (length + self._mask) & ~self._mask

    def grow(self, taken: int) -> None:
        """Make the bytes from the old `taken` to *taken* free. Misuse: *taken* is less than the old one."""
        if taken < self.taken:
            raise Misuse(f"taken would fall from {self.taken} to {taken}: an arena only grows")
        start = max(self.taken & ~self._mask, self._head)
        end = taken & ~self._mask  # the bytes behind the last boundary wait for the next growth
        self.taken = taken
        if end > start:
            self.capacity += end - start
            self._release(start, end - start)

    def reserve_head(self, length: int) -> None:
        """Never hand out the first *length* bytes. Call it once, before the first range is handed out."""
        if self._head or self.used:
            raise Misuse("reserve_head comes once, before the first range is handed out")
        if length < 1:
            raise Misuse(f"length is {length}: it must be 1 or more")
        self._head = self.rounded(length)
        hole = self._holes.get(0, 0)
        if hole:
            self.capacity -= min(hole, self._head)
            self._take_hole(0, hole)
            if hole > self._head:
                self._add_hole(self._head, hole - self._head)

    def allocate(self, length: int) -> int | None:
        """The offset of a range of *length* bytes, or None when no hole is large enough."""
        if length < 1:
            raise Misuse(f"length is {length}: it must be 1 or more")
        # A length that needs no rounding stays the same int object, so all chunks of a layout share one.
        need = length if not length & self._mask else self.rounded(length)
        lengths = self._lengths
        at = bisect_left(lengths, need)
        if at == len(lengths):
            return None
        hole = lengths[at]
        bucket = self._buckets[hole]
        offset, _ = bucket.popitem()  # the one freed last: its pages are the likeliest to be in a cache
        if not bucket:
            del self._buckets[hole]
            del lengths[at]
        del self._holes[offset]
        del self._ends[offset + hole]
        if hole > need:
            self._add_hole(offset + need, hole - need)
        self.used += need
        self._given[_TABLE_OF[hash((offset,)) % _KEYS]][offset] = need
        return offset

    def free(self, offset: int, length: int) -> None:
        """Take back the range that `allocate` gave for *length*. Misuse: that range is not handed out now."""
        need = self.rounded(length)
        table = self._given[_TABLE_OF[hash((offset,)) % _KEYS]]
        if table.get(offset) != need:
            raise Misuse(f"the range of {length} bytes at {offset} is not handed out")
        del table[offset]
        self.used -= need
        self._release(offset, need)

    def holes(self) -> list[tuple[int, int]]:
        """(offset, length) of every hole, in order. It sorts, so it is for statistics and tests alone."""
        return sorted(self._holes.items())

    def _release(self, offset: int, length: int) -> None:
        end = offset + length
        right = self._holes.get(end)
        if right is not None:
            self._take_hole(end, right)
            length += right
        left = self._ends.get(offset)
        if left is not None:
            before = offset - left
            self._take_hole(left, before)
            offset, length = left, length + before
        self._add_hole(offset, length)

    def _add_hole(self, offset: int, length: int) -> None:
        self._holes[offset] = length
        self._ends[offset + length] = offset
        bucket = self._buckets.get(length)
        if bucket is None:
            self._buckets[length] = {offset: None}
            insort(self._lengths, length)
        else:
            bucket[offset] = None

    def _take_hole(self, offset: int, length: int) -> None:
        del self._holes[offset]
        del self._ends[offset + length]
        bucket = self._buckets[length]
        del bucket[offset]
        if not bucket:
            del self._buckets[length]
            del self._lengths[bisect_left(self._lengths, length)]
