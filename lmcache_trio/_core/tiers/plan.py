"""The plan of one lookup that memory does not cover: which chunks are in memory, which a tier has, which to load next.

Each chunk of the lookup:

    UNKNOWN --found--> FOUND(tier) --wanted--> COMING --landed--> HERE
       |                                          `----missed---> ABSENT
       |--here--> HERE
       `--every tier said no--> ABSENT

Only the leading run counts, so the plan is cut at the first ABSENT chunk: no chunk behind it is wanted any more. The
plan is done when all chunks before the cut are HERE. Each tier is asked once, for the chunks that no nearer tier has.

Rule: no I/O and no clock here.
"""

from collections.abc import Iterable, Sequence
from enum import Enum

from lmcache_trio.errors import Misuse

__all__ = ["Place", "Plan"]


class Place(Enum):
    """Where a chunk is, to the lookup's knowledge."""

    UNKNOWN = "unknown"
    FOUND = "found"
    COMING = "coming"
    HERE = "here"
    ABSENT = "absent"


class Plan:
    """*count* chunks, *tiers* tiers, nearest first. At most *window* loads are wanted at one time."""

    def __init__(self, count: int, tiers: int, window: int = 64) -> None:
        self._place = [Place.UNKNOWN] * count
        self._tier = [-1] * count
        self._noes = [0] * count  # one bit per tier
        self._all = (1 << tiers) - 1
        self._window = window
        self._coming = 0
        self._asked: dict[int, list[int]] = {}
        self.cut = count
        """Chunks that may still belong to the leading run."""
        self.run = 0
        """Leading chunks that are HERE."""
        self._frontier = 0  # the position behind the last chunk that `to_want` gave

    @property
    def done(self) -> bool:
        """Whether the leading run can't grow any more."""
        return self.run >= self.cut

    def place(self, position: int) -> Place:
        return self._place[position]

    def here(self, position: int) -> None:
        """Memory has the chunk at *position*."""
        if self._place[position] is Place.UNKNOWN:
            self._set(position, Place.HERE)

    def ask(self, tier: int) -> list[int]:
        """The positions to ask *tier* for. Each tier is asked once."""
        if tier in self._asked:
            raise Misuse(f"tier {tier} was asked already")
        asked = [i for i in range(self.run, self.cut) if self._place[i] is Place.UNKNOWN]
        self._asked[tier] = asked
        return asked

    def answered(self, tier: int, found: Sequence[bool]) -> None:
        """*tier* has answered: *found* says which of the chunks that it was asked for it has."""
        asked = self._asked.get(tier)
        if asked is None or len(asked) != len(found):
            raise Misuse(f"tier {tier} was not asked for {len(found)} chunks")
        bit = 1 << tier
        for position, there in zip(asked, found, strict=True):
            if self._place[position] is not Place.UNKNOWN:
                continue
            if there:
                self._place[position], self._tier[position] = Place.FOUND, tier
            else:
                self._noes[position] |= bit
                if self._noes[position] == self._all:
                    self._set(position, Place.ABSENT)

    def to_want(self) -> Iterable[tuple[int, int]]:
        """(position, tier) of the loads to want next, now COMING: in order, without gaps, within the window.

        A chunk gets no slot before its parent, and only loads of the same tier keep that order. So a chunk whose parent
        comes from another tier waits until the parent is HERE.
        """
        while self._frontier < self.cut and self._coming < self._window:
            at = self._frontier
            if self._place[at] is Place.FOUND:
                if at and self._place[at - 1] is Place.COMING and self._tier[at - 1] != self._tier[at]:
                    return
                self._place[at] = Place.COMING
                self._coming += 1
                self._frontier += 1
                yield at, self._tier[at]
            elif self._place[at] is Place.HERE:
                self._frontier += 1
            else:
                return

    def landed(self, position: int) -> None:
        """The load of the chunk at *position* ended well."""
        self._ended(position, Place.HERE)

    def missed(self, position: int) -> None:
        """The load of the chunk at *position* failed."""
        self._ended(position, Place.ABSENT)

    def _ended(self, position: int, place: Place) -> None:
        if self._place[position] is not Place.COMING:
            raise Misuse(f"chunk {position} is {self._place[position].value}: no load of it was wanted")
        self._coming -= 1
        self._set(position, place)

    def _set(self, position: int, place: Place) -> None:
        self._place[position] = place
        if place is Place.ABSENT:
            self.cut = min(self.cut, position)
        while self.run < self.cut and self._place[self.run] is Place.HERE:
            self.run += 1
