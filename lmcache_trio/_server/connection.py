"""One client's connection: its reader, which carries out requests, and its writer, which sends the outbox.

The reader answers inline and without a task. While the outbox has frames that the client has not read, the reader reads
nothing more: the backpressure meets that client alone. A message that no client may send ends this one connection,
after a last word.

The loop is shared by time, not by count. A client's turn takes `TURN`. A client that takes more than `SHARE` of the
loop uses the *lane*, in which one client has one turn per pass of the loop. A client that asks little skips the lane,
even if that is busy. Lost clients are taken apart one after the other, each in pieces of `TURN`.
"""

import logging
import os

import trio

from lmcache_trio._server.handlers import HANDLERS
from lmcache_trio._server.parts import Parts
from lmcache_trio._server.peer import Peer
from lmcache_trio._server.tasks import Branch
from lmcache_trio._transport import Connection, PairListener
from lmcache_trio._wire.codec import ECHO, decode, peek_id
from lmcache_trio._wire.messages import ErrorReply, Message, Register, Role
from lmcache_trio._wire.protocol import FROM_CLIENT, TAKE_UP, kind_of, speakers
from lmcache_trio.config.addresses import socket_path
from lmcache_trio.errors import Gone, LMCacheTrioError, Misuse, ProtocolError, Unavailable

__all__ = ["serve_peer"]

log = logging.getLogger("lmcache_trio.server")

LAST_WORD = 0.2
"""Seconds that a client has to read the last word before its connection ends."""
TURN = 0.0005
"""Seconds of a client's turn: some 30 lookups of one chunk, or one Statistics. One message may take longer."""
SHARE = 0.01
"""Share of the loop's time that a client may take outside the lane. A hundred such clients would fill the loop."""
_NAMES = {Role.OBSERVER: "an observer", Role.SCHEDULER: "a scheduler", Role.WORKER: "a worker"}


async def serve_peer(parts: Parts, peer: Peer, listener: PairListener, branch: Branch) -> None:
    """Wait for *peer* to take up its address, and serve it until either side ends it. Then end all that it owned."""
    path = socket_path(listener.address)
    try:
        with peer.scope:
            try:
                if path is not None:
                    parts.sockets.add(str(path))
                peer.transport = await listener.accept(trio.current_time() + TAKE_UP)
            except (Unavailable, Gone) as exc:
                parts.counts.events["withdrawn"] += 1
                log.warning("the connection of %s was withdrawn: %s", peer, exc)
                await _leave(parts, peer)
                return
            finally:
                parts.sockets.discard(str(path))
            if not _is_the_same(peer, peer.transport):
                parts.counts.events["refused"] += 1
                log.warning("a process other than the one that said HELLO took up the connection of %s: ended", peer)
                return
            async with branch() as start:
                peer.start = start
                start(_write, peer, peer.transport)
                await _read_guarded(parts, peer, peer.transport)
                await _leave(parts, peer)
    finally:
        if peer.deaf:
            parts.counts.over_limit(peer, "pushes", f"{len(peer.outbox)} messages that it does not read, and is ended")
        listener.close()
        if peer.transport is not None:
            peer.transport.close()
        parts.peers.dismiss(peer)


async def _leave(parts: Parts, peer: Peer) -> None:
    """End *peer*, and all that it owned in pieces. Other clients have their turns between the pieces."""
    async with parts.turns.leaving:
        if peer.transport is not None:
            peer.transport.close()
        while parts.peers.end_some(peer, trio.current_time() + TURN):
            await trio.lowlevel.checkpoint()
        parts.peers.dismiss(peer)


def _is_the_same(peer: Peer, transport: Connection) -> bool:
    """Whether the process at the other end said HELLO, and lives. Its pidfd is the peer's from now on."""
    pidfd = transport.open_pidfd()
    same = peer.is_process(transport.peer_pid, pidfd) and not peer.has_exited()
    if peer.pidfd is not None:  # if the kernel cannot tell the two apart, the one behind this connection copies
        os.close(peer.pidfd)
    peer.pidfd = pidfd
    return same


async def _read_guarded(parts: Parts, peer: Peer, transport: Connection) -> None:
    transport.unfinished = parts.turns.unfinished
    try:
        await _read(parts, peer, transport)
    except Gone:
        if transport.fault:
            parts.counts.events["protocol_errors"] += 1
            log.warning("ended the connection of %s: %s", peer, transport.fault)
    except ProtocolError as exc:
        parts.counts.events["protocol_errors"] += 1
        log.warning("ending the connection of %s: %s", peer, exc)
        with trio.move_on_after(LAST_WORD):
            await transport.wait_closed()
    except LMCacheTrioError as exc:
        log.warning("the connection of %s ended: %s", peer, exc)
    except Exception:  # a bug of ours: it costs this one connection, and is logged
        parts.counts.events["connection_bugs"] += 1
        log.exception("bug in the connection of %s, which is ended", peer)


async def _read(parts: Parts, peer: Peer, transport: Connection) -> None:
    owed, since = 0.0, trio.current_time()  # seconds of the loop that it took beyond its share, at that time
    while True:
        frame = await transport.receive()
        asks_little = owed - SHARE * (trio.current_time() - since) <= TURN
        alone_in_lane = parts.turns.last_in_lane is peer and not parts.turns.lane.locked()
        if asks_little or alone_in_lane:
            took = _have_turn(parts, peer, transport, frame)
        else:
            async with parts.turns.lane:
                parts.turns.last_in_lane = peer
                took = _have_turn(parts, peer, transport, frame)
        now = trio.current_time()
        owed, since = max(0.0, owed - SHARE * (now - since)) + took, now
        while peer.outbox:
            await peer.drained.wait()


def _have_turn(parts: Parts, peer: Peer, transport: Connection, frame: bytes) -> float:
    """Carry out *frame* and the frames behind it, until the turn is over. Returns the seconds that the turn took."""
    began = trio.current_time()
    while True:
        _carry_out(parts, peer, frame)
        if parts.index.changes.pending:
            parts.watches.tell()
        took = trio.current_time() - began
        if peer.outbox or took > TURN:
            return took
        try:
            frame = transport.receive_nowait()
        except trio.WouldBlock:
            return took


def _carry_out(parts: Parts, peer: Peer, frame: bytes) -> None:
    if frame[:1] == ECHO:
        peer.send(frame)
        return
    try:
        reply = _reply_to(parts, peer, decode(frame))
    except ProtocolError as exc:
        last_word = _error_reply(peek_id(frame), exc)
        if last_word is not None:
            peer.send(last_word)
        raise
    if reply is not None:
        peer.send(reply)


def _reply_to(parts: Parts, peer: Peer, message: Message) -> Message | None:
    """Carry out *message* and return the reply; `ProtocolError` when no client may send it.

    An error of `lmcache_trio.errors` becomes an ErrorReply of its kind. Any other exception is a bug in one handler: it
    is logged, counted and answered, and the connection goes on.
    """
    kind = type(message)
    if kind not in FROM_CLIENT[peer.hello.role]:
        return _out_of_place(peer, message)
    try:
        return HANDLERS[kind](parts, peer, message)
    except ProtocolError:
        raise
    except LMCacheTrioError as exc:
        if kind is Register:
            log.warning("%s cannot be cached: %s", peer, exc)
        return _error_reply(message, exc)
    except Exception as exc:  # a bug of ours: contained here, and answered
        parts.counts.events["handler_bugs"] += 1
        log.exception("bug in the handler of %s for %s", kind.__name__, peer)
        return _error_reply(message, Unavailable(f"internal error of the server: {exc!r}; see its log"))


def _out_of_place(peer: Peer, message: Message) -> Message | None:
    """A message for another role fails the request; a message that no client may send ends the connection."""
    kind = type(message)
    roles = speakers(kind)
    if not roles:
        raise ProtocolError(f"{kind.__name__} is not for a client to say here")
    names = " or ".join(_NAMES[role] for role in roles)
    return _error_reply(message, Misuse(f"{kind.__name__} is for {names} to say, not for {peer}"))


def _error_reply(message: Message | int, error: LMCacheTrioError) -> ErrorReply | None:
    """The reply that tells of *error*. None: a notice gets no reply, and its error is only logged."""
    number = message if isinstance(message, int) else getattr(message, "id", None)
    if number is None:
        log.debug("notice %s: %s", type(message).__name__, error)
        return None
    return ErrorReply(number, kind_of(error), str(error)[:4000])


async def _write(peer: Peer, transport: Connection) -> None:
    """Send the outbox, in order, as the transport takes it."""
    while True:
        await peer.queued.wait()
        try:
            while peer.outbox:
                await transport.send(peer.outbox[0])
                if peer.outbox:  # if the client was lost, the outbox is empty now
                    peer.outbox.popleft()
        except Gone:
            peer.outbox.clear()  # the reader notices it too, and ends the connection
        peer.queued = trio.Event()
        peer.drained.set()
        peer.drained = trio.Event()
