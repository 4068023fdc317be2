"""Whose processor time it was: one process', and everyone else's while a benchmark ran. Reads Linux's /proc."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import attrs

__all__ = ["Meter", "anonymous_bytes", "cpu_seconds", "describe"]

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float | None:
    """Processor time of all threads of *pid* so far, in nanosecond steps; None where it cannot be read.

    Time of threads that ended is lost: a server keeps its threads.
    """
    try:
        with os.scandir(f"/proc/{pid}/task") as tasks:
            total = sum(_nanoseconds(task.path) for task in tasks)
    except (OSError, ValueError, IndexError):
        return None
    return total / 1e9 if total else _ticks(pid)


def _nanoseconds(task: str) -> int:
    try:
        return int(Path(task, "schedstat").read_bytes().split()[0])
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile, or the kernel keeps none
        return 0


def _ticks(pid: int) -> float | None:
    """Where the kernel keeps no schedstat: steps of 10 ms."""
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
    parts += [f"{name} {version(name)}" for name in ("trio", "pynng", "torch", "numpy")]
    return ", ".join(parts)
