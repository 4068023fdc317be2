"""One plain function a sentence: `(state, client, message) -> reply | None`, called inline by the connection's reader.

Nothing here waits. A request that fails raises an error of `lmcache_trio.errors`, which becomes an ErrorReply of its
kind; `ProtocolError` ends the connection too. Any other exception is a bug in one handler: it is logged, counted and
answered, and ends nothing else.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import trio

from lmcache_trio._core.keys import split_digests
from lmcache_trio._core.session import LookupState, Session
from lmcache_trio._server.state import Client, Engine, State
from lmcache_trio._server.statistics import statistics_of
from lmcache_trio._server.tier_writes import Deletion
from lmcache_trio._server.transfer_requests import HANDLERS as TRANSFER_HANDLERS
from lmcache_trio._wire.codec import pack_offsets, pack_positions
from lmcache_trio._wire.messages import (
    Abort,
    Ack,
    Answer,
    AnswerState,
    Commit,
    Committed,
    CopiesEnded,
    Done,
    Ended,
    ErrorKind,
    ErrorReply,
    Finished,
    Lookup,
    LookupStatus,
    Message,
    NamespaceKnown,
    Ping,
    Pinned,
    Pong,
    Register,
    Release,
    Reserve,
    Reserved,
    Reset,
    Retrieve,
    Role,
    Statistics,
    StatisticsReply,
    Taken,
)
from lmcache_trio.errors import Gone, LMCacheTrioError, Misuse, ProtocolError, Unavailable

__all__ = ["answer_now", "answer_of", "error_reply", "handle"]

log = logging.getLogger("lmcache_trio.server")

_STATES = {
    LookupState.UNKNOWN: AnswerState.UNKNOWN,
    LookupState.PENDING: AnswerState.PENDING,
    LookupState.ANSWERED: AnswerState.ANSWERED,
}


def handle(state: State, client: Client, message: Message) -> Message | None:
    """Carry out *message* and return the reply, an ErrorReply included; ProtocolError when it was out of place."""
    entry = _HANDLERS.get(type(message))
    if entry is None:
        raise ProtocolError(f"{type(message).__name__} is not for a client to say here")
    handler, roles = entry
    try:
        if client.hello.role not in roles:
            raise Misuse(
                f"{type(message).__name__} is for a {' or '.join(_NAMES[r] for r in roles)} to say, not for {client}"
            )
        return handler(state, client, message)
    except ProtocolError:
        raise
    except LMCacheTrioError as exc:
        return error_reply(message, exc)
    except Exception as exc:  # a bug of ours: contained here, and told to everyone whom it may concern
        state.counted["handler_bugs"] += 1
        log.exception("bug in the handler of %s for %s", type(message).__name__, client)
        return error_reply(message, Unavailable(f"internal error of the server: {exc!r}; see its log"))


def error_reply(message: Message | int, error: LMCacheTrioError) -> ErrorReply | None:
    """What to say of *error*; None for a notice, which gets no reply (the error is logged)."""
    kind = next((k for cls, k in _KINDS.items() if isinstance(error, cls)), ErrorKind.UNAVAILABLE)
    number = message if isinstance(message, int) else getattr(message, "id", None)
    if number is None:
        log.debug("notice %s: %s", type(message).__name__, error)
        return None
    return ErrorReply(number, kind, str(error)[:4000])


_KINDS: dict[type[LMCacheTrioError], ErrorKind] = {
    Gone: ErrorKind.GONE,
    Misuse: ErrorKind.MISUSE,
    ProtocolError: ErrorKind.PROTOCOL,
    Unavailable: ErrorKind.UNAVAILABLE,
}
_NAMES = {Role.OBSERVER: "observer", Role.SCHEDULER: "scheduler", Role.WORKER: "worker"}


def _engine(state: State, client: Client) -> Engine:
    engine = state.engine_of(client)
    if engine is None:
        raise Gone(f"the engine of {client} is not there any more")
    return engine


def _ping(state: State, client: Client, message: Ping) -> Message:
    return Pong(message.id, state.boot)


def _statistics(state: State, client: Client, message: Statistics) -> Message:
    return StatisticsReply(message.id, json.dumps(statistics_of(state)).encode())


# --- a scheduler's ----------------------------------------------------------------------------------------------------


def _lookup(state: State, client: Client, message: Lookup) -> Message:
    engine = _engine(state, client)
    session = engine.sessions.get(message.session)
    if session is None:
        session = Session(message.session)
    former = session.lease
    wanted = session.lookup(message.start, split_digests(message.digests), message.upto, message.id)
    engine.sessions[message.session] = session
    if former:
        state.index.release(former)
    if state.cancel_prefetch is not None:
        state.cancel_prefetch(engine, session)
    _match(state, client, engine, session, message, wanted)
    return answer_of(session, message.id)


def _match(
    state: State, client: Client, engine: Engine, session: Session, message: Lookup, wanted: list[bytes]
) -> None:
    """Answer from memory; where that is not all that is wanted and tiers are there, leave it pending for them."""
    if wanted and engine.namespace and not state.stopping:
        short = state.prefetch is not None and state.index.match(engine.namespace, wanted) < len(wanted)
        if short and state.prefetch is not None and state.prefetch(client, engine, session, message, wanted):
            return
    answer_now(state, engine, session, message.id, wanted, engine.namespace)


def answer_now(
    state: State, engine: Engine, session: Session, asked: int, wanted: Sequence[bytes], namespace: bytes
) -> None:
    """Lease what memory has of *wanted* in *namespace* (b"": nothing), and make that the answer to *asked*."""
    key = (engine.name, session.number)
    lease = None
    if wanted and namespace and not state.stopping:
        lease = state.index.lease(key, namespace, wanted, trio.current_time())
    if lease is None:
        session.answer(asked, 0)
    else:
        session.answer(asked, lease.chunks, lease.id, lease.expires)
        state.tiers.used(namespace, wanted[: lease.chunks])
        state.clock.not_later_than(lease.expires)
    state.counted["lookups"] += bool(wanted)
    state.counted["hits"] += session.chunks
    state.counted["misses"] += len(wanted) - session.chunks


def answer_of(session: Session, reply_to: int) -> Answer:
    """What to say of *session*'s lookup; *reply_to* is 0 in a push."""
    now = trio.current_time()
    status = session.status(now)
    ttl_ms = math.floor(status.ttl * 1000)
    return Answer(reply_to, session.number, status.asked, _STATES[status.state], status.chunks, status.lease, ttl_ms)


def _lookup_status(state: State, client: Client, message: LookupStatus) -> Message:
    session = _engine(state, client).sessions.get(message.session)
    if session is None:
        return Answer(message.id, message.session, 0, AnswerState.UNKNOWN)
    return answer_of(session, message.id)


def _taken(state: State, client: Client, message: Taken) -> None:
    session = _engine(state, client).sessions.get(message.session)
    if session is not None and message.lease and session.lease == message.lease:
        state.index.take(message.lease)


def _release(state: State, client: Client, message: Release) -> None:
    engine = _engine(state, client)
    session = engine.sessions.get(message.session)
    if session is not None:
        if state.cancel_prefetch is not None:
            state.cancel_prefetch(engine, session)
        lease = session.release()
        if lease:
            state.index.release(lease)


def _ended(state: State, client: Client, message: Ended) -> None:
    state.end_session(_engine(state, client), message.session)


def _reset(state: State, client: Client, message: Reset) -> Message | None:
    namespace = _engine(state, client).namespace
    if namespace:
        state.index.reset(namespace)
        state.counted["resets"] += 1
        state.clock.not_later_than(trio.current_time())  # it sweeps, piece by piece
        for engine in state.engines.values():
            if engine.namespace == namespace:
                for session in engine.sessions.values():
                    if session.lease:
                        state.index.release(session.lease)  # what it kept is stale: the extents come free
                        session.lose_lease()
        deletions = state.tiers.forget(namespace)
        if deletions:
            client.start(_acknowledge_reset, state, client, message, deletions)
            return None
    return Ack(message.id)


async def _acknowledge_reset(state: State, client: Client, message: Reset, deletions: Sequence[Deletion]) -> None:
    """A task of the client's: reply when the tiers have deleted, or it is known that one can't."""
    with trio.move_on_after(state.config.tier_timeout):
        for deletion in deletions:
            await deletion.known.wait()
    if all(deletion.done for deletion in deletions):
        client.send(Ack(message.id))
        return
    failure = Unavailable(
        "nothing of the namespace is served any more, but a tier could not delete it yet; it will before it is used "
        "again, unless the server ends first: reset again to be sure"
    )
    if (reply := error_reply(message, failure)) is not None:
        client.send(reply)


# --- a worker's -------------------------------------------------------------------------------------------------------


def _register(state: State, client: Client, message: Register) -> Message:
    engine = _engine(state, client)
    if client.pidfd is None:
        raise Misuse(f"{client} got no arena, so it can neither store nor retrieve; the welcome's arena_note says why")
    chunk_tokens = state.config.chunk_tokens
    if chunk_tokens % message.block_tokens:
        raise Misuse(
            f"the server's chunk_tokens ({chunk_tokens}) is no multiple of the engine's block size "
            f"({message.block_tokens} tokens); set chunk_tokens to a multiple of {message.block_tokens}"
        )
    former = engine.layouts.get(client.hello.shard)
    if state.transfer is not None:
        state.transfer.lose(client)  # what it attached had the former layout
    engine.layouts[client.hello.shard] = message
    try:
        state.settle_namespace(engine)
    except Misuse:
        del engine.layouts[client.hello.shard]
        if former is not None:
            engine.layouts[client.hello.shard] = former
        raise
    return NamespaceKnown(message.id, engine.namespace)


def _retrieve(state: State, client: Client, message: Retrieve) -> Message:
    if client.pidfd is None:
        raise Misuse(f"{client} got no arena to read from")
    if state.stopping:
        raise Unavailable("the server is stopping")
    hello = client.hello
    pin = state.index.pin(message.lease, hello.engine, client.number, hello.shard, message.start, message.count)
    client.pins.add(pin.id)
    return Pinned(message.id, pin.id, pack_offsets(pin.offsets))


def _done(state: State, client: Client, message: Done) -> Message:
    valid = state.index.unpin(message.pin, client.number)
    client.pins.discard(message.pin)
    state.note_progress()
    return Finished(message.id, valid)


def _reserve(state: State, client: Client, message: Reserve) -> Message:
    engine = _engine(state, client)
    digests = split_digests(message.digests)
    reason = state.why_no_slots(client, engine, message.session)
    if reason:
        state.dropped[reason] += len(digests)
        return Reserved(message.id, b"", b"", b"", {reason: len(digests)} if digests else {})
    now = trio.current_time()
    key = (engine.name, message.session)
    shard = client.hello.shard
    made = state.index.reserve(key, client.number, shard, engine.namespace, message.parent, digests, now)
    if made.id:
        client.copies.add(made.id)
        state.clock.not_later_than(now + state.config.reservation_timeout)
    positions = pack_positions([slot.position for slot in made.slots])
    offsets = pack_offsets([slot.offset for slot in made.slots])
    return Reserved(message.id, made.id, positions, offsets, dict(made.dropped))


def _commit(state: State, client: Client, message: Commit) -> Message:
    ours = message.reservation in client.copies
    client.copies.discard(message.reservation)  # whatever the index says of it: the copy has ended
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
    return Committed(message.id, published)


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


Handler = Callable[[State, Client, Any], Message | None]
_ANYONE = (Role.OBSERVER, Role.SCHEDULER, Role.WORKER)
_SCHEDULER = (Role.SCHEDULER,)
_WORKER = (Role.WORKER,)
_HANDLERS: dict[type[Message], tuple[Handler, tuple[Role, ...]]] = {
    Ping: (_ping, _ANYONE),
    Statistics: (_statistics, _ANYONE),
    CopiesEnded: (_copies_ended, _ANYONE),
    Lookup: (_lookup, _SCHEDULER),
    LookupStatus: (_lookup_status, _SCHEDULER),
    Taken: (_taken, _SCHEDULER),
    Release: (_release, _SCHEDULER),
    Ended: (_ended, _SCHEDULER),
    Reset: (_reset, _SCHEDULER),
    Register: (_register, _WORKER),
    Retrieve: (_retrieve, _WORKER),
    Done: (_done, _WORKER),
    Reserve: (_reserve, _WORKER),
    Commit: (_commit, _WORKER),
    Abort: (_abort, _WORKER),
    **TRANSFER_HANDLERS,
}
