"""The plan of one lookup that memory does not cover: which parts are in memory, which a tier has, which to load next.

A part, one KV group's of one chunk, by the lookup's knowledge:

    UNKNOWN --found--> FOUND(tier) --wanted--> COMING --landed--> HERE
       |                                          `----missed---> ABSENT
       |--here--> HERE
       `--every tier said no--> ABSENT

The *boundary* is the longest hit that may still be: no part that it needs is ABSENT. It falls when such a part turns
out to be ABSENT, and the parts behind it are wanted no more. The plan is done when all parts that the boundary needs
are HERE. Each tier is asked once, for the parts that no nearer tier has.

Rule: no I/O and no clock here.
"""

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum

from lmcache_trio._core.groups import EVERY, Group, Need, longest_hit
from lmcache_trio.errors import Misuse

__all__ = ["Place", "Plan"]


class Place(Enum):
    """Where a part is, to the lookup's knowledge."""

    UNKNOWN = "unknown"
    FOUND = "found"
    COMING = "coming"
    HERE = "here"
    ABSENT = "absent"


class Plan:
    """*count* chunks of an engine with *groups*; *tiers* tiers, nearest first. At most *window* loads at one time.

    A part is named by the number of its group and the position of its chunk.
    """

    def __init__(
        self, count: int, tiers: int, groups: Sequence[Group] = (EVERY,), chunk_tokens: int = 0, window: int = 64
    ) -> None:
        self._groups = groups
        self._chunk_tokens = chunk_tokens
        self._window = window
        self._all = (1 << tiers) - 1
        self._place = [[Place.UNKNOWN] * count for _ in groups]
        self._tier = [[-1] * count for _ in groups]
        self._noes = [[0] * count for _ in groups]  # one bit per tier
        self._chained = [number for number, group in enumerate(groups) if group.need is Need.EVERY]
        self._others = [number for number in range(len(groups)) if number not in self._chained]
        self._asked: dict[int, list[tuple[int, int]]] = {}  # by tier
        self._coming: set[tuple[int, int]] = set()  # those that are needed
        self._frontier = [0] * len(groups)  # of chained groups: behind the last part that `to_want` gave
        self.boundary = count
        """Chunks of the longest hit that may still be."""
        self._first = [group.first(count, chunk_tokens) for group in groups]  # that the boundary needs
        self._unknown = self._waiting = sum(count - first for first in self._first)  # needed parts: UNKNOWN, not HERE

    @property
    def done(self) -> bool:
        """Whether all that the boundary needs is HERE."""
        return not self._waiting

    def needs(self, group: int, position: int) -> bool:
        """Whether the boundary needs the part. Once it has needed a part and does not any more, it never will again."""
        return self._first[group] <= position < self.boundary

    def place(self, group: int, position: int) -> Place:
        return self._place[group][position]

    def unknown(self) -> Iterator[tuple[int, int]]:
        """The UNKNOWN parts of all hits that may still be, by group and position."""
        for group, places in enumerate(self._place):
            for position in range(self.boundary):
                if places[position] is Place.UNKNOWN:
                    yield group, position

    def here(self, group: int, position: int) -> None:
        """Memory has the part."""
        if self._place[group][position] is Place.UNKNOWN:
            self._set(group, position, Place.HERE)

    def ask(self, tier: int) -> list[tuple[int, int]]:
        """The parts to ask *tier* for. Each tier is asked once."""
        if tier in self._asked:
            raise Misuse(f"tier {tier} was asked already")
        self._asked[tier] = list(self.unknown())
        return self._asked[tier]

    def answered(self, tier: int, found: Sequence[bool]) -> None:
        """*tier* has answered: *found* says which of the parts that it was asked for it has."""
        asked = self._asked.get(tier)
        if asked is None or len(asked) != len(found):
            raise Misuse(f"tier {tier} was not asked for {len(found)} parts")
        bit, most = 1 << tier, self.boundary
        for (group, position), there in zip(asked, found, strict=True):
            if self._place[group][position] is not Place.UNKNOWN:
                continue
            if there:
                self._set(group, position, Place.FOUND)
                self._tier[group][position] = tier
            else:
                self._noes[group][position] |= bit
                if self._noes[group][position] == self._all:
                    self._set(group, position, Place.ABSENT)
                    most = min(most, position) if group in self._chained else most
        self._lower(most)

    def to_want(self) -> Iterable[tuple[int, int, int]]:
        """(group, position, tier) of the loads to want next, now COMING, within the window.

        Parts that are not chained come first, since one that misses lowers the boundary. They wait until no part that
        the boundary needs is UNKNOWN. Those of a chained group come in order, without gaps. A chunk gets no slot before
        its parent, and only loads of the same tier keep that order. So a chunk whose parent comes from another tier
        waits until the parent is HERE.
        """
        for group in [*([] if self._unknown else self._others), *self._chained]:
            places, tiers, chained = self._place[group], self._tier[group], group in self._chained
            at = max(self._first[group], self._frontier[group])
            while at < self.boundary and len(self._coming) < self._window:
                if places[at] is Place.FOUND:
                    if chained and at and places[at - 1] is Place.COMING and tiers[at - 1] != tiers[at]:
                        break
                    self._set(group, at, Place.COMING)
                    self._coming.add((group, at))
                    yield group, at, tiers[at]
                elif places[at] is Place.UNKNOWN:
                    break
                at += 1
                self._frontier[group] = at if chained else 0

    def landed(self, group: int, position: int) -> None:
        """The load of the part ended well."""
        self._ended(group, position, Place.HERE)

    def missed(self, group: int, position: int) -> None:
        """The load of the part failed."""
        self._ended(group, position, Place.ABSENT)
        self._lower(min(self.boundary, position) if group in self._chained else self.boundary)

    def _ended(self, group: int, position: int, place: Place) -> None:
        before = self._place[group][position]
        if before is not Place.COMING:
            raise Misuse(f"part {position} of group {group} is {before.value}: no load of it was wanted")
        self._coming.discard((group, position))
        self._set(group, position, place)

    def _set(self, group: int, position: int, place: Place) -> None:
        if self.needs(group, position):
            self._unknown -= self._place[group][position] is Place.UNKNOWN
            self._waiting -= place is Place.HERE
        self._place[group][position] = place

    def _lower(self, most: int) -> None:
        """The boundary is *most* at the most. Find the longest hit that may still be."""
        others = [self._place[number] for number in self._others]
        groups = [self._groups[number] for number in self._others]
        boundary = longest_hit(
            lambda number, position: others[number][position] is not Place.ABSENT, groups, self._chunk_tokens, most
        )
        if boundary == self.boundary:
            return
        for number, group in enumerate(self._groups):
            first, places = self._first[number], self._place[number]
            self._first[number] = group.first(boundary, self._chunk_tokens)
            for place in places[max(first, boundary) : self.boundary]:
                self._unknown -= place is Place.UNKNOWN
                self._waiting -= place is not Place.HERE
            for place in places[self._first[number] : min(first, boundary)]:
                self._unknown += place is Place.UNKNOWN
                self._waiting += place is not Place.HERE
        self.boundary = boundary
        self._coming = {(group, position) for group, position in self._coming if position < boundary}
