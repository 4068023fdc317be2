"""How a run is told: its table, what two runs have to do with each other, and how far to believe them."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from lmcache_trio.bench.rows import Round, Row, spread
from lmcache_trio.bench.settings import KVShape, Settings

__all__ = ["comparison", "doubts", "table"]

_SPREAD = 0.2
"""Above this, the limits themselves moved too much within one run for its ratios to be quoted."""
_OTHERS = 0.1
"""Cores that everyone else kept busy."""

_COLUMNS = ("row", "clients", "n", "p50 µs", "p99 µs", "ops/s", "GB/s", "client µs", "server µs", "ratio")


def table(rows: Sequence[Row], settings: Settings) -> Table:
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
    for name, figure in (("memcpy", "bandwidth"), ("bare_round_trip", "p50")):
        if name in rounds and len(rounds[name]) > 1:
            width = spread([getattr(r, figure) for r in rounds[name]])
            if width > _SPREAD:
                found.append(f"noisy machine: {name} varied by {width:.0%} between rounds")
    if others > _OTHERS:
        found.append(f"noisy machine: other processes kept {others:.2f} cores busy")
    return found


def comparison(before: Sequence[Row], after: Sequence[Row], names: tuple[str, str]) -> Table:
    """Two runs side by side, and what the second is of the first: below 1 is faster for times, above 1 for the rest."""
    made = Table(title=f"A: {names[0]}, B: {names[1]}")
    for name in ("row", "clients", "p50 A", "p50 B", "B/A", "ops/s A", "ops/s B", "B/A", "GB/s A", "GB/s B", "B/A"):
        made.add_column(name, justify="left" if name == "row" else "right")
    known = {(row.name, row.clients): row for row in before}
    for b in after:
        a = known.pop((b.name, b.clients), None)
        cells = []
        for field in ("p50_us", "ops_s", "gb_s"):
            one, other = getattr(a, field, None), getattr(b, field)
            cells += [_figure(one), _figure(other), _figure(other / one if one and other else None)]
        made.add_row(b.name, str(b.clients), *cells)
    for a in known.values():
        made.add_row(a.name, str(a.clients), *(c for v in (a.p50_us, a.ops_s, a.gb_s) for c in (_figure(v), "", "")))
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
