"""Where the rows of the index file lie in the slabs: scanned once, at the start, in the order of their places.

The scanner claims the bytes of sound rows and names the rows that cannot be sound; `chunk_table` decides about those.
"""

from array import array
from collections.abc import Iterator, Sequence

from lmcache_trio.abc import Arena
from lmcache_trio.errors import Misuse
from lmcache_trio_backends.disk.records import ALIGNMENT, Lost
from lmcache_trio_backends.disk.rows import ChunkRows

__all__ = ["SLICE", "SlabScanner", "by_place"]

SLICE = 400
"""Rows that one step handles: about 2 ms of the loop."""
_STRETCH = 4 << 20
"""Bytes of the slabs whose rows are sorted at once: 1,024 at most. A sort keeps the interpreter to itself."""
_STRETCHES = 4096
"""The most stretches: they are sorted too."""


def by_place(rows: ChunkRows) -> "array[int]":
    """All rows by their place on the disk. May run in a thread while nobody changes them.

    numpy would take a tenth of the second that a million take here, and a fifth of a server's start to be imported.
    """
    offsets = rows.offset
    size = max(_STRETCH, max(offsets[: rows.count], default=0) // _STRETCHES + 1)
    stretches: dict[int, array[int]] = {}
    for row in range(rows.count):
        number = offsets[row] // size
        if number not in stretches:
            stretches[number] = array("i")
        stretches[number].append(row)
    found = array("i")
    for number in sorted(stretches):
        found.extend(sorted(stretches[number], key=offsets.__getitem__))
    return found


class SlabScanner:
    """The bytes that rows of one *state* name, claimed from an *arena* that has given nothing yet."""

    def __init__(self, rows: ChunkRows, state: int, arena: Arena, lost: Sequence[Lost]) -> None:
        self._rows = rows
        self._state = state
        self._arena = arena
        self._lost = lost
        self._passed = 0  # of the lost ranges, those that end before the row that is looked at
        self.strays: list[int] = []
        """Rows whose bytes lie outside of the slabs, in what is lost of them, or over another's."""
        self.overlaid = 0
        """How many of them lie over another's."""

    def claim(self, taken: int, order: "array[int]") -> Iterator[None]:
        """Go through all rows in *order* of their places in the *taken* bytes of slabs; in steps of about 2 ms."""
        gaps: list[tuple[int, int]] = []
        end = 0
        self._arena.grow(taken)
        for i in range(0, len(order), SLICE):
            for row in order[i : i + SLICE]:
                if self._rows.state[row] == self._state and self._is_free(row, end, taken):
                    start, extent = self._rows.offset[row], self._rows.extent[row]
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
        """Whether its bytes are nobody else's; if not, it is a stray. What lies before *end* was claimed."""
        start, extent = self._rows.offset[row], self._rows.extent[row]
        while self._passed < len(self._lost) and self._lost[self._passed].end <= start:
            self._passed += 1
        is_lost = self._passed < len(self._lost) and self._lost[self._passed].start < start + extent
        if start >= end and not start % ALIGNMENT and start + extent <= taken and extent and not is_lost:
            return True
        self.strays.append(row)
        self.overlaid += start < end
        return False

    def _pass(self, start: int, end: int) -> list[tuple[int, int]]:
        """Take all between two rows. Returns the parts (place, length) to be given back: what can be used again."""
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
