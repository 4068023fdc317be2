"""The handlers of a scheduler's messages: its lookups and their ends, its identity, and a reset. No handler waits.

`answers` has how a lookup is answered.
"""

from collections.abc import Callable, Sequence
from typing import Any

import trio

from lmcache_trio._core.index.session import LookupState, Session
from lmcache_trio._core.keys import DIGEST_BYTES, split_digests
from lmcache_trio._server.answers import answer_of
from lmcache_trio._server.parts import Parts
from lmcache_trio._server.peer import Peer
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
    Watch,
)
from lmcache_trio.errors import Misuse

__all__ = ["HANDLERS"]

MOST_RESETS_DUE = 64
"""Resets that one engine may ask for before its layout is known, or that name none: after a restart of the server, one
or two."""


def _lookup(parts: Parts, peer: Peer, message: Lookup) -> Message:
    engine = parts.engines.of(peer)
    limits, session = parts.config.limits, engine.sessions.live.get(message.session)
    if session is None:
        if len(engine.sessions.live) >= limits.sessions:
            raise parts.counts.over_limit(peer, "sessions", f"{limits.sessions} open sessions and asks for one more")
        session = Session(message.session, message.name)
    more = message.start + len(message.digests) // DIGEST_BYTES - session.known
    if engine.digests + more > limits.digests and more > 0:
        raise parts.counts.over_limit(peer, "digests", f"sessions of {engine.digests} chunks and sends {more} more")
    former, was_pending = session.lease, session.state is LookupState.PENDING
    wanted = session.lookup(message.start, message.digests, message.upto, message.id)
    engine.sessions.open(session)
    engine.digests += more
    if not engine.namespace:
        parts.engines.tell_missing(engine)
    if former:
        parts.index.release(former)
    if was_pending:
        parts.answers.cancel(session)
    parts.answers.look_up(peer, engine, session, message, wanted)
    return answer_of(session, message.id)


def _lookup_status(parts: Parts, peer: Peer, message: LookupStatus) -> Message:
    session = parts.engines.of(peer).sessions.live.get(message.session)
    if session is None:
        return Answer(message.id, message.session, 0, AnswerState.UNKNOWN)
    return answer_of(session, message.id)


def _taken(parts: Parts, peer: Peer, message: Taken) -> None:
    session = parts.engines.of(peer).sessions.live.get(message.session)
    if session is not None and message.lease and session.lease == message.lease:
        parts.index.take(message.lease)


def _release(parts: Parts, peer: Peer, message: Release) -> None:
    engine = parts.engines.of(peer)
    session = engine.sessions.live.get(message.session)
    if session is not None:
        parts.answers.cancel(session)
        lease = session.release()
        if lease:
            parts.index.release(lease)


def _ended(parts: Parts, peer: Peer, message: Ended) -> None:
    parts.engines.end_session(parts.engines.of(peer), message.session)


def _identify(parts: Parts, peer: Peer, message: Identify) -> Message:
    parts.engines.identify(parts.engines.of(peer), message.identity)
    return Ack(message.id)


def _reset(parts: Parts, peer: Peer, message: Reset) -> Message | None:
    engine = parts.engines.of(peer)
    engine.sessions.bar()
    identity, named, layout = message.identity, message.layouts, engine.layout
    layouts = set(split_digests(named))
    if layout:
        layouts.add(layout)
    if layouts and peer.resets >= parts.config.limits.resets:
        raise parts.counts.over_limit(peer, "resets", f"{peer.resets} resets under way and asks for one more")
    if not named:  # nobody knows which layout it is of
        if len(engine.resets_of_any) >= MOST_RESETS_DUE and identity not in engine.resets_of_any:
            raise Misuse(f"{MOST_RESETS_DUE} resets of {peer} are of any layout already: name its layouts")
        engine.resets_of_any[identity] = set(layouts)
    elif not layout:
        if len(engine.resets_due) >= MOST_RESETS_DUE and identity not in engine.resets_due:
            raise Misuse(f"{MOST_RESETS_DUE} resets are due for {peer} already: register its workers first")
        engine.resets_due.add(identity)
    deletions = parts.engines.reset(engine, identity, layouts) if layouts else []
    if not deletions:
        return Ack(message.id)
    peer.resets += 1
    peer.start(_acknowledge_reset, parts, peer, message, deletions)
    return None


async def _acknowledge_reset(parts: Parts, peer: Peer, message: Reset, deletions: Sequence[Deletion]) -> None:
    """A task of the client: reply when all tiers have deleted, or when one is known not to."""
    with trio.move_on_after(parts.config.tier_timeout):
        for deletion in deletions:
            await deletion.known.wait()
    peer.resets -= 1
    if all(deletion.done for deletion in deletions):
        peer.send(Ack(message.id))
        return
    failure = (
        "nothing of the namespace is served any more, but a tier could not delete it yet; it will before it is used "
        "again, unless the server ends first: reset again to be sure"
    )
    peer.send(ErrorReply(message.id, ErrorKind.UNAVAILABLE, failure))


def _watch(parts: Parts, peer: Peer, message: Watch) -> None:
    parts.watches.add(peer)


HANDLERS: dict[type[Message], Callable[[Parts, Peer, Any], Message | None]] = {
    Lookup: _lookup,
    LookupStatus: _lookup_status,
    Taken: _taken,
    Release: _release,
    Ended: _ended,
    Identify: _identify,
    Reset: _reset,
    Watch: _watch,
}
