"""How the benchmark's figures are made of what was measured, how they are told, and what its flags refuse."""

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from lmcache_trio.bench.files import PAGE, Extent, pieces, why_no_direct, written
from lmcache_trio.bench.report import comparison, doubts, verdicts
from lmcache_trio.bench.rows import HostPart, ResultRow, Round, load_rows, percentile, save_rows, spread, summarise
from lmcache_trio.bench.settings import NAMED_KV, ROWS, BenchSettings, KVShape
from lmcache_trio.errors import ConfigError, Unavailable

FIELDS = ["name", "clients", "n", "p50_us", "p99_us", "ops_s", "gb_s", "cpu_client_us", "cpu_server_us", "ratio"]


def a_round(times: list[float], *, moved: int = 0, server_cpu: float | None = None, clients: int = 1) -> Round:
    """Every client with the same *times*, one operation right after the other, all from 0 on."""
    return Round([HostPart(times, 0.0, sum(times), sum(times) / 2, moved) for _ in range(clients)], server_cpu)


def only(rows: list[ResultRow], name: str) -> ResultRow:
    (found,) = [row for row in rows if row.name == name]
    return found


def test_a_row_is_the_median_of_its_rounds() -> None:
    rounds = [a_round([t] * 10, server_cpu=t) for t in (0.001, 0.002, 0.009)]
    row = only(summarise({"ping": rounds}), "ping")
    assert row.n == 30
    assert [row.p50_us, row.p99_us, row.ops_s] == pytest.approx([2000, 2000, 500])
    assert [row.cpu_client_us, row.cpu_server_us] == pytest.approx([1000, 200])
    assert (row.gb_s, row.ratio) == (None, None)


def test_a_lookups_ratio_is_of_the_bare_round_trip_of_the_same_round() -> None:
    bare = [a_round([0.001] * 3), a_round([0.004] * 3), a_round([0.002] * 3)]
    ping = [a_round([0.002] * 3), a_round([0.008] * 3), a_round([0.004] * 3)]  # the machine drifts, the ratio does not
    rows = summarise({"bare_round_trip": bare, "ping": ping})
    assert only(rows, "ping").ratio == 2
    assert only(rows, "bare_round_trip").ratio == 1


def test_a_copys_ratio_is_of_the_memcpy_of_the_same_round() -> None:
    memcpy = [a_round([0.5, 0.5], moved=10**9), a_round([1.0, 1.0], moved=10**9)]
    store = [a_round([1.0, 1.0], moved=10**9), a_round([2.0, 2.0], moved=10**9)]
    rows = summarise({"memcpy": memcpy, "store": store})
    assert only(rows, "store").ratio == 0.5
    assert only(rows, "memcpy").gb_s == 0.75
    assert only(rows, "memcpy").cpu_server_us is None


def test_several_clients_bandwidth_is_of_all_they_moved_from_the_first_to_the_last() -> None:
    four = a_round([0.5, 0.5], moved=10**9, clients=4)
    assert four.bandwidth == 4e9
    assert only(summarise({"memcpy": [four]}), "memcpy").clients == 4


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(i) for i in range(1, 101)]
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([7.0], 0.99) == 7


def test_spread_is_small_where_one_round_alone_is_off() -> None:
    steady = [1.0] * 19
    assert spread([*steady, 9.0]) == 0
    assert spread([1.0, 2.0]) == pytest.approx(2 / 3)


def test_rows_are_written_as_a_list_of_objects_with_exactly_the_fields(tmp_path: Path) -> None:
    rows = summarise({"memcpy": [a_round([0.5], moved=10**9)], "ping": [a_round([0.001])]})
    file = tmp_path / "rows.json"
    save_rows(file, rows)
    found = json.loads(file.read_text())
    assert [list(row) for row in found] == [FIELDS, FIELDS]
    assert found[1]["gb_s"] is None
    assert load_rows(file) == rows


@pytest.mark.parametrize("text", ["", "{}", '[{"name": "ping"}]', "[1]"])
def test_a_file_that_is_no_benchmarks_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json"):
        load_rows(file)


def test_two_runs_are_compared_row_by_row_also_where_one_lacks_a_row() -> None:
    a = summarise({"ping": [a_round([0.002])], "memcpy": [a_round([1.0], moved=10**9)]})
    b = summarise({"ping": [a_round([0.001])], "lookup_8k_hit": [a_round([0.003])]})
    console = Console(width=160, file=io.StringIO())
    console.print(comparison(a, b, ("a.json", "b.json")))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = {words[1]: words for line in text.splitlines() if len(words := line.split()) > 3}
    assert {"ping", "memcpy", "lookup_8k_hit"} <= set(lines)
    assert "0.5" in lines["ping"]
    assert "2" in lines["ping"]


def test_a_row_that_one_run_lacks_has_empty_cells_and_no_ratio() -> None:
    a = summarise({"memcpy": [a_round([1.0], moved=10**9)], "store": [a_round([2.0], moved=10**9)]})
    b = summarise({"memcpy": [a_round([1.0], moved=10**9)], "store_device": [a_round([4.0], moved=10**9)]})
    made = comparison(a, b, ("a.json", "b.json"))
    names, clients, *cells = [list(column.cells) for column in made.columns]
    assert (names, clients) == (["memcpy", "store_device", "store"], ["1"] * 3)
    assert [column[1] for column in cells] == ["", "4,000,000", "", *["", "0.25", ""] * 3]
    assert [column[2] for column in cells] == ["2,000,000", "", "", *["0.5", "", ""] * 3]


def test_goals_of_copies_are_told_beside_the_table() -> None:
    rounds = {
        "memcpy": [a_round([1.0], moved=10**9)] * 3,
        "store_device": [a_round([1.25], moved=10**9, server_cpu=server) for server in (0.0, 0.0, 2.0)],
        "load_disk_warm": [a_round([2.0], moved=10**9)] * 3,
        "load_disk_cold": [a_round([4.0], moved=10**9)] * 3,
        "direct_read": [a_round([2.0], moved=10**9)] * 3,
        "writeback_disk": [a_round([2.0], moved=10**9)] * 3,
        "direct_write": [a_round([1.5], moved=10**9)] * 3,
    }
    device, disk = verdicts(rounds, BenchSettings())
    assert device.startswith("store_device is 0.80 x memcpy (goal 0.8); ")
    assert "spent 100.0% (goal 5% at most)" in device
    assert disk == (
        "load_disk_cold is 0.50 x direct_read (goal 0.9), load_disk_warm is 0.50 x memcpy (goal 0.6),"
        " writeback_disk is 0.75 x direct_write (goal 0.8)"
    )
    del rounds["direct_read"], rounds["direct_write"], rounds["store_device"]
    assert verdicts(rounds, BenchSettings()) == ["load_disk_warm is 0.50 x memcpy (goal 0.6)"]
    assert verdicts({}, BenchSettings()) == []
    assert "caches" in verdicts({}, BenchSettings(operation=1))[0]


def test_a_direct_read_is_no_work_of_the_servers_and_has_the_memcpy_for_its_limit() -> None:
    rows = summarise(
        {
            "memcpy": [a_round([1.0], moved=10**9)],
            "direct_read": [a_round([4.0], moved=10**9, server_cpu=0.1)],
            "load_disk_cold": [a_round([5.0], moved=10**9, server_cpu=0.1)],
        }
    )
    assert (only(rows, "direct_read").cpu_server_us, only(rows, "direct_read").ratio) == (None, 0.25)
    assert only(rows, "load_disk_cold").ratio == 0.2


def test_a_noisy_machine_is_reported_and_a_quiet_one_is_not() -> None:
    quiet = {"memcpy": [a_round([0.1], moved=10**9)] * 5, "bare_round_trip": [a_round([0.001])] * 5}
    assert doubts(quiet, 0.01) == []
    noisy = {**quiet, "memcpy": [a_round([0.1 * i], moved=10**9) for i in range(1, 6)]}
    assert any("memcpy" in doubt for doubt in doubts(noisy, 0.01))
    assert any("1.50 cores" in doubt for doubt in doubts(quiet, 1.5))


# --- files ------------------------------------------------------------------------------------------------------------


def test_only_bytes_that_were_written_are_read(tmp_path: Path) -> None:
    file = tmp_path / "slab"
    with file.open("wb") as slab:
        os.posix_fallocate(slab.fileno(), 0, 16 * PAGE)
        slab.truncate(32 * PAGE)
        os.pwrite(slab.fileno(), bytes([1]) * (4 * PAGE), 2 * PAGE)
        os.pwrite(slab.fileno(), bytes([2]) * PAGE, 20 * PAGE)
        os.fsync(slab.fileno())
    found = written(file)
    data = b"".join(file.read_bytes()[one.start : one.start + one.length] for one in found)
    assert data.count(1) == 4 * PAGE
    assert data.count(2) == PAGE
    assert len(data) <= 8 * PAGE  # a file system may count what lies beside them


def test_pieces_go_round_and_round_in_order() -> None:
    extents = [Extent(Path("a"), 100, 5), Extent(Path("b"), 0, 3)]
    got = [(one.path.name, one.start, one.length) for one in pieces(extents, 4, 10, 2)]
    assert got == [("a", 104, 1), ("b", 0, 2), ("b", 2, 1), ("a", 100, 2), ("a", 102, 2), ("a", 104, 1), ("b", 0, 1)]
    assert list(pieces(extents, 4 + 8, 10, 2)) == list(pieces(extents, 4, 10, 2))
    with pytest.raises(Unavailable):
        list(pieces([], 0, 1, 1))


def test_a_file_system_in_memory_has_no_direct_reads() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert "tmpfs" in why_no_direct(Path(folder))


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_shape_is_a_name_or_numbers() -> None:
    named = KVShape.parse("llama3-8b")
    assert (named.token_bytes, named.chunk_bytes) == (128 << 10, 32 << 20)
    numbers = KVShape.parse("layers=2, kv_heads=1,head_dim=64,dtype=fp32,block_tokens=8,chunk_tokens=64")
    assert numbers == KVShape(2, 1, 64, "fp32", 8, 64)
    assert KVShape.parse("layers=80") == NAMED_KV["llama3-70b"]


@pytest.mark.parametrize("text", ["llama9", "layers", "layers=x", "layers=0", "dtype=int3", "chunk_tokens=20", "x=3"])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--kv"):
        KVShape.parse(text)


def test_settings_come_back_as_they_went_to_the_clients() -> None:
    settings = BenchSettings(NAMED_KV["qwen2.5-7b"], 3, 2, 5 << 20, rows=("store",))
    assert BenchSettings.of_json(settings.as_json()) == settings


def test_the_two_limits_are_always_measured() -> None:
    assert BenchSettings(rows=("store",)).wanted == ("memcpy", "bare_round_trip", "store")
    assert BenchSettings(rows=("load_disk_cold",)).wanted == (
        "memcpy",
        "bare_round_trip",
        "load_disk_cold",
        "direct_read",
    )
    assert BenchSettings(rows=("writeback_disk",)).wanted == (
        "memcpy",
        "bare_round_trip",
        "writeback_disk",
        "direct_write",
    )
    assert BenchSettings().wanted == ROWS


def test_operations_are_whole_chunks() -> None:
    settings = BenchSettings()
    assert (settings.operation_chunks, settings.operation_tokens, settings.operation_bytes) == (4, 1024, 128 << 20)
    assert BenchSettings(operation=1).operation_chunks == 1
    for kv in NAMED_KV.values():
        assert 128 << 20 <= BenchSettings(kv).operation_bytes < 256 << 20


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--kv", "llama9"], "--kv"),
        (["--clients", "0"], "--clients"),
        (["--clients", "65"], "--clients"),
        (["--rounds", "0"], "--rounds"),
        (["--operation", "big"], "--operation"),
        (["--rows", "nothing"], "--rows"),
        (["compare", "a.json", "b.json"], "a.json"),
        (["--json", "/nowhere/at/all.json"], "--json"),
    ],
)
def test_a_wrong_flag_ends_in_one_line_before_anything_is_measured(arguments: list[str], word: str) -> None:
    command = [sys.executable, "-m", "lmcache_trio", "bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("lmcache-trio: ")
    assert word in done.stderr
    assert done.stdout == ""
