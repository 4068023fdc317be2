"""A server watches the name of its socket: where the file is removed it is made anew, or the server ends."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from lmcache_trio import Config, ConfigError, Server, open_client, open_server
from lmcache_trio._transport import listen


def config_at(path: Path) -> Config:
    return Config(address=f"unix://{path}", memory={"backend": "cpu", "size": 1 << 20}, grace=0.1)


def remove(path: Path) -> None:
    path.unlink()


def remove_directory(path: Path) -> None:
    shutil.rmtree(path.parent)


def move(path: Path) -> None:
    path.rename(path.with_name("moved"))


def move_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


def move_the_directory_above(path: Path) -> None:
    path.parent.parent.rename(path.parent.parent.with_name("moved"))


def put_a_dead_socket_in_its_place(path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{path}x")
    os.rename(f"{path}x", path)


async def rebound(server: Server) -> None:
    with trio.fail_after(5):
        while not server.statistics()["counted"]["rebound"]:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    "lose",
    [remove, remove_directory, move, move_directory, move_the_directory_above, put_a_dead_socket_in_its_place],
)
async def test_a_server_whose_socket_is_lost_listens_anew_and_its_clients_notice_nothing(
    tmp_path: Path, lose: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a" / "run" / "server.sock"
    async with open_server(config_at(path)) as server, open_client(server.address) as before:
        lose(path)
        await rebound(server)
        async with open_client(server.address) as after:
            assert await after.ping() == await before.ping() == server.boot
        assert sum("was removed: it was made anew" in line for line in caplog.messages) == 1
        assert server.statistics()["counted"]["rebound"] == 1
    assert not path.exists()


async def test_it_is_found_again_however_often_it_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "run" / "server.sock"
    async with open_server(config_at(path)) as server:
        for times in range(1, 4):
            path.unlink()
            with trio.fail_after(5):
                while server.statistics()["counted"]["rebound"] < times:
                    await trio.lowlevel.checkpoint()
            async with open_client(server.address) as client:
                assert await client.ping() == server.boot


async def test_files_beside_the_socket_that_come_and_go_are_nothing_to_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "server.sock"
    async with open_server(config_at(path)) as server:
        for number in range(20):
            (path.parent / str(number)).touch()
            (path.parent / str(number)).unlink()
            path.chmod(0o600)
            async with open_client(server.address) as client:
                await client.ping()
        assert server.statistics()["counted"]["rebound"] == 0


async def test_a_server_in_whose_place_another_listens_ends_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    path.parent.mkdir(exist_ok=True)
    other: list[Any] = []
    with pytest.raises(BaseExceptionGroup) as caught, trio.fail_after(5):
        async with open_server(config_at(path)):
            path.unlink()
            other.append(listen(f"unix://{path}"))
            await trio.sleep_forever()
    refused = caught.value.subgroup(ConfigError)
    while isinstance(refused, BaseExceptionGroup):
        refused = refused.exceptions[0]  # type: ignore[assignment]
    assert "in use" in str(refused)
    assert "so the server ends" in str(refused)
    assert path.exists()  # the other's
    other[0].close()


async def test_a_server_whose_directory_cannot_be_made_anew_ends_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "run" / "server.sock"
    with pytest.raises(BaseExceptionGroup) as caught, trio.fail_after(5):
        async with open_server(config_at(path)):
            shutil.rmtree(path.parent)
            path.parent.touch()  # a file is in the way
            await trio.sleep_forever()
    assert caught.group_contains(ConfigError, match="so the server ends")


async def test_where_the_kernel_gives_no_watch_it_looks_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_trio._transport.watching._libc.inotify_init1", lambda flags: -1)
    monkeypatch.setattr("lmcache_trio._transport.watching._UNTOLD", 0.01)
    path = tmp_path / "server.sock"
    async with open_server(config_at(path)) as server:
        path.unlink()
        await rebound(server)
