"""A server in a process of its own, every thread of whose disk hangs: it serves from memory, and it can be ended."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from lmcache_trio._wire.messages import AnswerState, Role
from lmcache_trio.client import open_client

SERVE = """
import sys
from lmcache_trio import load_config
from lmcache_trio._server.supervise import serve
serve(load_config(sets=sys.argv[1:], environ={}), lambda server: print("ready", flush=True))
"""
SHARD = 64 << 10

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/s.ipc"


@pytest.fixture
def start(tmp_path: Path, address: str) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def run(*sets: str) -> "subprocess.Popen[str]":
            command = [sys.executable, "-c", SERVE, f"address={address}", "memory.size=64MiB", *sets]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            return process

        yield run


def faulty(tmp_path: Path, *operations: str) -> list[str]:
    disk = ("backend=disk", f"path={tmp_path}/disk", "size=16MiB", "threads=2")
    sets = ["tiers.0.backend=faulty", *(f"tiers.0.inner.{setting}" for setting in disk)]
    for i, operation in enumerate(operations):
        when = "at=[2, 3, 4, 5]" if operation == "contains" else "rate=1.0"  # the first one probes the tier
        sets += [f"tiers.0.faults.{i}.{setting}" for setting in ("kind=hang_thread", f"on={operation}", when)]
    return sets


async def _hang(address: str, digests: Any, operations: tuple[str, ...]) -> None:
    """Store two chunks, wait until the tier's call for them hangs, and use the server as if it did not."""
    with trio.fail_after(20):
        async with open_client(address, role=Role.SCHEDULER, engine="e") as scheduler:
            async with open_client(address, role=Role.WORKER, engine="e") as worker:
                assert await worker.register(b"f" * 32, SHARD, 16)
                await scheduler.lookup(1, digests(2))
                async with worker.storing(1, b"", digests(2)) as storing:
                    for view in storing.slots.values():
                        view[:] = b"\x77" * SHARD
                if "contains" in operations:
                    began = trio.current_time()
                    answer = await scheduler.lookup(2, digests(3), budget=0.2)
                    assert (answer.state, answer.chunks) == (AnswerState.ANSWERED, 2)
                    assert 0.19 < trio.current_time() - began < 5
                while (await worker.statistics())["tiers"][0]["calls"] < len(operations):
                    pass
                for session in range(10, 20):
                    answer = await scheduler.lookup(session, digests(2))
                    assert answer.chunks == 2
                    async with worker.retrieving(answer.lease, 0, 2) as views:
                        assert [bytes(view) for view in views] == [b"\x77" * SHARD] * 2
                async with worker.storing(10, digests(2)[-1], digests(3)[2:]) as storing:
                    assert list(storing.slots) == [0]


@pytest.mark.parametrize("operations", [("store",), ("contains", "store")])
@pytest.mark.parametrize("signals", [1, 2])
def test_with_every_thread_of_a_tier_hung_memory_is_served_and_a_signal_ends_the_process_in_time(
    start: Start, address: str, tmp_path: Path, digests: Any, operations: tuple[str, ...], signals: int
) -> None:
    process = start(*faulty(tmp_path, *operations), "grace=1.0" if signals == 1 else "grace=60.0", "tier_timeout=60.0")
    trio.run(_hang, address, digests, operations)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    if signals == 2:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert process.poll() is None  # within its grace it waits for what is queued
        process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 3
    assert not Path(address.removeprefix("ipc://")).exists()


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
    command = [sys.executable, "-m", "lmcache_trio", "serve", "--address", f"ipc://{tmp_path}/other.ipc"]
    command += [part for setting in sets for part in ("--set", setting)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert f"{tmp_path}/disk" in ended.stderr
    assert "Traceback" not in ended.stderr
