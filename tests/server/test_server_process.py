"""A server that is a process of its own: signals, sudden deaths on either side, and the files that they leave."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from support.server import Refusal, digests, say_hello

from lmcache_trio import Config, ConfigError, Gone, load_config, open_client, open_server
from lmcache_trio._server.supervise import _second_signal, serve
from lmcache_trio._wire.messages import Role
from lmcache_trio.testing.forks import Fork, servers

SERVE = """
import sys
from lmcache_trio import load_config
from lmcache_trio._server.supervise import serve
def ready(server):
    assert "torch" not in sys.modules
    print("ready", server.statistics()["held"]["bytes_taken"], flush=True)
serve(load_config(sets=sys.argv[1:], environ={}), ready)
assert "torch" not in sys.modules
"""

WORKER = """
import hashlib, sys, trio
sys.path[:0] = [sys.argv[2]]
from support.server import digests as chain, say_hello as connect
from lmcache_trio._wire.messages import Role
async def main():
    scheduler = await connect(sys.argv[1], Role.SCHEDULER, "doomed")
    worker = await connect(sys.argv[1], Role.WORKER, "doomed")
    await worker.register()
    digests = chain(4)
    await scheduler.lookup(1, digests[:2])
    stored = await worker.reserve(1, digests[:2])
    await worker.commit(stored.reservation)
    answer = await scheduler.lookup(2, digests)
    from lmcache_trio._wire.messages import Pinned, Retrieve
    await worker.get(Pinned, Retrieve, answer.lease, 0, 2)
    assert (await worker.reserve(2, digests[2:], parent=digests[1])).reservation
    print("in the middle", flush=True)
    await trio.sleep_forever()
trio.run(main)
"""


@attrs.frozen(eq=False)
class Process:
    address: str
    process: Fork
    taken: int  # bytes of the arena when it was ready

    def end(self, *signals: signal.Signals) -> int:
        for number in signals:
            self.process.send_signal(number)
        return self.process.wait(timeout=30)


def _line(process: "Fork | subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts a server in a process of its own and waits until it answers."""
    with contextlib.ExitStack() as stack:

        def run(*sets: str, name: str = "server") -> Process:
            address = f"unix://{tmp_path}/{name}.sock"
            arguments = [f"address={address}", "memory.size=64MiB", *sets]
            process = stack.enter_context(servers.start(["-c", SERVE, *arguments]))
            stack.callback(process.kill)
            ready, taken = _line(process).split()
            assert ready == "ready"
            return Process(address, process, int(taken))

        yield run


async def _in_mid_store(connect: Any, address: str, digests: Any) -> tuple[Any, Any, bytes]:
    scheduler = await connect(address, Role.SCHEDULER)
    worker = await connect(address, Role.WORKER)
    await worker.register()
    await scheduler.lookup(1, digests(2))
    with trio.fail_after(60):
        while not (made := await worker.reserve(1, digests(2))).reservation:
            pass  # it answers before it has the first piece of its arena
    return scheduler, worker, made.reservation


async def test_sigterm_in_mid_store_lets_the_copy_end_and_leaves_no_file(start: Any, tmp_path: Path) -> None:
    server = start()
    scheduler, worker, reservation = await _in_mid_store(say_hello, server.address, digests)
    server.process.send_signal(signal.SIGTERM)
    with trio.fail_after(60):
        while not (await worker.reserve(1, digests(2))).dropped.get("stopping"):
            pass
    assert await worker.commit(reservation) == 2
    await worker.gone()
    assert server.end() == 0
    assert list(tmp_path.iterdir()) == []
    scheduler.connection.close()
    worker.connection.close()


async def test_a_second_sigterm_ends_the_process_at_once_and_leaves_no_file(start: Any, tmp_path: Path) -> None:
    server = start("grace=60")
    scheduler, worker, _ = await _in_mid_store(say_hello, server.address, digests)
    server.process.send_signal(signal.SIGTERM)
    while not (await worker.reserve(1, digests(2))).dropped.get("stopping"):
        pass
    with trio.fail_after(30):  # long before the grace
        with contextlib.suppress(Gone):
            while await worker.reserve(1, digests(2)):
                server.process.send_signal(signal.SIGTERM)  # the first of them are repeats
    assert server.end() == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    scheduler.connection.close()
    worker.connection.close()


async def test_signals_that_come_together_are_one_and_the_copy_may_end(start: Any, tmp_path: Path) -> None:
    server = start("grace=60")
    scheduler, worker, reservation = await _in_mid_store(say_hello, server.address, digests)
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCONT):
        server.process.send_signal(number)
    with trio.fail_after(60):
        while not (await worker.reserve(1, digests(2))).dropped.get("stopping"):
            pass
    assert await worker.commit(reservation) == 2
    await worker.gone()
    assert server.end() == 0
    assert list(tmp_path.iterdir()) == []
    scheduler.connection.close()
    worker.connection.close()


async def test_signals_are_repeats_of_the_first_for_half_a_second(autojump_clock: trio.testing.MockClock) -> None:
    send, receive = trio.open_memory_channel[signal.Signals](9)
    ended: list[tuple[float, signal.Signals]] = []

    async def wait() -> None:
        ended.append((trio.current_time() - began, await _second_signal(receive)))

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        for seconds, number in ((0.01, signal.SIGTERM), (0.3, signal.SIGHUP), (0.49, signal.SIGTERM)):
            await trio.sleep_until(began + seconds)
            send.send_nowait(number)
        await trio.testing.wait_all_tasks_blocked()
        assert ended == []
        await trio.sleep_until(began + 0.5)
        send.send_nowait(signal.SIGINT)
    assert ended[0][1] is signal.SIGINT


def test_a_late_repeat_does_not_change_the_exit_status_of_a_clean_end(tmp_path: Path) -> None:
    script = SERVE + "import os\nfor number in (15, 1, 2): os.kill(os.getpid(), number)\n"
    arguments = [f"address=unix://{tmp_path}/server.sock", "memory.size=1MiB"]
    with subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert _line(process).startswith("ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_a_server_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    script = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SERVE
    arguments = [f"address=unix://{tmp_path}/server.sock", "memory.size=1MiB"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert _line(process).startswith("ready")
        ignored = next(
            line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigIgn")
        )
        assert int(ignored.split()[1], 16) >> (signal.SIGHUP - 1) & 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_idle_server_ends_at_once_on_a_signal(start: Any, number: signal.Signals, tmp_path: Path) -> None:
    server = start("grace=60")
    assert server.end(number) == 0
    assert list(tmp_path.iterdir()) == []


def test_after_sigkill_the_next_start_removes_the_old_files_and_touches_none_of_a_live_server(
    start: Any, tmp_path: Path
) -> None:
    dead, live = start(name="dead"), start(name="live")
    dead.end(signal.SIGKILL)
    assert (tmp_path / "dead.sock").exists()
    again = start(name="dead")
    assert (tmp_path / "live.sock").exists()
    assert again.end(signal.SIGTERM) == 0
    assert live.process.poll() is None


async def test_two_servers_cannot_have_one_address_and_the_first_notices_nothing(start: Any) -> None:
    server = start()
    scheduler, worker, reservation = await _in_mid_store(say_hello, server.address, digests)
    with pytest.raises(ConfigError, match="in use") as caught:
        async with open_server(Config(address=server.address, memory={"backend": "cpu", "size": 1 << 20})):
            pass
    assert caught.value.key == "address"
    assert await worker.commit(reservation) == 2
    scheduler.connection.close()
    worker.connection.close()


async def test_nothing_is_held_of_a_client_that_was_killed_in_the_middle_by_notification(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(address=f"unix://{tmp_path}/server.sock", memory={"backend": "cpu", "size": 16 << 20}, grace=0.1)
    async with open_server(config) as server:
        arguments = [sys.executable, "-c", WORKER, server.address, str(Path(__file__).parents[1])]
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(_run, arguments)
            assert process.stdout is not None
            assert (await process.stdout.receive_some()).startswith(b"in the middle")
            held = server.statistics()["held"]
            assert (held["connections"], held["leases"], held["pins"], held["slots_writing"]) == (2, 1, 1, 2)
            killed = trio.current_time()
            process.kill()
            with trio.fail_after(60):
                while not _nothing_of_it(server.statistics()["held"]):
                    await trio.lowlevel.checkpoint()  # the server runs in this loop: it only needs its turns
            took = trio.current_time() - killed
        counted = server.statistics()["counted"]
        assert counted["exits_seen"] + counted["protocol_errors"] <= 1
        assert server.statistics()["held"]["slots_ready"] == 2
        with capsys.disabled():
            print(f"\n[killed client forgotten {took * 1000:.0f} ms after SIGKILL]", end=" ")


@pytest.mark.parametrize("role", [Role.SCHEDULER, Role.WORKER])
async def test_an_engine_is_refused_where_no_descriptor_can_come_along_and_an_observer_is_not(role: Role) -> None:
    config = Config(address="tcp://127.0.0.1:0", memory={"backend": "cpu", "size": 1 << 20})
    async with open_server(config) as server:
        assert not server.address.endswith(":0")
        with pytest.raises(Refusal, match=rf"a {role.name.lower()} cannot connect over tcp://.* unix://"):
            await say_hello(server.address, role)
        assert server.statistics()["counted"]["refused"] == 1
        with pytest.raises(ConfigError, match=rf"a {role.name.lower()} cannot use .*carries no descriptors"):
            async with open_client(server.address, role=role, engine="e"):
                pass
        async with open_client(server.address) as observer:
            assert await observer.ping() == server.boot


def _nothing_of_it(held: dict[str, Any]) -> bool:
    names = ("connections", "engines", "sessions", "leases", "pins", "reservations", "lost_writers")
    return not any(held[name] for name in (*names, "slots_writing", "slots_quarantined"))


async def _run(arguments: list[str], *, task_status: trio.TaskStatus[trio.Process]) -> None:
    await trio.run_process(arguments, stdout=subprocess.PIPE, check=False, task_status=task_status)


def test_a_server_answers_within_a_second_whatever_its_size_and_can_store_by_then(start: Any) -> None:
    """No clock is asked: it answers when it has taken the first piece, and not many more."""
    server = start("memory.size=2GiB", name="large")
    assert 1 << 20 < server.taken <= 256 << 20
    assert server.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (("memory.backend=cpuu",), "memory.backend"),
        (("memory.sise=1GiB",), "memory.sise"),
        (("memory.size=100000GiB",), "memory.size"),
        (("memory.size=true",), "memory.size"),
        (("address=unix:///proc/nowhere/x.sock",), "address"),
        (("address=ipc:///run/x.ipc",), "address"),
    ],
)
def test_a_setting_that_cannot_be_kept_ends_in_one_config_error_that_names_it(
    sets: tuple[str, ...], key: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        serve(load_config(sets=(f"address=unix://{tmp_path}/s.sock", *sets), environ={}))
    assert caught.value.key == key
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, lmcache_trio as t; t.open_server, t.Config; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30, env=os.environ)
