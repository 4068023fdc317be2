"""The benchmark of lookups that wait for a disk that hangs: it measures what it says, and refuses what it can't."""

import subprocess
import sys

import pytest
import trio

from lmcache_trio.bench import parked
from lmcache_trio.bench.parked import CALLS, KV, VERBS, Figures, Parked, measure_parked
from lmcache_trio.bench.report import parked_table, parked_verdicts


async def test_a_small_run_gives_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parked, "OPERATIONS", 50)
    told: list[tuple[str, int, int]] = []
    with trio.fail_after(100):
        found = await measure_parked(100, 1, lambda what, done, whole: told.append((what, done, whole)))
    assert tuple(found) == CALLS
    for each in found.values():
        assert tuple(each.figures) == tuple(VERBS)
        for figures in each.figures.values():
            assert 0 < figures.idle_p50 <= figures.idle_p99
            assert 0 < figures.parked_p50 <= figures.parked_p99
            assert figures.ratio == figures.parked_p99 / figures.idle_p99
    assert found["contains"].loading == 0
    assert found["load"].loading == 64  # as many as a tier makes at one time: each holds a slot
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert {what for what, _, _ in told} == {"contains hangs", "load hangs"}


def test_each_operation_is_held_to_twice_the_idle_servers_p99() -> None:
    kept, missed = Figures(1e-4, 2e-4, 1e-4, 4e-4), Figures(1e-4, 2e-4, 1e-4, 4.2e-4)
    found = Parked({"lookup": kept, "store": missed}, 3, 0.0)
    assert parked_verdicts(found) == [
        "lookup: kept: p99 is 2.00 x the idle server's (goal 2 at most)",
        "store: missed: p99 is 2.10 x the idle server's (goal 2 at most)",
    ]
    assert "3 loads stuck with their slots reserved" in str(parked_table("load", found, 7, 1).title)


def test_what_is_copied_is_small() -> None:
    assert KV.chunk_bytes == 64 << 10


@pytest.mark.parametrize(
    ("flags", "named"), [(["parked", "0"], "COUNT"), (["parked", "9", "--rounds", "0"], "--rounds")]
)
def test_a_number_out_of_range_is_refused_by_name(flags: list[str], named: str) -> None:
    command = [sys.executable, "-m", "lmcache_trio", "bench", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert named in ended.stderr
