"""How much memory this process may have: the machine's, or less where a cgroup of it says so.

A limit holds for all cgroups below the one that has it, so every cgroup from the process's own up to the top of what is
mounted is read: of version 2 (containers, systemd's MemoryMax and MemoryHigh) and of version 1. What lies above a
container's own view cannot be read from inside, but for version 1, whose kernel tells the least.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import attrs

__all__ = ["ProcessMemory", "memory_of_process"]


@attrs.frozen
class ProcessMemory:
    """Bytes that a process may have."""

    limit: int
    free: int
    """Of these, what it could take now: others of the machine or of the cgroup have the rest. Page cache counts as
    free."""
    named: str
    """What sets the limit, for messages."""


@attrs.frozen
class _Version:
    """Names of files and of figures in a version of cgroups."""

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


_V1 = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Version(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def memory_of_process(proc: Path = Path("/proc")) -> ProcessMemory:
    """What the process that *proc* calls `self` may have; *proc* also says where cgroups are mounted."""
    machine = _figures(proc / "meminfo")
    limit, named = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine's memory"
    if "MemTotal" in machine:
        limit = machine["MemTotal"] * 1024
    free = machine["MemAvailable"] * 1024 if "MemAvailable" in machine else limit
    for version, directory in _cgroups(proc):
        stat = _figures(directory / "memory.stat")
        limits = [(_number(directory / name), f"the limit in {directory / name}") for name in version.limits]
        limits.append((stat.get("hierarchical_memory_limit"), f"the limit of a cgroup above {directory}"))
        used = (_number(directory / version.usage) or 0) - sum(stat.get(name, 0) for name in version.cache)
        for found, name in limits:
            if found is None:
                continue
            if found < limit:
                limit, named = found, name
            free = min(free, found - used)
    return ProcessMemory(limit, max(0, min(free, limit)), named)


def _cgroups(proc: Path) -> Iterator[tuple[_Version, Path]]:
    """The directories of the process's memory cgroups: its own, and all above it that are mounted here."""
    with suppress(OSError):
        paths = dict(_own_paths(proc))
        for line in (proc / "self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            kind, _, options = after.split()[:3]
            version = {"cgroup2": _V2, "cgroup": _V1 if "memory" in options.split(",") else None}.get(kind)
            if version is None or version not in paths:
                continue
            root, mount = (_unescaped(text) for text in before.split()[3:5])
            own = PurePosixPath(paths[version])
            inside = PurePosixPath()  # at least the top of what is mounted
            if ".." in PurePosixPath(root).parts:
                inside = _found(Path(mount), [*PurePosixPath(root).parts[1:], *own.parts[1:]])
            elif own.is_relative_to(root) and ".." not in own.parts:
                inside = own.relative_to(root)
            for part in (inside, *inside.parents):
                yield version, Path(mount) / part


def _found(mount: Path, way: list[str]) -> PurePosixPath:
    """This process's cgroup below *mount*, which was mounted outside of our cgroup namespace: its root is `/../..`, and
    how many levels we are below it is told, but no names. So it is searched for there, by our process id."""
    for file in mount.glob("/".join(["*"] * len(way)) + "/cgroup.procs"):
        with suppress(OSError):
            if str(os.getpid()) in file.read_text().split():
                return PurePosixPath(file.parent.relative_to(mount))
    return PurePosixPath()


def _own_paths(proc: Path) -> Iterator[tuple[_Version, str]]:
    for line in (proc / "self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield _V2, path
        elif "memory" in controllers.split(","):
            yield _V1, path


def _figures(path: Path) -> dict[str, int]:
    """Lines such as `MemTotal:  123 kB` and `active_file 123`."""
    with suppress(OSError):
        found = re.findall(r"^(\w+):?\s+(\d+)", path.read_text(), re.MULTILINE)
        return {name: int(value) for name, value in found}
    return {}


def _number(path: Path) -> int | None:
    """None where there is no such file, or where it says `max`."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _unescaped(text: str) -> str:
    return re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), text)
