"""What a scheduler says: its lookups, what becomes of them, and a reset. As in `handlers`, nothing here waits.

A lookup that memory covers is answered at once; what memory does not cover may be taken on by `State.prefetch`, which
answers with `answer_now` when it knows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import trio

from lmcache_trio._core.keys import DIGEST_BYTES, split_digests
from lmcache_trio._core.session import LookupState, Session
from lmcache_trio._server.state import Client, Engine, State
from lmcache_trio._server.tiers.writer import Deletion
from lmcache_trio._wire.messages import (
    Ack,
    Answer,
    AnswerState,
    Ended,
    ErrorKind,
    ErrorReply,
    Identify,
    Lookup,
    LookupStatus,
    Message,
    Release,
    Reset,
    Taken,
)
from lmcache_trio.errors import Gone, Misuse

__all__ = ["HANDLERS", "answer_now", "answer_of", "engine_of"]

MOST_RESETS_DUE = 64
"""Identities that one engine may have reset before its layout is known: after a restart of the server, one or two."""
_STATES = {
    LookupState.UNKNOWN: AnswerState.UNKNOWN,
    LookupState.PENDING: AnswerState.PENDING,
    LookupState.ANSWERED: AnswerState.ANSWERED,
}


def engine_of(state: State, client: Client) -> Engine:
    """The engine that *client* belongs to. Gone: it is not there any more."""
    engine = state.engine_of(client)
    if engine is None:
        raise Gone(f"the engine of {client} is not there any more")
    return engine


def _lookup(state: State, client: Client, message: Lookup) -> Message:
    engine = engine_of(state, client)
    limits, session = state.config.limits, engine.sessions.get(message.session)
    if session is None:
        if len(engine.sessions) >= limits.sessions:
            raise state.over_limit(client, "sessions", f"{limits.sessions} open sessions and asks for one more")
        session = Session(message.session)
    more = message.start + len(message.digests) // DIGEST_BYTES - session.known
    if engine.digests + more > limits.digests and more > 0:
        raise state.over_limit(client, "digests", f"sessions of {engine.digests} chunks and sends {more} more")
    former = session.lease
    wanted = session.lookup(message.start, split_digests(message.digests), message.upto, message.id)
    engine.sessions.open(session)
    engine.digests += more
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
    session = engine_of(state, client).sessions.get(message.session)
    if session is None:
        return Answer(message.id, message.session, 0, AnswerState.UNKNOWN)
    return answer_of(session, message.id)


def _taken(state: State, client: Client, message: Taken) -> None:
    session = engine_of(state, client).sessions.get(message.session)
    if session is not None and message.lease and session.lease == message.lease:
        state.index.take(message.lease)


def _release(state: State, client: Client, message: Release) -> None:
    engine = engine_of(state, client)
    session = engine.sessions.get(message.session)
    if session is not None:
        if state.cancel_prefetch is not None:
            state.cancel_prefetch(engine, session)
        lease = session.release()
        if lease:
            state.index.release(lease)


def _ended(state: State, client: Client, message: Ended) -> None:
    state.end_session(engine_of(state, client), message.session)


def _identify(state: State, client: Client, message: Identify) -> Message:
    state.identify(engine_of(state, client), message.identity)
    return Ack(message.id)


def _reset(state: State, client: Client, message: Reset) -> Message | None:
    engine = engine_of(state, client)
    engine.sessions.bar()
    namespace = engine.namespace_under(message.identity)
    if not namespace:
        if len(engine.resets_due) >= MOST_RESETS_DUE and message.identity not in engine.resets_due:
            raise Misuse(f"{MOST_RESETS_DUE} resets are due for {client} already: register its workers first")
        engine.resets_due.add(message.identity)
        return Ack(message.id)
    if client.resets >= state.config.limits.resets:
        raise state.over_limit(client, "resets", f"{client.resets} resets under way and asks for one more")
    deletions = state.reset(namespace)
    if not deletions:
        return Ack(message.id)
    client.resets += 1
    client.start(_acknowledge_reset, state, client, message, deletions)
    return None


async def _acknowledge_reset(state: State, client: Client, message: Reset, deletions: Sequence[Deletion]) -> None:
    """A task of the client's: reply when the tiers have deleted, or it is known that one can't."""
    with trio.move_on_after(state.config.tier_timeout):
        for deletion in deletions:
            await deletion.known.wait()
    client.resets -= 1
    if all(deletion.done for deletion in deletions):
        client.send(Ack(message.id))
        return
    failure = (
        "nothing of the namespace is served any more, but a tier could not delete it yet; it will before it is used "
        "again, unless the server ends first: reset again to be sure"
    )
    client.send(ErrorReply(message.id, ErrorKind.UNAVAILABLE, failure))


HANDLERS: dict[type[Message], Callable[[State, Client, Any], Message | None]] = {
    Lookup: _lookup,
    LookupStatus: _lookup_status,
    Taken: _taken,
    Release: _release,
    Ended: _ended,
    Identify: _identify,
    Reset: _reset,
}
