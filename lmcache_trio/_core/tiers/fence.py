"""The fence of a tier: when the tier may be used.

    PROBING --works--> OPEN --failed--> FENCED(until) --probe, from then on--> PROBING
       `-----------------failed-----------^

A tier begins as PROBING: it has yet to show that it works. Each failure in a row doubles the time until the next probe.
If a tier stayed OPEN for longer than it was fenced before, that time begins anew at the shortest. So a tier that works
only for a moment after each probe is probed less and less often.

Rule 1: every transition of a fence lives in this file. Rule 2: no I/O and no clock here. Rule 3: an event that the
state does not know raises `Misuse` and changes nothing. Only a failure may come at any time, because calls that are
under way when the first one fails may fail as well: `failed` then says False.
"""

from enum import Enum
from math import inf

from lmcache_trio.errors import Misuse

__all__ = ["Fence", "FenceState"]


class FenceState(Enum):
    """Only an OPEN tier is called."""

    PROBING = "probing"
    OPEN = "open"
    FENCED = "fenced"


class Fence:
    """One tier's fence. *first* and *most* bound the seconds from a failure to the next probe."""

    def __init__(self, *, first: float = 1.0, most: float = 60.0) -> None:
        if not 0 < first <= most:
            raise Misuse(f"first is {first} and most is {most}: they must be above 0, and in order")
        self._first = first
        self._most = most
        self._wait = 0.0
        self._opened = 0.0
        self.state = FenceState.PROBING
        self.reason = ""
        """Why the tier is fenced, or was fenced last."""
        self.until = -inf
        self.failures = 0
        """How often the tier was fenced, ever."""

    def works(self, now: float) -> None:
        """The probe ended well."""
        if self.state is not FenceState.PROBING:
            raise Misuse(f"a tier that is {self.state.value} cannot be opened")
        self.state = FenceState.OPEN
        self._opened = now

    def failed(self, reason: str, now: float) -> bool:
        """A call failed, or is overdue. False: the tier was fenced before."""
        if self.state is FenceState.FENCED:
            return False
        if self.state is FenceState.OPEN and now - self._opened > self._wait:
            self._wait = 0.0
        self._wait = min(self._most, max(self._first, 2 * self._wait))
        self.state, self.reason, self.until = FenceState.FENCED, reason, now + self._wait
        self.failures += 1
        return True

    def probe(self, now: float) -> None:
        """The tier is tried again."""
        if self.state is not FenceState.FENCED:
            raise Misuse(f"a tier that is {self.state.value} cannot be probed")
        if now < self.until:
            raise Misuse(f"it is {now}, and the next probe is at {self.until}")
        self.state = FenceState.PROBING
