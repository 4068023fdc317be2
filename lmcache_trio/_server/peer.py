"""A peer: the server's end of one client, from its HELLO to the end of its connection."""

import os
import select
from collections import deque
from collections.abc import Awaitable, Callable

import attrs
import trio

from lmcache_trio._server.tasks import Starter
from lmcache_trio._transport import Connection
from lmcache_trio._wire.codec import encode
from lmcache_trio._wire.messages import Hello, Message, Role
from lmcache_trio.errors import Gone, Unavailable

__all__ = ["LostWriter", "Peer"]


def _not_connected(fn: Callable[..., Awaitable[object]], *args: object, name: object = None) -> None:
    raise Unavailable("the client has not taken up its connection")


@attrs.define(eq=False)
class Peer:
    """One connection, from its HELLO on. `number` is its name in the index, and is never used again."""

    number: int
    hello: Hello
    peer_pid: int | None
    pidfd: int | None  # owned; None: the client's process cannot be watched, so it gets no arena
    is_owner: bool  # a process of the server's uid, or of root: it may steer the server
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    transport: Connection | None = None  # None until the client has taken up its address
    copies: set[bytes] = attrs.field(factory=set)  # reservations whose copy has not ended, to the server's knowledge
    pins: dict[bytes, int] = attrs.field(factory=dict)  # by id: how many chunks each reads
    outbox: deque[bytes] = attrs.field(factory=deque)  # frames that wait for room in the transport, in order
    queued: trio.Event = attrs.field(factory=trio.Event)
    drained: trio.Event = attrs.field(factory=trio.Event)
    most_unread: int = 1
    deaf: bool = False  # its connection is ended because it did not read
    resets: int = 0  # resets that have no reply yet
    is_clearing: bool = False  # its Clear has no reply yet
    limits_met: set[str] = attrs.field(factory=set)
    lost: bool = False
    start: Starter = _not_connected  # starts a task that ends with the connection

    def __str__(self) -> str:
        what = f"shard {self.hello.shard} of {self.hello.shards}" if self.hello.role is Role.WORKER else "scheduler"
        if self.hello.replicas > 1 and self.hello.role is Role.WORKER:
            what = f"replica {self.hello.replica} of {what}"
        where = f" of engine {self.hello.engine!r} ({what})" if self.hello.engine else ""
        return f"client {self.hello.client!r}{where}"

    def send(self, message: Message | bytes) -> None:
        """Send *message*, or a frame, now; or put it into the outbox, for the writer to send when there is room."""
        if self.lost:
            return
        frame = message if isinstance(message, bytes) else encode(message)
        if self.transport is not None and not self.outbox:
            try:
                return self.transport.send_nowait(frame)
            except trio.WouldBlock:
                pass
            except Gone:
                return  # its reader notices it too
        if len(self.outbox) >= self.most_unread:
            self.deaf = True
            self.scope.cancel()
            return
        self.outbox.append(frame)
        self.queued.set()

    def is_process(self, pid: int | None, pidfd: int | None) -> bool:
        """Whether this client's process is the one of *pid* and *pidfd*, as far as the kernel can tell.

        Since Linux 6.9 the pidfds of each process have an inode of their own. Before, all pidfds share one.
        """
        if self.pidfd is not None and pidfd is not None and os.fstat(self.pidfd).st_ino != os.fstat(pidfd).st_ino:
            return False
        return self.peer_pid == pid

    def has_exited(self) -> bool:
        """Whether the process is known to be dead, though its connection may not have been seen to close yet."""
        if self.pidfd is None:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))


@attrs.define(eq=False)
class LostWriter:
    """A client that may still be copying after its connection was lost. Its slots wait for its word or for its exit."""

    number: int
    token: bytes
    pidfd: int
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
