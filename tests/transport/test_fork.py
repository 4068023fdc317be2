"""A forked child: NNG would end it, so it is told; plain unix sockets work there."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

import lmcache_trio._transport.over_nng
import lmcache_trio._transport.over_unix  # noqa: F401
from lmcache_trio import Misuse, open_client
from lmcache_trio._transport import listen, listen_pair
from lmcache_trio.testing.sides import ServerProcess


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _visit(address: str) -> None:
    with trio.fail_after(20):
        async with open_client(address) as client:
            await client.ping()


async def _listen(address: str) -> None:
    listen(address).close()


async def _listen_pair(address: str) -> None:
    listen_pair(address).close()


def _in_child(use: Callable[..., object], address: str) -> int:
    """The status of a forked child: 7 for `Misuse` that says what to do, 8 for another error, 0 for none."""
    pid = os.fork()
    if not pid:
        status = 9
        try:
            trio.run(use, address)  # type: ignore[arg-type]
            status = 0
        except Misuse as exc:
            status = 7 if "forked" in str(exc) and "unix://" in str(exc) else 6
        except BaseException:  # noqa: BLE001
            status = 8
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("use", [_visit, _listen, _listen_pair])
def test_nng_in_a_child_of_a_process_that_used_it_is_misuse_and_ends_nobody(use: Callable[..., object]) -> None:
    server = ServerProcess(f"tcp://127.0.0.1:{free_port()}")
    server.start()
    try:
        trio.run(_visit, server.address)
        assert _in_child(use, server.address if use is _visit else "tcp://127.0.0.1:0") == 7
        trio.run(_visit, server.address)
    finally:
        server.kill()


@pytest.mark.parametrize("use", [_visit, _listen, _listen_pair])
def test_unix_sockets_work_in_a_forked_child(use: Callable[..., object], tmp_path: Path) -> None:
    server = ServerProcess(f"unix://{tmp_path}/s")
    server.start()
    try:
        trio.run(_visit, server.address)
        assert _in_child(use, server.address if use is _visit else f"unix://{tmp_path}/other") == 0
        trio.run(_visit, server.address)
    finally:
        server.kill()
