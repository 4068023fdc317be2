"""The wiring and the nursery tree of a server. `open_server` has both in one sight.

    serve
    |- memory        grows the arena, pushes ArenaGrown
    |- exits         one task per process that may still be copying after its connection was lost
    |- clock         sleeps until something in the index falls due; sweeps after a reset
    |- records       writes the records of lookups, if a file is set
    |- tiers         one task per tier: its questions, its loads (a task each), its writes
    |- transfer      the device transfer worker, and one task per copy, which waits for its end
    `- connections   the rendezvous, HTTP, and one nursery per client: reader, writer, prefetches; dies first

Parts are made in order of need, each whole, so that no part is completed from outside. Shutdown order is nesting order.
Leaving `open_server` drains: the server grants nothing more, and copies under way have `grace` seconds to end. Then the
connections end, tiers have the rest of the grace to write their queues, and all else ends.
"""

import gc
import itertools
import logging
import math
import os
import resource
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from typing import Any

import attrs
import trio

from lmcache_trio import __version__
from lmcache_trio._core.index.arena import Arena
from lmcache_trio._core.index.index import Index
from lmcache_trio._core.sizing import FACTORS, SizeCurve
from lmcache_trio._server import http, rendezvous
from lmcache_trio._server.answers import Answers
from lmcache_trio._server.clock import Clock
from lmcache_trio._server.connection import serve_peer
from lmcache_trio._server.counts import Counts
from lmcache_trio._server.drain import Drain
from lmcache_trio._server.engines import Engines
from lmcache_trio._server.misses import Misses
from lmcache_trio._server.parts import Parts, Turns
from lmcache_trio._server.peers import Peers
from lmcache_trio._server.plugins import make_device, make_memory
from lmcache_trio._server.records import open_records
from lmcache_trio._server.report import report
from lmcache_trio._server.requests import Requests
from lmcache_trio._server.socket_directory import prepare_directory
from lmcache_trio._server.systemd import feed_watchdog, tell_systemd
from lmcache_trio._server.tasks import Starter, Tasks
from lmcache_trio._server.tiers.tiers import Tiers, make_tiers
from lmcache_trio._server.transfer.worker import TransferWorker
from lmcache_trio._server.watches import Watches
from lmcache_trio._transport import Rendezvous, Unfinished, listen, listen_pair
from lmcache_trio._wire.codec import encode
from lmcache_trio._wire.messages import ArenaGrown, ErrorKind, Refused, Role
from lmcache_trio.abc import Device, Memory, Tier
from lmcache_trio.config import Config, format_size
from lmcache_trio.config.addresses import socket_path
from lmcache_trio.errors import ConfigError, Gone, LMCacheTrioError, Unavailable

__all__ = ["Server", "open_server", "serve"]

log = logging.getLogger("lmcache_trio.server")

ENDING = 0.5
"""Seconds of a process's grace that are kept for its own end, after copies and tiers. It may take as long."""
LAST = 0.2
"""Seconds before the end of the grace at which a process that still runs ends itself: a thread hangs, maybe for ever.
The chunks on a disk are safe at any moment, so a longer wait would only bring a kinder exit status."""

DESCRIPTORS = 64
"""No start is tried with fewer file descriptors. A server has 17 with an empty disk tier, and 4 more per client while
that is admitted, 3 later: a scheduler and 8 workers make it 53."""

REPEAT = 0.5
"""Seconds in which further signals repeat the first. `timeout` and terminals signal a process and then its group, and
systemd sends SIGHUP behind SIGTERM, all within some milliseconds; a user who means it presses Ctrl-C again later."""


@attrs.frozen(eq=False)
class Server:
    """A running server, as `open_server` yields it."""

    address: str
    boot: bytes
    _parts: Parts
    http_address: str = ""
    """Where HTTP is answered; empty: nowhere."""

    @property
    def grace(self) -> float:
        """Seconds that copies under way have to end when the server is left."""
        return self._parts.config.grace

    def statistics(self) -> dict[str, Any]:
        """`server`, `faults`, `held`, `counted`, `rates` and `tiers`, as `lmcache-trio status --json` prints them."""
        return report(self._parts)

    def remove_files(self) -> None:
        """Unlink the files by which other processes find this server. For an end in a hurry. Idempotent."""
        for path in self._parts.sockets:
            with suppress(OSError):
                os.unlink(path)


@asynccontextmanager
async def open_server(  # noqa: PLR0915 the order of need, and the whole tree, in one sight
    config: Config | None = None,
    *,
    memory: Memory | None = None,
    tiers: Sequence[Tier] | None = None,
    device: Device | None = None,
) -> AsyncIterator[Server]:
    """Serve until the block is left. ConfigError names the setting at fault.

    *memory*, *tiers* and *device* are for programs that bring their own. By default they are made as `config` says.
    """
    config = Config() if config is None else config
    memory = make_memory(config.memory) if memory is None else memory
    tiers = make_tiers(config) if tiers is None else tiers
    device = make_device(config.device) if device is None else device
    tasks, drain, turns = Tasks(), Drain(), Turns(Unfinished(config.limits.unfinished_bytes))
    index = _make_index(config)
    clock = Clock(index.expire, index.sweep)
    all_tiers = Tiers(tiers, index, memory, clock, config)
    counts = Counts(SizeCurve(lambda: int(FACTORS[-1] * max(memory.size, all_tiers.capacity))))
    records = open_records(config.records, counts)
    requests = Requests(Misses(index, all_tiers, drain, counts), records)
    answers = Answers(index, clock, all_tiers, requests, drain, counts, config.prefetch_budget)
    numbers = itertools.count(1)  # the names of peers, readers and writers in the index
    prepare_directory(config.address, config.access)
    path = socket_path(config.address)
    sockets = set() if path is None else {str(path)}
    fronts = ExitStack()
    front = fronts.enter_context(closing(listen(config.address, config.access)))
    try:
        web = http.listen(config.http, config.access.socket_mode)
        if web is not None:
            fronts.callback(web.close)
            sockets |= {web.path} if web.path else set()
        async with memory.open(), trio.open_nursery() as upkeep:
            start_upkeep = tasks.starter(upkeep)
            if records is not None:
                start_upkeep(records.run, name="records")
            async with tasks.branch() as start_tier:
                all_tiers.open(start_tier, tasks.branch)
                async with _transfer(device, memory, index, all_tiers, numbers, drain, counts, tasks) as transfer:
                    engines = Engines(config, index, clock, all_tiers, answers, transfer, drain, counts)
                    peers = Peers(config, index, engines, transfer, numbers, drain, counts, start_upkeep)
                    parts = Parts(
                        config=config,
                        boot=rendezvous.new_boot(),
                        version=__version__,
                        began=trio.current_time(),
                        memory=memory,
                        tasks=tasks,
                        counts=counts,
                        drain=drain,
                        turns=turns,
                        sockets=sockets,
                        index=index,
                        clock=clock,
                        tiers=all_tiers,
                        answers=answers,
                        requests=requests,
                        transfer=transfer,
                        engines=engines,
                        peers=peers,
                        watches=Watches(index, all_tiers, engines),
                    )
                    await upkeep.start(_grow, parts, name="memory")
                    start_upkeep(clock.run, peers.tell_overdue, name="clock")
                    start_upkeep(parts.watches.run, name="watches")
                    async with trio.open_nursery() as connections:
                        start_connection = tasks.starter(connections)
                        if web is not None:
                            start_connection(http.serve_http, parts, web, name="http")
                        await all_tiers.wait_opened()
                        start_connection(_be_found, parts, front, fronts, start_connection, name="rendezvous")
                        yield Server(front.address, parts.boot, parts, "" if web is None else web.address)
                        drain.stopping = True
                        end = trio.current_time() + config.grace
                        with _grace_until(end, lambda: "copies of clients were cut off"):
                            await drain.wait_until(lambda: peers.idle)
                        connections.cancel_scope.cancel()
                with _grace_until(end, lambda: f"{format_size(all_tiers.bytes_queued)} were not written to tiers"):
                    await all_tiers.wait_idle()
            if records is not None:
                with _grace_until(end, lambda: "records were not written"):
                    await records.wait_idle()
            upkeep.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if all_tiers.refusal is not None:
            raise all_tiers.refusal from group
        raise
    finally:
        fronts.close()


def _make_index(config: Config) -> Index:
    return Index(
        Arena(),
        new_id=lambda: secrets.token_bytes(16),
        lease_share=config.lease_share,
        write_share=config.write_share,
        lease_timeout=config.lease_timeout,
        reservation_timeout=config.reservation_timeout,
        most_unused=config.limits.namespaces,
    )


@asynccontextmanager
async def _transfer(  # noqa: PLR0913 all parts that the device's worker works with
    device: Device | None,
    memory: Memory,
    index: Index,
    tiers: Tiers,
    numbers: "itertools.count[int]",
    drain: Drain,
    counts: Counts,
    tasks: Tasks,
) -> AsyncIterator[TransferWorker | None]:
    """The device's branch. It ends when no copy runs any more: the wait for a copy is shielded."""
    if device is None:
        yield None
        return
    async with device.open(memory), tasks.branch() as start:
        worker = TransferWorker(device, index, tiers, numbers, drain, counts, start)
        start(worker.run, name="transfer")
        yield worker


@contextmanager
def _grace_until(end: float, lost: Callable[[], str]) -> Iterator[None]:
    """The block may wait until *end*. If it has to end then, *lost* says for the log what was lost."""
    with trio.move_on_at(end) as scope:
        yield
    if scope.cancelled_caught:
        log.warning("the grace is over: %s", lost())


async def _grow(parts: Parts, *, task_status: trio.TaskStatus[None]) -> None:
    """Take the arena piece by piece, until it is whole or the file system has no more.

    It counts as started with the first piece: before, stores would be dropped as too large.
    """
    grew = await _take_piece(parts)
    task_status.started()
    while grew:
        grew = await _take_piece(parts)


async def _take_piece(parts: Parts) -> bool:
    taken = await parts.memory.grow()
    if taken == parts.index.arena.taken:
        return False
    parts.index.grow(taken)
    if parts.transfer is not None:
        parts.transfer.arena_grew()
    for peer in parts.peers:
        if peer.hello.role is Role.WORKER:
            peer.send(ArenaGrown(taken))
    return True


async def _be_found(parts: Parts, front: Rendezvous, fronts: ExitStack, start: Starter) -> None:
    """Answer at *front*. If its file was removed, answer at a new one of the same name, or end the server.

    Connected clients notice nothing. *fronts* closes the listeners.
    """
    config = parts.config
    while True:
        async with trio.open_nursery() as answering:
            answering.start_soon(_admit, parts, front, start, name="answers")
            await front.wait_lost()
            answering.cancel_scope.cancel()
        front.close()
        try:
            prepare_directory(config.address, config.access)
            front = fronts.enter_context(closing(listen(config.address, config.access)))
        except LMCacheTrioError as exc:
            why = f"the socket was removed while the server ran, and cannot be made anew, so the server ends: {exc}"
            raise ConfigError("address", why) from exc
        parts.counts.events["rebound"] += 1
        log.warning("the socket of %s was removed: it was made anew", config.address)


async def _admit(parts: Parts, front: Rendezvous, start: Starter) -> None:
    """Answer at the rendezvous, one client after the other; none of them waits for anything but its turn."""
    front.counted = parts.counts.events
    while True:
        try:
            introduction = await front.accept()
        except Gone as exc:  # it was closed under this task: a server without clients would only hold memory
            raise Unavailable(f"nobody can connect to {front.address} any more, so the server ends: {exc}") from exc
        peer = rendezvous.receive_hello(parts, introduction)
        if isinstance(peer, Refused):
            introduction.reply(encode(peer))
            continue
        try:
            listener = listen_pair(front.address, parts.config.access)
        except (LMCacheTrioError, OSError) as exc:  # out of file descriptors, say: this client's loss alone
            parts.peers.dismiss(peer)
            parts.counts.events["refused"] += 1
            log.warning("%s was refused: no connection could be made: %s", peer, exc)
            introduction.reply(encode(Refused(ErrorKind.UNAVAILABLE, f"no connection could be made: {exc}")))
            continue
        welcome = rendezvous.welcome(parts, peer, listener.address)
        introduction.reply(encode(welcome), [parts.memory.descriptor] if welcome.arena_size else ())
        start(serve_peer, parts, peer, listener, parts.tasks.branch, name=str(peer))


def serve(config: Config | None = None, on_ready: Callable[[Server], None] | None = None) -> None:
    """Serve in this process until SIGINT, SIGTERM or SIGHUP, then drain and return, all within the configured grace.

    A second signal, `REPEAT` seconds later or more, ends the process at once, and the end of the grace does where a
    thread hangs. *on_ready* is called when clients are answered. Runs a Trio loop in the main thread. When this returns
    the process is meant to end: it ignores those signals from then on. ConfigError names the setting at fault.
    """
    try:
        trio.run(_serve, config, on_ready)
    except ExceptionGroup as group:  # the nursery's wrapping means nothing to an operator
        refused: ConfigError | ExceptionGroup[ConfigError] | None = group.subgroup(ConfigError)
        while isinstance(refused, ExceptionGroup):
            refused = refused.exceptions[0]
        raise (refused or group) from group


async def _serve(config: Config | None, on_ready: Callable[[Server], None] | None) -> None:
    config = Config() if config is None else config
    grace = config.grace
    _take_descriptors()
    with _ending_signals() as signals:
        async with trio.open_nursery() as watch:
            async with open_server(attrs.evolve(config, grace=_draining(grace))) as server:
                gc.freeze()  # no collection looks at the objects of now any more. One before this finds 54 of 36,000
                if on_ready is not None:
                    on_ready(server)
                began = trio.current_time()
                _log_start(config, server)
                tell_systemd("READY=1")
                watch.start_soon(feed_watchdog, name="watchdog")
                first = await signals.receive()
                tell_systemd("STOPPING=1")
                log.info("%s: ending; a second signal ends it at once", first.name)
                watch.start_soon(_end_in_a_hurry, server, signals, grace, name="second signal")
            watch.cancel_scope.cancel()
            log.info("ended, after %.0f s", trio.current_time() - began)


def _log_start(config: Config, server: Server) -> None:
    statistics = server.statistics()
    tiers = ", ".join(f"{tier['name']} ({tier['state']})" for tier in statistics["tiers"]) or "none"
    size = format_size(statistics["held"]["bytes_size"])
    words = "lmcache-trio %s serves at %s: memory %s (%s), chunk_tokens %s, tiers: %s, device: %s"
    backends = config.memory["backend"], config.device["backend"]
    log.info(words, __version__, server.address, size, backends[0], config.chunk_tokens, tiers, backends[1])


def _take_descriptors() -> None:
    """Let this process have as many file descriptors as it may. ConfigError: these are too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # where "no limit" is more than the kernel lets any process have
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if 0 <= soft < DESCRIPTORS:  # RLIM_INFINITY is -1
        raise ConfigError(
            "ulimit -n",
            f"{soft} file descriptors are too few for one engine; allow {DESCRIPTORS} or more, better 4096: `ulimit -n"
            " 4096`, LimitNOFILE= of systemd, --ulimit nofile= of docker",
        )


@contextmanager
def _ending_signals() -> Iterator["trio.MemoryReceiveChannel[signal.Signals]"]:
    """The signals that ask this process to end, as they come. A SIGHUP that nohup has set to be ignored stays ignored.

    After the block they are ignored, so that a late repeat does not change the exit status of a clean end. If the block
    raises, their former actions return. (Trio's own receiver would raise signals that came and were not read anew.)
    """
    send, receive = trio.open_memory_channel[signal.Signals](math.inf)
    loop = trio.lowlevel.current_trio_token()

    def handle(number: int, frame: object) -> None:
        loop.run_sync_soon(send.send_nowait, signal.Signals(number))

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    former = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield receive
    except BaseException:
        for number, action in former.items():
            signal.signal(number, action)
        raise
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _draining(grace: float) -> float:
    """Seconds of *grace* for copies under way and tiers. The rest is for the process's own end."""
    return max(grace - ENDING, grace / 2)


async def _end_in_a_hurry(server: Server, signals: "trio.MemoryReceiveChannel[signal.Signals]", grace: float) -> None:
    """On a second signal, or if a thread hangs until the grace is over: leave without waiting."""
    signum = signal.SIGTERM
    with trio.move_on_after(max(grace - LAST, ENDING)):
        signum = await _second_signal(signals)
    log.warning("ending at once")
    server.remove_files()
    os._exit(128 + signum)


async def _second_signal(signals: "trio.MemoryReceiveChannel[signal.Signals]") -> signal.Signals:
    """Wait for a signal that does not repeat the first, which came just now."""
    repeated_until = trio.current_time() + REPEAT
    while True:
        number = await signals.receive()
        if trio.current_time() >= repeated_until:
            return number
