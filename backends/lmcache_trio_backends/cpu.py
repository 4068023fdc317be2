"""The `cpu` memory: the host arena, one file in shared memory that clients map.

The file is taken in pieces by `posix_fallocate`, which releases the GIL and fails cleanly where a bare `ftruncate`
would kill whoever touches the page later (SIGBUS). A live server holds a lock (`flock`) on its file for as long as it
lives, so a file whose lock is free was left by a dead one and is removed by the next start. Never is a pid guessed at.

This module never touches the arena's pages but the first, and populates nothing on a request's path.
"""

import errno
import fcntl
import logging
import mmap
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import trio

from lmcache_trio import threads
from lmcache_trio.abc import Memory
from lmcache_trio.errors import ConfigError, Misuse, Unavailable
from lmcache_trio_backends._memory_limits import memory_of_process

__all__ = ["CpuConfig", "CpuMemory"]

log = logging.getLogger("lmcache_trio.memory")

PAGE = 4096
FIRST_PIECE = 16 << 20
"""Small, so that the first slots are there 4 ms after the start (4 GB/s)."""
PIECE = 256 << 20
SMALLEST_PIECE = 1 << 20
"""When a piece does not fit, halves are tried down to this."""


def _check_size(instance: object, attribute: object, value: int | None) -> None:
    if value is not None and value < 2 * PAGE:
        raise ConfigError("size", f'{value} bytes hold no chunk; give {2 * PAGE} or more, as in "4GiB"')


@attrs.frozen
class CpuConfig:
    """Settings of `[memory]` with `backend = "cpu"`."""

    size: int | None = attrs.field(
        default=None,
        validator=_check_size,
        metadata={
            "unit": "bytes",
            "help": 'Bytes of the arena, as in "4GiB"; unset: a quarter of the memory that this process may have'
            " (its cgroups' limits count), at most half of what is free and of the file system.",
        },
    )
    directory: str = attrs.field(
        default="/dev/shm", metadata={"help": "A directory in a memory file system (tmpfs), shared with the engines."}
    )


class CpuMemory(Memory):
    """The arena file: made, grown, viewed, removed."""

    Config = CpuConfig

    def __init__(self, config: CpuConfig) -> None:
        super().__init__(config)
        self._directory = Path(config.directory)
        self._size = _fitting_size(config)
        self._nonce = secrets.token_bytes(16)
        self._path = ""
        self._fd = -1
        self._taken = 0
        self._full = ""
        self._map: mmap.mmap | None = None
        self._limiter = trio.CapacityLimiter(1)

    @property
    def path(self) -> str:
        return self._path

    @property
    def size(self) -> int:
        return self._size

    @property
    def nonce(self) -> bytes:
        return self._nonce

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        remove_leftovers(self._directory)
        self._path, self._fd = _create(self._directory)
        try:
            try:
                os.posix_fallocate(self._fd, 0, PAGE)
                os.pwrite(self._fd, self._nonce, 0)
                os.ftruncate(self._fd, self._size)  # so that clients can map all of it at once; holes cost nothing
            except OSError as exc:
                raise ConfigError("memory.directory", f"{self._directory} takes no file: {exc.strerror}") from exc
            self._taken = PAGE
            yield
        finally:
            self._close()

    async def grow(self) -> int:
        if self._fd < 0:
            raise Misuse("grow() was called on an arena that is not open")
        piece = min(FIRST_PIECE if self._taken == PAGE else PIECE, self._size - self._taken)
        while piece > 0 and not self._full:
            refused = await threads.offload(_allocate, self._fd, self._taken, piece, limiter=self._limiter)
            if refused is None:
                self._taken += piece
                break
            if piece >= 2 * SMALLEST_PIECE:
                piece = piece // 2 // PAGE * PAGE
                continue
            self._stay(refused)
        return self._taken

    def view(self, offset: int, length: int) -> memoryview:
        if offset < PAGE or length < 0 or offset + length > self._taken:
            raise Misuse(f"[{offset}, {offset + length}) is not inside the slots, which end at {self._taken}")
        if self._map is None:
            self._map = mmap.mmap(self._fd, self._size)
        return memoryview(self._map)[offset : offset + length]

    def statistics(self) -> dict[str, int | str]:
        return {"bytes_taken": self._taken, "bytes_size": self._size, "path": self._path, "limit": self._full}

    def _stay(self, refused: OSError) -> None:
        space = os.statvfs(self._directory)
        self._full = (
            f"the arena stays at {_human(self._taken)} of {_human(self._size)}: {self._directory} refused more "
            f"({refused.strerror}; the file system has {_human(space.f_frsize * space.f_blocks)}, of which "
            f"{_human(space.f_frsize * space.f_bavail)} are free; see `df -h {self._directory}`). "
            f"Set memory.size lower, or make it larger: "
            f"`mount -o remount,size=… {self._directory}`, in a container --shm-size"
        )
        log.warning("%s", self._full)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        os.close(fd)
        if self._map is not None:
            with suppress(BufferError):  # a tier's hung call still holds a view: the mapping goes with the view
                self._map.close()
            self._map = None


def remove_leftovers(directory: Path) -> list[str]:
    """Remove the arena files of this user that no live server holds a lock on; returns their paths."""
    removed = []
    for path in sorted(directory.glob(f"{_prefix()}*.arena")):
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue  # gone already, or not ours to open
        try:
            # The lock comes first. A server that is just starting has made its file but not locked it yet: if we are
            # faster, it finds its file gone and makes another.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_uid == os.getuid() and _is_file_at(fd, path):
                os.unlink(path)
                removed.append(str(path))
        except OSError as exc:
            if exc.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT, errno.EPERM):
                raise
        finally:
            os.close(fd)
    if removed:
        log.info("removed what a dead server left: %s", ", ".join(removed))
    return removed


def _create(directory: Path) -> tuple[str, int]:
    for _ in range(100):
        path = directory / f"{_prefix()}{os.getpid()}-{secrets.token_hex(8)}.arena"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise ConfigError("memory.directory", f"cannot make a file in {directory}: {exc.strerror}") from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file_at(fd, path):
                return str(path), fd
        except BlockingIOError:
            pass  # another start took it for a leftover in the moment before the lock
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise Unavailable(f"other servers kept removing the arena in {directory} while it was made")


def _is_file_at(fd: int, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _allocate(fd: int, offset: int, length: int) -> OSError | None:
    """Back the range with memory; the error where the file system has no more. Runs in a thread."""
    try:
        os.posix_fallocate(fd, offset, length)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
            return exc
        raise
    return None


def _fitting_size(config: CpuConfig) -> int:
    """The arena's size in whole pages, which fits this process's memory and file system; else ConfigError."""
    try:
        space = os.statvfs(config.directory)
    except OSError as exc:
        raise ConfigError("memory.directory", f"{config.directory!r}: {exc.strerror}; give a tmpfs directory") from exc
    room, memory = space.f_frsize * space.f_blocks, memory_of_process()
    if config.size is None:
        return max(2 * PAGE, min(memory.limit // 4, memory.free // 2, room // 2) // PAGE * PAGE)
    if config.size > memory.limit:
        raise ConfigError(
            "memory.size", f"{_human(config.size)} do not fit {memory.named} of {_human(memory.limit)}; give less"
        )
    if config.size > memory.free:
        words = "memory.size: only %s of %s are free now, and the arena will take %s: the system may end this server"
        log.warning(words, _human(memory.free), memory.named, _human(config.size))
    if config.size > room:
        raise ConfigError(
            "memory.size",
            f"{_human(config.size)} do not fit {config.directory}, which has {_human(room)}; give less, or make it "
            f"larger: `mount -o remount,size=… {config.directory}`, in a container --shm-size",
        )
    return config.size // PAGE * PAGE


def _prefix() -> str:
    return f"lmcache-trio-{os.getuid()}-"


def _human(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} bytes"
