"""Lookups under way: what the Trio thread does with their answers, and how each of them ends.

Every change of a lookup's state happens under the latch, because the host releases what the loop answers; each is
decided by `_core.lookup`. It asks nothing and offers nothing to an engine: `scheduler` does.
"""

import math
import time
from collections.abc import Sequence

import trio

from lmcache_trio._core.lookup import LookupState
from lmcache_trio._transport.conversation import Reply
from lmcache_trio._wire.messages import Ack, Answer, AnswerState, Hello, Identify, Message, Ping, Release, Reset
from lmcache_trio.adapters.link import Link, logger
from lmcache_trio.adapters.prompts import Prompts
from lmcache_trio.adapters.request import Pending, Request
from lmcache_trio.client import Client
from lmcache_trio.threads import Handoff

__all__ = ["Lookups"]

_LEASE_MARGIN = 0.1
"""Share of a lease that is left unused: a load must begin before the server's clock ends, which began earlier."""


class Lookups(Prompts):
    """The requests of one scheduler, and their lookups on one link."""

    def __init__(
        self, identity: Sequence[str | bytes], block_tokens: int, chunk_tokens: int | None, lookup_timeout: float
    ) -> None:
        super().__init__(identity, block_tokens, chunk_tokens)
        self._lookup_timeout = lookup_timeout
        self._lease_timeout = math.inf
        self._clock = time.monotonic
        self._silent: tuple[Client, int] | None = None
        """A client whose server was silent for a whole lookup, and how much it had said: not asked until it speaks."""
        self._warned = False
        self._awaited: Handoff[bool] | None = None
        """Whom the next answer wakes, whichever lookup it is of."""
        self._link: Link
        self._told: Client | None = None
        """The client whose server was told of the model and of all resets; None while there is none."""
        self._resets_owed: dict[bytes, None] = {}
        """Identities whose chunks are to be dropped, as no server has confirmed yet: the next one is told first."""

    def _connect(self, address: str, hello: Hello, timeout: float) -> None:
        self._link = Link(address, hello, connected=self._on_connected, lost=self._on_lost)
        self._link.start(timeout)

    # --- for subclasses ---------------------------------------------------------------------------------------------

    def _pending(self, request: Request) -> Pending | None:
        """The lookup of *request* that is awaited now, if one is."""
        with self._latch:
            return request.pending if request.machine.state is LookupState.PENDING else None

    def _take_answer(self, pending: Pending, answer: Answer) -> None:
        """What the server says of a lookup. In the loop."""
        if answer.state is AnswerState.PENDING:
            self._watch(pending)
            return
        with self._latch:
            if not pending.is_current():
                return
            machine = pending.request.machine
            if answer.state is AnswerState.UNKNOWN:
                machine.late()
            else:
                lease = min(answer.ttl_ms / 1000, self._lease_timeout) if answer.chunks else self._lease_timeout
                expires = self._clock() + (lease if lease is math.inf else lease * (1 - _LEASE_MARGIN))
                if machine.answer(answer.asked, answer.chunks, answer.lease, expires):
                    self._warned = False
            self._settle(pending)

    def _too_late(self, pending: Pending) -> None:
        """Give *pending* up: 0 tokens, one warning, and nothing left behind. Any thread."""
        with self._latch:
            if not pending.is_current():
                return
            pending.request.machine.late()
            pending.request.given_up = pending.request.upto
            pending.client.forget(pending.asked)
            pending.client.notice_nowait(Release(pending.request.session))
            if pending.client.heard == pending.heard:  # not a word since it was asked: do not stall on it again
                self._silent = (pending.client, pending.heard)
                pending.client.request_unheard(Ping(pending.client.new_id()))  # whose answer ends the silence
            warn, self._warned = not self._warned, True
            self._settle(pending)
        if warn:
            logger.warning("a lookup was not answered within %g s: going on without the cache", self._lookup_timeout)

    async def _until_late(self, pending: Pending) -> None:
        """In the loop: give *pending* up at its deadline."""
        with trio.move_on_after(max(0.0, pending.deadline - self._clock())):
            await pending.wait_settled()
            return
        self._too_late(pending)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _usable(self) -> Client | None:
        client = self._link.client
        if client is not None and self._silent == (client, client.heard):
            return None
        return client

    def _expire(self, request: Request) -> None:
        if request.machine.expired(self._clock()):
            self._notify(request, Release(request.session))

    def _let_go(self, request: Request) -> None:
        """The lookup is not wanted any more: the server is told so."""
        with self._latch:
            if self._drop_lookup(request):
                self._notify(request, Release(request.session))

    def _drop_lookup(self, request: Request) -> bool:
        """Under the latch: forget the lookup on this side. False if there was none to let go."""
        if request.machine.state not in (LookupState.PENDING, LookupState.ANSWERED):
            return False
        if request.pending is not None:
            request.pending.client.forget(request.pending.asked)
            self._settle(request.pending)
        request.machine.release()
        return True

    def _notify(self, request: Request, notice: Message) -> None:
        """Tell the server, if it is still the one that knows the request."""
        if request.client is not None and request.client is self._link.client:
            request.client.notice_nowait(notice)

    def _settle(self, pending: Pending) -> None:
        if pending.request.pending is pending:
            pending.request.pending = None
        pending.answered.set(True)
        if self._awaited is not None:
            self._awaited.set(True)
            self._awaited = None
        if pending.watched:
            self._link.post(pending.settled)

    def _watch_soon(self, pending: Pending) -> None:
        if not pending.watched:
            self._link.post(self._watch, pending)

    def _watch(self, pending: Pending) -> None:
        if pending.begin_watch():
            self._link.spawn(lambda client: self._until_late(pending))

    def _on_reply(self, pending: Pending, reply: Reply) -> None:
        if isinstance(reply, Answer):
            self._take_answer(pending, reply)
            return
        with self._latch:
            if pending.is_current():
                pending.request.machine.late()
            self._settle(pending)
            pending.request.refused(pending.client)

    def _on_push(self, message: Message) -> None:
        if isinstance(message, Answer):
            with self._latch:  # under which the host sends a question and notes it: the answer may be faster
                request = self._sessions.get(message.session)
                pending = request.pending if request is not None else None
            if pending is not None and pending.asked == message.asked:
                self._take_answer(pending, message)

    async def _on_connected(self, client: Client) -> None:
        self._adopt_chunk_tokens(client.chunk_tokens)
        client.on_push = self._on_push
        with self._latch:  # before anything is asked: what the server has of before a reset is not offered
            for identity in self._resets_owed:
                self._send_reset(client, identity)
            if self._link.said.identity != self._model:
                client.request_unheard(Identify(client.new_id(), self._model))
            self._told = client

    def _send_reset(self, client: Client, identity: bytes) -> Handoff[Reply]:
        """Have the server drop what it has under *identity*. `Unavailable`: it is gone. Under the latch."""
        replied: Handoff[Reply] = Handoff()

        def on_reply(reply: Reply) -> None:
            if isinstance(reply, Ack):
                with self._latch:
                    self._resets_owed.pop(identity, None)
            elif not client.lost:
                logger.warning("the cache was not reset: %s", reply)
            replied.set(reply)

        client.request_nowait(Reset(client.new_id(), identity), on_reply)
        return replied

    def _on_lost(self) -> None:
        with self._latch:
            self._told = None
            for request in self._requests.values():
                if request.machine.state in (LookupState.PENDING, LookupState.ANSWERED):
                    request.machine.release()
                if request.pending is not None:
                    self._settle(request.pending)
