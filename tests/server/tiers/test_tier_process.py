"""A server in a process of its own, every thread of one of whose disks hangs: the rest works, and it can be ended."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from lmcache_trio_backends.disk import DiskConfig, DiskTier
from support.server import digests

from lmcache_trio import Client, Config
from lmcache_trio._server import supervise
from lmcache_trio._wire.messages import AnswerState, Role
from lmcache_trio.abc import ChunkKey
from lmcache_trio.client import open_client
from lmcache_trio.testing.forks import Fork, servers

SERVE = """
import logging, sys, trio
from lmcache_trio import load_config
from lmcache_trio._server.supervise import serve
from lmcache_trio.testing.faulty_tier import FaultyTier

async def tell(runners, count):
    for runner in runners:
        await runner.opened.wait()  # on a busy machine that may be later
    print("ready", flush=True)
    for runner in runners:
        if isinstance(runner.tier, FaultyTier):
            await runner.tier.wait_hanging(count)
            print("hanging", count, flush=True)

def ready(server):
    trio.lowlevel.spawn_system_task(tell, server._parts.tiers.runners, int(sys.argv[1]))

logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
serve(load_config(sets=sys.argv[2:], environ={}), ready)
"""
SHARD = 64 << 10
THREADS = 3


class Process:
    """A server in a process. `line` waits for a line of its output."""

    def __init__(self, fork: Fork) -> None:
        self.fork = fork

    def line(self, beginning: str) -> None:
        assert self.fork.stdout is not None
        for line in self.fork.stdout:
            if line.startswith(beginning):
                return
        raise AssertionError(f"it ended, and never said {beginning!r}")

    async def wait_line(self, beginning: str) -> None:
        await trio.to_thread.run_sync(self.line, beginning)

    def end(self) -> int:
        """Ask it to, once; its status."""
        self.fork.send_signal(signal.SIGTERM)
        return self.fork.wait(60)


Start = Callable[..., Process]


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix://{tmp_path}/s.sock"


@pytest.fixture
def start(address: str) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def run(*sets: str, hanging: int = 1) -> Process:
            settings = [f"address={address}", "memory.size=64MiB", "prefetch_budget=20.0", *sets]
            fork = stack.enter_context(servers.start(["-c", SERVE, str(hanging), *settings]))
            stack.callback(fork.kill)
            process = Process(fork)
            process.line("ready")
            return process

        yield run


def disk(number: int, path: Path, inner: str = "") -> list[str]:
    settings = ("backend=disk", f"path={path}", "size=16MiB", f"threads={THREADS}")
    return [f"tiers.{number}.{inner}{setting}" for setting in settings]


def faulty(path: Path, *operations: str) -> list[str]:
    """Tier 0, every call of which hangs in its thread."""
    sets = ["tiers.0.backend=faulty", *disk(0, path, "inner.")]
    for i, operation in enumerate(operations):
        when = "at=[2, 3, 4, 5]" if operation == "contains" else "rate=1.0"  # the first one probes the tier
        sets += [f"tiers.0.faults.{i}.{setting}" for setting in ("kind=hang_thread", f"on={operation}", when)]
    return sets


@contextlib.asynccontextmanager
async def engine(address: str) -> AsyncIterator[tuple[Any, Any]]:
    """Its scheduler and its worker."""
    with trio.fail_after(60):
        async with open_client(address, role=Role.SCHEDULER, engine="e") as scheduler:
            async with open_client(address, role=Role.WORKER, engine="e") as worker:
                assert await worker.register(b"f" * 32, SHARD, 16)
                yield scheduler, worker


async def _store(scheduler: Any, worker: Any, session: int, chain: list[bytes]) -> None:
    await scheduler.lookup(session, chain, budget=0.0)
    async with worker.storing(session, b"", chain) as storing:
        assert list(storing.slots) == list(range(len(chain)))
        for i, view in storing.slots.items():
            view[:] = chain[i] * (SHARD // 32)


async def _hits(scheduler: Any, worker: Any, session: int, chain: list[bytes]) -> None:
    answer = await scheduler.lookup(session, chain)
    assert answer.chunks == len(chain)
    async with worker.retrieving(answer.lease, 0, len(chain)) as views:
        assert [bytes(view) for view in views] == [digest * (SHARD // 32) for digest in chain]


def _fill(start: Start, address: str, path: Path, chain: list[bytes]) -> None:
    """A server that stores *chain* on the disk at *path*, and ends."""

    async def store() -> None:
        async with engine(address) as (scheduler, worker):
            await _store(scheduler, worker, 1, chain)

    process = start(*disk(0, path))
    trio.run(store)
    assert process.end() == 0


def _ends(process: Process, grace: float, signals: int) -> None:
    """By itself, and says how long it took; on a second signal at once."""
    began = time.monotonic()
    process.fork.send_signal(signal.SIGTERM)
    if signals == 2:
        process.line("SIGTERM: ending")
        with pytest.raises(subprocess.TimeoutExpired):  # within its grace it waits for its queues
            process.fork.wait(supervise.REPEAT)
        for _ in range(10):  # the first of them may still repeat the signal before
            process.fork.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.fork.wait(supervise.REPEAT)
    assert process.fork.wait(50) == 128 + signal.SIGTERM
    took = time.monotonic() - began
    print(f"grace {grace:g} s, {signals} SIGTERM: ended after {took:.3f} s")


@pytest.mark.parametrize("signals", [1, 2])
def test_with_every_thread_of_a_disk_hung_in_loads_memory_and_another_disk_serve_and_a_signal_ends_the_process(
    start: Start, address: str, tmp_path: Path, signals: int
) -> None:
    hung, other = tmp_path / "hung", tmp_path / "other"
    parked, healthy = digests(2 * THREADS, "parked"), digests(2, "healthy")
    _fill(start, address, hung, parked)
    _fill(start, address, other, healthy)
    grace = 3.0 if signals == 1 else 60.0
    sets = [*faulty(hung, "load"), *disk(1, other), f"grace={grace}", "tier_timeout=60.0"]
    process = start(*sets, hanging=THREADS)
    namespace = b""

    async def use() -> None:
        nonlocal namespace
        async with engine(address) as (scheduler, worker):
            namespace = worker.namespace
            began = trio.current_time()
            answer = await scheduler.lookup(1, parked, budget=0.3)
            assert (answer.state, answer.chunks) == (AnswerState.ANSWERED, 0)
            assert 0.29 < trio.current_time() - began < 20
            await process.wait_line(f"hanging {THREADS}")
            for session in range(10, 15):
                await _store(scheduler, worker, session, digests(2, f"prompt {session}"))
                await _hits(scheduler, worker, session + 100, digests(2, f"prompt {session}"))
            await _hits(scheduler, worker, 200, healthy)
            first, second = (await worker.statistics())["tiers"]
            assert (first["backend"]["hanging"], first["fenced"]) == (THREADS, False)  # all its threads, to the end
            assert (second["loads"], second["fenced"]) == (2, False)
            # No event tells of a writeback's end, so the speed of this disk would decide which chunks it has
            while signals == 1 and (await worker.statistics())["tiers"][1]["bytes_queued"]:  # noqa: ASYNC110
                await trio.sleep(0.01)

    trio.run(use)
    _ends(process, grace, signals)
    assert not Path(address.removeprefix("unix://")).exists()
    if signals == 1:  # the other disk took the stored chunks
        keys = [ChunkKey(namespace, digest) for digest in digests(2, "prompt 14")]
        assert trio.run(_contained, other, keys) == [True, True]


async def _opened(worker: Client) -> None:
    """A server does not wait for a slow disk for long. Chunks stored before the disk is open are not offered to it."""
    with trio.fail_after(60):
        while (await worker.statistics())["tiers"][0]["state"] != "open":  # noqa: ASYNC110  nothing tells
            await trio.sleep(0.01)


async def _contained(path: Path, keys: list[ChunkKey]) -> list[bool]:
    tier = DiskTier(DiskConfig(path=str(path), size=16 << 20))
    async with tier.open():
        return list(await tier.contains(keys))


@pytest.mark.parametrize("operations", [("store",), ("contains", "store")])
def test_with_a_disk_hung_in_its_stores_and_questions_memory_serves_and_a_signal_ends_the_process(
    start: Start, address: str, tmp_path: Path, operations: tuple[str, ...]
) -> None:
    sets = [*faulty(tmp_path / "hung", *operations), "grace=2.0", "tier_timeout=60.0"]
    process = start(*sets, hanging=len(operations))

    async def use() -> None:
        async with engine(address) as (scheduler, worker):
            await _opened(worker)
            await _store(scheduler, worker, 1, digests(2))
            if "contains" in operations:
                began = trio.current_time()
                answer = await scheduler.lookup(2, digests(3), budget=0.2)
                assert (answer.state, answer.chunks) == (AnswerState.ANSWERED, 2)
                assert 0.19 < trio.current_time() - began < 20
            await process.wait_line(f"hanging {len(operations)}")
            for session in range(10, 20):
                await _hits(scheduler, worker, session, digests(2))
            await _store(scheduler, worker, 20, digests(1, "more"))

    trio.run(use)
    _ends(process, 2.0, 1)


@pytest.mark.parametrize("grace", [1.0, 5.0, 60.0])
async def test_all_of_the_end_lies_within_the_grace_of_a_process(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, grace: float
) -> None:
    """Copies and tiers have most of it, a process that still runs is ended before it is over."""
    ended: list[tuple[int, float]] = []

    class NoFiles:
        def remove_files(self) -> None:
            """There are none."""

    send, no_signal = trio.open_memory_channel[signal.Signals](1)
    monkeypatch.setattr(os, "_exit", lambda status: ended.append((status, trio.current_time())))
    start = trio.current_time()
    with send:
        await supervise._end_in_a_hurry(NoFiles(), no_signal, grace)  # type: ignore[arg-type]
    ((status, when),) = ended
    assert status == 128 + signal.SIGTERM
    assert grace / 2 <= supervise._draining(grace) < when - start < grace


@pytest.fixture
def _own_signals() -> Iterator[None]:
    """After a clean end a server's process ignores signals; this process must not."""
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, action in former.items():
        signal.signal(number, action)


@pytest.mark.usefixtures("_own_signals")
async def test_a_process_drains_for_its_share_of_the_grace_and_is_watched_for_all_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    draining: list[float] = []
    watched = trio.Event()
    given: list[float] = []
    opened = supervise.open_server

    def open_server(config: Config) -> contextlib.AbstractAsyncContextManager[supervise.Server]:
        draining.append(config.grace)
        return opened(config)

    async def end_in_a_hurry(server: supervise.Server, signals: object, grace: float) -> None:
        given.append(grace)
        watched.set()
        await trio.sleep_forever()

    monkeypatch.setattr(supervise, "open_server", open_server)
    monkeypatch.setattr(supervise, "_end_in_a_hurry", end_in_a_hurry)
    config = Config(address=f"unix://{tmp_path}/s.sock", memory={"backend": "cpu", "size": 1 << 20}, grace=7.0)
    with trio.fail_after(60):
        await supervise._serve(config, lambda server: os.kill(os.getpid(), signal.SIGTERM))
    assert draining == [supervise._draining(7.0)] == [6.5]
    assert given == [7.0]


def test_a_tiers_misspelt_setting_is_named_with_exit_status_2(tmp_path: Path, address: str) -> None:
    command = [sys.executable, "-m", "lmcache_trio", "serve", "--address", address]
    sets = ["tiers.0.backend=disk", f"tiers.0.pth={tmp_path}/disk", "tiers.0.size=16MiB"]
    command += [part for setting in sets for part in ("--set", setting)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "tiers.0.pth" in ended.stderr
    assert "'path'" in ended.stderr


def test_a_directory_that_another_server_has_ends_the_start_with_exit_status_2(
    start: Start, tmp_path: Path, address: str
) -> None:
    sets = ["tiers.0.backend=disk", f"tiers.0.path={tmp_path}/disk", "tiers.0.size=16MiB"]
    start(*sets)
    command = [sys.executable, "-m", "lmcache_trio", "serve", "--address", f"unix://{tmp_path}/other.sock"]
    command += [part for setting in sets for part in ("--set", setting)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert f"{tmp_path}/disk" in ended.stderr
    assert "Traceback" not in ended.stderr
