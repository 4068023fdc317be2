"""Text for a terminal of any width, or for a pipe: rows with a label, and figures as people write them.

It is plain text: no colour says what a word does not.
"""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

__all__ = ["columns", "count", "duration", "percent", "rows", "width"]

LEAST_WIDTH = 40
"""Columns below which lines are not made shorter: a terminal breaks them by itself."""


def width() -> int:
    """Columns of a line: those of the terminal; behind a pipe no line is broken, so that each can be searched for."""
    return max(LEAST_WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 1 << 16


def rows(table: Iterable[tuple[str, str]]) -> str:
    """A line per row: its label, and its text, which is wrapped beside it. A label that is empty continues the last."""
    table = list(table)
    indent = max((len(label) for label, _ in table), default=0) + 2
    lines = []
    for label, text in table:
        wrapped = textwrap.wrap(text, max(LEAST_WIDTH // 2, width() - indent), break_on_hyphens=False) or [""]
        lines += [f"{label:{indent}}{wrapped[0]}", *(" " * indent + line for line in wrapped[1:])]
    return "".join(f"{line}\n" for line in lines)


def columns(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table. The first column is of words; columns whose head begins with a space hold numbers, and end together."""
    lines = [list(head), *map(list, body)]
    widths = [max(len(line[column].strip()) for line in lines) for column in range(len(head))]
    made = ""
    for line in lines:
        cells = [
            f"{cell.strip():>{size}}" if name.startswith(" ") else f"{cell:{size}}"
            for name, cell, size in zip(head, line, widths, strict=True)
        ]
        made += "  ".join(cells).rstrip() + "\n"
    return made


def count(number: float, thing: str = "") -> str:
    """`1,234 tokens`; *thing* is a plural."""
    plural = thing if number != 1 else thing.removesuffix("s")
    return f"{number:,.10g} {plural}".rstrip()


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def duration(seconds: float) -> str:
    """`3 d 4 h`, `12 min 5 s`: the two largest units."""
    left = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        number, left = divmod(left, size)
        if number or parts:
            parts.append(f"{number} {unit}")
    return " ".join(parts[:2]) or "0 s"
