"""What a server knows of its clients: connections, the engines that they form, and those engines' sessions.

Everything here is synchronous and called from the Trio loop, so that each step is whole. It starts no task and waits
for nothing; what must wait is asked of `supervise` through the callables that it was given.
"""

import logging
import os
import select
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import attrs
import trio

from lmcache_trio._core.index import Index, Reservation
from lmcache_trio._core.keys import namespace_of
from lmcache_trio._core.session import Session, Sessions
from lmcache_trio._server.clock import Clock
from lmcache_trio._server.tasks import Starter, Tasks
from lmcache_trio._server.tiers.tiers import Tiers
from lmcache_trio._server.tiers.writer import Deletion
from lmcache_trio._transport import Connection, Unfinished
from lmcache_trio._wire.codec import encode
from lmcache_trio._wire.messages import Hello, Lookup, Message, NamespaceKnown, Register, Role
from lmcache_trio.abc import Memory
from lmcache_trio.config import Config, Limits, format_size
from lmcache_trio.errors import Gone, Misuse, Unavailable

if TYPE_CHECKING:
    from lmcache_trio._server.transfer import TransferWorker

__all__ = ["Client", "Engine", "LostWriter", "State"]

log = logging.getLogger("lmcache_trio.server")

COUNTERS = (
    *("lookups", "hits", "misses", "resets", "refused", "withdrawn", "turned_away", "exits_seen", "rebound"),
    *("protocol_errors", "handler_bugs", "connection_bugs", "device_bugs"),
    *("attaches_refused", "layouts_too_large"),
)


def _not_connected(fn: Callable[..., Awaitable[object]], *args: object, name: object = None) -> None:
    raise Unavailable("the client has not taken up its connection")


@attrs.define(eq=False)
class Client:
    """One connection, from its HELLO on. `number` is its name in the index; nothing else ever has the same."""

    number: int
    hello: Hello
    peer_pid: int | None
    pidfd: int | None  # owned; None for a client that cannot be seen, which therefore gets no arena
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    transport: Connection | None = None  # None until the client has taken up its own address
    copies: set[bytes] = attrs.field(factory=set)  # reservations whose copy was not yet said to have ended
    pins: dict[bytes, int] = attrs.field(factory=dict)  # and how many chunks each reads
    outbox: deque[bytes] = attrs.field(factory=deque)  # what the transport had no room for, in order
    queued: trio.Event = attrs.field(factory=trio.Event)
    drained: trio.Event = attrs.field(factory=trio.Event)
    most_unread: int = 1
    deaf: bool = False  # it is ended because it did not read
    resets: int = 0  # that have no reply yet
    limits_met: set[str] = attrs.field(factory=set)
    lost: bool = False
    start: Starter = _not_connected  # a task of its connection's, which ends with it

    def __str__(self) -> str:
        what = f"shard {self.hello.shard} of {self.hello.shards}" if self.hello.role is Role.WORKER else "scheduler"
        where = f" of engine {self.hello.engine!r} ({what})" if self.hello.engine else ""
        return f"client {self.hello.client!r}{where}"

    def send(self, message: Message) -> None:
        """Send *message* now, or queue it behind what is queued, for the writer to send when there is room."""
        if not self.lost:
            self.send_frame(encode(message))

    def send_frame(self, frame: bytes) -> None:
        """As `send`, what is a frame already."""
        if self.lost:
            return
        if self.transport is not None and not self.outbox:
            try:
                return self.transport.send_nowait(frame)
            except trio.WouldBlock:
                pass
            except Gone:
                return  # its reader finds out by itself
        if len(self.outbox) >= self.most_unread:
            self.deaf = True
            self.scope.cancel()
            return
        self.outbox.append(frame)
        self.queued.set()

    def is_process(self, pid: int | None, pidfd: int | None) -> bool:
        """Is this client's process the one of *pid* and *pidfd*, as far as can be told?

        Since Linux 6.9 each process has an inode of its own behind its pidfds; before, all pidfds have one.
        """
        if self.pidfd is not None and pidfd is not None and os.fstat(self.pidfd).st_ino != os.fstat(pidfd).st_ino:
            return False
        return self.peer_pid == pid

    def has_exited(self) -> bool:
        """Whether the process is known to be dead, though its connection may not have been seen to close yet."""
        if self.pidfd is None:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))


@attrs.define(eq=False)
class Engine:
    """One scheduler and its workers, and the namespace that their layouts make."""

    name: str
    shards: int
    scheduler: Client | None = None
    workers: dict[int, Client] = attrs.field(factory=dict)
    layouts: dict[int, Register] = attrs.field(factory=dict)
    attaching: dict[int, Register] = attrs.field(factory=dict)
    """Layouts that count once the memory of their worker is attached: it moves nothing before."""
    identity: bytes = b""
    """What its scheduler said last of its model."""
    namespace: bytes = b""
    last_layout: tuple[bytes, ...] = ()
    """The latest fingerprints that were known of all shards: what was granted is of these."""
    sessions: Sessions = attrs.field(factory=Sessions)
    digests: int = 0  # of all sessions
    resets_due: set[bytes] = attrs.field(factory=set)
    """Identities whose chunks are to be dropped as soon as the layout is known."""

    def namespace_under(self, identity: bytes) -> bytes:
        """The namespace of its layout under *identity*; b"" while a shard's layout is missing."""
        if len(self.layouts) < self.shards:
            return b""
        return namespace_of([self.layouts[shard].fingerprint for shard in range(self.shards)], identity)

    def clients(self) -> Iterator[Client]:
        if self.scheduler is not None:
            yield self.scheduler
        yield from self.workers.values()


@attrs.define(eq=False)
class LostWriter:
    """A client whose connection is gone while it may still be copying: its slots wait for its word or for its exit."""

    number: int
    token: bytes
    pidfd: int
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)


Prefetch = Callable[[Client, Engine, Session, Lookup, list[bytes]], bool]
"""Called when memory does not cover a lookup: True if the tiers may, and the answer will be pushed."""


@attrs.define(eq=False)
class State:
    """The server's memory. *watch_exit* starts the wait for a lost writer's exit; *prefetch* is there when tiers are.

    Its own part of the counters is `counted` and, by reason, `dropped`; the index counts what happens inside it.
    """

    config: Config
    boot: bytes
    index: Index
    clock: Clock
    memory: Memory
    watch_exit: Callable[[LostWriter], None]
    tiers: Tiers
    tasks: Tasks = attrs.field(factory=Tasks)  # of all branches
    count_prefetches: Callable[[], int] = lambda: 0
    prefetch: Prefetch | None = None
    cancel_prefetch: Callable[[Engine, Session], None] | None = None
    transfer: "TransferWorker | None" = None
    engines: dict[str, Engine] = attrs.field(factory=dict)
    clients: dict[int, Client] = attrs.field(factory=dict)
    sockets: set[str] = attrs.field(factory=set)  # files that an end in a hurry must remove
    lost_writers: list[LostWriter] = attrs.field(factory=list)
    counted: Counter[str] = attrs.field(factory=lambda: Counter(dict.fromkeys(COUNTERS, 0)))
    dropped: Counter[str] = attrs.field(factory=Counter)
    limits_hit: Counter[str] = attrs.field(factory=lambda: Counter({f.name: 0 for f in attrs.fields(Limits)}))
    unfinished: Unfinished = attrs.field(
        default=attrs.Factory(lambda self: Unfinished(self.config.limits.unfinished_bytes), takes_self=True)
    )
    taken: int = 0
    stopping: bool = False
    idle: trio.Event = attrs.field(factory=trio.Event)
    lane: trio.Lock = attrs.field(factory=trio.Lock)
    """Held by the client whose turn it is among those that ask much."""
    last_in_lane: Client | None = None
    leaving: trio.Lock = attrs.field(factory=trio.Lock)
    """Held by the client that is being taken apart."""
    _numbers: int = 0

    # --- clients -----------------------------------------------------------------------------------------------------

    def admit(self, hello: Hello, peer_pid: int | None, pidfd: int | None) -> Client:
        """Make room for a client that `rendezvous` found in order, in place of those that it replaces."""
        client = Client(self.new_number(), hello, peer_pid, pidfd, most_unread=self.config.limits.pushes)
        self.clients[client.number] = client
        if hello.role is not Role.OBSERVER:
            engine = self.engines.setdefault(hello.engine, Engine(hello.engine, hello.shards))
            if hello.role is Role.SCHEDULER:
                engine.scheduler = client
                self.identify(engine, hello.identity)
            else:
                engine.workers[hello.shard] = client
            if engine.namespace:
                client.send(self.namespace_known(engine))  # waits in the outbox until the client is there
        return client

    def new_number(self) -> int:
        """A name in the index that nothing else has, or had."""
        self._numbers += 1
        return self._numbers

    def engine_of(self, client: Client) -> Engine | None:
        return self.engines.get(client.hello.engine) if client.hello.role is not Role.OBSERVER else None

    def lose(self, client: Client) -> bool:
        """The connection is gone, or replaced: everything that it owned ends now. Idempotent.

        True when the caller must close the pidfd; a lost writer's is kept until its exit was seen.
        """
        if client.lost:
            return False
        client.lost = True
        del self.clients[client.number]
        engine = self.engine_of(client)
        if engine is not None:
            self._leave(engine, client)
        self.index.lose_worker(client.number)
        if self.transfer is not None:
            self.transfer.lose(client)
        client.pins.clear()
        client.outbox.clear()
        keep = bool(client.copies) and client.pidfd is not None
        if keep and client.pidfd is not None:
            writer = LostWriter(client.number, client.hello.token, client.pidfd)
            self.lost_writers.append(writer)
            self.watch_exit(writer)
        client.copies.clear()
        client.scope.cancel()
        self.note_progress()
        return not keep

    def end_some(self, client: Client, until: float) -> bool:
        """Until that time, but at least one: end sessions and reads of *client*, which is lost. Are there more?"""
        engine = self.engine_of(client)
        sessions = engine.sessions if engine is not None and engine.scheduler is client else ()
        while True:
            if engine is not None and sessions:
                self.end_session(engine, next(iter(sessions)).number)
            elif client.pins:
                self.index.unpin(client.pins.popitem()[0], client.number)
            else:
                return False
            if trio.current_time() >= until:
                return True

    def _leave(self, engine: Engine, client: Client) -> None:
        if engine.scheduler is client:
            engine.scheduler = None
            for session in list(engine.sessions):
                self.end_session(engine, session.number)
        elif engine.workers.get(client.hello.shard) is client:
            del engine.workers[client.hello.shard]
            engine.attaching.pop(client.hello.shard, None)
            engine.layouts.pop(client.hello.shard, None)
            self.settle_namespace(engine)
        if engine.scheduler is None and not engine.workers:
            del self.engines[engine.name]
            log.info("engine %r left", engine.name)

    def copies_ended(self, writer: LostWriter) -> None:
        """The process of *writer* exited, or its client said after a reconnect that its copies ended. Idempotent."""
        if writer in self.lost_writers:
            self.lost_writers.remove(writer)
            self.index.copies_ended(writer.number)
            writer.scope.cancel()

    # --- engines and sessions ----------------------------------------------------------------------------------------

    def settle_namespace(self, engine: Engine) -> None:
        """Work out the engine's namespace from the layouts that are there; when it changed, tell all its clients.

        Resets that are due come first, so that nothing of before them is served in it.
        """
        former, namespace = engine.namespace, engine.namespace_under(engine.identity)
        if namespace:
            layouts = [engine.layouts[shard] for shard in range(engine.shards)]
            self.index.attach(namespace, [layout.shard_bytes for layout in layouts])
            self._see_layout(engine, tuple(layout.fingerprint for layout in layouts))
            for identity in engine.resets_due:
                self.reset(engine.namespace_under(identity))
            engine.resets_due.clear()
        engine.namespace = namespace
        if former:
            self.index.detach(former)
            self.clock.not_later_than(trio.current_time())  # it may have something to sweep
        if namespace != former:
            self._tell_layout(engine)
            for client in engine.clients():
                client.send(self.namespace_known(engine))

    def namespace_known(self, engine: Engine, reply_to: int = 0) -> NamespaceKnown:
        """What to say of the engine's namespace; *reply_to* is 0 in a push."""
        return NamespaceKnown(
            reply_to, engine.namespace, self.index.chunk_bytes(engine.namespace), self.index.arena_bytes
        )

    def attached(self, client: Client) -> None:
        """The memory of *client* is open: a layout that waited for that counts from now on. `Misuse`: it can't."""
        engine, shard = self.engine_of(client), client.hello.shard
        if engine is not None and engine.workers.get(shard) is client and shard in engine.attaching:
            engine.layouts[shard] = engine.attaching.pop(shard)
            try:
                self.settle_namespace(engine)
            except Misuse:
                del engine.layouts[shard]
                raise

    def fenced(self, client: Client) -> None:
        """Nothing more is moved for *client*: its engine is offered nothing, until it registers again."""
        engine, shard = self.engine_of(client), client.hello.shard
        if engine is not None and engine.workers.get(shard) is client and shard in engine.layouts:
            del engine.layouts[shard]
            self.settle_namespace(engine)

    def _tell_layout(self, engine: Engine) -> None:
        """A line of log for who asks what is cached for *engine*, and if nothing is, why."""
        if not engine.namespace:
            missing = sorted(set(range(engine.shards)) - set(engine.layouts))
            log.info("engine %r has no cache until its shards %s are registered", engine.name, missing)
            return
        tokens, size = self.config.chunk_tokens, self.index.arena_bytes
        chunk = self.index.chunk_bytes(engine.namespace)
        if chunk > size:
            self.counted["layouts_too_large"] += 1
            words = (
                "engine %r cannot be cached: a chunk of %d tokens takes %s, and the memory holds %s: raise memory.size,"
                " or set a smaller chunk_tokens"
            )
            log.warning(words, engine.name, tokens, format_size(chunk), format_size(size))
            return
        words = "engine %r joins: model %s, layout %s in %d shard(s), %s a token; the memory holds %d tokens"
        layout = namespace_of([engine.layouts[shard].fingerprint for shard in range(engine.shards)], b"").hex()[:12]
        model, a_token = engine.identity.hex()[:12] or "not named", format_size(chunk // tokens)
        log.info(words, engine.name, model, layout, engine.shards, a_token, size // chunk * tokens)

    def identify(self, engine: Engine, identity: bytes) -> None:
        """The scheduler of *engine* says what its model is. Another one than before ends what was answered before."""
        if identity != engine.identity:
            engine.identity = identity
            engine.sessions.bar()
            self._end_answers(engine)
            self.settle_namespace(engine)

    def reset(self, namespace: bytes) -> list[Deletion]:
        """Drop every chunk of *namespace*, for all its engines. Returns the tiers' deletions, which go on by now.

        Nothing of it is served from now on, nor stored or loaded by what began before.
        """
        self.index.reset(namespace)
        self.counted["resets"] += 1
        self.clock.not_later_than(trio.current_time())  # it sweeps, piece by piece
        for engine in self.engines.values():
            if engine.namespace == namespace:
                engine.sessions.bar()
                self._end_answers(engine)
        return self.tiers.forget(namespace)

    def _end_answers(self, engine: Engine) -> None:
        for session in engine.sessions:
            if session.lease:
                self.index.release(session.lease)  # what it kept is stale after a reset: the extents come free
                session.lose_lease()

    def _see_layout(self, engine: Engine, layout: tuple[bytes, ...]) -> None:
        """If the layout of *engine* is another, what was granted under the former is neither published nor valid.

        Copies that are under way end by themselves; the slots of the writers among them stay quarantined until then.
        """
        if layout == engine.last_layout:
            return
        engine.last_layout = layout
        self._end_answers(engine)
        for client in engine.workers.values():
            self.index.lose_worker(client.number)
            if self.transfer is not None:
                self.transfer.end_grants(client)

    def end_session(self, engine: Engine, number: int) -> None:
        """The session goes, with everything that it owned; one that is not there is no error."""
        session = engine.sessions.end(number)
        if session is not None:
            engine.digests -= session.known
            if self.cancel_prefetch is not None:
                self.cancel_prefetch(engine, session)
            self.index.end_session((engine.name, number))

    def over_limit(self, client: Client, name: str, what: str) -> Misuse:
        """*client* would exceed the limit *name* with *what*: it is counted, told once in the log, and to be raised."""
        self.limits_hit[name] += 1
        error = Misuse(f"{client} has {what}: that is limits.{name}; the server's configuration can raise it")
        if name not in client.limits_met:
            client.limits_met.add(name)
            log.warning("%s", error)
        return error

    def reserve(
        self, client: Client, engine: Engine, worker: int, session: int, parent: bytes, digests: Sequence[bytes]
    ) -> Reservation:
        """Slots for a store of *client*, which the index knows as *worker*; what gets none is counted, by reason."""
        reason = self.why_no_slots(client, engine, session)
        if reason:
            self.dropped[reason] += len(digests)
            return Reservation(b"", (), {reason: len(digests)} if digests else {})
        now, key, shard = trio.current_time(), (engine.name, session), client.hello.shard
        made = self.index.reserve(key, worker, shard, engine.namespace, parent, digests, now)
        if made.id:
            self.clock.not_later_than(now + self.config.reservation_timeout)
        if "share" in made.dropped and "write_share" not in client.limits_met:
            client.limits_met.add("write_share")
            words = (
                "%s is writing %s with its engine, and gets no more at one time: that is write_share (%g of the memory"
                " that no other engine is writing); what it stores beyond is dropped until copies of it end"
            )
            log.warning(words, client, format_size(self.index.bytes_written_by(engine.name)), self.config.write_share)
        return made

    def tell_overdue(self) -> None:
        """A line of log for each client that did not commit in time, the first time."""
        for worker in self.index.overdue_writers():
            client = self.clients.get(worker)
            if client is None and self.transfer is not None:
                client = self.transfer.attachments.client_of(worker)
            if client is None or "reservation_timeout" in client.limits_met:
                continue
            client.limits_met.add("reservation_timeout")
            words = (
                "%s (process %s) did not commit what it reserved within reservation_timeout (%g s): it is not served,"
                " and %s that its engine is writing stay taken until it says that its copies ended, or exits"
            )
            written = format_size(self.index.bytes_written_by(client.hello.engine))
            log.warning(words, client, client.peer_pid, self.config.reservation_timeout, written)

    def why_no_slots(self, client: Client, engine: Engine, session: int) -> str:
        """Why a store of *client* gets none, whatever room there is; "" when there is no such reason."""
        if self.stopping:
            return "stopping"
        if client.pidfd is None:
            return "no_arena"
        if not engine.namespace:
            return "no_namespace"
        return engine.sessions.why_no_store(session)

    # --- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Give out nothing more; `idle` is set once every copy that is under way has ended."""
        self.stopping = True
        self.note_progress()

    def note_progress(self) -> None:
        moving = self.transfer is not None and self.transfer.busy
        if self.stopping and not moving and not any(c.copies or c.pins for c in self.clients.values()):
            self.idle.set()
