"""Who comes to a unix socket and who is turned away, its file, and how a server is found when it starts."""

import contextlib
import errno
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from lmcache_trio import _transport
from lmcache_trio._transport import Rendezvous, over_unix, socket_files, watching
from lmcache_trio._transport.unix import PACKET
from lmcache_trio._transport.unix_sockets import open_socket
from lmcache_trio.errors import ConfigError, Unavailable

PACKETS = (socket.AF_UNIX, socket.SOCK_SEQPACKET)
WHOLE, FIRST, _, LAST = (bytes([kind]) for kind in range(4))


@pytest.fixture
def near(tmp_path: Path) -> str:
    return f"unix://{tmp_path}/s"


async def answer_all(rendezvous: Any) -> None:
    while True:
        introduction = await rendezvous.accept()
        introduction.reply(b"re: " + introduction.hello)


@asynccontextmanager
async def answering(near: str) -> AsyncIterator[Rendezvous]:
    rendezvous = _transport.listen(near)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_all, rendezvous)
            yield rendezvous
            nursery.cancel_scope.cancel()
    rendezvous.close()


def call(near: str) -> socket.socket:
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    caller.connect(near.removeprefix("unix://"))
    caller.setblocking(False)
    return caller


async def answer_to(caller: socket.socket) -> bytes:
    await trio.lowlevel.wait_readable(caller)
    with contextlib.suppress(ConnectionResetError):
        return caller.recv(100)
    return b""


async def test_clients_that_say_nothing_hold_nobody_up_and_the_oldest_are_turned_away(near: str) -> None:
    async with answering(near) as rendezvous:
        with contextlib.ExitStack() as callers:
            silent = [callers.enter_context(call(near)) for _ in range(over_unix._MOST_SILENT + 3)]
            assert await _transport.introduce(near, b"me") == b"re: me"
            assert [await answer_to(caller) for caller in silent[:3]] == [b""] * 3
            assert rendezvous.counted["turned_away"] >= 3
            silent[-1].send(WHOLE + b"at last")
            assert await answer_to(silent[-1]) == WHOLE + b"re: at last"
        assert await _transport.introduce(near, b"me") == b"re: me"


async def test_who_has_no_manners_or_left_is_not_introduced(near: str) -> None:
    rendezvous = _transport.listen(near)
    large = WHOLE + bytes(PACKET + 1)
    for packet in (b"", b"GET / HTTP/1.1\r\n\r\n", FIRST + b"x", large, WHOLE + b"left"):
        with call(near) as caller:
            caller.send(packet)
    rude = call(near)
    rude.send(FIRST + bytes(PACKET))
    rude.send(LAST + bytes(PACKET))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_transport.introduce, near, b"hello")
            introduction = await rendezvous.accept()
            assert introduction.hello == b"hello"
            introduction.reply(b"")
    assert await answer_to(rude) == b""
    rude.close()
    rendezvous.close()


async def test_an_answer_to_a_client_that_is_gone_is_no_error(near: str) -> None:
    rendezvous = _transport.listen(near)
    with trio.fail_after(60):
        with call(near) as caller:
            caller.send(WHOLE + b"hello")
            introduction = await rendezvous.accept()
        introduction.reply(b"to nobody")
    rendezvous.close()


async def test_a_server_that_goes_turns_everybody_away(near: str) -> None:
    rendezvous = _transport.listen(near)
    with trio.fail_after(60), call(near) as silent, call(near) as speaking:
        speaking.send(WHOLE + b"hello")
        await rendezvous.accept()
        with call(near) as late:
            rendezvous.close()
            assert [await answer_to(caller) for caller in (silent, speaking, late)] == [b""] * 3


@pytest.fixture
def no_descriptors() -> Iterator[Callable[[int], None]]:
    """Leave this process as many descriptors as it is told."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def leave(count: int) -> None:
        free = []
        for _ in range(count + 1):
            free.append(os.dup(0))
        for fd in free:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))

    yield leave
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("left", [0, 1])
async def test_without_descriptors_a_client_is_turned_away_and_the_loop_sleeps(
    near: str, no_descriptors: Callable[[int], None], left: int, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with answering(near) as rendezvous:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
            await wait_all_tasks_blocked()
            no_descriptors(left)
            caller.connect(near.removeprefix("unix://"))
            await wait_all_tasks_blocked()
            caller.setblocking(False)
            assert caller.recv(100) == b""
            with pytest.raises(Unavailable, match="could be opened"):
                await _transport.introduce(near, b"me")
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        (told,) = {record.getMessage() for record in caplog.records}
        assert told.startswith("a client was turned away: ")
        assert rendezvous.counted["turned_away"] >= 1
        assert "ulimit -n" in told
        assert await _transport.introduce(near, b"me") == b"re: me"


@pytest.mark.parametrize("again", ["in time", "when a client leaves"])
async def test_when_the_spare_descriptor_is_gone_too_the_loop_sleeps_and_lets_clients_in_again(
    near: str, no_descriptors: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    """Another part of the process takes it in the moment in which it is free."""
    stolen: list[int] = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def late() -> socket.socket:
        if not stolen:
            stolen.append(os.dup(0))
        return open_socket()

    monkeypatch.setattr(over_unix, "_NO_DESCRIPTOR", 0.05 if again == "in time" else 10_000)
    async with answering(near):
        monkeypatch.setattr(over_unix, "open_socket", late)
        with contextlib.ExitStack() as callers:
            silent, refused, waiting = (callers.enter_context(socket.socket(*PACKETS)) for _ in range(3))
            silent.connect(near.removeprefix("unix://"))
            await wait_all_tasks_blocked()
            no_descriptors(0)
            refused.connect(near.removeprefix("unix://"))
            await wait_all_tasks_blocked()
            assert stolen
            assert await answer_to(refused) == b""
            waiting.connect(near.removeprefix("unix://"))
            waiting.send(WHOLE + b"me")
            await wait_all_tasks_blocked()
            if again == "in time":
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            else:
                silent.close()
            assert await answer_to(waiting) == WHOLE + b"re: me"
    os.close(stolen[0])


async def test_a_pair_address_refuses_a_second_client_also_before_the_first_was_let_in(near: str) -> None:
    listener = _transport.listen_pair(near)
    first = await _transport.dial_pair(listener.address)
    with pytest.raises(Unavailable):
        await _transport.dial_pair(listener.address)
    server = await listener.accept()
    await first.send(b"undisturbed")
    assert await server.receive() == b"undisturbed"
    first.close()
    server.close()


# --- files ------------------------------------------------------------------------------------------------------------


async def test_a_file_that_is_anothers_by_now_is_not_removed(near: str, tmp_path: Path) -> None:
    first = _transport.listen(near)
    (tmp_path / "s").unlink()
    second = _transport.listen(near)
    first.close()
    assert (tmp_path / "s").exists()
    await _transport.wait_listening(near)
    second.close()
    assert list(tmp_path.iterdir()) == []


async def test_a_server_that_appeared_meanwhile_is_not_replaced(
    near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _transport.listen(near)
    monkeypatch.setattr("lmcache_trio._transport.socket_files.claim", lambda address: None)
    with pytest.raises(ConfigError, match="in use"):
        _transport.listen(near)
    assert list(tmp_path.iterdir()) == [tmp_path / "s"]
    first.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
async def test_a_file_of_another_program_is_left_to_it_and_told(
    near: str, tmp_path: Path, kind: socket.SocketKind
) -> None:
    with socket.socket(socket.AF_UNIX, kind) as other, trio.fail_after(60):
        other.bind(str(tmp_path / "s"))
        if kind == socket.SOCK_STREAM:
            other.listen()
        with pytest.raises(ConfigError, match="in use"):
            _transport.listen(near)
        with pytest.raises(ConfigError, match="is the socket of another program"):
            await _transport.introduce(near, b"hello")


# --- waiting for a server ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["", "a", "a/b"])
async def test_a_server_is_noticed_though_folders_on_the_way_were_missing(there: str, tmp_path: Path) -> None:
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    near = f"unix://{tmp_path}/a/b/s"
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_transport.wait_listening, near)
            await wait_all_tasks_blocked()
            (tmp_path / "beside").touch()
            (tmp_path / "a").mkdir(exist_ok=True)
            await wait_all_tasks_blocked()
            (tmp_path / "a" / "b").mkdir(exist_ok=True)
            (tmp_path / "a" / "b" / "beside").touch()
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 1
            rendezvous = _transport.listen(near)
    rendezvous.close()


async def test_a_server_is_noticed_after_its_folder_was_removed_or_moved_there(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    near = f"unix://{folder}/s"
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_transport.wait_listening, near)
            await wait_all_tasks_blocked()
            folder.rmdir()
            folder.parent.rmdir()
            await wait_all_tasks_blocked()
            (tmp_path / "c" / "b").mkdir(parents=True)
            rendezvous = _transport.listen(f"unix://{tmp_path}/c/b/s")
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 1
            (tmp_path / "c").rename(tmp_path / "a")
    rendezvous.close()


async def test_a_server_is_noticed_through_a_link_that_led_nowhere(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_transport.wait_listening, f"unix://{tmp_path}/link/s")
            await wait_all_tasks_blocked()
            (tmp_path / "a").mkdir()
            rendezvous = _transport.listen(f"unix://{tmp_path}/a/s")
    rendezvous.close()


async def test_without_watches_a_server_is_looked_for_now_and_then(near: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(path: str) -> None:
        raise OSError(24, "no instances")

    monkeypatch.setattr(watching, "Watch", none_left)
    monkeypatch.setattr(watching, "_UNWATCHED", 0.01)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_transport.wait_listening, near)
            await trio.sleep(0.05)
            rendezvous = _transport.listen(near)
    rendezvous.close()


@pytest.mark.parametrize("spared", [0, 1])
async def test_a_look_without_a_descriptor_does_not_end_the_wait_for_a_server(
    near: str, monkeypatch: pytest.MonkeyPatch, spared: int
) -> None:
    looks = iter([False] * spared)
    failed = trio.Event()
    is_listening = socket_files.is_listening

    def out_of_descriptors_once(path: str) -> bool:
        if not failed.is_set() and next(looks, True):
            failed.set()
            raise OSError(errno.EMFILE, "Too many open files")
        return is_listening(path)

    monkeypatch.setattr(socket_files, "is_listening", out_of_descriptors_once)
    monkeypatch.setattr(watching, "_UNWATCHED", 0.01)
    before = len(os.listdir("/proc/self/fd"))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_transport.wait_listening, near)
            await failed.wait()
            rendezvous = _transport.listen(near)
    rendezvous.close()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_waiting_for_a_server_leaves_no_descriptor_when_it_is_cancelled(near: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with trio.move_on_after(0.01):
            await _transport.wait_listening(near)
    assert len(os.listdir("/proc/self/fd")) == before
