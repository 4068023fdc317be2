"""Where the rows of the index file lie in the slabs: scanned once, at the start, in the order of their places.

The scanner claims the bytes of sound rows, and collects the others as strays. `chunk_table` decides about the strays.
"""

from array import array
from collections.abc import Iterator, Sequence

from lmcache_trio.abc import Arena
from lmcache_trio.errors import Misuse
from lmcache_trio_backends.disk.records import ALIGNMENT, Lost

__all__ = ["SLICE", "SlabScanner", "by_place"]

SLICE = 400
"""Rows that one step handles: about 2 ms of the loop."""
_STRETCH = 4 << 20
"""Bytes of the slabs whose rows are sorted at once: 1,024 at most. A sort does not give the GIL away."""
_STRETCHES = 4096
"""The most stretches: they are sorted too."""


def by_place(offsets: "array[int]") -> "array[int]":
    """The rows by their *offsets* in the slabs.

    numpy would take a tenth of the second that a million rows take here, but its import a fifth of a server's start.
    """
    size = max(_STRETCH, max(offsets, default=0) // _STRETCHES + 1)
    stretches: dict[int, array[int]] = {}
    for row, offset in enumerate(offsets):
        number = offset // size
        if number not in stretches:
            stretches[number] = array("i")
        stretches[number].append(row)
    found = array("i")
    for number in sorted(stretches):
        found.extend(sorted(stretches[number], key=offsets.__getitem__))
    return found


class SlabScanner:
    """The bytes that rows name, claimed from an *arena* that has given nothing yet. A row without extent has none."""

    def __init__(self, offsets: "array[int]", extents: "array[int]", arena: Arena, lost: Sequence[Lost]) -> None:
        self._offsets = offsets
        self._extents = extents
        self._arena = arena
        self._lost = lost
        self._passed = 0  # lost ranges that end before the present row
        self.strays: list[int] = []
        """Rows whose bytes lie outside of the slabs, in their lost parts, or over another row's."""
        self.overlaid = 0
        """How many of them lie over another row's."""

    def claim(self, taken: int, order: "array[int]") -> Iterator[None]:
        """Go through all rows in *order* of their places in the *taken* bytes of slabs; in steps of about 2 ms."""
        gaps: list[tuple[int, int]] = []
        end = 0
        self._arena.grow(taken)
        for i in range(0, len(order), SLICE):
            for row in order[i : i + SLICE]:
                start, extent = self._offsets[row], self._extents[row]
                if extent and self._is_free(row, end, taken):
                    gaps += self._pass(end, start)
                    self._take(start, extent)
                    end = start + extent
            yield
        gaps += self._pass(end, max((lost.end for lost in self._lost), default=0))
        for i, gap in enumerate(gaps):
            self._arena.free(*gap)
            if i % SLICE == 0:
                yield

    def _is_free(self, row: int, end: int, taken: int) -> bool:
        """Whether *row* alone names its bytes; if not, it is a stray. All bytes before *end* were claimed."""
        start, extent = self._offsets[row], self._extents[row]
        while self._passed < len(self._lost) and self._lost[self._passed].end <= start:
            self._passed += 1
        is_lost = self._passed < len(self._lost) and self._lost[self._passed].start < start + extent
        if start >= end and not start % ALIGNMENT and start + extent <= taken and not is_lost:
            return True
        self.strays.append(row)
        self.overlaid += start < end
        return False

    def _pass(self, start: int, end: int) -> list[tuple[int, int]]:
        """Take all between two rows. Returns the usable parts (place, length), to be freed at the end."""
        gaps = []
        for lost in self._lost:
            if not lost.usable and start <= lost.start and lost.end <= end:
                if lost.start > start:
                    gaps.append((start, lost.start - start))
                    self._take(*gaps[-1])
                self._take(lost.start, lost.end - lost.start)
                start = lost.end
        if end > start:
            gaps.append((start, end - start))
            self._take(*gaps[-1])
        return gaps

    def _take(self, offset: int, length: int) -> None:
        """From an arena whose only hole begins at *offset*, `allocate` gives exactly that."""
        given = self._arena.allocate(length)
        if given != offset:
            raise Misuse(f"the arena gave {given} where {offset} was to be claimed")
