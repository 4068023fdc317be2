"""One client's connection: its reader, which carries out requests, and its writer, which sends what had to wait.

The reader answers inline and without a task. When the client does not read its replies, the reader reads nothing more
until it does: the backpressure meets that client alone. What is out of place ends this one connection, after a last
word.

The loop is shared by time, not by count. A client's turn takes `TURN`; one that takes more than `SHARE` of the loop
goes through the *lane*, where one client at a time has its turn, one in a pass of the loop. A client that asks little
passes by the lane, however many ask much. Clients that leave do so one after the other, each in pieces of `TURN`.
"""

import logging
import os

import trio

from lmcache_trio._server.address import socket_path
from lmcache_trio._server.handlers import error_reply, handle
from lmcache_trio._server.rendezvous import dismiss
from lmcache_trio._server.state import Client, LostWriter, State
from lmcache_trio._server.tasks import Branch
from lmcache_trio._transport import Connection, PairListener
from lmcache_trio._wire.codec import ECHO, decode, peek_id
from lmcache_trio.errors import Gone, LMCacheTrioError, ProtocolError, Unavailable

__all__ = ["TAKE_UP", "serve_client", "wait_exit"]

log = logging.getLogger("lmcache_trio.server")

TAKE_UP = 5.0
"""Seconds that a WELCOME stands."""
LAST_WORD = 0.2
"""Seconds that a client whose connection is being ended has to read why."""
TURN = 0.0005
"""Seconds in which messages of one client are carried out in a row: some 30 lookups of one chunk, or one statistics."""
SHARE = 0.01
"""Of the loop's time, what a client takes without going through the lane; a hundred such clients would fill it."""


async def serve_client(state: State, client: Client, listener: PairListener, branch: Branch) -> None:
    """Wait for *client* to take up its address, then serve it until either side ends it, and all that it owned."""
    path = socket_path(listener.address)
    try:
        with client.scope:
            try:
                state.sockets.add(str(path))
                client.transport = await listener.accept(trio.current_time() + TAKE_UP)
            except (Unavailable, Gone) as exc:
                state.counted["withdrawn"] += 1
                log.warning("the connection of %s was withdrawn: %s", client, exc)
                await _leave(state, client)
                return
            finally:
                state.sockets.discard(str(path))
            if not _is_the_same(client, client.transport):
                state.counted["refused"] += 1
                log.warning("a process other than the one that said HELLO took up the connection of %s: ended", client)
                return
            async with branch() as start:
                client.start = start
                start(_write, client, client.transport)
                await _read_guarded(state, client, client.transport)
                await _leave(state, client)
    finally:
        if client.deaf:
            state.over_limit(client, "pushes", f"{len(client.outbox)} messages that it does not read, and is ended")
        listener.close()
        if client.transport is not None:
            client.transport.close()
        dismiss(state, client)


async def _leave(state: State, client: Client) -> None:
    """End *client*, and what it owned in pieces: others have their turns between them."""
    async with state.leaving:
        if client.transport is not None:
            client.transport.close()
        while state.end_some(client, trio.current_time() + TURN):
            await trio.lowlevel.checkpoint()
        dismiss(state, client)


def _is_the_same(client: Client, transport: Connection) -> bool:
    """Whether the process at the other end is the one that said HELLO, and lives. It is watched from now on."""
    pidfd = transport.open_pidfd()
    same = client.is_process(transport.peer_pid, pidfd) and not client.has_exited()
    if client.pidfd is not None:  # where it cannot be told apart, the one that copies is the one at this end
        os.close(client.pidfd)
    client.pidfd = pidfd
    return same


async def _read_guarded(state: State, client: Client, transport: Connection) -> None:
    transport.unfinished = state.unfinished
    try:
        await _read(state, client, transport)
    except Gone:
        if transport.fault:
            state.counted["protocol_errors"] += 1
            log.warning("ended the connection of %s: %s", client, transport.fault)
    except ProtocolError as exc:
        state.counted["protocol_errors"] += 1
        log.warning("ending the connection of %s: %s", client, exc)
        with trio.move_on_after(LAST_WORD):
            await transport.wait_closed()
    except LMCacheTrioError as exc:
        log.warning("the connection of %s ended: %s", client, exc)
    except Exception:  # a bug of ours: it costs this one connection, and is told
        state.counted["connection_bugs"] += 1
        log.exception("bug in the connection of %s, which is ended", client)


async def _read(state: State, client: Client, transport: Connection) -> None:
    owed, since = 0.0, trio.current_time()  # seconds of the loop beyond its share, and at what time
    while True:
        frame = await transport.receive()
        asks_little = owed - SHARE * (trio.current_time() - since) <= TURN
        alone_in_lane = state.last_in_lane is client and not state.lane.locked()
        if asks_little or alone_in_lane:
            took = _have_turn(state, client, transport, frame)
        else:
            async with state.lane:
                state.last_in_lane = client
                took = _have_turn(state, client, transport, frame)
        now = trio.current_time()
        owed, since = max(0.0, owed - SHARE * (now - since)) + took, now
        while client.outbox:
            await client.drained.wait()


def _have_turn(state: State, client: Client, transport: Connection, frame: bytes) -> float:
    """Carry out *frame* and what is there behind it, until the turn is over. Returns the seconds that it took."""
    began = trio.current_time()
    while True:
        _carry_out(state, client, frame)
        took = trio.current_time() - began
        if client.outbox or took > TURN:
            return took
        try:
            frame = transport.receive_nowait()
        except trio.WouldBlock:
            return took


def _carry_out(state: State, client: Client, frame: bytes) -> None:
    if frame[:1] == ECHO:
        client.send_frame(frame)
        return
    try:
        reply = handle(state, client, decode(frame))
    except ProtocolError as exc:
        last_word = error_reply(peek_id(frame), exc)
        if last_word is not None:
            client.send(last_word)
        raise
    if reply is not None:
        client.send(reply)


async def _write(client: Client, transport: Connection) -> None:
    """Send what was queued, in order, as the transport takes it."""
    while True:
        await client.queued.wait()
        try:
            while client.outbox:
                await transport.send(client.outbox[0])
                if client.outbox:  # it was emptied meanwhile if the client was lost
                    client.outbox.popleft()
        except Gone:
            client.outbox.clear()  # the reader is told as well, and ends the connection
        client.queued = trio.Event()
        client.drained.set()
        client.drained = trio.Event()


async def wait_exit(state: State, writer: LostWriter) -> None:
    """Wait until the process of *writer* has exited, or its client spoke up: then its slots leave quarantine."""
    try:
        with writer.scope:
            await trio.lowlevel.wait_readable(writer.pidfd)
            state.counted["exits_seen"] += 1
            state.copies_ended(writer)
    finally:
        trio.lowlevel.notify_closing(writer.pidfd)
        os.close(writer.pidfd)
