"""Engines: their peers, the namespace that their layouts make, their sessions and their grants.

All methods are synchronous and called from the Trio loop, so each step is whole.
"""

import logging
from collections.abc import Collection, Iterator

import trio

from lmcache_trio._core.groups import named_groups
from lmcache_trio._core.index.generations import Whole
from lmcache_trio._core.index.index import Index, Reservation
from lmcache_trio._core.keys import DIGEST_BYTES, chunk_tokens_for, namespace_of, namespaces_of
from lmcache_trio._server.answers import Answers
from lmcache_trio._server.clock import Clock
from lmcache_trio._server.counts import Counts
from lmcache_trio._server.drain import Drain
from lmcache_trio._server.engine import Engine
from lmcache_trio._server.peer import Peer
from lmcache_trio._server.tiers.tiers import Tiers
from lmcache_trio._server.tiers.writer import Deletion
from lmcache_trio._server.transfer.worker import TransferWorker
from lmcache_trio._wire.messages import MAX_LAYOUTS, Hello, NamespaceKnown, Reserve, Role, StoreBlocks
from lmcache_trio.config import Config, format_size
from lmcache_trio.errors import Gone, Misuse
from lmcache_trio.statistics import EngineHeld

__all__ = ["Engines"]

log = logging.getLogger("lmcache_trio.server")


class Engines:
    """All engines, by name. An engine exists from the HELLO of its first peer until its last peer has left."""

    def __init__(  # noqa: PLR0913 each is a part that it works with
        self,
        config: Config,
        index: Index,
        clock: Clock,
        tiers: Tiers,
        answers: Answers,
        transfer: TransferWorker | None,
        drain: Drain,
        counts: Counts,
    ) -> None:
        self._config = config
        self._index = index
        self._clock = clock
        self._tiers = tiers
        self._answers = answers
        self._transfer = transfer
        self._drain = drain
        self._counts = counts
        self._engines: dict[str, Engine] = {}

    def __len__(self) -> int:
        return len(self._engines)

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines.values())

    def of(self, peer: Peer) -> Engine:
        """The engine that *peer*, a scheduler or a worker, belongs to. Gone: it does not exist any more."""
        engine = self._engines.get(peer.hello.engine)
        if engine is None or peer.lost:
            raise Gone(f"the engine of {peer} is not there any more")
        return engine

    def find(self, hello: Hello) -> Engine | None:
        """The engine of the client that says *hello*, if it exists. An observer has none."""
        return self._engines.get(hello.engine) if hello.role is not Role.OBSERVER else None

    def chunk_tokens_of(self, hello: Hello) -> int:
        """Tokens of a chunk of the engine whose client says *hello*: that engine's, or what a new engine gets."""
        engine = self.find(hello)
        if engine is not None:
            return engine.chunk_tokens
        if hello.chunk_tokens:
            return hello.chunk_tokens
        return chunk_tokens_for(self._config.chunk_tokens, hello.block_tokens or 1, hello.token_bytes)

    # --- peers --------------------------------------------------------------------------------------------------------

    def join(self, peer: Peer) -> None:
        """*peer* takes its place in its engine, which it founds if it is the first."""
        hello = peer.hello
        if hello.role is Role.OBSERVER:
            return
        tokens, groups = self.chunk_tokens_of(hello), named_groups(hello.groups)
        engine = self._engines.setdefault(
            hello.engine, Engine(hello.engine, hello.shards, hello.replicas, tokens, groups)
        )
        if hello.role is Role.SCHEDULER:
            engine.scheduler, engine.model = peer, hello.model
            self.identify(engine, hello.identity)
        else:
            engine.workers[hello.rank] = peer
        if engine.namespace:
            peer.send(self.namespace_known(engine))  # waits in the outbox until the client is there

    def leave(self, peer: Peer) -> None:
        """*peer* is lost: its sessions end, its layout counts no more, and an engine without peers is forgotten."""
        engine, rank = self.find(peer.hello), peer.hello.rank
        if engine is None:
            return
        if engine.scheduler is peer:
            engine.scheduler = None
            for number in list(engine.sessions.live):
                self.end_session(engine, number)
        elif engine.workers.get(rank) is peer:
            del engine.workers[rank]
            engine.attaching.pop(rank, None)
            engine.layouts.pop(rank, None)
            self.settle_namespace(engine)
        if engine.scheduler is None and not engine.workers:
            del self._engines[engine.name]
            log.info("engine %r left", engine.name)

    # --- namespaces ---------------------------------------------------------------------------------------------------

    def settle_namespace(self, engine: Engine) -> None:
        """Work out the engine's namespace from its layouts; when it changed, tell all its peers.

        Resets that are due come first, so that no chunk of before them is served in it. `Misuse` changes nothing.
        """
        former, namespace = engine.namespaces, engine.namespace_under(engine.identity)
        namespaces = namespaces_of(namespace, len(engine.groups)) if namespace else ()
        if namespace:
            self.check_identity(engine, engine.identity)  # so that all groups are attached, or none
            for of_group, lengths, group in zip(namespaces, engine.part_bytes(), engine.groups, strict=True):
                self._index.attach(of_group, lengths, group, engine.chunk_tokens, Whole(namespace, engine.model))
            self._see_layout(engine)
        engine.namespace, engine.namespaces = namespace, namespaces
        engine.chunk_bytes = sum(self._index.chunk_bytes(of_group) for of_group in namespaces)
        for of_group in former:
            self._index.detach(of_group)
            self._clock.not_later_than(trio.current_time())  # it may have something to sweep
        if namespaces != former:
            self._tell_layout(engine)
            for peer in engine.peers():
                peer.send(self.namespace_known(engine))

    def namespace_known(self, engine: Engine, reply_to: int = 0) -> NamespaceKnown:
        """The engine's namespace, as its peers are told; *reply_to* is 0 in a push."""
        arena = self._index.arena.capacity
        return NamespaceKnown(reply_to, engine.namespace, engine.chunk_bytes, arena, engine.layout)

    def held(self) -> Iterator[EngineHeld]:
        """Each engine, and what it needs of the memory."""
        size = self._index.arena.capacity
        for engine in self:
            chunk = engine.chunk_bytes
            no_cache = "a chunk is larger than the memory" if chunk > size else ""
            yield EngineHeld(
                name=engine.name,
                model=engine.model,
                namespace=engine.namespace.hex(),
                no_cache=no_cache if engine.namespace else f"not until {engine.lacks}",
                workers=len(engine.workers),
                sessions=len(engine.sessions.live),
                chunk_tokens=engine.chunk_tokens,
                chunk_bytes=chunk,
                tokens_in_memory=size // chunk * engine.chunk_tokens if chunk else 0,
            )

    def attached(self, peer: Peer) -> None:
        """The memory of *peer* is open: its layout, which waited for that, counts from now on. `Misuse`: it cannot."""
        engine, rank = self.find(peer.hello), peer.hello.rank
        if engine is not None and engine.workers.get(rank) is peer and rank in engine.attaching:
            engine.layouts[rank] = engine.attaching.pop(rank)
            try:
                self.settle_namespace(engine)
            except Misuse:
                del engine.layouts[rank]
                raise

    def fenced(self, peer: Peer) -> None:
        """The device moves nothing more for *peer*, so its engine is offered nothing until *peer* registers again."""
        engine, rank = self.find(peer.hello), peer.hello.rank
        if engine is not None and engine.workers.get(rank) is peer and rank in engine.layouts:
            del engine.layouts[rank]
            self.settle_namespace(engine)

    def tell_missing(self, engine: Engine) -> None:
        """Log that *engine* asks for chunks while a layout of its workers is missing; once, until it is complete."""
        if not engine.namespace and not engine.is_told_of:
            self._tell_layout(engine)

    def _tell_layout(self, engine: Engine) -> None:
        """Log how much can be cached for *engine*, or the reason why nothing can."""
        engine.is_told_of = not engine.namespace
        if not engine.namespace:
            log.info("engine %r has no cache until %s", engine.name, engine.lacks)
            return
        tokens, size = engine.chunk_tokens, self._index.arena.capacity
        chunk = engine.chunk_bytes
        if chunk > size:
            self._counts.events["layouts_too_large"] += 1
            words = (
                "engine %r cannot be cached: a chunk of %d tokens takes %s, and the memory holds %s: raise memory.size,"
                " or set a smaller chunk_tokens"
            )
            log.warning(words, engine.name, tokens, format_size(chunk), format_size(size))
            return
        words = (
            "engine %r joins: model %s, layout %s in %d shard(s), chunks of %d tokens, %s a token; the memory holds %d"
            " tokens"
        )
        model, layout = engine.identity.hex()[:12] or "not named", engine.layout.hex()[:12]
        a_token = format_size(chunk // tokens)
        log.info(words, engine.name, model, layout, engine.shards, tokens, a_token, size // chunk * tokens)

    # --- sessions -----------------------------------------------------------------------------------------------------

    def identify(self, engine: Engine, identity: bytes) -> None:
        """The scheduler of *engine* says its model's *identity*. A new one ends the grants and bars the sessions.

        If this message came late, a store of before may hold KV that the new weights computed.
        """
        if identity != engine.identity:
            self.check_identity(engine, identity)
            engine.identity = identity
            engine.sessions.bar()
            self._end_grants(engine)
            self.settle_namespace(engine)

    def check_identity(self, engine: Engine, identity: bytes) -> None:
        """Misuse: under *identity* the layout of *engine* has the namespace of one with slots of other lengths."""
        namespace = engine.namespace_under(identity)
        if namespace:
            for of_group, lengths in zip(
                namespaces_of(namespace, len(engine.groups)), engine.part_bytes(), strict=True
            ):
                self._index.check_lengths(of_group, lengths)

    def reset(self, engine: Engine, identity: bytes, layouts: Collection[bytes]) -> list[Deletion]:
        """Drop every chunk of *layouts* under *identity*, in the groups of *engine*, for all engines. Returns the
        tiers' deletions, which have begun. Whether an engine has one of the layouts now does not matter.

        From now on no chunk of before is served, and no store or load that began before publishes one.
        """
        dropped = {namespace_of(layout, identity) for layout in layouts}
        namespaces = [of_group for each in dropped for of_group in namespaces_of(each, len(engine.groups))]
        lost = sum(self._index.reset(of_group) for of_group in namespaces)
        refilled_at = self._index.filled + lost
        engine.refilled_at = refilled_at if lost else engine.refilled_at
        self._counts.events["resets"] += 1
        self._clock.not_later_than(trio.current_time())  # it sweeps, piece by piece
        for other in self:
            if other.namespace in dropped:
                other.sessions.bar()
                self._end_answers(other)
                other.refilled_at = refilled_at if lost else other.refilled_at
        return [deletion for of_group in namespaces for deletion in self._tiers.forget(of_group)]

    def _end_answers(self, engine: Engine) -> None:
        for session in engine.sessions.live.values():
            if session.lease:
                self._index.release(session.lease)  # its chunks are stale after a reset, and are given back
                session.lose_lease()

    def _see_layout(self, engine: Engine) -> None:
        """The layout of *engine* is known: if it is not the former one, its grants end. Carry out what it is due."""
        layout = engine.layout
        if layout != engine.last_layout:
            engine.last_layout = layout
            self._end_grants(engine)
        for identity in engine.resets_due.union(engine.resets_of_any):
            done_in = engine.resets_of_any.get(identity, set())
            if identity in engine.resets_due or layout not in done_in:
                self.reset(engine, identity, [layout])
                if len(done_in) == MAX_LAYOUTS:
                    done_in.clear()  # they are dropped once more, which costs hits and is never wrong
                done_in.add(layout)
        engine.resets_due.clear()

    def _end_grants(self, engine: Engine) -> None:
        """The leases, pins and reservations of *engine* end.

        Copies that are under way run on; the slots of the writers among them stay in quarantine until then.
        """
        self._end_answers(engine)
        for peer in engine.workers.values():
            self._index.lose_worker(peer.number)
            if self._transfer is not None:
                self._transfer.end_grants(peer)

    def end_session(self, engine: Engine, number: int) -> None:
        """End the session *number*, and all that it owned. Idempotent."""
        session = engine.sessions.end(number)
        if session is not None:
            engine.digests -= session.known
            self._answers.cancel(session)
            self._index.end_session((engine.name, number))

    def reserve(self, peer: Peer, engine: Engine, worker: int, message: Reserve | StoreBlocks) -> Reservation:
        """Slots for a store of *peer*, which is *worker* to the index. Chunks without a slot are counted by reason."""
        namespace, session, digests = engine.namespace_of_group(message.group), message.session, message.digests
        if self._drain.stopping:
            reason = "stopping"
        elif peer.pidfd is None:
            reason = "no_arena"
        elif not namespace:
            reason = "no_namespace"
        else:
            reason = engine.sessions.why_no_store(session)
        if reason:  # whatever room there is
            count = len(digests) // DIGEST_BYTES
            self._counts.dropped[reason] += count
            return Reservation(b"", (), {reason: count} if count else {})
        now, key, shard = trio.current_time(), (engine.name, engine.sessions.serial_of(session)), peer.hello.shard
        made = self._index.reserve(
            key, worker, shard, namespace, message.parent, digests, now, live=engine.sessions.live_serials
        )
        if made.id:
            self._clock.not_later_than(now + self._config.reservation_timeout)
            if not message.group:  # its other parts are counted with it
                self._counts.curve.stored(digests, engine.chunk_bytes)
        if "share" in made.dropped and "write_share" not in peer.limits_met:
            peer.limits_met.add("write_share")
            words = (
                "%s is writing %s with its engine, and gets no more at one time: that is write_share (%g of the memory"
                " that no other engine is writing); further stores of it are dropped until its copies end"
            )
            log.warning(words, peer, format_size(self._index.bytes_written_by(engine.name)), self._config.write_share)
        return made
