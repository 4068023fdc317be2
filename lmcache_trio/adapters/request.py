"""What a scheduler's adapter knows of one request, and of a lookup that is awaited: `scheduler` decides."""

import trio

from lmcache_trio._core.lookup import LookupMachine, LookupState
from lmcache_trio.client import Client
from lmcache_trio.threads import Handoff

__all__ = ["Pending", "Request"]


class Request:
    """One engine request: its session's number, its lookup, and the digests of its chunks so far."""

    __slots__ = (
        "client",
        "digests",
        "doubtful",
        "extras",
        "given_up",
        "lease_taken",
        "machine",
        "outdated",
        "pending",
        "sent",
        "session",
        "tokens",
        "upto",
    )

    def __init__(self, session: int) -> None:
        self.session = session
        self.machine = LookupMachine()
        self.digests: list[bytes] = []
        self.tokens: list[int] = []
        """The tokens that were hashed, whole chunks: 8 bytes each, for objects that the engine's own list holds too."""
        self.extras: list[bytes] = []
        """What was hashed besides, one entry a chunk."""
        self.client: Client | None = None
        """The connection on which the server was told of this session; on another it knows nothing of it."""
        self.sent = 0
        """Leading digests that it has."""
        self.doubtful = False
        """Did the server refuse what it was told last? Nobody knows what it has then."""
        self.upto = 0
        self.lease_taken = False
        """Does a load, or one that ended, hold the lease?"""
        self.given_up: int | None = None
        """The length of a lookup that was late: not asked again before something changes, or each step would wait."""
        self.pending: Pending | None = None
        self.outdated = False
        """Did it begin before a reset, or with other weights? What it computed is not stored any more."""

    def forget_prompt(self) -> None:
        """Nothing of it was hashed, as things are."""
        self.digests, self.tokens, self.extras = [], [], []

    def known_to(self, client: Client) -> bool:
        """Does the server of *client* know the session, and its first `sent` digests?"""
        return self.client is client and not self.doubtful

    def told(self, client: Client, sent: int) -> None:
        """The server was just sent what it needs to know the session and its first *sent* digests. Under the latch."""
        self.client, self.sent, self.doubtful = client, sent, False

    def refused(self, client: Client) -> None:
        """What the server was told came back as an error: next time it is told from the start. Under the latch."""
        self.doubtful = self.doubtful or self.client is client


class Pending:
    """One lookup under way. It is current until the request's state moves on, which only the latch's holder may do."""

    __slots__ = ("_settled", "answered", "asked", "client", "deadline", "heard", "request", "watched")

    def __init__(self, request: Request, client: Client, asked: int, deadline: float, heard: int) -> None:
        self.request = request
        self.client = client
        self.asked = asked
        self.deadline = deadline
        self.heard = heard
        """How much the server had said when it was asked, or when the watch began."""
        self.answered: Handoff[bool] = Handoff()
        """For a host thread that waits."""
        self.watched = False
        self._settled: trio.Event | None = None

    def is_current(self) -> bool:
        machine = self.request.machine
        return machine.state is LookupState.PENDING and machine.asked == self.asked and self.request.pending is self

    def begin_watch(self) -> bool:
        """In the loop: True for the first who wants to watch it, if there is still something to watch."""
        if self.watched or self.answered.done:
            return False
        self.watched = True
        self.heard = self.client.heard  # what was on its way has come by now
        self._settled = trio.Event()
        return True

    def settled(self) -> None:
        """In the loop: wake the watch."""
        if self._settled is not None:
            self._settled.set()

    async def wait_settled(self) -> None:
        if self._settled is not None and not self.answered.done:
            await self._settled.wait()
