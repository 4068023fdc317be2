"""One plain function per message: `(parts, peer, message) -> reply | None`. The peer's reader calls it inline.

No handler waits. A request that fails raises an error of `lmcache_trio.errors`, which `connection` answers.
"""

import json
import logging
from collections.abc import Callable
from typing import Any

from lmcache_trio._core.groups import EVERY, check_groups
from lmcache_trio._core.keys import check_chunk_tokens
from lmcache_trio._server.lookups import HANDLERS as SCHEDULER_HANDLERS
from lmcache_trio._server.operator_requests import HANDLERS as OPERATOR_HANDLERS
from lmcache_trio._server.parts import Parts
from lmcache_trio._server.peer import Peer
from lmcache_trio._server.report import inventory, report
from lmcache_trio._server.transfer_requests import HANDLERS as TRANSFER_HANDLERS
from lmcache_trio._wire.codec import OFFSETS, POSITIONS
from lmcache_trio._wire.messages import (
    Abort,
    Ack,
    Commit,
    Committed,
    CopiesEnded,
    Done,
    Explain,
    Explained,
    Finished,
    Inventory,
    InventoryReply,
    Message,
    Ping,
    Pinned,
    Pong,
    Register,
    Reserve,
    Reserved,
    Retrieve,
    Statistics,
    StatisticsReply,
)
from lmcache_trio.errors import Gone, Misuse, Unavailable

__all__ = ["HANDLERS"]

log = logging.getLogger("lmcache_trio.server")


def _ping(parts: Parts, peer: Peer, message: Ping) -> Message:
    return Pong(message.id, parts.boot)


def _statistics(parts: Parts, peer: Peer, message: Statistics) -> Message:
    return StatisticsReply(message.id, json.dumps(report(parts)).encode())


def _inventory(parts: Parts, peer: Peer, message: Inventory) -> Message:
    return InventoryReply(message.id, json.dumps(inventory(parts)).encode())


def _explain(parts: Parts, peer: Peer, message: Explain) -> Message:
    return Explained(message.id, json.dumps({"requests": parts.requests.find(message.name)}).encode())


# --- a worker's -------------------------------------------------------------------------------------------------------


def _register(parts: Parts, peer: Peer, message: Register) -> Message:
    engine = parts.engines.of(peer)
    if peer.pidfd is None:
        raise Misuse(f"{peer} got no arena, so it can neither store nor retrieve; the welcome's arena_note says why")
    check_chunk_tokens(engine.chunk_tokens, message.block_tokens)
    if engine.groups != (EVERY,):
        check_groups(engine.groups, message.block_tokens, engine.chunk_tokens)
    part_bytes = message.part_bytes or (message.shard_bytes,)
    if (len(part_bytes), sum(part_bytes)) != (len(engine.groups), message.shard_bytes):
        raise Misuse(
            f"part_bytes is {message.part_bytes}, and shard_bytes {message.shard_bytes}: give the bytes of a part in"
            f" each of the engine's {len(engine.groups)} KV groups, which are shard_bytes in all"
        )
    rank = peer.hello.rank
    former = engine.layouts.pop(rank, None)
    if parts.transfer is not None:
        parts.transfer.lose(peer)  # the memory that it attached had the former layout
    engine.attaching.pop(rank, None)
    if message.attaching:
        engine.attaching[rank] = message
    else:
        engine.layouts[rank] = message
    try:
        parts.engines.settle_namespace(engine)
    except Misuse:
        del engine.layouts[rank]
        if former is not None:
            engine.layouts[rank] = former
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
    namespace = engine.namespace_of_group(message.group)
    pin = parts.index.pin(message.lease, engine.name, namespace, peer.number, shard, message.start, message.count)
    peer.pins[pin.id] = message.count
    return Pinned(message.id, pin.id, OFFSETS.pack(pin.offsets), pin.slot_bytes)


def _done(parts: Parts, peer: Peer, message: Done) -> Message:
    valid = parts.index.unpin(message.pin, peer.number)
    peer.pins.pop(message.pin, None)
    parts.drain.progress.set()
    return Finished(message.id, valid)


def _reserve(parts: Parts, peer: Peer, message: Reserve) -> Message:
    engine = parts.engines.of(peer)
    made = parts.engines.reserve(peer, engine, peer.number, message)
    if not made.id:
        return Reserved(message.id, b"", b"", b"", dict(made.dropped))
    peer.copies.add(made.id)
    positions = POSITIONS.pack([slot.position for slot in made.slots])
    offsets = OFFSETS.pack([slot.offset for slot in made.slots])
    return Reserved(message.id, made.id, positions, offsets, dict(made.dropped), made.lengths[peer.hello.shard])


def _commit(parts: Parts, peer: Peer, message: Commit) -> Message:
    ours = message.reservation in peer.copies
    peer.copies.discard(message.reservation)  # the copy has ended, even if the index refuses the commit
    kept = parts.index.would_keep(message.reservation)
    try:
        keys = parts.index.commit(message.reservation, peer.number)
        published = len(keys)
        for writer in parts.tiers.writers:
            writer.offer(keys)
    except Gone:
        if not ours:
            raise
        published = 0  # the server aborted this client's reservation meanwhile, so a late commit is no error
    finally:
        parts.drain.progress.set()
    return Committed(message.id, published, kept)


def _abort(parts: Parts, peer: Peer, message: Abort) -> Message:
    peer.copies.discard(message.reservation)
    parts.index.abort(message.reservation, peer.number)
    parts.drain.progress.set()
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
    Inventory: _inventory,
    Explain: _explain,
    Register: _register,
    Retrieve: _retrieve,
    Done: _done,
    Reserve: _reserve,
    Commit: _commit,
    Abort: _abort,
    CopiesEnded: _copies_ended,
    **SCHEDULER_HANDLERS,
    **TRANSFER_HANDLERS,
    **OPERATOR_HANDLERS,
}
"""One handler for each message of `protocol.FROM_CLIENT`, and for no other."""
