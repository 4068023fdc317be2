"""One plain function per sentence: `(parts, peer, message) -> reply | None`, called inline by the peer's reader.

Nothing here waits. `_wire.protocol` decides which role may say what. A request that fails raises an error of
`lmcache_trio.errors`, which becomes an ErrorReply of its kind; `ProtocolError` ends the connection too. Any other
exception is a bug in one handler: it is logged, counted and answered, and ends nothing else.
"""

import json
import logging
from collections.abc import Callable
from typing import Any

from lmcache_trio._core.keys import split_digests
from lmcache_trio._server.lookups import HANDLERS as SCHEDULER_HANDLERS
from lmcache_trio._server.parts import Parts
from lmcache_trio._server.peer import Peer
from lmcache_trio._server.statistics import statistics_of
from lmcache_trio._server.transfer_requests import HANDLERS as TRANSFER_HANDLERS
from lmcache_trio._wire.codec import pack_offsets, pack_positions
from lmcache_trio._wire.messages import (
    Abort,
    Ack,
    Commit,
    Committed,
    CopiesEnded,
    Done,
    ErrorReply,
    Finished,
    Message,
    Ping,
    Pinned,
    Pong,
    Register,
    Reserve,
    Reserved,
    Retrieve,
    Role,
    Statistics,
    StatisticsReply,
)
from lmcache_trio._wire.protocol import FROM_CLIENT, kind_of, speakers
from lmcache_trio.errors import Gone, LMCacheTrioError, Misuse, ProtocolError, Unavailable

__all__ = ["HANDLERS", "error_reply", "handle"]

log = logging.getLogger("lmcache_trio.server")


def handle(parts: Parts, peer: Peer, message: Message) -> Message | None:
    """Carry out *message* and return the reply, an ErrorReply included; ProtocolError when it was out of place."""
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
        return error_reply(message, exc)
    except Exception as exc:  # a bug of ours: contained here, logged, and told to the sender
        parts.counts.events["handler_bugs"] += 1
        log.exception("bug in the handler of %s for %s", kind.__name__, peer)
        return error_reply(message, Unavailable(f"internal error of the server: {exc!r}; see its log"))


def _out_of_place(peer: Peer, message: Message) -> Message | None:
    """A message for another role fails the request; a message that no client may send ends the connection."""
    kind = type(message)
    roles = speakers(kind)
    if not roles:
        raise ProtocolError(f"{kind.__name__} is not for a client to say here")
    names = " or ".join(_NAMES[role] for role in roles)
    return error_reply(message, Misuse(f"{kind.__name__} is for {names} to say, not for {peer}"))


def error_reply(message: Message | int, error: LMCacheTrioError) -> ErrorReply | None:
    """The reply that tells of *error*; None for a notice, which gets no reply (the error is logged)."""
    number = message if isinstance(message, int) else getattr(message, "id", None)
    if number is None:
        log.debug("notice %s: %s", type(message).__name__, error)
        return None
    return ErrorReply(number, kind_of(error), str(error)[:4000])


_NAMES = {Role.OBSERVER: "an observer", Role.SCHEDULER: "a scheduler", Role.WORKER: "a worker"}


def _ping(parts: Parts, peer: Peer, message: Ping) -> Message:
    return Pong(message.id, parts.boot)


def _statistics(parts: Parts, peer: Peer, message: Statistics) -> Message:
    return StatisticsReply(message.id, json.dumps(statistics_of(parts).table()).encode())


# --- a worker's -------------------------------------------------------------------------------------------------------


def _register(parts: Parts, peer: Peer, message: Register) -> Message:
    engine = parts.engines.of(peer)
    if peer.pidfd is None:
        raise Misuse(f"{peer} got no arena, so it can neither store nor retrieve; the welcome's arena_note says why")
    chunk_tokens = parts.config.chunk_tokens
    if chunk_tokens % message.block_tokens:
        raise Misuse(
            f"the server's chunk_tokens ({chunk_tokens}) is no multiple of the engine's block size "
            f"({message.block_tokens} tokens); set chunk_tokens to a multiple of {message.block_tokens}"
        )
    shard = peer.hello.shard
    former = engine.layouts.pop(shard, None)
    if parts.transfer is not None:
        parts.transfer.lose(peer)  # what it attached had the former layout
    engine.attaching.pop(shard, None)
    if message.attaching:
        engine.attaching[shard] = message
    else:
        engine.layouts[shard] = message
    try:
        parts.engines.settle_namespace(engine)
    except Misuse:
        del engine.layouts[shard]
        if former is not None:
            engine.layouts[shard] = former
        raise
    return parts.engines.namespace_known(engine, message.id)


def _retrieve(parts: Parts, peer: Peer, message: Retrieve) -> Message:
    if peer.pidfd is None:
        raise Misuse(f"{peer} got no arena to read from")
    if parts.drain.stopping:
        raise Unavailable("the server is stopping")
    engine, limits = parts.engines.of(peer), parts.config.limits
    if len(peer.pins) >= limits.pins:
        raise parts.counts.over_limit(peer, "pins", f"{limits.pins} reads under way and asks for one more")
    if sum(peer.pins.values()) + message.count > limits.digests:
        raise parts.counts.over_limit(peer, "digests", f"reads of {sum(peer.pins.values())} chunks under way")
    shard = peer.hello.shard
    pin = parts.index.pin(
        message.lease, engine.name, engine.namespace, peer.number, shard, message.start, message.count
    )
    peer.pins[pin.id] = message.count
    return Pinned(message.id, pin.id, pack_offsets(pin.offsets), pin.slot_bytes)


def _done(parts: Parts, peer: Peer, message: Done) -> Message:
    valid = parts.index.unpin(message.pin, peer.number)
    peer.pins.pop(message.pin, None)
    parts.drain.note_progress()
    return Finished(message.id, valid)


def _reserve(parts: Parts, peer: Peer, message: Reserve) -> Message:
    engine = parts.engines.of(peer)
    digests = split_digests(message.digests)
    made = parts.engines.reserve(peer, engine, peer.number, message.session, message.parent, digests)
    if not made.id:
        return Reserved(message.id, b"", b"", b"", dict(made.dropped))
    peer.copies.add(made.id)
    positions = pack_positions([slot.position for slot in made.slots])
    offsets = pack_offsets([slot.offset for slot in made.slots])
    slot_bytes = parts.index.shard_bytes(engine.namespace)[peer.hello.shard]
    return Reserved(message.id, made.id, positions, offsets, dict(made.dropped), slot_bytes)


def _commit(parts: Parts, peer: Peer, message: Commit) -> Message:
    ours = message.reservation in peer.copies
    peer.copies.discard(message.reservation)  # whatever the index says of it: the copy has ended
    kept = parts.index.would_keep(message.reservation)
    try:
        keys = parts.index.commit(message.reservation, peer.number)
        published = len(keys)
        parts.tiers.stored(keys)
    except Gone:
        if not ours:
            raise
        published = 0  # given to this client and aborted meanwhile: refused, as it had to expect
    finally:
        parts.drain.note_progress()
    return Committed(message.id, published, kept)


def _abort(parts: Parts, peer: Peer, message: Abort) -> Message:
    peer.copies.discard(message.reservation)
    parts.index.abort(message.reservation, peer.number)
    parts.drain.note_progress()
    return Ack(message.id)


def _copies_ended(parts: Parts, peer: Peer, message: CopiesEnded) -> Message:
    if message.token != peer.hello.token:
        raise Misuse("CopiesEnded speaks for another client: it must carry this client's own token")
    for writer in [w for w in parts.peers.lost_writers if w.token == message.token]:
        parts.peers.copies_ended(writer)
    return Ack(message.id)


HANDLERS: dict[type[Message], Callable[[Parts, Peer, Any], Message | None]] = {
    Ping: _ping,
    Statistics: _statistics,
    Register: _register,
    Retrieve: _retrieve,
    Done: _done,
    Reserve: _reserve,
    Commit: _commit,
    Abort: _abort,
    CopiesEnded: _copies_ended,
    **SCHEDULER_HANDLERS,
    **TRANSFER_HANDLERS,
}
"""One for each sentence of `protocol.FROM_CLIENT`, and for no other."""
