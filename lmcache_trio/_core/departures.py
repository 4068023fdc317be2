"""A bounded memory of chunks that are not in memory any more, or never came there: which, why and when.

It answers one question, why a lookup missed, and decides nothing. `MOST` departures are remembered, the latest ones, by
the hash of their names: 2^-46 of the questions about a chunk that never left find another one's departure. All of them
take 11 MB. No I/O and no clock here.
"""

from array import array
from enum import StrEnum

import attrs

__all__ = ["MOST", "Cause", "Departure", "Departures"]

MOST = 65_536


class Cause(StrEnum):
    """Why a chunk is not there. It was in memory only if it was EVICTED; the others got no slot."""

    EVICTED = "evicted"
    NO_SPACE = "no_space"
    SHARE = "share"


_CAUSES = tuple(Cause)


@attrs.frozen
class Departure:
    """One chunk's: *cause*, *when* by the index's clock, and the seconds for which it was *idle*, at the least."""

    cause: Cause
    when: float
    idle: float


class Departures:
    """The latest *most* departures. A chunk that came back keeps its departure, which tells nothing then."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._place_of: dict[int, int] = {}  # by the hash of a chunk's name
        self._next = 0
        # Flat arrays, in the order in which the chunks left, and around: to the garbage collector they are one object.
        self._names = array("q")
        self._when = array("d")
        self._idle = array("f")
        self._cause = bytearray()

    def __len__(self) -> int:
        return len(self._place_of)

    def note(self, namespace: bytes, digest: bytes, cause: Cause, now: float, idle: float = 0.0) -> None:
        """The chunk left at *now*, *idle* for so many seconds or more. The oldest departure may be forgotten for it."""
        name, place = hash((namespace, digest)), self._next
        if place == len(self._names):
            self._names.append(name)
            self._when.append(now)
            self._idle.append(idle)
            self._cause.append(_CAUSES.index(cause))
        else:
            oldest = self._names[place]
            if self._place_of.get(oldest) == place:  # else that chunk left again, and later
                del self._place_of[oldest]
            self._names[place], self._when[place], self._idle[place] = name, now, idle
            self._cause[place] = _CAUSES.index(cause)
        self._place_of[name] = place
        self._next = (place + 1) % self._most

    def find(self, namespace: bytes, digest: bytes) -> Departure | None:
        """The chunk's latest departure, if it is remembered."""
        place = self._place_of.get(hash((namespace, digest)))
        if place is None:
            return None
        return Departure(_CAUSES[self._cause[place]], self._when[place], self._idle[place])
