"""The text of one setting, read as a size or a path, and the known name that is closest to a wrong one."""

import difflib
import os
import re
from collections.abc import Iterable

__all__ = ["closest", "expand", "format_size", "parse_path", "parse_size"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip


def parse_size(text: str) -> int:
    """The bytes of `"4GiB"`, `"512 Mi"`, `"1.5G"` or `"1000000"`. ValueError says what is accepted."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise ValueError(f'{text!r} is not a size; write a number of bytes, or one with a unit, as in "4GiB"')
    return int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit


def format_size(size: float) -> str:
    """*size* bytes as people write them: `"4 GiB"`, `"1.5 MiB"`, `"17 bytes"`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def expand(text: str) -> str:
    """*text* with `~` and `$NAME` expanded, as a shell does. ValueError: it names a variable that is not set."""
    if unset := [name for name in re.findall(r"\$\{?(\w+)", text) if name not in os.environ]:
        raise ValueError(f"{text!r} names the variable {unset[0]}, which is not set; write the absolute path")
    return os.path.expanduser(os.path.expandvars(text))


def parse_path(text: str) -> str:
    """The absolute path in *text*, with `~` and `$NAME` expanded, as a shell does. ValueError says what is wrong.

    A relative path is refused: a server that is started elsewhere would not find its files. An empty one stays empty.
    """
    path = expand(text)
    if "\0" in path:
        raise ValueError(f"{text!r} has a zero byte in it; write the absolute path")
    if path and not path.startswith("/"):
        raise ValueError(f"{text!r} is a relative path; write the absolute one, such as {os.path.abspath(path)!r}")
    return path


def closest(name: str, known: Iterable[str]) -> str:
    """The one of *known* that *name* was probably meant to be; empty if none is close."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), "")
