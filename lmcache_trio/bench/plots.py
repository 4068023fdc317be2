"""Draws what `grow` measured, as SVG. Needs matplotlib, which the extra `lmcache-trio[plots]` brings."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lmcache_trio.bench.grow import Grown, Point
from lmcache_trio.errors import Unavailable

__all__ = ["check", "draw"]


def check() -> None:
    """`Unavailable` if nothing can be drawn here: to be told before an hour of measuring, not after it."""
    try:
        import_module("matplotlib.figure")
    except ImportError as exc:
        raise Unavailable("plots need matplotlib: pip install 'lmcache-trio[plots]'") from exc


def draw(grown: Grown, folder: Path, machine: str) -> list[Path]:
    """Write the plots into *folder*; returns the files."""
    lengths = [
        ("tokens in, count out", grown.of("length, tokens in")),
        ("hashed already, million chunks", grown.of("length, large index")),
        ("hashed already, thousand chunks", grown.of("length, small index")),
    ]
    return [
        _plot(folder / "lookup_by_length.svg", lengths, "tokens of the prompt", machine),
        _plot(folder / "lookup_by_index.svg", [("8,192 tokens", grown.of("index"))], "chunks in the index", machine),
        _plot_clients(folder / "lookups_by_clients.svg", grown.of("clients"), machine),
    ]


def _plot(path: Path, series: Sequence[tuple[str, Sequence[Point]]], what: str, machine: str) -> Path:
    figure, axes = _axes(what, "microseconds a lookup", machine)
    for label, points in series:
        xs = [point.x for point in points]
        (line,) = axes.plot(xs, [point.p50_us for point in points], marker="o", label=f"{label}: p50")
        axes.plot(xs, [point.p99_us for point in points], linestyle=":", color=line.get_color(), label="p99")
    axes.set_xscale("log", base=2 if "tokens" in what else 10)
    axes.set_yscale("log")
    return _save(path, figure, axes)


def _plot_clients(path: Path, points: Sequence[Point], machine: str) -> Path:
    figure, axes = _axes("clients", "lookups of 8,192 tokens a second, with their ends", machine)
    axes.plot([point.x for point in points], [point.ops_s for point in points], marker="o", label="all hit")
    axes.set_ylim(bottom=0)
    return _save(path, figure, axes)


def _axes(x: str, y: str, machine: str) -> tuple[Any, Any]:
    figure = import_module("matplotlib.figure").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(machine, fontsize=6)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def _save(path: Path, figure: Any, axes: Any) -> Path:
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})  # the same figures, the same file
    return path
