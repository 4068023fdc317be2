"""A server that systemd started tells it when it is ready, that it lives, and when it ends."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_trio._server.systemd import watchdog_interval

UNIT = Path(__file__).parents[2] / "docs" / "howto" / "systemd" / "lmcache-trio.service"


@pytest.fixture(params=["a file", "an abstract name"])
def notify(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The socket that systemd listens at, and how it names it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = str(tmp_path / "notify") if request.param == "a file" else f"@lmcache-trio-test-{os.getpid()}"
        sock.bind(name.replace("@", "\0", 1))
        sock.settimeout(60)
        yield sock, name


def test_systemd_is_told_of_each_turn(notify: tuple[socket.socket, str], tmp_path: Path) -> None:
    sock, name = notify
    command = [sys.executable, "-m", "lmcache_trio", "serve", "--address", f"unix://{tmp_path}/s/server.sock"]
    told = {**os.environ, "NOTIFY_SOCKET": name, "WATCHDOG_USEC": "20000"}
    told.pop("WATCHDOG_PID", None)
    with subprocess.Popen([*command, "--set", "memory.size=1MiB"], env=told, stdout=subprocess.DEVNULL) as process:
        assert sock.recv(100) == b"READY=1"
        assert [sock.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        process.send_signal(signal.SIGTERM)
        while (said := sock.recv(100)) == b"WATCHDOG=1":
            pass
        assert said == b"STOPPING=1"
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["", "relative", "/nowhere/notify", "@nobody-listens-there"])
def test_a_server_serves_where_no_systemd_listens(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lmcache_trio", "serve", "--address", f"unix://{tmp_path}/s/server.sock"]
    where = {**os.environ, "NOTIFY_SOCKET": name}
    with subprocess.Popen(
        [*command, "--set", "memory.size=1MiB"], env=where, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_it_wants(environ: dict[str, str], interval: float | None) -> None:
    assert watchdog_interval(environ) == interval


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_itself_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    program = tmp_path / "lmcache-trio"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/lmcache-trio/bin/lmcache-trio", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if UNIT.name in line or "lmcache-trio" in line]
    assert (done.returncode, complaints) == (0, [])
