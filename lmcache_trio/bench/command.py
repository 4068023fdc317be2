"""What `lmcache-trio bench` does: run, with a progress bar on standard error; print; write."""

import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from lmcache_trio.bench import grow as growth
from lmcache_trio.bench import plots
from lmcache_trio.bench.machine import describe
from lmcache_trio.bench.parked import measure_parked
from lmcache_trio.bench.records import measure_records
from lmcache_trio.bench.report import comparison, doubts, parked_table, parked_verdicts, start_lines, table, verdicts
from lmcache_trio.bench.rows import load_rows, save_rows, summarise
from lmcache_trio.bench.run import measure
from lmcache_trio.bench.settings import BenchSettings
from lmcache_trio.errors import ConfigError
from lmcache_trio.signals import run_until_signal

__all__ = ["compare", "grow", "parked", "records", "run"]

T = TypeVar("T")
MOST_PARKED = 10_000
MOST_RECORDS = 10_000_000
Tell = Callable[[str, int, int], None]


def run(settings: BenchSettings, *, address: str | None, disk: Path | None, json: Path | None) -> int:
    """Measure, print the table, write *json*. Returns the exit status."""
    if json is not None:
        save_rows(json, [])  # a path that cannot be written is told before the run, not after it
    measured = _with_progress(lambda tell: measure(settings, address=address, disk=disk, tell=tell))
    rows = summarise(measured.rounds)
    if json is not None:
        save_rows(json, rows)
    out = _console()
    out.print(table(rows, settings))
    out.print(describe())
    for verdict in verdicts(measured.rounds, settings):
        out.print(verdict)
    for why in dict.fromkeys(measured.left_out.values()):
        rows_out = [row for row, reason in measured.left_out.items() if reason == why]
        out.print(f"left out: {', '.join(rows_out)}: {why}", markup=False)
    for doubt in doubts(measured.rounds, measured.others):
        out.print(doubt, style="red")
    return 0


def compare(before: Path, after: Path) -> int:
    """Print two runs side by side."""
    _console().print(comparison(load_rows(before), load_rows(after), (before.name, after.name)))
    return 0


def parked(count: int, rounds: int) -> int:
    """Print what others notice of *count* lookups that wait for a disk that hangs. Returns the exit status."""
    if not 0 < count <= MOST_PARKED:
        raise ConfigError("COUNT", f"{count} is out of range; give 1 to {MOST_PARKED}")
    if rounds < 1:
        raise ConfigError("--rounds", f"{rounds} is too few; give 1 or more")
    measured = _with_progress(lambda tell: measure_parked(count, rounds, tell))
    out = _console()
    out.print("a lookup is of 8,192 tokens; a store or retrieve copies one chunk of 64 KiB; all through the adapters")
    for call, found in measured.items():
        out.print(parked_table(call, found, count, rounds))
        for line in parked_verdicts(found):
            out.print(line)
        for doubt in doubts({}, found.others):
            out.print(doubt, style="red")
    out.print(describe())
    return 0


def records(count: int, disk: Path | None = None) -> int:
    """Print how a server starts whose disk tier knows *count* chunks. Returns the exit status."""
    if not 0 < count <= MOST_RECORDS:
        raise ConfigError("COUNT", f"{count} is out of range; give 1 to {MOST_RECORDS}")
    starts = _with_progress(lambda tell: measure_records(count, tell, disk))
    out = _console()
    for line in start_lines(starts, count):
        out.print(line)
    out.print(describe())
    return 0


def grow(folder: Path, plan: growth.GrowthPlan | None = None) -> int:
    """Measure how it grows; write the figures and their plots into *folder*."""
    plots.check()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError("FOLDER", f"{folder} cannot be made: {exc.strerror}") from exc
    grown = _with_progress(lambda tell: growth.grow(plan or growth.GrowthPlan(), tell))
    (folder / "grow.json").write_text(grown.as_json())
    plots.draw(grown, folder, describe())
    out = _console()
    for name, value in grown.figures.items():
        out.print(f"{name}: {value:.4g}")
    out.print(f"figures and plots are in {folder}")
    return 0


def _with_progress(work: Callable[[Tell], Awaitable[T]]) -> T:
    columns = (TextColumn("{task.description:20}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2, transient=True) as progress:
        bar = progress.add_task("", total=None)

        def tell(what: str, done: int, whole: int) -> None:
            progress.update(bar, description=what, completed=done, total=whole or None)

        return trio.run(run_until_signal, partial(work, tell))


def _console() -> Console:
    """Wide enough for the table where standard output is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 160)
