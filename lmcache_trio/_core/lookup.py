"""A request's lookup, as its scheduler sees it.

    NONE --submit--> PENDING --answer--> ANSWERED --taken--> TAKEN
                        |                   |--release (also: 0 tokens allocated, server lost)--> RELEASED
                        |                   `--expired (its lease timed out)--> RELEASED
                        `--late (deadline, server lost), release--> LATE

    TAKEN, RELEASED, LATE --submit--> PENDING        (after preemption, or with more tokens)
    any --failed--> same state, with a cap           (the failed chunk and all behind it are never offered again)

Rule 1: every transition of a lookup lives in this file. Rule 2: no I/O and no clock here. Rule 3: an event that the
state does not know raises `Misuse` and changes nothing; only an answer may come at any time, because the server may
speak while we change our mind: one that is not the awaited one changes nothing and `answer` says so.
"""

from enum import Enum

from lmcache_trio.errors import Misuse

__all__ = ["LookupMachine", "LookupState"]


class LookupState(Enum):
    """Where a lookup stands. `ANSWERED` alone holds a lease of ours; `TAKEN`'s belongs to the load."""

    NONE = "none"
    PENDING = "pending"
    ANSWERED = "answered"
    TAKEN = "taken"
    RELEASED = "released"
    LATE = "late"


class LookupMachine:
    """One request's lookup. Whoever calls `release`, `late` or `expired` owes the server a Release."""

    __slots__ = ("asked", "cap", "chunks", "expires", "lease", "state")

    def __init__(self) -> None:
        self.state = LookupState.NONE
        self.asked = 0
        """The id of the Lookup that is or was awaited."""
        self.chunks = 0
        """Leading chunks that may be offered; 0 unless ANSWERED."""
        self.lease = b""
        self.expires = 0.0
        self.cap: int | None = None
        """The first chunk whose load failed, if one did."""

    def limit(self, chunks: int) -> int:
        """As many of *chunks* as lie before the first failed one."""
        return chunks if self.cap is None else min(chunks, self.cap)

    def submit(self, asked: int) -> None:
        """A Lookup with the id *asked* was sent."""
        if self.state in (LookupState.PENDING, LookupState.ANSWERED):
            raise Misuse(f"a lookup that is {self.state.value} cannot be submitted again: release it first")
        self._become(LookupState.PENDING)
        self.asked = asked

    def answer(self, asked: int, chunks: int, lease: bytes, expires: float) -> bool:
        """The server says: *chunks* may be read under *lease* until *expires*. False: not the awaited answer."""
        if self.state is not LookupState.PENDING or asked != self.asked:
            return False
        self._become(LookupState.ANSWERED)
        self.chunks, self.lease, self.expires = self.limit(chunks), lease, expires
        return True

    def taken(self) -> bytes:
        """The engine allocated blocks for the answer. Returns its lease, which belongs to the load from now on."""
        self._expect("taken", LookupState.ANSWERED)
        lease = self.lease
        self._become(LookupState.TAKEN)
        return lease

    def release(self) -> None:
        """The lookup is not wanted any more."""
        self._expect("released", LookupState.PENDING, LookupState.ANSWERED)
        self._become(LookupState.LATE if self.state is LookupState.PENDING else LookupState.RELEASED)

    def late(self) -> None:
        """The deadline passed, or the server went, before the answer came."""
        self._expect("late", LookupState.PENDING)
        self._become(LookupState.LATE)

    def expired(self, now: float) -> bool:
        """Has the answer's lease timed out by *now*? Then it is used up."""
        if self.state is not LookupState.ANSWERED or now < self.expires:
            return False
        self._become(LookupState.RELEASED)
        return True

    def failed(self, chunk: int) -> None:
        """A load of *chunk* failed: neither it nor anything behind it is offered again."""
        if chunk < 0:
            raise Misuse(f"failed chunk is {chunk}: chunks count from 0")
        self.cap = self.limit(chunk)
        self.chunks = min(self.chunks, self.cap)

    def forget(self) -> None:
        """Back to NONE, from any state that holds nothing at the server. The cap stays."""
        if self.state in (LookupState.PENDING, LookupState.ANSWERED):
            raise Misuse(f"a lookup that is {self.state.value} cannot be forgotten: release it first")
        self._become(LookupState.NONE)

    def _expect(self, event: str, *states: LookupState) -> None:
        if self.state not in states:
            raise Misuse(f"a lookup that is {self.state.value} cannot be {event}")

    def _become(self, state: LookupState) -> None:
        self.state = state
        self.chunks, self.lease, self.expires = 0, b"", 0.0
