"""The requests of one scheduler, and their lookups at the server.

The host's thread asks, checks and ends; the loop's thread brings the server's messages. `LookupMachine` decides each
step of a lookup, under one lock. No task waits for deadlines: each call looks at them.
"""

import math
import secrets
import time
from collections.abc import Sequence

from lmcache_trio._core.keys import join_digests
from lmcache_trio._transport.conversation import Reply
from lmcache_trio._wire.messages import (
    Answer,
    AnswerState,
    Ended,
    Lookup,
    LookupStatus,
    Message,
    Ping,
    Release,
    Taken,
)
from lmcache_trio.adapters.link import Link, logger
from lmcache_trio.adapters.scheduler.lookup_machine import LookupMachine, LookupStage
from lmcache_trio.adapters.scheduler.prompts import Prompt
from lmcache_trio.client import Client
from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio.threads import Handoff, Lock

__all__ = ["LookupTable", "Request"]

_NAME = 512
"""Characters of a request's id that a server is told, for people."""
_BUDGET_SHARE = 0.8
"""The share of the lookup's timeout that tiers may take: a slow disk is to give a smaller hit, and not a timeout."""
_LEASE_MARGIN = 0.1
"""The share of a lease that stays unused: the server counts its seconds from an earlier moment."""
_OPENING = 0.1
"""Seconds that a store waits for its session to be opened: 500 round trips."""


class Request:
    """One engine request: the number of its session, its prompt and its lookup."""

    __slots__ = ("heard", "heard_again", "lookup", "name", "outdated", "prompt", "session", "status_asked", "waiter")

    def __init__(self, name: str, session: int) -> None:
        self.name = name[:_NAME].encode(errors="replace").decode()
        """What a server is told of its id."""
        self.session = session
        self.prompt = Prompt()
        self.lookup = LookupMachine()
        self.outdated = False
        """Did it begin before a reset, or with other weights? Then its KV is not stored any more."""
        self.heard = 0
        """How many messages the server had sent when it was asked. It is counted again at the time `heard_again`."""
        self.heard_again = math.inf
        self.status_asked = False
        """Is a question for the lookup's status under way?"""
        self.waiter: Handoff[bool] | None = None
        """Woken by the lookup's answer."""


class LookupTable:
    """The requests, by id and by session. *link* has the server; *lock* guards the table and every lookup's state.

    All times are in seconds. An answer is offered for its lease, and for *lease_timeout* at most.
    """

    def __init__(
        self, link: Link, lock: Lock, *, lookup_timeout: float, poll_interval: float, lease_timeout: float
    ) -> None:
        self.requests: dict[str, Request] = {}
        self.lookup_timeout = lookup_timeout
        self.poll_interval = poll_interval
        self.clock = time.monotonic
        self._link = link
        self._lock = lock
        self._lease_timeout = lease_timeout
        self._sessions: dict[int, Request] = {}
        self._next_session = secrets.randbits(62)
        self._silent: tuple[Client, int] | None = None
        """A client whose server was silent for a whole lookup, and its `heard` then: not asked until that grows."""
        self._warned = False

    @property
    def client(self) -> Client | None:
        """The client to ask now. None: no server is connected, or it is silent."""
        client = self._link.client
        if client is not None and self._silent == (client, client.heard):
            return None
        return client

    # --- requests ---------------------------------------------------------------------------------------------------

    def open(self, request_id: str) -> Request:
        """The request with this id. A new one gets the number of a session."""
        if not isinstance(request_id, str):
            raise Misuse(f"request_id is {request_id!r:.80}: it must be a str")
        request = self.requests.get(request_id)
        if request is None:
            self._next_session = (self._next_session + 1) % (1 << 62)
            request = Request(request_id, self._next_session)
            with self._lock:
                self.requests[request_id] = request
                self._sessions[request.session] = request
        return request

    def open_session(self, request: Request) -> None:
        """Open the session at the server, without a lookup. Waits for the reply: slots are given to known sessions
        only, and a worker may be faster than this connection.
        """
        client = self.client
        if client is None or request.outdated or request.lookup.known_at(client) is not None:
            return
        opened: Handoff[bool] = Handoff()
        message = Lookup(client.new_id(), request.session, 0, b"", 0, name=request.name)

        def on_reply(reply: Reply) -> None:
            if not isinstance(reply, Answer):
                with self._lock:
                    request.lookup.doubt(client)
            opened.set(True)

        with self._lock:
            try:
                client.request_nowait(message, on_reply)
            except Unavailable:
                return  # the store will be dropped and counted
            request.lookup.told(client, 0)
        opened.wait(min(self.lookup_timeout, _OPENING))

    def end(self, request_id: str) -> None:
        """The request is over: the end of its session releases its lookup, too."""
        request = self.requests.get(request_id)
        if request is not None:
            with self._lock:
                request.lookup.release()
                del self.requests[request_id], self._sessions[request.session]
                self._notify(request, Ended(request.session))

    # --- a lookup ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request, upto: int) -> None:
        """Look up the first *upto* chunks of the request's prompt, up to the first one that failed to load."""
        client, lookup, digests = self.client, request.lookup, request.prompt.digests
        upto = lookup.limit(upto)
        if client is None or not lookup.may_ask(upto):
            return
        asked, now = client.new_id(), self.clock()
        start = lookup.known_at(client) or 0
        budget_ms = int(self.lookup_timeout * _BUDGET_SHARE * 1000)
        name = "" if start else request.name
        message = Lookup(asked, request.session, start, join_digests(digests[start:upto]), upto, budget_ms, name)
        with self._lock:  # for which the reader of the reply waits
            request.heard, request.heard_again = client.heard, now + self.poll_interval
            try:
                client.request_nowait(message, lambda reply: self._on_reply(request, client, asked, reply))
            except Unavailable:
                return  # the server knows nothing of it, and what it knew before holds
            lookup.told(client, max(start, upto))
            lookup.submit(asked, upto, now + self.lookup_timeout)

    def is_asked(self, request: Request, most: int) -> bool:
        """Is its lookup awaited or answered, with *most* chunks at most? One that may bring more is forgotten."""
        self.check(request)
        state, lookup = request.lookup.state, request.lookup
        if state not in (LookupStage.PENDING, LookupStage.ANSWERED):
            return False
        if (lookup.upto if state is LookupStage.PENDING else lookup.chunks) <= most:
            return True
        self.forget(request)
        return False

    def check(self, request: Request) -> int | None:
        """How many leading chunks may be offered; None while that is unknown. It ends leases and lookups in time."""
        lookup, now, warn = request.lookup, self.clock(), False
        with self._lock:
            client = self._link.client
            if lookup.expire(now):
                self._notify(request, Release(request.session))
            elif lookup.late(now):
                if client is not None:
                    client.forget(lookup.asked)
                    client.notice_nowait(Release(request.session))
                    if client.heard == request.heard:  # do not stall on it again
                        self._silent = (client, client.heard)
                        client.request_unheard(Ping(client.new_id()))  # whose answer ends the silence
                warn, self._warned = not self._warned, True
            elif lookup.state is LookupStage.PENDING:
                if client is not None and now >= request.heard_again:  # messages on their way have come by now
                    request.heard, request.heard_again = client.heard, math.inf
                return None
            chunks = lookup.chunks
        if warn:
            logger.warning("a lookup was not answered within %g s: going on without the cache", self.lookup_timeout)
        return chunks

    def wait(self, request_ids: Sequence[str], seconds: float) -> None:
        """Block until one of the lookups is answered, ended or late, at most *seconds*."""
        waiter: Handoff[bool] = Handoff()
        until = self.clock() + seconds
        with self._lock:
            for request_id in request_ids:
                request = self.requests.get(request_id)
                if request is None or request.lookup.state is not LookupStage.PENDING:
                    return
                request.waiter = waiter
                until = min(until, request.lookup.deadline)
        waiter.wait(until - self.clock())

    def ask_status(self, request: Request) -> None:
        """Ask the server for the status of a pending lookup, in case its answer was lost: one question at a time."""
        client, lookup, asked = self._link.client, request.lookup, request.lookup.asked
        if client is None or lookup.state is not LookupStage.PENDING or request.status_asked:
            return

        def on_reply(reply: Reply) -> None:
            request.status_asked = False
            if isinstance(reply, Answer):  # else the lookup's own reply tells what is wrong
                self._on_reply(request, client, asked, reply)

        request.status_asked = True
        try:
            client.request_nowait(LookupStatus(client.new_id(), request.session), on_reply)
        except Unavailable:
            request.status_asked = False

    def take(self, request: Request, chunks: int, *, exact: bool) -> bytes:
        """The lease under which the first *chunks* of the answer may be loaded; b"" if the answer has fewer.

        *exact*: also if it has more. Its lease does not have what a hit of *chunks* needs then.
        """
        lookup = request.lookup
        self.check(request)
        with self._lock:
            enough = chunks == lookup.chunks if exact else chunks <= lookup.chunks
            if lookup.state is LookupStage.ANSWERED and enough:
                lease = lookup.take()
                self._notify(request, Taken(request.session, lease))
                return lease
            if lookup.forget():
                self._notify(request, Release(request.session))
        return b""

    def release(self, request: Request) -> None:
        """The lookup is not wanted any more, or its load has ended."""
        with self._lock:
            if request.lookup.release():
                self._notify(request, Release(request.session))

    def forget(self, request: Request) -> None:
        """The answer is not wanted; the next submit asks anew. A lease that a load has taken stays with it."""
        with self._lock:
            if request.lookup.forget():
                self._notify(request, Release(request.session))

    # --- what the server says, in the loop --------------------------------------------------------------------------

    def on_push(self, message: Message) -> None:
        """The answer to a lookup that tiers have taken on."""
        if isinstance(message, Answer):
            with self._lock:  # under which a lookup is sent and noted: the answer may be faster
                request, client = self._sessions.get(message.session), self._link.client
            if request is not None and client is not None:
                self._on_reply(request, client, message.asked, message)

    def lose(self) -> None:
        """The server is gone."""
        with self._lock:
            for request in self.requests.values():
                request.lookup.lose()
                if request.waiter is not None:
                    request.waiter.set(True)

    def _on_reply(self, request: Request, client: Client, asked: int, reply: Reply) -> None:
        """Take the server's word on the lookup *asked*: its reply, a push, or its status."""
        lookup = request.lookup
        with self._lock:
            if not isinstance(reply, Answer):
                settled = lookup.refuse(client, asked)
                lookup.doubt(client)
            elif reply.state is AnswerState.PENDING or reply.asked not in (0, asked):
                return
            elif reply.state is AnswerState.UNKNOWN:
                settled = lookup.refuse(client, asked)
            else:
                seconds = min(reply.ttl_ms / 1000, self._lease_timeout) if reply.chunks else self._lease_timeout
                expires = self.clock() + seconds * (1 - _LEASE_MARGIN)
                settled = lookup.answer(client, asked, reply.chunks, reply.lease, expires, reply.loaded)
                self._warned = self._warned and not settled
            if settled and request.waiter is not None:
                request.waiter.set(True)

    def _notify(self, request: Request, notice: Message) -> None:
        """Tell the server, if it is still the one that knows the request. Under the lock."""
        client = self._link.client
        if client is not None and request.lookup.connection is client:
            client.notice_nowait(notice)
