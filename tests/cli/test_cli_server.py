"""`lmcache-trio serve` and `status`, as processes: what a user sees of a running server, a stopped one and none."""

import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import attrs
import pytest
import trio

from lmcache_trio._transport import introduce
from lmcache_trio._wire.codec import decode, encode
from lmcache_trio._wire.messages import PROTOCOL_VERSION, Hello, Role, Welcome

PROGRAM = [sys.executable, "-m", "lmcache_trio"]


@attrs.frozen(eq=False)
class Server:
    address: str
    process: subprocess.Popen[str]
    ready: str

    def end(self, number: signal.Signals) -> str:
        """Signal it; returns what it wrote to standard error until it had ended."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=60)[1]


def start(address: str, *sets: str) -> Server:
    command = [*PROGRAM, "serve", "--address", address, "--set", "memory.size=16MiB", "grace=0.5", *sets]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _started.append(process)
    assert process.stdout is not None
    ready = process.stdout.readline()
    listening = re.search(r"ready: address (\S+),", ready)
    return Server(listening[1] if listening else address, process, ready)


_started: list["subprocess.Popen[str]"] = []


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    """Also where a test failed half-way."""
    yield
    while _started:
        process = _started.pop()
        if process.returncode is None:
            process.kill()
            process.communicate(timeout=60)


@pytest.fixture
def scheme() -> str:
    """Of the server's address; tests of what hangs on the transport set it."""
    return "unix"


@pytest.fixture
def server(tmp_path: Path, scheme: str) -> Server:
    return start(f"unix://{tmp_path}/server.sock" if scheme == "unix" else "tcp://127.0.0.1:0")


def status(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, "status", "--address", address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def failed(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_one_line_says_that_it_is_ready_with_address_arena_and_pid(server: Server) -> None:
    assert server.ready.count("\n") == 1
    assert server.address in server.ready
    assert re.search(r"\b16(\.0)? MiB\b", server.ready)
    assert re.search(rf"\b{server.process.pid}\b", server.ready)


def test_status_as_json_has_what_is_held_what_was_counted_and_each_tier(server: Server) -> None:
    done = status(server.address, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    statistics = json.loads(done.stdout)
    assert set(statistics) == {"server", "faults", "held", "counted", "rates", "tiers"}
    assert statistics["held"]["connections"] == 1  # the question's own
    assert statistics["held"]["bytes_size"] == 16 << 20


def test_status_with_all_figures_names_the_same_things(server: Server) -> None:
    held = json.loads(status(server.address, "--json").stdout)["held"]
    done = status(server.address, "--all")
    assert (done.returncode, done.stderr) == (0, "")
    for name, value in held.items():
        if not isinstance(value, dict):
            assert name in done.stdout


def to_where(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run our program in a shell: *command* has `"$@"` where the program stands."""
    words = ["bash", "-c", command, "bash", *PROGRAM, *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


UNREAD = 'exec 3> >(:); wait $!; "$@" >&3'
"""A pipe whose reader has gone already."""


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_status_ends_without_a_word_when_nobody_reads_what_it_prints(server: Server, arguments: list[str]) -> None:
    done = to_where(UNREAD, "status", "--address", server.address, *arguments)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_status_says_in_one_line_that_the_disk_is_full(server: Server, arguments: list[str]) -> None:
    done = to_where('"$@" > /dev/full', "status", "--address", server.address, *arguments)
    failed(done, "No space left on device")


@pytest.mark.parametrize("arguments", [["--json"], []])
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ('cd "$DIR"; ulimit -f 0; "$@" > out', "File too large"),
        ('"$@" 1< /dev/null', "Bad file descriptor"),
    ],
)
def test_status_says_in_one_line_that_its_output_takes_nothing(
    server: Server, arguments: list[str], command: str, words: str, tmp_path: Path
) -> None:
    done = to_where(f'DIR="{tmp_path}"; {command}', "status", "--address", server.address, *arguments)
    failed(done, words)


def test_status_into_the_first_lines_of_it_prints_them(server: Server) -> None:
    done = to_where('set -o pipefail; "$@" | head -1', "status", "--address", server.address, "--json")
    assert (done.stdout, done.stderr) == ("{\n", "")
    assert done.returncode in (0, 128 + signal.SIGPIPE)  # it may have written all before head ended


@pytest.mark.parametrize("command", [UNREAD, '"$@" > /dev/full'])
def test_a_server_whose_ready_line_nobody_gets_ends_with_one_line(command: str, tmp_path: Path) -> None:
    arguments = ["serve", "--address", f"unix://{tmp_path}/server.sock", "--set", "memory.size=16MiB"]
    done = to_where(f"export LMCACHE_TRIO_LOG=warning; {command}", *arguments)
    failed(done, "ready", "Broken pipe" if command == UNREAD else "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("errors", ["> >(:)", "> /dev/full", ">&-"])
def test_a_server_outlives_the_reader_of_its_log(errors: str, tmp_path: Path) -> None:
    address = f"unix://{tmp_path}/server.sock"
    script = f'exec "$@" 2{errors}'
    command = ["bash", "-c", script, "bash", *PROGRAM, "serve", "--address", address, "--set", "memory.size=16MiB"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    _started.append(process)
    assert process.stdout is not None
    assert "ready" in process.stdout.readline()
    assert status(address).returncode == 0
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_no_file_of_a_server_gets_the_number_of_a_standard_stream_that_is_closed(tmp_path: Path) -> None:
    """What a library in C writes there would go into it: into the arena, say."""
    address = f"unix://{tmp_path}/server.sock"
    command = ["bash", "-c", 'exec "$@" <&- 2>&-', "bash", *PROGRAM, "serve", "--address", address]
    process = subprocess.Popen([*command, "--set", "memory.size=16MiB"], stdout=subprocess.PIPE, text=True)
    _started.append(process)
    assert process.stdout is not None
    assert "ready" in process.stdout.readline()
    assert [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (0, 2)] == ["/dev/null"] * 2


def test_status_finds_the_address_in_the_servers_own_file(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f"address = '{server.address}'\n[memory]\nbackend = 'cpu'\nsize = '16MiB'\n")
    done = subprocess.run(
        [*PROGRAM, "status", "--config", str(file), "--json"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "held" in json.loads(done.stdout)


def test_status_without_a_server_is_one_line_at_once(tmp_path: Path) -> None:
    address = f"unix://{tmp_path}/nobody.sock"
    failed(status(address, "--timeout", "30"), address)


@pytest.mark.parametrize(("scheme", "arguments"), [("unix", []), ("tcp", []), ("unix", ["--json"])])
def test_status_of_a_stopped_server_returns_by_its_deadline(server: Server, arguments: list[str]) -> None:
    server.process.send_signal(signal.SIGSTOP)
    try:
        done = status(server.address, "--timeout", "0.5", *arguments)
    finally:
        server.process.send_signal(signal.SIGCONT)
    failed(done, server.address, "0.5 s")
    assert status(server.address).returncode == 0


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_processes_that_end_as_soon_as_they_gave_up_on_a_stopped_server_end_with_their_own_status(
    server: Server,
) -> None:
    """NNG was in mid-handshake then; its own end of the process used to abort one in five."""
    command = [*PROGRAM, "status", "--address", server.address, "--timeout", "0.2"]
    server.process.send_signal(signal.SIGSTOP)
    try:
        asking = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(12)]
        ended = [process.communicate(timeout=60)[1] for process in asking]
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert [process.returncode for process in asking] == [1] * len(asking), ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_cleanly_and_no_file_is_left(tmp_path: Path, number: signal.Signals) -> None:
    server = start(f"unix://{tmp_path}/server.sock")
    errors = server.end(number)
    assert server.process.returncode == 0
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_second_server_at_the_address_is_refused_and_the_first_goes_on(server: Server) -> None:
    done = subprocess.run(
        [*PROGRAM, "serve", "--address", server.address, "--set", "memory.size=16MiB"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "address" in done.stderr
    assert status(server.address).returncode == 0


def test_a_server_starts_where_another_was_killed_and_removes_what_that_one_left(tmp_path: Path) -> None:
    killed = start(f"unix://{tmp_path}/server.sock")
    killed.end(signal.SIGKILL)
    again = start(killed.address)
    try:
        assert "ready" in again.ready
        assert status(again.address).returncode == 0
    finally:
        again.end(signal.SIGTERM)


def test_serving_loads_no_torch(server: Server) -> None:
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()


def test_what_serving_and_asking_import_is_no_torch() -> None:
    modules = "lmcache_trio.cli, lmcache_trio.client, lmcache_trio._server.supervise"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"


def test_both_sockets_are_the_users_alone_whatever_the_umask(tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        server = start(f"unix://{tmp_path}/server.sock")
    finally:
        os.umask(former)
    hello = Hello(PROTOCOL_VERSION, "not yet there", os.urandom(16), Role.OBSERVER, "")
    welcome = decode(trio.run(introduce, server.address, encode(hello)))
    assert isinstance(welcome, Welcome)  # and its address waits to be taken up
    rendezvous, pair = (Path(address.partition("://")[2]) for address in (server.address, welcome.address))
    assert set(tmp_path.iterdir()) == {rendezvous, pair}
    assert [stat.S_IMODE(path.stat().st_mode) for path in (rendezvous, pair)] == [0o600] * 2


def test_the_log_says_what_a_server_serves_and_that_it_ended_and_is_quiet_between(tmp_path: Path) -> None:
    tier = f'tiers=[{{backend="disk", path="{tmp_path}/disk", size="64MiB", slab_size="16MiB"}}]'
    server = start(f"unix://{tmp_path}/server.sock", tier)
    for _ in range(3):
        assert status(server.address).returncode == 0
    lines = server.end(signal.SIGTERM).splitlines()
    told = [line.split(" lmcache_trio.server: ", 1)[1] for line in lines if " lmcache_trio.server: " in line]
    opened, serving, ending, ended = told
    assert opened == "the tier 0:disk is open"
    for word in (version("lmcache-trio"), server.address, "memory 16 MiB", "chunk_tokens auto", "0:disk (open)"):
        assert word in serving
    assert ending.startswith("SIGTERM: ending")
    assert re.fullmatch(r"ended, after \d+ s", ended)


@pytest.mark.parametrize("flag", ["-n", "-Hn"])
def test_a_server_without_the_file_descriptors_that_it_needs_is_refused_with_how_many(
    flag: str, tmp_path: Path
) -> None:
    address = f"unix://{tmp_path}/server.sock"
    done = to_where(f'ulimit -Sn 16; ulimit {flag} 16; exec "$@"', "serve", "--address", address)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    for word in ("ulimit -n", "16", "64", "LimitNOFILE"):
        assert word in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_server_takes_all_the_file_descriptors_that_it_may_have(tmp_path: Path) -> None:
    command = ["bash", "-c", 'ulimit -Sn 16; exec "$@"', "bash", *PROGRAM, "serve", "--set", "memory.size=16MiB"]
    process = subprocess.Popen(
        [*command, "--address", f"unix://{tmp_path}/server.sock"], stdout=subprocess.PIPE, text=True
    )
    _started.append(process)
    assert process.stdout is not None
    assert "ready" in process.stdout.readline()
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard > 64


def test_logs_go_to_standard_error_and_follow_the_level(tmp_path: Path) -> None:
    server = start(f"unix://{tmp_path}/server.sock")
    assert status(server.address).returncode == 0
    server.process.send_signal(signal.SIGTERM)
    out, errors = server.process.communicate(timeout=60)
    assert out == ""  # nothing but the ready line
    for line in errors.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) ", line)
