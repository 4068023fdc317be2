"""One plain function a sentence: `(state, client, message) -> reply | None`, called inline by the connection's reader.

Nothing here waits. Who may say what is `_wire.protocol`'s to know. A request that fails raises an error of
`lmcache_trio.errors`, which becomes an ErrorReply of its kind; `ProtocolError` ends the connection too. Any other
exception is a bug in one handler: it is logged, counted and answered, and ends nothing else.
"""

import json
import logging
from collections.abc import Callable
from typing import Any

from lmcache_trio._core.keys import split_digests
from lmcache_trio._server.lookups import HANDLERS as SCHEDULER_HANDLERS
from lmcache_trio._server.lookups import answer_of, engine_of
from lmcache_trio._server.state import Client, State
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

__all__ = ["HANDLERS", "answer_of", "error_reply", "handle"]

log = logging.getLogger("lmcache_trio.server")


def handle(state: State, client: Client, message: Message) -> Message | None:
    """Carry out *message* and return the reply, an ErrorReply included; ProtocolError when it was out of place."""
    kind = type(message)
    if kind not in FROM_CLIENT[client.hello.role]:
        return _out_of_place(client, message)
    try:
        return HANDLERS[kind](state, client, message)
    except ProtocolError:
        raise
    except LMCacheTrioError as exc:
        if kind is Register:
            log.warning("%s cannot be cached: %s", client, exc)
        return error_reply(message, exc)
    except Exception as exc:  # a bug of ours: contained here, and told to everyone whom it may concern
        state.counted["handler_bugs"] += 1
        log.exception("bug in the handler of %s for %s", kind.__name__, client)
        return error_reply(message, Unavailable(f"internal error of the server: {exc!r}; see its log"))


def _out_of_place(client: Client, message: Message) -> Message | None:
    """What a client of another role may say costs its sender the request; what none may say, the connection."""
    kind = type(message)
    roles = speakers(kind)
    if not roles:
        raise ProtocolError(f"{kind.__name__} is not for a client to say here")
    names = " or ".join(_NAMES[role] for role in roles)
    return error_reply(message, Misuse(f"{kind.__name__} is for {names} to say, not for {client}"))


def error_reply(message: Message | int, error: LMCacheTrioError) -> ErrorReply | None:
    """What to say of *error*; None for a notice, which gets no reply (the error is logged)."""
    number = message if isinstance(message, int) else getattr(message, "id", None)
    if number is None:
        log.debug("notice %s: %s", type(message).__name__, error)
        return None
    return ErrorReply(number, kind_of(error), str(error)[:4000])


_NAMES = {Role.OBSERVER: "an observer", Role.SCHEDULER: "a scheduler", Role.WORKER: "a worker"}


def _ping(state: State, client: Client, message: Ping) -> Message:
    return Pong(message.id, state.boot)


def _statistics(state: State, client: Client, message: Statistics) -> Message:
    return StatisticsReply(message.id, json.dumps(statistics_of(state)).encode())


# --- a worker's -------------------------------------------------------------------------------------------------------


def _register(state: State, client: Client, message: Register) -> Message:
    engine = engine_of(state, client)
    if client.pidfd is None:
        raise Misuse(f"{client} got no arena, so it can neither store nor retrieve; the welcome's arena_note says why")
    chunk_tokens = state.config.chunk_tokens
    if chunk_tokens % message.block_tokens:
        raise Misuse(
            f"the server's chunk_tokens ({chunk_tokens}) is no multiple of the engine's block size "
            f"({message.block_tokens} tokens); set chunk_tokens to a multiple of {message.block_tokens}"
        )
    shard = client.hello.shard
    former = engine.layouts.pop(shard, None)
    if state.transfer is not None:
        state.transfer.lose(client)  # what it attached had the former layout
    engine.attaching.pop(shard, None)
    if message.attaching:
        engine.attaching[shard] = message
    else:
        engine.layouts[shard] = message
    try:
        state.settle_namespace(engine)
    except Misuse:
        del engine.layouts[shard]
        if former is not None:
            engine.layouts[shard] = former
        raise
    return state.namespace_known(engine, message.id)


def _retrieve(state: State, client: Client, message: Retrieve) -> Message:
    if client.pidfd is None:
        raise Misuse(f"{client} got no arena to read from")
    if state.stopping:
        raise Unavailable("the server is stopping")
    engine, limits = engine_of(state, client), state.config.limits
    if len(client.pins) >= limits.pins:
        raise state.over_limit(client, "pins", f"{limits.pins} reads under way and asks for one more")
    if sum(client.pins.values()) + message.count > limits.digests:
        raise state.over_limit(client, "digests", f"reads of {sum(client.pins.values())} chunks under way")
    shard = client.hello.shard
    pin = state.index.pin(
        message.lease, engine.name, engine.namespace, client.number, shard, message.start, message.count
    )
    client.pins[pin.id] = message.count
    return Pinned(message.id, pin.id, pack_offsets(pin.offsets), pin.slot_bytes)


def _done(state: State, client: Client, message: Done) -> Message:
    valid = state.index.unpin(message.pin, client.number)
    client.pins.pop(message.pin, None)
    state.note_progress()
    return Finished(message.id, valid)


def _reserve(state: State, client: Client, message: Reserve) -> Message:
    engine = engine_of(state, client)
    digests = split_digests(message.digests)
    made = state.reserve(client, engine, client.number, message.session, message.parent, digests)
    if not made.id:
        return Reserved(message.id, b"", b"", b"", dict(made.dropped))
    client.copies.add(made.id)
    positions = pack_positions([slot.position for slot in made.slots])
    offsets = pack_offsets([slot.offset for slot in made.slots])
    slot_bytes = state.index.shard_bytes(engine.namespace)[client.hello.shard]
    return Reserved(message.id, made.id, positions, offsets, dict(made.dropped), slot_bytes)


def _commit(state: State, client: Client, message: Commit) -> Message:
    ours = message.reservation in client.copies
    client.copies.discard(message.reservation)  # whatever the index says of it: the copy has ended
    kept = state.index.would_keep(message.reservation)
    try:
        keys = state.index.commit(message.reservation, client.number)
        published = len(keys)
        state.tiers.stored(keys)
    except Gone:
        if not ours:
            raise
        published = 0  # given to this client and aborted meanwhile: refused, as it had to expect
    finally:
        state.note_progress()
    return Committed(message.id, published, kept)


def _abort(state: State, client: Client, message: Abort) -> Message:
    client.copies.discard(message.reservation)
    state.index.abort(message.reservation, client.number)
    state.note_progress()
    return Ack(message.id)


def _copies_ended(state: State, client: Client, message: CopiesEnded) -> Message:
    if message.token != client.hello.token:
        raise Misuse("CopiesEnded speaks for another client: it must carry this client's own token")
    for writer in [w for w in state.lost_writers if w.token == message.token]:
        state.copies_ended(writer)
    return Ack(message.id)


HANDLERS: dict[type[Message], Callable[[State, Client, Any], Message | None]] = {
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
