"""What only sockets can break: processes, files, forks, threads and the interpreter's end."""

import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from lmcache_trio import _transport
from lmcache_trio.errors import ConfigError, Gone, Unavailable

PEER = """
import sys, trio
from lmcache_trio import _transport
async def main():
    connection = await _transport.dial_pair(sys.argv[1])
    for i in range(3):
        await connection.send(b"%d" % i)
    await trio.sleep_forever()
trio.run(main)
"""
RENDEZVOUS = """
import sys, trio
from lmcache_trio import _transport
async def main():
    rendezvous = _transport.listen(sys.argv[1])
    pair = _transport.listen_pair(sys.argv[1])
    print(pair.address, flush=True)
    await trio.sleep_forever()
trio.run(main)
"""


Processes = list[subprocess.Popen[bytes]]


@pytest.fixture
def near(tmp_path: Path) -> str:
    return f"unix://{tmp_path}/s"


@pytest.fixture(params=["unix", "tcp"])
def anywhere(request: pytest.FixtureRequest, near: str) -> str:
    """Where a rendezvous can be opened; a TCP one takes any free port."""
    return near if request.param == "unix" else "tcp://127.0.0.1:0"


@pytest.fixture
def processes() -> Iterator[Processes]:
    started: Processes = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def python(code: str, *args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def runs_clean(code: str, *args: str) -> str:
    process = python(code, *args)
    try:
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err.decode()
    assert not err, err.decode()
    return out.decode()


def descriptor(connection: _transport.Connection) -> int:
    """Readable when a message is there."""
    found: int = connection._fd if hasattr(connection, "_fd") else connection._socket.recv_fd  # type: ignore[attr-defined]
    return found


async def test_a_peer_that_is_killed_is_noticed_by_notification_after_what_it_sent(
    anywhere: str, processes: Processes
) -> None:
    listener = _transport.listen_pair(anywhere)
    processes.append(peer := python(PEER, listener.address))
    with trio.fail_after(60):
        connection = await listener.accept()
        assert connection.peer_pid == (peer.pid if anywhere.startswith("unix") else None)
        assert await connection.receive() == b"0"
        assert await connection.receive() == b"1"
        while not select.select([descriptor(connection)], [], [], 0)[0]:
            await trio.lowlevel.checkpoint()
        peer.send_signal(signal.SIGKILL)
        await connection.wait_closed()
        assert await connection.receive() == b"2"
        with pytest.raises(Gone):
            await connection.receive()
    connection.close()


async def test_an_introduction_tells_who_came(near: str) -> None:
    rendezvous = _transport.listen(near)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_transport.introduce, near, b"hello")
            introduction = await rendezvous.accept()
            assert introduction.peer_pid == os.getpid()
            introduction.reply(b"")
    rendezvous.close()


async def test_socket_files_are_private_and_removed(near: str, tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        rendezvous, listener = _transport.listen(near), _transport.listen_pair(near)
    finally:
        os.umask(former)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(list(tmp_path.iterdir())) == 2
    with trio.fail_after(60):
        client = await _transport.dial_pair(listener.address)
        server = await listener.accept()
    assert list(tmp_path.iterdir()) == [tmp_path / "s"]
    rendezvous.close()
    client.close()
    server.close()
    assert list(tmp_path.iterdir()) == []


async def test_files_of_a_killed_server_are_removed_and_a_live_ones_are_not(
    near: str, tmp_path: Path, processes: Processes
) -> None:
    processes.append(server := python(RENDEZVOUS, near))
    assert server.stdout is not None
    live_pair = await trio.to_thread.run_sync(server.stdout.readline)
    before = sorted(tmp_path.iterdir())
    assert len(before) == 2
    with pytest.raises(ConfigError, match="in use"):
        _transport.listen(near)
    assert sorted(tmp_path.iterdir()) == before
    with trio.fail_after(60):
        await _transport.wait_listening(near)
    server.kill()
    server.wait()
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(Unavailable, match="no server listens"):
        await _transport.dial_pair(live_pair.decode().strip())
    rendezvous = _transport.listen(near)
    assert list(tmp_path.iterdir()) == [tmp_path / "s"]
    rendezvous.close()


async def test_what_is_no_socket_is_never_removed(near: str, tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket"):
        _transport.listen(near)
    assert (tmp_path / "s").read_text() == "precious"


async def test_a_file_that_is_no_socket_stays_whatever_its_name(near: str, tmp_path: Path) -> None:
    """A backup that is named by its time looks like a pair of a dead server's."""
    (tmp_path / "s.202611280912").write_text("precious")
    (tmp_path / "s.0123456789ab").mkdir()
    _transport.listen(near).close()
    assert (tmp_path / "s.202611280912").read_text() == "precious"
    assert (tmp_path / "s.0123456789ab").is_dir()


async def test_a_host_thread_may_send_while_the_loop_receives_and_closes(anywhere: str) -> None:
    for _ in range(20):
        listener = _transport.listen_pair(anywhere)
        with trio.fail_after(60):
            client = await _transport.dial_pair(listener.address)
            server = await listener.accept()

            def host(connection: _transport.Connection = client) -> str:
                while True:
                    try:
                        connection.send_nowait(b"from the host")
                    except trio.WouldBlock:
                        pass
                    except Gone:
                        return "gone"

            async with trio.open_nursery() as nursery:

                async def watch(host: Callable[[], str] = host) -> None:
                    assert await trio.to_thread.run_sync(host) == "gone"

                nursery.start_soon(watch)
                for _ in range(20):
                    assert await server.receive() == b"from the host"
                client.close()
        server.close()


async def test_closing_gives_back_every_descriptor(anywhere: str) -> None:
    async def once() -> None:
        rendezvous = _transport.listen(anywhere)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_transport.introduce, rendezvous.address, b"hello")
            (await rendezvous.accept()).reply(b"")
        listener = _transport.listen_pair(anywhere)
        client = await _transport.dial_pair(listener.address)
        server = await listener.accept()
        rendezvous.close()
        client.close()
        server.close()
        abandoned = _transport.listen_pair(anywhere)
        with trio.move_on_after(0.01):
            await abandoned.accept()

    with trio.fail_after(60):
        await once()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            await once()
    # NNG closes on a thread of its own, so the last round's may still be open; one leaked a round would be 20.
    assert len(os.listdir("/proc/self/fd")) < before + (10 if anywhere.startswith("tcp") else 1)


def test_importing_the_transport_or_using_unix_sockets_imports_no_pynng(tmp_path: Path) -> None:
    out = runs_clean("import sys, lmcache_trio._transport; print('pynng' in sys.modules)")
    assert out.strip() == "False"
    use = "import sys, trio; from lmcache_trio import _transport as t\nasync def main(): t.listen(sys.argv[1]).close()"
    out = runs_clean(f"{use}\ntrio.run(main); print('pynng' in sys.modules)", f"unix://{tmp_path}/s")
    assert out.strip() == "False"


FORKS = """
import gc, os, sys, trio
from lmcache_trio import _transport
from lmcache_trio.errors import Gone
from lmcache_trio.threads import Portal
kept = []
async def main(*, task_status):
    listener = _transport.listen_pair(sys.argv[1])
    client = await _transport.dial_pair(listener.address)
    server = await listener.accept()
    rendezvous = _transport.listen(sys.argv[1])
    kept.extend([client, server, rendezvous])
    task_status.started(client)
    await trio.sleep_forever()
async def echo():
    await kept[0].send(b"from the parent")
    return await kept[1].receive()
portal = Portal("loop")
client = portal.start(main, timeout=60)
pid = os.fork()
if pid == 0:
    try:
        client.send_nowait(b"from the child")
    except Gone:
        pass
    else:
        os._exit(3)
    if portal.alive or portal.post(print):
        os._exit(4)
    client.close()
    del client, kept[:]
    gc.collect()
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert sys.argv[1].startswith("tcp") or os.path.exists(sys.argv[1].partition("://")[2])
assert portal.call(echo, timeout=60) == b"from the parent"
assert portal.stop(10)
"""


def test_a_forked_child_finds_inherited_connections_gone_and_ends_cleanly(anywhere: str) -> None:
    runs_clean(FORKS, anywhere)


EXITS = """
import sys, threading, trio
from lmcache_trio import _transport
from lmcache_trio.errors import Gone
ready = threading.Event()
async def until_gone(fn):
    try:
        await fn()
    except Gone:
        pass
async def main():
    rendezvous = _transport.listen(sys.argv[1])
    listener = _transport.listen_pair(sys.argv[1])
    client = await _transport.dial_pair(listener.address)
    server = await listener.accept()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(until_gone, client.receive)
        nursery.start_soon(until_gone, rendezvous.accept)
        nursery.start_soon(_transport.wait_listening, sys.argv[2])
        await trio.testing.wait_all_tasks_blocked()
        ready.set()
        while True:
            try:
                await client.send(b"busy")
                await server.receive()
            except Gone:
                await trio.sleep_forever()
import trio.testing
threading.Thread(target=trio.run, args=(main,), daemon=True).start()
assert ready.wait(60)
"""


def test_the_interpreter_may_end_with_open_connections_in_a_daemon_thread(anywhere: str) -> None:
    for _ in range(3):
        runs_clean(EXITS, anywhere, "tcp://127.0.0.1:1" if anywhere.startswith("tcp") else anywhere + "x")
