"""The handlers of what an operator asks beside figures: to clear layouts, and to log more or less.

Only a process of the server's own uid, or of root, may ask this. An engine of another uid, which `[access]` lets in,
can reset what is its own and nothing else.
"""

import logging
from collections.abc import Callable
from typing import Any

import trio

from lmcache_trio._log_handler import LEVELS
from lmcache_trio._server.parts import Parts
from lmcache_trio._server.peer import Peer
from lmcache_trio._wire.messages import Ack, Clear, Cleared, ErrorKind, ErrorReply, LogLevel, Message
from lmcache_trio.errors import Misuse

__all__ = ["HANDLERS"]

log = logging.getLogger("lmcache_trio.server")


def _check_owner(peer: Peer) -> None:
    if not peer.is_owner:
        raise Misuse(f"{peer} may not steer this server: run the command as the server's user or as root, at unix://")


def _log_level(parts: Parts, peer: Peer, message: LogLevel) -> Message:
    _check_owner(peer)
    if message.level not in LEVELS:
        raise Misuse(f"{message.level!r} is not a level; give one of {', '.join(LEVELS)}")
    logging.getLogger("lmcache_trio").setLevel(message.level.upper())
    log.warning("%s set the level of the log to %s", peer, message.level)
    return Ack(message.id)


def _clear(parts: Parts, peer: Peer, message: Clear) -> None:
    _check_owner(peer)
    if peer.is_clearing:
        raise Misuse(f"{peer} has a Clear without a reply: wait for it")
    peer.is_clearing = True
    peer.start(_clear_layouts, parts, peer, message)


async def _clear_layouts(parts: Parts, peer: Peer, message: Clear) -> None:
    """A task of the client. The tiers go first: what is queued for them is in use by the server."""
    layouts = parts.index.find_layouts(message.namespace, message.model)
    names = [name for groups in layouts.values() for name in groups]
    deletions = [deletion for name in names for deletion in parts.tiers.forget(name)]
    chunks = size = 0
    for name in names:
        extent = parts.index.chunk_bytes(name)
        for dropped in parts.index.clear(name):
            chunks, size = chunks + dropped, size + dropped * extent
            await trio.lowlevel.checkpoint()
    used = sum(parts.index.chunks_of(name) for name in names)
    with trio.move_on_after(parts.config.tier_timeout):
        for deletion in deletions:
            await deletion.known.wait()
    peer.is_clearing = False
    log.info("%s cleared %d chunks of %d layouts; %d chunks in use stayed", peer, chunks, len(layouts), used)
    if all(deletion.done for deletion in deletions):
        peer.send(Cleared(message.id, len(layouts), chunks, size, used))
        return
    failure = (
        f"{chunks} chunks are gone from memory, but a tier could not delete its own yet; it will before it is used "
        "again, unless the server ends first: clear again to be sure"
    )
    peer.send(ErrorReply(message.id, ErrorKind.UNAVAILABLE, failure))


HANDLERS: dict[type[Message], Callable[[Parts, Peer, Any], Message | None]] = {Clear: _clear, LogLevel: _log_level}
