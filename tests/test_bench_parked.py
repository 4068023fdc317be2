"""The benchmark of lookups that wait for a disk that hangs: it measures what it says, and refuses what it can't."""

import subprocess
import sys

import pytest
import trio

from lmcache_trio.bench.parked import VERBS, measure_parked


async def test_a_small_run_gives_every_figure() -> None:
    with trio.fail_after(60):
        figures = await measure_parked(20, 1)
    assert tuple(figures) == VERBS
    for each in figures.values():
        assert 0 < each.idle_p50 <= each.idle_p99
        assert 0 < each.parked_p50 <= each.parked_p99
        assert each.ratio == each.parked_p99 / each.idle_p99


@pytest.mark.parametrize(
    ("flags", "named"), [(["--parked", "0"], "--parked"), (["--parked", "9", "--rounds", "0"], "--rounds")]
)
def test_a_number_out_of_range_is_refused_by_name(flags: list[str], named: str) -> None:
    command = [sys.executable, "-m", "lmcache_trio", "bench", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert named in ended.stderr
