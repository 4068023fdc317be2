"""The `host` device: engines whose KV lies in shared CPU memory. Copies run in one thread, in order, without the GIL.

An engine's memory is an anonymous file (memfd), whose descriptor the engine passes over its connection; it is taken
only when it cannot be made shorter (sealed), since touching a page that is gone would kill the server (SIGBUS).

`lmcache_trio.host_memory` moves the blocks. This needs no torch.
"""

import fcntl
import mmap
import os
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import trio

from lmcache_trio.abc import ArenaDevice, Attached, Copy, Direction, Export, Memory, SharedMemory, Ticket
from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio.threads import DedicatedThread, offload

if TYPE_CHECKING:
    from lmcache_trio.host_memory import BlockIndex, Bytes

__all__ = ["HostConfig", "HostDevice"]

_PIECE = 64 << 20
"""Bytes whose pages are entered by one call: about 10 ms, the longest that a cancellation waits for it."""


@attrs.frozen
class HostConfig:
    """The `host` device has no settings."""


class AttachedHost(Attached):
    """The engine's memory, mapped. *groups*: the blocks of each KV group."""

    def __init__(self, export: Export, maps: "Sequence[Bytes]") -> None:
        from lmcache_trio.host_memory import blocks_of

        super().__init__(export)
        self.groups = [blocks_of(pieces, maps, export.num_blocks) for pieces in export.pieces]

    def close(self) -> None:
        """Let the mappings go: each goes with its last view."""
        del self.groups


class _HostTicket(Ticket):
    def __init__(self) -> None:
        self.ended = trio.Event()
        self.error: Exception | None = None


class HostDevice(ArenaDevice):
    """Moves blocks of shared memory. It needs numpy, which is imported when the first engine is attached."""

    Config = HostConfig

    def __init__(self, config: HostConfig) -> None:
        super().__init__(config)
        self._memory: Memory | None = None
        self._thread: DedicatedThread | None = None
        self._unmapping: DedicatedThread | None = None
        """Where memory is let go: what a lost engine leaves behind (0.1 s for 16 GiB) keeps nobody waiting."""
        self._attached: set[AttachedHost] = set()
        self._limiter = trio.CapacityLimiter(1)
        self._populating = trio.Lock()
        self._copies = 0
        self._bytes = 0
        self._populated = 0  # bytes of the arena

    @asynccontextmanager
    async def open(self, memory: Memory) -> AsyncIterator[None]:
        self._memory, self._thread = memory, DedicatedThread("lmcache-trio host device")
        self._unmapping = DedicatedThread("lmcache-trio host unmapping")
        self._populated = 0
        try:
            yield
        finally:
            self._thread.close()
            for opened in list(self._attached):
                self.detach(opened)
            self._unmapping.close()
            self._memory = self._thread = self._unmapping = None

    async def attach(self, export: Export) -> Attached:
        if self._thread is None:
            raise Unavailable("the host device is not open")
        maps: list[Bytes] = []
        try:
            await self._open(export, maps)
            opened = AttachedHost(export, maps)
        except BaseException:
            self._unmap(maps.clear)
            raise
        self._attached.add(opened)
        return opened

    async def _open(self, export: Export, maps: "list[Bytes]") -> None:
        """Map the memory, a place in *maps* each, and enter its pages."""
        for memory in export.memory:
            if not isinstance(memory, SharedMemory):
                raise Unavailable("the host device opens shared host memory alone")
            maps.append(await offload(_map, memory, limiter=self._limiter))
            for start in range(0, memory.size, _PIECE):
                await offload(_populate, maps[-1], start, min(_PIECE, memory.size - start), limiter=self._limiter)
        await self._populate_arena()

    async def arena_grew(self) -> None:
        if self._attached:
            await self._populate_arena()

    async def _populate_arena(self) -> None:
        """Only a server that moves an engine's KV needs the arena's pages in its own table; then it needs them all."""
        async with self._populating:
            memory = self._memory
            while memory is not None and (left := int(memory.statistics()["bytes_taken"]) - self._populated) > 0:
                length = min(left, _PIECE)
                await offload(_populate_view, memory.view(self._populated, length), limiter=self._limiter)
                self._populated += length

    def start(self, copy: Copy) -> Ticket:
        if self._thread is None or self._memory is None:
            raise Unavailable("the host device is not open")
        ticket = _HostTicket()
        self._thread.post(self._run, copy, self._memory, ticket, on_return=ticket.ended.set)
        return ticket

    async def wait_ended(self, ticket: Ticket) -> None:
        if not isinstance(ticket, _HostTicket):
            raise Misuse("this ticket is another device's")
        await ticket.ended.wait()
        if ticket.error is not None:
            raise Unavailable(f"a copy failed: {ticket.error!r}") from ticket.error

    def detach(self, attached: Attached) -> None:
        if isinstance(attached, AttachedHost) and attached in self._attached:
            self._attached.remove(attached)
            self._unmap(attached.close)

    def _unmap(self, let_go: Callable[[], None]) -> None:
        """Have *let_go*, which drops the last views of an engine's memory, called where it keeps nobody waiting."""
        if self._unmapping is not None:
            self._unmapping.post(let_go, on_return=lambda: None)

    def statistics(self) -> dict[str, int | str]:
        return {"attached": len(self._attached), "copies": self._copies, "bytes_copied": self._bytes}

    def _run(self, copy: Copy, memory: Memory, ticket: _HostTicket) -> None:
        """In the thread."""
        try:
            self._bytes += copy_blocks(copy, memory)
            self._copies += 1
        except Exception as exc:  # noqa: BLE001  (told to whoever waits for it)
            ticket.error = exc


def copy_blocks(copy: Copy, memory: Memory) -> int:
    """Carry out *copy*, of an `Attached` of this module. Returns the bytes moved. In a thread."""
    import numpy as np

    attached = copy.attached
    assert isinstance(attached, AttachedHost)
    count, paged = copy.chunk_blocks, attached.groups[copy.group]
    length = count * paged.block_bytes
    every = np.asarray(copy.blocks, dtype=np.int64).reshape(len(copy.slots), count)
    for offset, blocks in zip(copy.slots, every, strict=True):
        slot = np.frombuffer(memory.view(offset, length), dtype=np.uint8)
        if copy.direction is Direction.STORE:
            paged.gather(blocks, slot)
        else:
            wanted = np.flatnonzero(blocks >= 0)
            places: slice | BlockIndex = wanted  # blocks that are left out in the middle are cut out of a copy
            if len(wanted) and wanted[-1] - wanted[0] == len(wanted) - 1:
                places = slice(int(wanted[0]), int(wanted[-1]) + 1)
            paged.scatter(slot, count, places, blocks[wanted])
    return length * len(copy.slots)


def _map(memory: SharedMemory) -> "Bytes":
    """Map what is behind the descriptor, if it is what it is said to be. In a thread."""
    import numpy as np

    try:
        _check(memory)
        return np.frombuffer(mmap.mmap(memory.descriptor, memory.size), dtype=np.uint8)
    except (OSError, ValueError) as exc:
        raise Unavailable(f"the engine's memory cannot be mapped: {exc}") from exc


def _check(memory: SharedMemory) -> None:
    found = os.fstat(memory.descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise Misuse("what the engine passed is no memory: pass the descriptor of an anonymous file (memfd)")
    if found.st_size < memory.size:
        raise Misuse(f"the memory that the engine passed has {found.st_size} bytes, not {memory.size}")
    try:
        sealed = fcntl.fcntl(memory.descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:
        sealed = 0
    if not sealed or found.st_blocks * 512 < memory.size:
        raise Misuse("the memory could vanish under a copy: allocate it whole, and seal it against shrinking")


def _populate(mapped: "Bytes", start: int, length: int) -> None:
    """In a thread."""
    from lmcache_trio.host_memory import enter_pages

    enter_pages(mapped.ctypes.data + start, length)


def _populate_view(view: memoryview) -> None:
    import numpy as np

    _populate(np.frombuffer(view, dtype=np.uint8), 0, len(view))
