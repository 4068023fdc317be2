"""What nobody thought of, in a copy or in a connection: it costs that one, is told and counted, and ends no adapter."""

import errno
import importlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache_trio._wire.messages import PROTOCOL_VERSION, Hello, Role
from lmcache_trio.adapters import LoadSpec, StoreSpec
from lmcache_trio.adapters.link import Link
from lmcache_trio.adapters.shared_kv import shared_tensor
from lmcache_trio.client import Client, connect
from lmcache_trio.errors import ConfigError, Gone, ProtocolError, Unavailable
from lmcache_trio.testing.sides import CHUNK, LAYERS, ServerProcess, Side, make_kv, wait_until

MakeSide = Callable[..., Side]
TOKENS = list(range(3 * CHUNK))
OTHERS = list(range(10_000, 10_000 + 3 * CHUNK))
FROM = [5, 9, 1, 33, 34, 35, 36, 60, 2, 7, 8, 3]
INTO = [11, 40, 12, 50, 13, 51, 14, 52, 20, 21, 22, 23]
NAMES = [f"layer {i}" for i in range(LAYERS)]


class Bug:
    """A probe with a bug at one point of a copy, as often as *bugs* says."""

    def __init__(self) -> None:
        self.point, self.bugs = "", 0

    def __call__(self, point: str, spec: StoreSpec | LoadSpec) -> None:
        if point == self.point and self.bugs:
            self.bugs -= 1
            raise ValueError("nobody thought of this")


def buggy(sides: MakeSide, server: ServerProcess) -> tuple[Side, Bug]:
    bug = Bug()
    return sides(server.address, make_kv(1), probe=bug), bug


def told(caplog: pytest.LogCaptureFixture) -> int:
    """How often it was logged, with its traceback."""
    return sum(record.levelno == logging.ERROR and record.exc_info is not None for record in caplog.records)


@pytest.mark.parametrize("point", ["slots known", "half copied", "before commit"])
def test_a_bug_in_a_stores_copy_drops_that_store_and_no_more(
    live_server: ServerProcess, sides: MakeSide, caplog: pytest.LogCaptureFixture, point: str
) -> None:
    one, bug = buggy(sides, live_server)
    worker = one.worker
    bug.point, bug.bugs = point, 1
    one.store("r", TOKENS, FROM)
    assert worker.statistics() == {"running": 0, "dropped_unavailable": 3, "copy_bugs": 1}
    assert told(caplog) == 1
    assert one.lookup("q", TOKENS) == 0
    wait_until(lambda: live_server.held["bytes_quarantined"] == live_server.held["bytes_writing"] == 0)
    one.check_round_trip("after", OTHERS, FROM, INTO)


@pytest.mark.parametrize("point", ["slots known", "half copied", "before valid"])
def test_a_bug_in_a_retrieves_copy_fails_its_blocks_and_no_more(
    live_server: ServerProcess, sides: MakeSide, caplog: pytest.LogCaptureFixture, point: str
) -> None:
    one, bug = buggy(sides, live_server)
    worker = one.worker
    one.store("r", TOKENS, FROM)
    assert one.lookup("q", TOKENS) == 3 * CHUNK
    bug.point, bug.bugs = point, 1
    assert one.load("q", 3 * CHUNK, INTO) == set(INTO)
    assert worker.statistics()["copy_bugs"] == told(caplog) == 1
    wait_until(lambda: live_server.held["pins"] == 0)
    one.check_round_trip("after", OTHERS, FROM, INTO)


@pytest.mark.parametrize(
    ("failure", "when"),
    [
        (Gone("it went"), "the first time"),
        (Gone("it went"), "later"),
        (ProtocolError("no sentence of ours"), "later"),  # the first time it is refused: no server of ours
        (ValueError("nobody thought of this"), "the first time"),
        (ValueError("nobody thought of this"), "later"),
    ],
)
def test_a_link_tries_again_whatever_ended_its_connection(
    live_server: ServerProcess, failure: Exception, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    fails = [] if when == "later" else [failure]

    async def connected(client: Client) -> None:
        if fails:
            raise fails.pop()

    hello = Hello(PROTOCOL_VERSION, "a link", os.urandom(16), Role.OBSERVER, "")
    link = Link(live_server.address, hello, connected=connected, lost=lambda: None)
    link.start(30.0)
    try:
        if when == "later":
            first = link.client
            assert first is not None
            fails.append(failure)
            link.post(first._connection.close)
            wait_until(lambda: not fails)
        wait_until(lambda: link.client is not None)
        assert link.alive
        assert told(caplog) == isinstance(failure, ValueError)
    finally:
        link.stop(30.0)


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.EMFILE, "Too many open files"), Unavailable("no socket"), ValueError("nobody thought of it")],
)
@pytest.mark.parametrize(
    "where", ["lmcache_trio._transport.socket_files.is_listening", "lmcache_trio.adapters.link.wait_server"]
)
def test_a_link_goes_on_whatever_ended_its_wait_for_a_server(
    tmp_path: Path, where: str, failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module, _, name = where.rpartition(".")
    real = getattr(importlib.import_module(module), name)
    fails = [failure]

    def fails_once(asked: str) -> object:
        if fails:
            raise fails.pop()
        return real(asked)

    monkeypatch.setattr(where, fails_once)
    monkeypatch.setattr("lmcache_trio.adapters.link.REFUSED_WAIT", 0.01)
    monkeypatch.setattr("lmcache_trio._transport.watching._UNWATCHED", 0.01)

    async def connected(client: Client) -> None:
        pass

    server = ServerProcess(f"unix://{tmp_path}/s.sock")
    hello = Hello(PROTOCOL_VERSION, "a link", os.urandom(16), Role.OBSERVER, "")
    link = Link(server.address, hello, connected=connected, lost=lambda: None)
    try:
        link.start(0.0)
        wait_until(lambda: not fails)
        server.start()
        wait_until(lambda: link.client is not None)
        assert link.alive
    finally:
        link.stop(30.0)
        server.kill()


async def no_preparation(client: Client) -> None:
    """Of a client that is to do nothing."""


@pytest.fixture
def other_program(tmp_path: Path) -> Iterator[Path]:
    """A socket at which something else than a server listens."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s.sock"))
        other.listen()
        yield tmp_path / "s.sock"


def test_a_link_that_starts_at_another_programs_socket_is_told(other_program: Path) -> None:
    hello = Hello(PROTOCOL_VERSION, "a link", os.urandom(16), Role.OBSERVER, "")
    link = Link(f"unix://{other_program}", hello, connected=no_preparation, lost=lambda: None)
    with pytest.raises(ConfigError, match=f"{other_program} is the socket of another program"):
        link.start(60.0)


def test_a_link_that_waits_where_another_program_comes_logs_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused: list[str] = []

    def counted(address: str, *args: Any) -> Any:
        if caplog.text:
            refused.append(address)
        return connect(address, *args)

    monkeypatch.setattr("lmcache_trio.adapters.link.connect", counted)
    monkeypatch.setattr("lmcache_trio.adapters.link.REFUSED_WAIT", 0.01)
    path = tmp_path / "s.sock"
    hello = Hello(PROTOCOL_VERSION, "a link", os.urandom(16), Role.OBSERVER, "")
    link = Link(f"unix://{path}", hello, connected=no_preparation, lost=lambda: None)
    try:
        link.start(0.0)
        caplog.clear()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            wait_until(lambda: len(refused) > 3)
        assert [(record.levelname, str(path) in record.getMessage()) for record in caplog.records] == [("ERROR", True)]
    finally:
        link.stop(30.0)


def test_a_server_that_dies_as_it_says_that_it_opened_the_kv_is_waited_for_again(
    live_server: ServerProcess, sides: MakeSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, asked = Client.open_pidfd, []

    def open_pidfd(client: Client) -> int | None:
        asked.append(client)
        return None if len(asked) == 1 else opened(client)

    monkeypatch.setattr(Client, "open_pidfd", open_pidfd)
    plain = make_kv(1)
    kv = dict(plain)
    memory = shared_tensor(sum(t.nbytes for t in plain.values())).view(torch.float32)
    layers = memory.view(LAYERS, *plain[NAMES[0]].shape)
    for (name, tensor), layer in zip(plain.items(), layers, strict=True):
        kv[name] = layer.copy_(tensor)
    one = sides(live_server.address, kv)
    live_server.kill()
    live_server.start()
    one.wait_healthy()
    assert one.worker.path == "device"
    assert len(asked) == 2
    one.check_round_trip("after", OTHERS, FROM, INTO)
