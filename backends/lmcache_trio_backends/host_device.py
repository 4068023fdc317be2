"""The `host` device: engines whose KV lies in shared CPU memory. Copies run in one thread, in order, without the GIL.

An engine's memory is an anonymous file (memfd), whose descriptor the engine passes over its connection; it is taken
only when it cannot be made shorter (sealed), since touching a page that is gone would kill the server (SIGBUS).

Measured (chunks of 32 MiB, 32 KiB blocks scattered in 512 MiB, one thread, share of memcpy's processor time between
private arrays; a plain memcpy between the same shared files has 0.88): one call a chunk, over the blocks of all layers,
`np.take(out=, mode="clip")` 0.92 and assignment of one void item a block 0.95; one call a piece 0.91 and 0.91 to 0.94,
chunk by chunk or piece by piece. So it is one call a chunk where the layers lie at one stride, which also waits for the
loop's thread once, not 64 times. Before, a piece at a time and rows of bytes: 0.83 and 0.82. One memcpy a block is left
for gathering blocks that do not lie densely. This needs no torch.
"""

import ctypes
import fcntl
import mmap
import os
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import trio

from lmcache_trio.abc import ArenaDevice, Attached, Copy, Direction, Export, Memory, Piece, SharedMemory, Ticket
from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio.threads import DedicatedThread, offload

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    _Bytes = npt.NDArray[np.uint8]
    _Index = npt.NDArray[np.int64]

__all__ = ["HostConfig", "HostDevice"]

_POPULATE_WRITE = 23  # Linux 5.14; older kernels say EINVAL, and pages come one by one, with the first copy
_PIECE = 64 << 20
"""Bytes whose pages are entered by one call: about 10 ms, the longest that a cancellation waits for it."""


@attrs.frozen
class HostConfig:
    """The `host` device has no settings."""


class _Run:
    """Pieces at one stride in one allocation, one after the other in a slot: what one call can move.

    *rows* are all places where a block of them may begin, *first* the row of each piece's block 0.
    """

    def __init__(self, mapped: "_Bytes", stride: int, length: int) -> None:
        import numpy as np

        self.length = length
        self.dense = stride == length
        count = (len(mapped) - length) // stride + 1
        self.rows = np.lib.stride_tricks.as_strided(mapped, (count, length), (stride, 1))
        self.items = self.rows.view(f"V{length}")[:, 0]
        """The same, one item a block."""
        self.first: list[int] = []

    def index(self, blocks: "_Index") -> "_Index":
        """The rows of *blocks*, piece after piece, as they stand in a slot."""
        import numpy as np

        first = np.asarray(self.first, dtype=np.int64)
        return (first[:, None] + blocks[None, :]).ravel()


class AttachedHost(Attached):
    """The engine's memory, mapped."""

    def __init__(self, export: Export, maps: "Sequence[_Bytes]") -> None:
        super().__init__(export)
        self.runs: list[_Run] = []
        last: Piece | None = None
        for layer in export.pieces:
            for piece in layer:
                stride = _stride(piece)
                if last is None or not _in_line(last, piece):
                    start = piece.offset % stride
                    self.runs.append(_Run(maps[piece.allocation][start:], stride, piece.length))
                last = piece
                self.runs[-1].first.append(piece.offset // stride)

    def close(self) -> None:
        self.runs = []  # the mappings go with their last view


def _stride(piece: Piece) -> int:
    return max(piece.stride, piece.length)  # a tensor of one block may have any


def _in_line(one: Piece, other: Piece) -> bool:
    first, second = (
        (piece.allocation, piece.length, _stride(piece), piece.offset % _stride(piece)) for piece in (one, other)
    )
    return first == second


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
        maps: list[_Bytes] = []
        try:
            await self._open(export, maps)
            opened = AttachedHost(export, maps)
        except BaseException:
            self._unmap(maps.clear)
            raise
        self._attached.add(opened)
        return opened

    async def _open(self, export: Export, maps: "list[_Bytes]") -> None:
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
    count = copy.chunk_blocks
    length = count * attached.export.block_bytes
    every = np.asarray(copy.blocks, dtype=np.int64).reshape(len(copy.slots), count)
    for offset, blocks in zip(copy.slots, every, strict=True):
        slot = np.frombuffer(memory.view(offset, length), dtype=np.uint8)
        at = 0
        for run in attached.runs:
            size = len(run.first) * count * run.length
            if copy.direction is Direction.STORE:
                _gather(run, blocks, slot[at : at + size])
            else:
                _scatter(slot[at : at + size], run, blocks)
            at += size
    return length * len(copy.slots)


def _gather(run: _Run, blocks: "_Index", part: "_Bytes") -> None:
    import numpy as np

    index, out = run.index(blocks), part.reshape(-1, run.length)
    if run.dense:
        np.take(run.rows, index, axis=0, out=out, mode="clip")
    else:  # take() would first make a copy of everything that is there
        for i, row in enumerate(index.tolist()):
            out[i] = run.rows[row]


def _scatter(part: "_Bytes", run: _Run, blocks: "_Index") -> None:
    source = part.view(f"V{run.length}")
    if blocks.min() >= 0:
        run.items[run.index(blocks)] = source
        return
    wanted = blocks >= 0  # what is left out is cut out of a copy, a piece at a time
    for first, piece in zip(run.first, source.reshape(-1, len(blocks)), strict=True):
        run.items[first + blocks[wanted]] = piece[wanted]


def _map(memory: SharedMemory) -> "_Bytes":
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


def _populate(mapped: "_Bytes", start: int, length: int) -> None:
    """Enter the pages into this process' table, which is slower than a copy. In a thread, without the GIL."""
    _libc.madvise(ctypes.c_void_p(mapped.ctypes.data + start), ctypes.c_size_t(length), _POPULATE_WRITE)


def _populate_view(view: memoryview) -> None:
    import numpy as np

    _populate(np.frombuffer(view, dtype=np.uint8), 0, len(view))


_libc = ctypes.CDLL(None, use_errno=True)
