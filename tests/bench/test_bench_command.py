"""`lmcache-trio bench`, as a user runs it, with a KV so small that it takes seconds; what grows, likewise."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from lmcache_trio.bench import command, plots
from lmcache_trio.bench.files import why_no_direct
from lmcache_trio.bench.grow import Grown, GrowthPlan, Point, grow
from lmcache_trio.bench.machine import Meter, anonymous_bytes, cpu_seconds, describe
from lmcache_trio.bench.records import Start, measure_records, typical
from lmcache_trio.bench.report import start_lines
from lmcache_trio.bench.settings import ROWS
from lmcache_trio.errors import ConfigError
from lmcache_trio.testing.sides import wait_until

SMALL = ["--kv", "layers=2,kv_heads=1,head_dim=64", "--operation", "1MiB", "--rounds", "1", "--lookups", "5"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as made:
        yield Path(made)


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lmcache_trio", "bench", *SMALL, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "TMPDIR": str(folder)},
    )


def children(pid: int) -> set[str]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.add(stat.parent.name)
    return found


def test_every_row_is_measured_printed_and_written_and_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = bench(folder, "--json", str(file))
    assert done.returncode == 0, done.stderr
    rows: dict[str, Any] = {row["name"]: row for row in json.loads(file.read_text())}
    assert tuple(rows) == tuple(row for row in ROWS if row != "direct_read" or not why_no_direct(folder))
    for name, row in rows.items():
        assert name in done.stdout
        copying = any(what in name for what in ("memcpy", "disk", "store", "retrieve", "direct"))
        assert row["p50_us"] > 0
        assert row["ops_s"] > 0
        assert row["ratio"] > 0
        assert (row["gb_s"] is not None) == copying
        assert (row["cpu_server_us"] is None) == name.startswith(("memcpy", "direct"))
    assert rows["memcpy"]["ratio"] == rows["bare_round_trip"]["ratio"] == 1
    assert "of the copy's processor time the engine's process spent" in done.stdout
    assert "load_disk_warm is" in done.stdout
    assert "x direct_write (goal 0.8)" in done.stdout
    assert list(folder.iterdir()) == []


def test_rows_that_cannot_be_measured_are_left_out_and_it_is_said_why(folder: Path) -> None:
    address = f"unix://{folder}/s.ipc"
    command = [sys.executable, "-m", "lmcache_trio", "serve", "--address", address, "--set", "memory.size=64MiB"]
    command.append("device.backend=none")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            assert "ready" in server.stdout.readline()
            done = bench(folder, "--address", address, "--rows", "store", "store_device")
        finally:
            server.terminate()
    assert done.returncode == 0, done.stderr
    assert "store_device: its KV took the path 'shm': " in done.stdout
    assert "device.backend is none" in done.stdout


def test_several_clients_are_several_processes_that_add_up(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = bench(folder, "--clients", "2", "--json", str(file), "--rows", "lookup_8k_hit", "store", "retrieve")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert tuple(rows) == ("memcpy", "bare_round_trip", "lookup_8k_hit", "store", "retrieve")
    assert {row["clients"] for row in rows.values()} == {2}
    assert (rows["lookup_8k_hit"]["n"], rows["store"]["n"]) == (10, 16)


def test_a_server_that_runs_already_is_measured_without_the_disk_rows(folder: Path) -> None:
    address = f"unix://{folder}/s.ipc"
    command = [sys.executable, "-m", "lmcache_trio", "serve", "--address", address, "--set", "memory.size=64MiB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            assert "ready" in server.stdout.readline()
            done = bench(folder, "--address", address, "--rows", "store", "load_disk_warm")
            assert done.returncode == 0, done.stderr
            assert "left out" in done.stdout
            assert "load_disk_warm" in done.stdout
            assert server.poll() is None
        finally:
            server.terminate()


def test_a_server_that_is_not_there_is_told_in_one_line(folder: Path) -> None:
    done = bench(folder, "--address", f"unix://{folder}/nobody.ipc", "--rows", "ping")
    assert done.returncode == 1
    assert "nobody.ipc" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bench_that_is_told_to_end_takes_its_processes_with_it(folder: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "lmcache_trio", "bench", "--kv", "layers=1,kv_heads=1", "--rounds", "100000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(folder)}
    ) as process:
        wait_until(lambda: bool(list(folder.glob("*/host.log"))), timeout=30)
        ours = children(process.pid)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert list(folder.iterdir()) == []
    assert not [pid for pid in ours if Path("/proc", pid).exists()]


# --- what grows -------------------------------------------------------------------------------------------------------


async def test_growth_is_measured_at_each_point_and_drawn(tmp_path: Path) -> None:
    plan = GrowthPlan((1024, 8192), (1000, 4000), (1, 2), sessions=20, rounds=1, lookups=5, ready_arena=64 << 20)
    told: list[str] = []
    with trio.fail_after(100):
        grown = await grow(plan, lambda what, done, whole: told.append(what))
    assert [point.x for point in grown.of("index")] == [1000, 4000]
    assert [point.x for point in grown.of("clients")] == [1, 2]
    for series in ("length, small index", "length, large index", "length, tokens in"):
        assert [point.x for point in grown.of(series)] == [1024, 8192]
    assert all(point.p50_us > 0 and point.ops_s > 0 for point in grown.points)
    assert grown.figures["ready_s"] > 0
    assert grown.figures["full_to_empty_p50"] > 0
    assert grown.figures["longest_pause_ms"] > 0
    assert grown.figures["longest_collection_ms"] > 0
    assert json.loads(grown.as_json())["figures"] == grown.figures
    assert "20 sessions" in told


def test_plots_are_drawn_of_every_series(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    series = ("index", "clients", "length, small index", "length, large index", "length, tokens in")
    points = tuple(Point(name, x, 100.0 + x, 200.0 + x, 5.0) for name in series for x in (1, 2, 4))
    files = plots.draw(Grown(points, {}), tmp_path, describe())
    assert [file.name for file in files] == ["lookup_by_length.svg", "lookup_by_index.svg", "lookups_by_clients.svg"]
    for file in files:
        assert "<svg" in file.read_text()


# --- how it starts ----------------------------------------------------------------------------------------------------


async def test_a_server_whose_tier_knows_many_chunks_is_started_and_asked(folder: Path) -> None:
    told: list[str] = []
    with trio.fail_after(100):
        starts = await measure_records(5000, lambda what, done, whole: told.append(what), folder)
    assert len(starts) == 3
    for start in starts:
        assert start.empty > 0
        assert 0 < start.lookup < start.answered
        assert 0 < start.ready < start.answered < start.read
    assert {"records", "starts"} == set(told)
    assert list(folder.iterdir()) == []


def test_how_it_starts_is_the_median_of_each_and_held_to_a_second() -> None:
    two = [Start(0.2, 0.5, 0.7, 3.0, 0.02, True), Start(0.3, 0.4, 0.6, 9.0, 0.01, True)]
    starts = [*two, Start(0.1, 2, 3, 4, 1, False)]
    assert typical(starts) == Start(0.2, 0.5, 0.7, 4.0, 0.02, False)
    said = "\n".join(start_lines(starts, 1_000_000))
    assert "1,000,000 records" in said
    assert "ready: 0.50 s (goal under 1: kept); one without a tier: 0.20 s" in said
    assert "not by query: 0.70 s; it took 20.0 ms" in said
    assert "all records read: 4.00 s" in said
    assert "missed" in "".join(start_lines(starts[2:], 1))
    assert ", by query" in "".join(start_lines(two, 1))


def test_a_number_of_records_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="COUNT"):
        command.records(0)


# --- the machine ------------------------------------------------------------------------------------------------------


def test_processor_time_of_a_process_grows_with_its_work() -> None:
    before = cpu_seconds(os.getpid())
    sum(range(2_000_000))
    after = cpu_seconds(os.getpid())
    assert before is not None
    assert after is not None
    assert after - before > 0.005


_BURN = """
import threading
def burn():
    sum(range(3_000_000))
    print("burnt", flush=True)
    input()
thread = threading.Thread(target=burn)
thread.start()
thread.join()
print("ended", flush=True)
input()
"""


def test_processor_time_of_threads_that_ended_is_not_lost() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _BURN], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "burnt\n"
        during = cpu_seconds(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ended\n"
        after = cpu_seconds(process.pid)
        process.communicate("\n")
    assert during is not None
    assert after is not None
    assert after >= during > 0.02


def test_a_process_that_is_not_there_has_no_figures() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    assert cpu_seconds(ended.pid) is None


def test_ones_own_work_is_not_counted_as_others() -> None:
    pids = [os.getpid()]
    before = Meter(busy=10.0, ours=4.0, whole=100.0, cores=2)
    after = Meter(busy=13.0, ours=6.0, whole=120.0, cores=2)
    assert after.others_since(before) == pytest.approx(0.1)
    assert Meter.read(pids).others_since(Meter.read(pids)) >= 0


def test_private_memory_and_the_machine_can_be_told() -> None:
    assert anonymous_bytes(os.getpid()) > 1 << 20
    assert "Python" in describe()
