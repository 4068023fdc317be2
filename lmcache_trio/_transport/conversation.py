"""One client's conversation over a connection: the replies that are due, their waiters, and the frames to be sent.

    request --id--> due --reply of its kind or ErrorReply, same id--> answered      (once, in any order)

Any thread may ask: that thread encodes and sends, and one task in the loop reads and hands each reply to its waiter.
Order is kept, also when the socket has no room. A lost connection is over: every waiter is told at once, and nothing is
sent or waited for any more. A message that is neither due nor a push is the server's fault. It ends the connection, and
nothing else that the server says is believed. `client` knows what the messages mean.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import trio

from lmcache_trio._transport import Connection
from lmcache_trio._wire.codec import ECHO, decode, encode
from lmcache_trio._wire.messages import Answer, ErrorReply, Message
from lmcache_trio._wire.protocol import PUSHES, REPLIES, error_of
from lmcache_trio.errors import Gone, LMCacheTrioError, ProtocolError, Unavailable
from lmcache_trio.threads import Lock

__all__ = ["Conversation", "Reply", "expect"]

log = logging.getLogger("lmcache_trio")
_M = TypeVar("_M", bound=Message)
Reply = Message | LMCacheTrioError
_OUTBOX = 1024
"""Messages that may wait for a server that does not read. Beyond it requests are refused; notices never are."""


def expect(reply: Reply, kind: type[_M]) -> _M:
    """*reply*, which is raised if it is an error. Its *kind* was checked when it came."""
    if isinstance(reply, LMCacheTrioError):
        raise reply
    return cast(_M, reply)


def _nobody(reply: Reply) -> None:
    """The waiter of a reply that is not wanted, or not wanted any more."""


class Conversation:
    """Made in the loop. Its maker must run `read` and `write` in a nursery of its own."""

    def __init__(self, connection: Connection) -> None:
        self.heard = 0
        """Messages that came so far. While it stands still, the server is silent."""
        self.new_id: Callable[[], int] = itertools.count(1).__next__
        """Returns an id for the next request: never 0, and never the same twice."""
        self.on_echo: Callable[[bytes], None] = lambda frame: None
        """Called in the Trio thread with each frame that came back to `echo_nowait`."""
        self._connection = connection
        self._lost: Unavailable | None = None
        self._due: dict[int, type[Message]] = {}  # by request, from its sending to its reply: also if nobody waits
        self._waiters: dict[int, Callable[[Reply], None]] = {}
        self._answers: dict[int, Callable[[Reply], None]] = {}
        self._lock = Lock()
        self._outbox: deque[bytes] = deque()
        self._outbox_filled = trio.Event()
        self._loop = trio.lowlevel.current_trio_token()

    @property
    def lost(self) -> bool:
        """Is the connection over? All waiters were told before."""
        return self._lost is not None

    @property
    def peer_pid(self) -> int | None:
        """The process at the other end; None where it can't be seen."""
        return self._connection.peer_pid

    def open_pidfd(self) -> int | None:
        """A descriptor of the process at the other end, the caller's to close; None where the kernel gives none."""
        return self._connection.open_pidfd()

    def request_nowait(self, message: Any, on_reply: Callable[[Reply], None]) -> None:
        """Send a request whose id came from `new_id`. *on_reply* gets the reply or error, in the Trio thread, once.

        `Unavailable` when the server is gone or does not read: *on_reply* is then never called.
        """
        if self._lost is None:
            self._due[message.id] = REPLIES[type(message)]
            self._waiters[message.id] = on_reply
            try:
                self._post(encode(message), refusable=True)
            except BaseException:
                self._due.pop(message.id, None)
                self._waiters.pop(message.id, None)
                raise
            if self._lost is None or self._waiters.pop(message.id, None) is None:
                return  # sent; or lost meanwhile, and on_reply was told
        raise Unavailable("the connection to the server is lost")

    def notice_nowait(self, message: Message) -> None:
        """Send a notice. Nothing is raised if the server is gone: it has forgotten the subject of the notice."""
        try:
            self._post(encode(message), refusable=False)
        except Unavailable:
            return

    def echo_nowait(self, payload: bytes) -> None:
        """Have the server send *payload* back, undecoded, in order with the rest: to `on_echo`. `Unavailable`: gone."""
        self._post(ECHO + payload, refusable=True)

    def forget(self, request: int) -> None:
        """Drop the reply to *request*, when it comes."""
        self._waiters.pop(request, None)
        self._answers.pop(request, None)

    # --- for the loop -----------------------------------------------------------------------------------------------

    def said(self, message: Message) -> None:
        """The server sent the push *message*. A subclass takes it from here."""

    async def request(
        self,
        message: Any,
        kind: type[_M],
        unwanted: Callable[[_M], None] | None = None,
        *,
        descriptors: Sequence[int] = (),
    ) -> _M:
        """Send and wait for the reply, a *kind*. If the wait is cancelled, *unwanted* gets a reply that still comes.

        A request that brings *descriptors* is sent before the messages that wait in the outbox.
        """
        come = trio.Event()
        found: list[Reply] = []

        def on_reply(reply: Reply) -> None:
            found.append(reply)
            come.set()

        def on_late_reply(reply: Reply) -> None:
            if unwanted is not None and not isinstance(reply, LMCacheTrioError):
                unwanted(cast(_M, reply))

        if not descriptors:
            self.request_nowait(message, on_reply)
        try:
            if descriptors:
                await self._request_with(message, on_reply, descriptors)
            await come.wait()
        except BaseException:
            if found:
                on_late_reply(found[0])
            elif message.id in self._waiters:
                self._waiters[message.id] = on_late_reply
            raise
        return expect(found[0], kind)

    async def _request_with(self, message: Any, on_reply: Callable[[Reply], None], descriptors: Sequence[int]) -> None:
        """`request_nowait`, with *descriptors*. A cancelled one was not sent."""
        if self._lost is not None:
            raise Unavailable("the connection to the server is lost")
        self._due[message.id] = REPLIES[type(message)]
        self._waiters[message.id] = on_reply
        try:
            await self._connection.send(encode(message), descriptors)
        except BaseException as exc:
            self._due.pop(message.id, None)
            self._waiters.pop(message.id, None)
            if isinstance(exc, Gone):
                raise Unavailable("the connection to the server is lost") from exc
            raise

    def request_unheard(self, message: Any) -> None:
        """Send a request whose reply is not wanted. Nothing is raised if the server is gone."""
        self._due[message.id] = REPLIES[type(message)]
        try:
            self._post(encode(message), refusable=False)
        except Unavailable:
            self._due.pop(message.id, None)

    async def read(self) -> None:
        """Hand out the messages that come, until the connection is lost."""
        cause: BaseException | None = None
        try:
            while True:
                frame = await self._connection.receive()
                if frame[:1] == ECHO:
                    self.heard += 1
                    self.on_echo(frame)
                else:
                    self._handle(decode(frame))
        except Gone as exc:
            cause = exc
        except ProtocolError as exc:  # there may be no waiter to tell
            log.warning("ending the connection: %s", exc)
            cause = exc
            self._connection.close()
        finally:
            self._lose(cause)

    async def write(self) -> None:
        """Send the messages that the socket had no room for."""
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled = trio.Event()
            while self._outbox:
                try:
                    await self._connection.send(self._outbox[0])
                except Gone:
                    return
                with self._lock:
                    self._outbox.popleft()

    def _post(self, frame: bytes, *, refusable: bool) -> None:
        """Send *frame* behind all that were sent before. It waits in the outbox if the socket has no room."""
        with self._lock:
            if self._lost is not None:
                raise Unavailable("the connection to the server is lost")
            if not self._outbox:
                try:
                    self._connection.send_nowait(frame)
                    return
                except trio.WouldBlock:
                    pass
                except Gone as exc:
                    raise Unavailable("the connection to the server is lost") from exc
            elif refusable and len(self._outbox) >= _OUTBOX:
                raise Unavailable("the server does not read what it is sent")
            self._outbox.append(frame)
        try:
            self._loop.run_sync_soon(self._outbox_filled.set)
        except trio.RunFinishedError as exc:
            raise Unavailable("the client's loop has ended") from exc

    def _handle(self, message: Message) -> None:
        self.heard += 1
        kind = type(message)
        request = getattr(message, "id", 0)
        if request:
            due = self._due.pop(request, None)
            waiter = self._waiters.pop(request, _nobody)
            if kind is due:
                waiter(message)
            elif due is None:
                raise ProtocolError(f"the server replied {kind.__name__} to request {request}: no reply to it is due")
            elif isinstance(message, ErrorReply):
                waiter(error_of(message.kind, message.message))
            else:
                fault = f"the server replied {kind.__name__} where {due.__name__} was due"
                waiter(ProtocolError(fault))
                raise ProtocolError(fault)
            return
        if kind not in PUSHES:
            raise ProtocolError(f"the server said {kind.__name__} unasked")
        if isinstance(message, ErrorReply):
            raise ProtocolError(f"the server could not read what it was sent: {message.message}")
        if isinstance(message, Answer):
            answered = self._answers.pop(message.asked, None)
            if answered is not None:
                answered(message)
                return
        self.said(message)

    def _lose(self, cause: BaseException | None) -> None:
        with self._lock:
            self._lost = Unavailable("the connection to the server is lost")
            self._outbox.clear()
        self._due.clear()
        for waiters in (self._waiters, self._answers):
            while waiters:
                _, waiter = waiters.popitem()
                error = Unavailable(
                    f"the connection to the server is lost: {cause}" if cause else "the client was closed"
                )
                error.__cause__ = cause
                waiter(error)
