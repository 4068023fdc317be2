"""The `cpu` memory: the host arena, one anonymous file (memfd) that clients map.

The file has its whole length from the start and is sealed: no client can make it shorter (whoever touched a page that
is gone would be killed, SIGBUS), longer (memory that nobody accounts for), or read-only for others. It is backed with
memory in pieces by `posix_fallocate`, which releases the GIL and fails cleanly where a bare `ftruncate` would kill
whoever touches the page later. It has no name: it goes with the last process that has it open or mapped, however that
ends, and the size of /dev/shm is nothing to it.

This module never touches the arena's pages, and populates nothing on a request's path.
"""

import errno
import fcntl
import logging
import mmap
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import attrs
import trio

from lmcache_trio import threads
from lmcache_trio.abc import Memory
from lmcache_trio.errors import ConfigError, Misuse
from lmcache_trio_backends._memory_limits import memory_of_process

__all__ = ["CpuConfig", "CpuMemory"]

log = logging.getLogger("lmcache_trio.memory")

PAGE = 4096
FIRST_PIECE = 16 << 20
"""Small, so that the first slots are there 4 ms after the start (4 GB/s)."""
PIECE = 256 << 20
SMALLEST_PIECE = 1 << 20
"""When a piece does not fit, halves are tried down to this."""
_NOEXEC_SEAL = 0x8  # MFD_NOEXEC_SEAL, Linux 6.3: some systems let through nothing else (vm.memfd_noexec = 2)


def _check_size(instance: object, attribute: object, value: int | None) -> None:
    if value is not None and value < PAGE:
        raise ConfigError("size", f'{value} bytes hold no chunk; give {PAGE} or more, as in "4GiB"')


@attrs.frozen
class CpuConfig:
    """Settings of `[memory]` with `backend = "cpu"`."""

    size: int | None = attrs.field(
        default=None,
        validator=_check_size,
        metadata={
            "unit": "bytes",
            "help": 'Bytes of the arena, as in "4GiB"; unset: a quarter of the memory that this process may have'
            " (its cgroups' limits count), at most half of what is free.",
        },
    )


class CpuMemory(Memory):
    """The arena: made, grown, viewed."""

    Config = CpuConfig

    def __init__(self, config: CpuConfig) -> None:
        super().__init__(config)
        self._size = _fitting_size(config)
        self._fd = -1
        self._taken = 0
        self._full = ""
        self._map: mmap.mmap | None = None
        self._limiter = trio.CapacityLimiter(1)

    @property
    def descriptor(self) -> int:
        if self._fd < 0:
            raise Misuse("the arena is not open")
        return self._fd

    @property
    def size(self) -> int:
        return self._size

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        self._fd, self._taken, self._full = _create(self._size), 0, ""
        try:
            yield
        finally:
            self._close()

    async def grow(self) -> int:
        if self._fd < 0:
            raise Misuse("grow() was called on an arena that is not open")
        piece = min(PIECE if self._taken else FIRST_PIECE, self._size - self._taken)
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
        if offset < 0 or length < 0 or offset + length > self._taken:
            raise Misuse(f"[{offset}, {offset + length}) is not inside the slots, which end at {self._taken}")
        if self._map is None:
            self._map = mmap.mmap(self._fd, self._size)
        return memoryview(self._map)[offset : offset + length]

    def statistics(self) -> dict[str, int | str]:
        return {"bytes_taken": self._taken, "bytes_size": self._size, "limit": self._full}

    def _stay(self, refused: OSError) -> None:
        self._full = (
            f"the arena stays at {_human(self._taken)} of {_human(self._size)}: there is no memory for more "
            f"({refused.strerror}). Set memory.size lower, or give the machine or container more"
        )
        log.warning("%s", self._full)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)
        if self._map is not None:
            with suppress(BufferError):  # a tier's hung call still holds a view: the mapping goes with the view
                self._map.close()
            self._map = None


def _create(size: int) -> int:
    """An anonymous file of *size* bytes without memory behind them, of which no client can change the length."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        try:
            fd = os.memfd_create("lmcache-trio arena", flags | _NOEXEC_SEAL)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            fd = os.memfd_create("lmcache-trio arena", flags)
    except OSError as exc:
        raise ConfigError("memory", f"no anonymous file can be made for the arena: {exc.strerror}") from exc
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as exc:
        os.close(fd)
        raise ConfigError("memory.size", f"no arena of {_human(size)} can be made: {exc.strerror}") from exc
    return fd


def _allocate(fd: int, offset: int, length: int) -> OSError | None:
    """Back the range with memory; the error where there is none. Runs in a thread."""
    try:
        os.posix_fallocate(fd, offset, length)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
            return exc
        raise
    return None


def _fitting_size(config: CpuConfig) -> int:
    """The arena's size in whole pages, which fits this process's memory; else ConfigError."""
    memory = memory_of_process()
    if config.size is None:
        return max(PAGE, min(memory.limit // 4, memory.free // 2) // PAGE * PAGE)
    if config.size > memory.limit:
        raise ConfigError(
            "memory.size", f"{_human(config.size)} do not fit {memory.named} of {_human(memory.limit)}; give less"
        )
    if config.size > memory.free:
        words = "memory.size: only %s of %s are free now, and the arena will take %s: the system may end this server"
        log.warning(words, _human(memory.free), memory.named, _human(config.size))
    return config.size // PAGE * PAGE


def _human(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} bytes"
