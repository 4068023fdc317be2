"""One request's lookup: its state, its answer and lease, and what the server knows of its session.

    IDLE --submit--> PENDING --answer--> ANSWERED --take--> TAKEN
                        `--late--> LATE

                submit     answer     late    expire   take     release   forget
    IDLE        PENDING    -          -       -        Misuse   -         -
    PENDING     Misuse     ANSWERED   LATE*   -        Misuse   IDLE*     IDLE*
    ANSWERED    Misuse     -          -       IDLE*    TAKEN    IDLE*     IDLE*
    TAKEN       PENDING    -          -       -        Misuse   IDLE*     -
    LATE        PENDING    -          -       -        Misuse   -         IDLE

    -  changes nothing, and the result says so: host, server and clock don't wait for each other
    *  the caller owes the server a Release. A submit owes none: the server ends the former lease itself

A LATE lookup is submitted again only for another number of chunks: else each step of the engine would wait as long
again. `refuse` ends a PENDING lookup that the server can't answer. `lose` leads from any state to IDLE. `fail` keeps
the state: the failed chunk and all behind it are never offered again.

Rule 1: every transition of a lookup lives in this file. Rule 2: no I/O and no clock here: times are arguments, on the
caller's monotonic clock, and a connection is any object that stands for one.
"""

from enum import Enum

from lmcache_trio.errors import Misuse

__all__ = ["LookupMachine", "LookupStage"]


class LookupStage(Enum):
    """The state of a lookup. The machine has the lease while ANSWERED, and the load has it once TAKEN."""

    IDLE = "idle"
    PENDING = "pending"
    ANSWERED = "answered"
    TAKEN = "taken"
    LATE = "late"


class LookupMachine:
    """The lookup of one request. *connection*, where an event has it, is the one that the event came from."""

    __slots__ = (
        "asked",
        "cap",
        "chunks",
        "connection",
        "deadline",
        "expires",
        "in_memory",
        "lease",
        "sent",
        "state",
        "upto",
    )

    def __init__(self) -> None:
        self.state = LookupStage.IDLE
        self.asked = 0
        """The id of the latest Lookup."""
        self.upto = 0
        """How many chunks it asked for."""
        self.deadline = 0.0
        """When it is late."""
        self.chunks = 0
        """Leading chunks that may be offered; 0 unless ANSWERED."""
        self.in_memory = 0
        """How many of the answer's chunks no tier had to bring."""
        self.lease = b""
        self.expires = 0.0
        self.cap: int | None = None
        """The first chunk whose load failed, if one did."""
        self.connection: object | None = None
        """The connection on which the server was told of the session. On another one it does not know it."""
        self.sent: int | None = None
        """How many leading digests the server has; None: it must be told from the start."""

    # --- what may be asked ------------------------------------------------------------------------------------------

    def limit(self, chunks: int) -> int:
        """The number of *chunks* that lie before the first failed one."""
        return chunks if self.cap is None else min(chunks, self.cap)

    def may_ask(self, upto: int) -> bool:
        """May a lookup of *upto* chunks be submitted now? A late one is not repeated: it would wait as long again."""
        if self.state in (LookupStage.PENDING, LookupStage.ANSWERED):
            return False
        return upto > 0 and not (self.state is LookupStage.LATE and upto == self.upto)

    def known_at(self, connection: object) -> int | None:
        """How many leading digests the server behind *connection* has; None: it does not know the session for sure."""
        return self.sent if self.connection is connection else None

    # --- what the server is told, and says --------------------------------------------------------------------------

    def told(self, connection: object, sent: int) -> None:
        """The server behind *connection* was sent all it needs to know the session and its first *sent* digests."""
        self.connection, self.sent = connection, sent

    def doubt(self, connection: object) -> None:
        """A message on *connection* came back as an error: next time the server is told from the start."""
        if self.connection is connection:
            self.sent = None

    def submit(self, asked: int, upto: int, deadline: float) -> None:
        """A Lookup with the id *asked*, of *upto* chunks, was sent on the connection last `told`."""
        if not self.may_ask(upto):
            raise Misuse(f"a lookup that is {self.state.value} cannot be submitted for {upto} chunks")
        self._become(LookupStage.PENDING)
        self.asked, self.upto, self.deadline = asked, upto, deadline

    def answer(
        self, connection: object, asked: int, chunks: int, lease: bytes, expires: float, loaded: int = 0
    ) -> bool:
        """The server says that *chunks* may be read under *lease* until *expires*; tiers brought *loaded* of them.

        False: not the awaited answer.
        """
        if self.state is not LookupStage.PENDING or self.asked != asked or self.connection is not connection:
            return False
        self.state = LookupStage.ANSWERED
        self.chunks = chunks if self.cap is None else min(chunks, self.cap)
        self.lease, self.expires, self.in_memory = lease, expires, chunks - loaded
        return True

    def refuse(self, connection: object, asked: int) -> bool:
        """The server can't answer the lookup *asked*. False: that one is not awaited."""
        if self.state is not LookupStage.PENDING or self.asked != asked or self.connection is not connection:
            return False
        self._become(LookupStage.IDLE)
        return True

    def late(self, now: float) -> bool:
        """Has the deadline passed by *now* without an answer? Then a Release is owed."""
        if self.state is not LookupStage.PENDING or now < self.deadline:
            return False
        self._become(LookupStage.LATE)
        return True

    def expire(self, now: float) -> bool:
        """Has the answer's lease run out by *now*? Then a Release is owed."""
        if self.state is not LookupStage.ANSWERED or now < self.expires:
            return False
        self._become(LookupStage.IDLE)
        return True

    def lose(self) -> None:
        """The server is gone. The chunks whose load failed stay failed."""
        self._become(LookupStage.IDLE)
        self.connection = self.sent = None

    # --- what the engine does ---------------------------------------------------------------------------------------

    def take(self) -> bytes:
        """The engine allocated blocks for the answer. Returns its lease, which belongs to the load from now on."""
        if self.state is not LookupStage.ANSWERED:
            raise Misuse(f"a lookup that is {self.state.value} has no lease to take")
        lease = self.lease
        self._become(LookupStage.TAKEN)
        return lease

    def release(self) -> bool:
        """The lookup is not wanted any more, or its load has ended. True: a Release is owed."""
        if self.state in (LookupStage.IDLE, LookupStage.LATE):
            return False
        self._become(LookupStage.IDLE)
        return True

    def forget(self) -> bool:
        """The answer is not wanted; the next submit asks anew. A lease that is TAKEN stays. True: a Release is owed."""
        if self.state in (LookupStage.IDLE, LookupStage.TAKEN):
            return False
        owed = self.state is not LookupStage.LATE
        self._become(LookupStage.IDLE)
        return owed

    def fail(self, chunk: int) -> None:
        """A load of *chunk* failed: neither it nor anything behind it is offered again."""
        if chunk < 0:
            raise Misuse(f"failed chunk is {chunk}: chunks count from 0")
        self.cap = self.limit(chunk)
        self.chunks = min(self.chunks, self.cap)

    def _become(self, state: LookupStage) -> None:
        """Enter *state*, in which the machine has no lease."""
        self.state = state
        self.chunks, self.lease, self.expires = 0, b"", 0.0
