"""Commands that ask a running server: what a user reads, in a terminal and in a pipe."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from support.live import chain_of

from lmcache_trio import Role, open_client
from lmcache_trio._server.answers import PIECE, PIECES, LastMinute
from lmcache_trio.cli.status import UNKNOWN
from lmcache_trio.client import Client
from lmcache_trio.statistics import FIGURES, EngineHeld, LayoutHeld, figures_of

PROGRAM = [sys.executable, "-m", "lmcache_trio"]
MODEL = "example/Some-Model-8B"
CHUNK, TOKENS = 64 << 10, 128


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server with a disk tier."""
    home = tmp_path_factory.mktemp("status")
    where = f"unix://{home}/server.sock"
    tier = f'tiers=[{{backend="disk", path="{home}/disk", size="64MiB", slab_size="16MiB"}}]'
    command = [*PROGRAM, "serve", "--address", where, "--set", "memory.size=16MiB", "grace=0.5", tier]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        yield where
        process.terminate()


def run(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": str(columns)}
    command = [*PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)


def in_terminal(*arguments: str, columns: int) -> str:
    """What the command prints to a terminal of *columns*."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([*PROGRAM, *arguments], stdout=theirs, env=os.environ | {"COLUMNS": str(columns)}) as process:
        os.close(theirs)
        told = b""
        while part := _read(ours):
            told += part
    os.close(ours)
    assert process.returncode == 0
    return told.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the program has ended
        return b""


async def hold_one_prompt(address: str, name: str) -> tuple[str, dict[str, Any]]:
    """An engine stores ten chunks and finds four of them; what `status` prints while it is there, and `ls --json`."""
    said: dict[str, Any] = {"role": Role.SCHEDULER, "engine": name, "identity": name.encode(), "model": MODEL}
    async with open_client(address, **said) as scheduler, open_client(address, role=Role.WORKER, engine=name) as worker:
        await worker.register(b"f" * 32, CHUNK, 16)
        await store(scheduler, worker, chain_of(name, 10))
        await scheduler.lookup(2, chain_of(name, 4))
        status = await trio.to_thread.run_sync(run, "status", "--address", address)
        listed = await trio.to_thread.run_sync(run, "ls", "--json", "--address", address)
        table = await trio.to_thread.run_sync(run, "ls", "--address", address)
    assert (status.returncode, listed.returncode, table.returncode, status.stderr) == (0, 0, 0, "")
    assert MODEL in table.stdout
    return status.stdout, json.loads(listed.stdout)


async def store(scheduler: Client, worker: Client, chain: list[bytes]) -> None:
    await scheduler.lookup(1, chain)
    async with worker.storing(1, b"", chain) as storing:
        assert len(storing.slots) == len(chain)


async def test_status_answers_in_the_order_in_which_a_person_asks(address: str) -> None:
    told, _ = await hold_one_prompt(address, "asked")
    assert re.match(rf"lmcache-trio \S+ at {re.escape(address)}, up \d", told)
    assert re.findall(r"^(\w+)  ", told, re.MULTILINE) == ["Memory", "Hits", "Engines", "Tiers", "Faults"]
    assert re.search(r"of 16 MiB \(\d+ %\), 256 KiB in use; holds \d,\d+ tokens, has room for 32,768\n", told)
    assert re.search(r"29 % of 1,792 tokens in the last minute\n +29 % of 1,792 tokens since the start\n", told)
    assert re.search(r"expected by size of the memory: 0.5 x \d+ %, 1 x \d+ %, 2 x \d+ %, 4 x \d+ %, 8 x \d+ %\n", told)
    assert f"asked: {MODEL}, chunks of {TOKENS} tokens, 512 bytes a token, 2 open requests\n" in told
    assert re.search(r"0:disk: open, \S+ \w+ of \S+ MiB", told)
    assert "Faults   none\n" in told


async def test_ls_lists_each_layout_and_engine_with_bytes_and_tokens(address: str) -> None:
    _, listed = await hold_one_prompt(address, "listed")
    assert listed["left_out"] == {"engines": 0, "layouts": 0}
    (engine,) = listed["engines"]
    assert set(engine) == set(figures_of(EngineHeld))
    assert (engine["name"], engine["model"], engine["sessions"], engine["tokens_in_memory"]) == (
        ("listed", MODEL, 2, 16 * 16 * TOKENS)
    )
    (layout,) = [each for each in listed["layouts"] if each["namespace"] == engine["namespace"]]
    assert set(layout) == set(figures_of(LayoutHeld))
    assert (layout["model"], layout["engines"], layout["chunks"], layout["tokens"]) == (MODEL, 1, 10, 10 * TOKENS)
    assert (layout["bytes"], layout["bytes_retained"]) == (10 * CHUNK, 4 * CHUNK)


def test_every_figure_of_a_real_server_has_a_unit_and_a_meaning(address: str) -> None:
    """`--all` says each figure, and none of them is unknown to this release."""
    figures = json.loads(run("status", "--json", "--address", address).stdout)
    told = run("status", "--all", "--address", address)
    assert (told.returncode, told.stderr) == (0, "")
    assert UNKNOWN[1] not in told.stdout
    lines = dict(line.split(maxsplit=1) for line in told.stdout.splitlines())
    for part, cls in FIGURES.items():
        tables = figures[part] if isinstance(figures[part], list) else [figures[part]]
        keys = {key for table in tables for key in table}
        assert keys <= set(figures_of(cls))
        for key in keys:
            found = [line for place, line in lines.items() if re.match(rf"{part}\.(\d+\.)?{key}(\.|$)", place)]
            assert found or not any(table[key] for table in tables)
            assert all(re.search(r": [A-Z0-9`].+", line) for line in found)


def test_a_terminal_of_sixty_columns_shows_lines_of_sixty_at_most(address: str) -> None:
    for arguments in (["status"], ["status", "--all"]):
        told = in_terminal(*arguments, "--address", address, columns=60)
        assert max(map(len, told.splitlines())) <= 60
    assert max(map(len, run("status", "--all", "--address", address, columns=60).stdout.splitlines())) > 60  # in a pipe


def test_check_says_ready_with_status_0_and_no_answer_with_status_2(address: str, tmp_path: Path) -> None:
    done = run("status", "--check", "--address", address)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")
    done = run("status", "--check", "--address", f"unix://{tmp_path}/nobody.sock")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_check_says_with_status_1_why_a_server_is_not_ready(tmp_path: Path) -> None:
    where = f"unix://{tmp_path}/server.sock"
    command = [*PROGRAM, "serve", "--address", where, "--set", "memory.size=16MiB", "limits.clients=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        done = run("status", "--check", "--address", where)  # which is the one client itself
        process.terminate()
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("clients_at_limit: ")


def test_watch_prints_it_again_and_again_until_ctrl_c(address: str) -> None:
    command = [*PROGRAM, "status", "--watch", "0.1", "--address", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        seen = 0
        while seen < 3:
            seen += process.stdout.readline().startswith("lmcache-trio ")
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
    assert process.returncode in (130, -signal.SIGINT)


def test_watch_goes_on_while_no_server_answers(tmp_path: Path) -> None:
    command = [*PROGRAM, "status", "--watch", "0.1", "--address", f"unix://{tmp_path}/nobody.sock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        process.terminate()
    assert len([line for line in lines if "nobody.sock" in line]) >= 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["status", "--watch", "0"], "--watch"),
        (["status", "--watch", "1", "2"], "--watch"),
        (["status", "--check", "--json"], "--check"),
        (["ping", "--count", "0"], "--count"),
        (["ls", "--timeout", "-1"], "--timeout"),
    ],
)
def test_a_wrong_flag_is_named(arguments: list[str], word: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert word in done.stderr


def test_ping_says_that_it_is_alive_and_how_long_the_answers_took(address: str, tmp_path: Path) -> None:
    done = run("ping", "--count", "3", "--address", address)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(
        rf"{re.escape(address)} is alive: 3 round trips of [\d.]+ to [\d.]+ ms, median [\d.]+ ms\n", done.stdout
    )
    done = run("ping", "--address", f"unix://{tmp_path}/nobody.sock")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


async def test_clear_asks_first_and_drops_what_is_named(address: str) -> None:
    said: dict[str, Any] = {"role": Role.SCHEDULER, "engine": "cleared", "identity": b"cleared", "model": "to/clear"}
    async with (
        open_client(address, **said) as scheduler,
        open_client(address, role=Role.WORKER, engine="cleared") as worker,
    ):
        await worker.register(b"f" * 32, CHUNK, 16)
        await store(scheduler, worker, chain_of("cleared", 10))
        asked = await trio.to_thread.run_sync(run, "clear", "--model", "to/clear", "--address", address)
        assert (asked.returncode, "--yes" in asked.stderr) == (2, True)
        assert "to/clear  1,280 tokens, 640 KiB in memory" in asked.stdout
        named = ("clear", "--model", "to/clear", "--yes", "--address", address)
        done = await trio.to_thread.run_sync(run, *named)
    assert (done.returncode, done.stdout) == (0, "cleared 10 chunks (640 KiB) of 1 layout\n"), done.stderr


def test_clear_wants_to_know_what_and_loglevel_which_level(address: str) -> None:
    for arguments, words in (
        (["clear"], "--all"),
        (["clear", "--all", "--model", "m"], "--all"),
        (["loglevel", "x"], "x"),
    ):
        done = run(*arguments, "--address", address)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert words in done.stderr
    done = run("clear", "--namespace", "none", "--address", address)
    assert (done.returncode, "lmcache-trio ls" in done.stderr) == (1, True)
    assert run("loglevel", "warning", "--address", address).stdout == "the log's level is warning\n"


def test_the_last_minute_forgets_what_is_older() -> None:
    recent = LastMinute()
    assert recent.sums(1000.0) == (0, 0)
    for piece in range(2 * PIECES):
        recent.add(10, 1, 1000.0 + piece * PIECE)
    last = 1000.0 + (2 * PIECES - 1) * PIECE
    assert recent.sums(last) == (10 * PIECES, PIECES)
    assert recent.sums(last + 30.0) == (10 * PIECES // 2, PIECES // 2)
    assert recent.sums(last + 60.0) == (0, 0)
