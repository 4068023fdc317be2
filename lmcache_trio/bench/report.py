"""How a run is told: its table, what two runs have to do with each other, and how far to believe them."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from lmcache_trio.bench.parked import Parked
from lmcache_trio.bench.records import Start, typical
from lmcache_trio.bench.rows import ResultRow, Round, client_share, speed_of, spread
from lmcache_trio.bench.settings import DEVICE, ROTATION, BenchSettings, KVShape

__all__ = ["comparison", "doubts", "parked_table", "parked_verdicts", "start_lines", "table", "verdicts"]

_SPREAD = 0.2
"""Above this, the limits themselves moved too much within one run for its ratios to be quoted."""
_OTHERS = 0.1
"""Cores that everyone else kept busy."""

_DEVICE_SPEED, _DEVICE_SHARE = 0.8, 0.05
_COLD_SPEED, _WARM_SPEED, _WRITE_SPEED = 0.9, 0.6, 0.8
"""Goals of the project's own."""
_PARKED_RATIO = 2.0
_READY_SECONDS = 1.0
_UNCACHED = 512 << 20

_DISK_LIMITS = (("direct_read", "bandwidth"), ("direct_write", "bandwidth"))
_COMPARED = {"p50_us": "p50 µs", "ops_s": "ops/s", "gb_s": "GB/s", "ratio": "ratio"}
_COLUMNS = ("row", "clients", "n", "p50 µs", "p99 µs", "ops/s", "GB/s", "client µs", "server µs", "ratio")


def table(rows: Sequence[ResultRow], settings: BenchSettings) -> Table:
    """All figures. Processor time is an operation's."""
    made = Table(title=f"{_shape(settings.kv)}, operations of {settings.operation_bytes / (1 << 20):.4g} MiB")
    for name in _COLUMNS:
        made.add_column(name, justify="left" if name == "row" else "right")
    for row in rows:
        made.add_row(
            row.name,
            str(row.clients),
            str(row.n),
            *(_figure(value) for value in (row.p50_us, row.p99_us, row.ops_s, row.gb_s)),
            *(_figure(value) for value in (row.cpu_client_us, row.cpu_server_us, row.ratio)),
        )
    return made


def doubts(rounds: Mapping[str, Sequence[Round]], others: float) -> list[str]:
    """Why the figures should not be quoted: one sentence each; none on a quiet machine."""
    found = []
    for name, figure in (("memcpy", "bandwidth"), ("bare_round_trip", "p50"), *_DISK_LIMITS):
        if name in rounds and len(rounds[name]) > 1:
            width = spread([getattr(r, figure) for r in rounds[name]])
            if width > _SPREAD:
                found.append(f"noisy machine: {name} varied by {width:.0%} between rounds")
    if others > _OTHERS:
        found.append(f"noisy machine: other processes kept {others:.2f} cores busy")
    return found


def verdicts(rounds: Mapping[str, Sequence[Round]], settings: BenchSettings) -> list[str]:
    """What the copies reached of their goals, one sentence each, where the table alone does not say it."""
    memcpy, told = rounds.get("memcpy", ()), []
    if ROTATION * settings.operation_bytes < _UNCACHED:
        told.append(f"operations are small: copies rotate over less than {_UNCACHED >> 20} MiB, and caches help them")
    for name in DEVICE:
        speed, share = speed_of(rounds.get(name, ()), memcpy), client_share(rounds.get(name, ()))
        if speed is not None and share is not None:
            told.append(
                f"{name} is {speed:.2f} x memcpy (goal {_DEVICE_SPEED:g}); of the copy's processor time the engine's"
                f" process spent {share:.1%} (goal {_DEVICE_SHARE:.0%} at most)"
            )
    disk = [
        ("load_disk_cold", "direct_read", _COLD_SPEED),
        ("load_disk_warm", "memcpy", _WARM_SPEED),
        ("writeback_disk", "direct_write", _WRITE_SPEED),
    ]
    found = [
        f"{name} is {speed:.2f} x {limit} (goal {goal:g})"
        for name, limit, goal in disk
        if (speed := speed_of(rounds.get(name, ()), rounds.get(limit, ()))) is not None
    ]
    return told + ([", ".join(found)] if found else [])


def parked_table(call: str, found: Parked, count: int, rounds: int) -> Table:
    """What others noticed of *count* lookups that waited for a disk whose *call* hung."""
    stuck = f"; {found.loading} loads stuck with their slots reserved" if found.loading else ""
    title = f"{count} lookups parked on a disk whose {call} hangs, {rounds} rounds{stuck}"
    made = Table(title=title, title_justify="left", min_width=len(title))
    for column in ("µs", "idle p50", "idle p99", "parked p50", "parked p99", "p99 parked / idle"):
        made.add_column(column, justify="right" if column != "µs" else "left")
    for verb, each in found.figures.items():
        times = (each.idle_p50, each.idle_p99, each.parked_p50, each.parked_p99)
        made.add_row(verb, *(f"{seconds * 1e6:.0f}" for seconds in times), f"{each.ratio:.2f}")
    return made


def parked_verdicts(found: Parked) -> list[str]:
    """One sentence a verb: did it keep its latency?"""
    return [
        f"{verb}: {'kept' if each.ratio <= _PARKED_RATIO else 'missed'}: p99 is {each.ratio:.2f} x the idle server's"
        f" (goal {_PARKED_RATIO:g} at most)"
        for verb, each in found.figures.items()
    ]


def start_lines(starts: Sequence[Start], count: int) -> list[str]:
    """How a server with *count* records starts, one figure a line."""
    each = typical(starts)
    how = "by query" if each.by_query else "after all was read, so not by query"
    verdict = "kept" if each.ready < _READY_SECONDS else "missed"
    return [
        f"{count:,} records, page cache dropped, medians of {len(starts)} starts, seconds after the start of serve:",
        f"ready: {each.ready:.2f} s (goal under {_READY_SECONDS:g}: {verdict}); one without a tier: {each.empty:.2f} s",
        f"a lookup answered, {how}: {each.answered:.2f} s; it took {each.lookup * 1e3:.1f} ms",
        f"all records read: {each.read:.2f} s",
    ]


def comparison(before: Sequence[ResultRow], after: Sequence[ResultRow], names: tuple[str, str]) -> Table:
    """Two runs side by side, and what the second is of the first: below 1 is faster for times, above 1 for rates.

    A row that one of them lacks leaves its cells empty."""
    made = Table(title=f"A: {names[0]}, B: {names[1]}")
    columns = [name for what in _COMPARED.values() for name in (f"{what} A", f"{what} B", "B/A")]
    for name in ("row", "clients", *columns):
        made.add_column(name, justify="left" if name == "row" else "right")
    one, other = ({(row.name, row.clients): row for row in rows} for rows in (before, after))
    for key in dict.fromkeys([*other, *one]):
        cells = []
        for field in _COMPARED:
            a, b = getattr(one.get(key), field, None), getattr(other.get(key), field, None)
            cells += [_figure(a), _figure(b), _figure(b / a if a and b else None)]
        made.add_row(key[0], str(key[1]), *cells)
    return made


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _shape(kv: KVShape) -> str:
    return (
        f"{kv.layers} layers, {kv.kv_heads} KV heads, head_dim {kv.head_dim}, {kv.dtype},"
        f" {kv.block_tokens}-token blocks, {kv.chunk_tokens}-token chunks"
    )
