"""What is measured of a soak's server, and what the figures must show: it only reads and reckons."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import linear_regression
from typing import Any

__all__ = ["GROWTH", "LONG", "grown", "process_figures", "unreturned"]

STAYS = {"bytes_size", "bytes_taken", "bytes_free", "largest_hole"}
"""Of `held`, the arena's size and places."""
OF_CHUNKS = {"chunks_ready", "slots_ready", "bytes_ready", "namespaces"}
"""Of `held`, what is there for the next engine."""
ONE_CLIENT = {"connections": 1, "tasks": 10**9}
"""Of `held`, what the client that asks has itself; tasks are compared with those of the start."""
WARM = 1 / 3
"""Of a soak, not judged: pools, the allocator's arenas and the interpreter's caches fill in it."""
LONG = 240.0
"""Seconds from which on memory is judged: a shorter soak sees little but a server's start."""
GROWTH = 0.05
"""By which share of its start the fitted line may rise in the judged window. Of 30 MiB in 400 s it is 3.9 kB a second:
100 bytes for each of 40 lookups a second, which one engine makes where it has half a core."""


def process_figures(pid: int, disk: Path) -> dict[str, int]:
    """Bytes, threads and descriptors of *pid*; those of files in *disk*, one a slab or index, are counted apart.

    OSError: it has ended.
    """
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    if _MEMORY["rss"] not in status:
        raise ProcessLookupError(f"process {pid} has ended")
    found = {name: int(status[field].split()[0]) << 10 for name, field in _MEMORY.items()}
    found |= {"threads": int(status["Threads"]), "descriptors": 0, "disk_descriptors": 0}
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            place = os.readlink(descriptor)
            if not place.startswith("/memfd:lmcache-trio arena"):  # one more from the first use of it on
                found["disk_descriptors" if place.startswith(str(disk)) else "descriptors"] += 1
    return found


_MEMORY = {"rss": "VmRSS", "anonymous": "RssAnon", "shared": "RssShmem"}


def unreturned(held: dict[str, Any]) -> dict[str, Any]:
    """What of *held* is not back at 0, with no client but the one that asks."""
    return {
        name: value for name, value in held.items() if name not in STAYS | OF_CHUNKS and value > ONE_CLIENT.get(name, 0)
    }


def grown(times: Sequence[float], values: Sequence[float]) -> float:
    """By which share of itself the least-squares line through the last two thirds rises from its start to its end.

    A line, because a leak is one; all points, because one sample is as high as what was just under way; the first third
    left out, because a start is no leak.
    """
    first, last = times[0] + WARM * (times[-1] - times[0]), times[-1]
    judged = [i for i, time in enumerate(times) if time >= first]
    slope, at_zero = linear_regression([times[i] for i in judged], [values[i] for i in judged])
    return slope * (last - first) / (slope * first + at_zero)
