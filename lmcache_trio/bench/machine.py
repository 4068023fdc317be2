"""Whose processor time it was: one process', and everyone else's while a benchmark ran. Reads Linux's /proc."""

import os
import platform
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import attrs

__all__ = ["Meter", "anonymous_bytes", "cpu_seconds", "describe"]

_TICKS = os.sysconf("SC_CLK_TCK")
_SCHEDULED = 2
"""Of the clocks that Linux has for each process, the scheduler's own: clock_getcpuclockid(3)."""


def cpu_seconds(pid: int) -> float | None:
    """Processor time of *pid* so far, threads that have ended included, in nanosecond steps; None if it is not there.

    Threads are not added up one by one: a server lets idle ones go, and their time would go with them.
    """
    try:
        return time.clock_gettime(~pid << 3 | _SCHEDULED)
    except OSError:
        return _ticks(pid)


def _ticks(pid: int) -> float | None:
    """Where the kernel has no such clock: steps of 10 ms."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / _TICKS


def anonymous_bytes(pid: int) -> int:
    """Private memory of *pid*: its heap, without the arena and without program text."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


@attrs.frozen
class Meter:
    """All processors' busy seconds, and those of *pids*, at one moment."""

    busy: float
    ours: float
    whole: float
    cores: int

    @classmethod
    def read(cls, pids: list[int]) -> "Meter":
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        idle = fields[3] + fields[4]
        ours = sum(cpu_seconds(pid) or 0.0 for pid in pids)
        whole = sum(fields[:8]) / _TICKS
        return cls(whole - idle / _TICKS, ours, whole, os.cpu_count() or 1)

    def others_since(self, before: "Meter") -> float:
        """Cores that everyone else kept busy since *before*, stolen time included."""
        seconds = (self.whole - before.whole) / self.cores
        if seconds <= 0:
            return 0.0
        return max(0.0, (self.busy - before.busy) - (self.ours - before.ours)) / seconds


def describe() -> str:
    """The machine in one line, for whoever reads the figures."""
    model = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        model = platform.machine()
    parts = [f"{len(os.sched_getaffinity(0))} x {model}", f"Linux {platform.release()}"]
    parts += [f"Python {platform.python_version()}"]
    for name in ("trio", "pynng", "torch", "numpy"):
        with suppress(PackageNotFoundError):  # torch need not be there
            parts.append(f"{name} {version(name)}")
    return ", ".join(parts)
