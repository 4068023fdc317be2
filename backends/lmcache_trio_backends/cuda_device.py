"""The `cuda` device: engines whose KV lies in GPU memory, opened by the driver's own handles (`cuda-bindings`).

    store: engine's event --> copy stream: block by block into pinned slots --> event --> ended
    load:                     copy stream: block by block out of pinned slots --> event --> ended

The calls that CUDA may block in (opening a handle, registering memory, waiting for an event) run in one thread that
holds the context; the copies themselves run on the GPU's copy engine, on a stream of their own, and cost the engine's
process nothing. The arena is registered as pinned memory by the first copy after it has grown to its size.

One asynchronous copy is submitted a block and piece: runs of neighbouring blocks become one. Not measured: no GPU was
at hand when this was written, `tests/gpu` holds it to the contract where there is one. Refused: memory of another
device than those that this process can see, and whatever the driver does not open.
"""

import ctypes
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import numpy as np
import trio

from lmcache_trio.abc import Attached, Copy, CudaMemory, Device, Direction, Export, Memory, Ticket
from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio.threads import DedicatedThread

__all__ = ["CudaConfig", "CudaDevice"]

_PAGE = 4096


@attrs.frozen
class CudaConfig:
    """The `cuda` device has no settings."""


class _Opened(Attached):
    """*bases*: where each allocation begins, in this process' view of the device."""

    def __init__(self, export: Export, context: Any, stream: Any, bases: list[int]) -> None:
        super().__init__(export)
        self.context, self.stream, self.bases = context, stream, bases


class _CudaTicket(Ticket):
    def __init__(self) -> None:
        self.ended = trio.Event()
        self.error: Exception | None = None


class CudaDevice(Device):
    """Moves blocks of GPU memory."""

    Config = CudaConfig

    def __init__(self, config: CudaConfig) -> None:
        super().__init__(config)
        self._memory: Memory | None = None
        self._thread: DedicatedThread | None = None
        self._attached: set[_Opened] = set()
        self._contexts: dict[bytes, tuple[Any, Any]] = {}  # by UUID: context, copy stream
        self._pinned = 0  # where the registered part of the arena begins
        self._copies = 0
        self._bytes = 0

    @asynccontextmanager
    async def open(self, memory: Memory) -> AsyncIterator[None]:
        thread = DedicatedThread("lmcache-trio cuda device")
        try:
            await thread.run(_initialise)
        except BaseException:
            thread.close()
            raise
        self._memory, self._thread = memory, thread
        try:
            yield
        finally:
            for opened in list(self._attached):
                self.detach(opened)
            with trio.CancelScope(shield=True):
                await thread.run(self._unpin)
            thread.close()
            self._memory = self._thread = None

    async def attach(self, export: Export, pid: int) -> Attached:
        if self._thread is None:
            raise Unavailable("the cuda device is not open")
        made: list[_Opened] = []
        try:
            await self._thread.run(self._open, export, made)
        except BaseException:
            for opened in made:  # opened, and then cancelled
                self._thread.post(_close, opened, on_return=lambda: None)
            raise
        self._attached.add(made[0])
        return made[0]

    def start(self, copy: Copy) -> Ticket:
        if self._thread is None:
            raise Unavailable("the cuda device is not open")
        ticket = _CudaTicket()
        self._thread.post(self._run, copy, ticket, on_return=ticket.ended.set)
        return ticket

    async def wait_ended(self, ticket: Ticket) -> None:
        if not isinstance(ticket, _CudaTicket):
            raise Misuse("this ticket is another device's")
        await ticket.ended.wait()
        if ticket.error is not None:
            raise Unavailable(f"a copy failed: {ticket.error}") from ticket.error

    def detach(self, attached: Attached) -> None:
        if isinstance(attached, _Opened) and attached in self._attached and self._thread is not None:
            self._attached.remove(attached)
            self._thread.post(_close, attached, on_return=lambda: None)

    def statistics(self) -> dict[str, int | str]:
        return {"attached": len(self._attached), "copies": self._copies, "bytes_copied": self._bytes}

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _open(self, export: Export, made: list[_Opened]) -> None:
        first = export.memory[0]
        if not isinstance(first, CudaMemory):
            raise Unavailable("the cuda device opens CUDA memory alone")
        context, stream = self._context(first.uuid)
        _call(_driver().cuCtxSetCurrent, context)
        opened = _Opened(export, context, stream, [])
        try:
            for memory in export.memory:
                if not isinstance(memory, CudaMemory) or memory.uuid != first.uuid:
                    raise Unavailable("one engine's KV lies on two devices")
                opened.bases.append(_open_memory(memory))
        except BaseException:
            _close(opened)
            raise
        made.append(opened)

    def _context(self, uuid: bytes) -> tuple[Any, Any]:
        if uuid not in self._contexts:
            for number in range(_call(_driver().cuDeviceGetCount)):
                device = _call(_driver().cuDeviceGet, number)
                if _uuid_of(device) == uuid:
                    context = _call(_driver().cuDevicePrimaryCtxRetain, device)
                    _call(_driver().cuCtxSetCurrent, context)
                    stream = _call(_driver().cuStreamCreate, _driver().CUstream_flags.CU_STREAM_NON_BLOCKING)
                    self._contexts[uuid] = (context, stream)
                    break
            else:
                raise Unavailable("the server does not see the engine's GPU (CUDA_VISIBLE_DEVICES)")
        return self._contexts[uuid]

    def _run(self, copy: Copy, ticket: _CudaTicket) -> None:
        try:
            opened = copy.attached
            assert isinstance(opened, _Opened)
            _call(_driver().cuCtxSetCurrent, opened.context)
            try:
                for host, gpu, length in self._moves(copy, opened):
                    if copy.direction is Direction.STORE:
                        _call(_driver().cuMemcpyDtoHAsync, host, gpu, length, opened.stream)
                    else:
                        _call(_driver().cuMemcpyHtoDAsync, gpu, host, length, opened.stream)
                    self._bytes += length
            finally:
                _call(_driver().cuStreamSynchronize, opened.stream)  # what was submitted ends before the ticket does
            self._copies += 1
        except Exception as exc:  # noqa: BLE001  (told to whoever waits for it)
            ticket.error = exc

    def _moves(self, copy: Copy, opened: _Opened) -> Iterator[tuple[int, int, int]]:
        """(host address, GPU address, length); blocks that lie one behind the other on both sides are one move."""
        count, at = copy.chunk_blocks, 0
        for number, layer in enumerate(opened.export.pieces):
            for piece in layer:
                if copy.layers[0] <= number < copy.layers[1]:
                    base = opened.bases[piece.allocation] + piece.offset
                    for i, slot in enumerate(copy.slots):
                        host = self._address(slot, opened.export.block_bytes * count) + at
                        blocks = copy.blocks[i * count : (i + 1) * count]
                        for place, first, run in _runs(blocks, dense=piece.stride == piece.length):
                            yield host + place * piece.length, base + first * piece.stride, run * piece.length
                at += count * piece.length

    def _address(self, offset: int, length: int) -> int:
        """The address of arena bytes. The arena is registered once it is whole; until then copies are staged."""
        assert self._memory is not None
        address = int(np.frombuffer(self._memory.view(offset, length), dtype=np.uint8).ctypes.data)
        if not self._pinned:
            found = self._memory.statistics()
            if found["bytes_taken"] == found["bytes_size"] or found.get("limit"):
                first, size = address - offset + _PAGE, int(found["bytes_taken"]) - _PAGE
                _call(_driver().cuMemHostRegister, first, size, _driver().CU_MEMHOSTREGISTER_PORTABLE)
                self._pinned = first
        return address

    def _unpin(self) -> None:
        if self._pinned:
            _call(_driver().cuMemHostUnregister, self._pinned)
            self._pinned = 0


def _runs(blocks: Any, *, dense: bool) -> Iterator[tuple[int, int, int]]:
    """(place in the slot, first block, how many) of the blocks that are to be touched."""
    place = 0
    while place < len(blocks):
        run = 1
        if blocks[place] >= 0:
            while dense and place + run < len(blocks) and blocks[place + run] == blocks[place] + run:
                run += 1
            yield place, blocks[place], run
        place += run


def _initialise() -> None:
    _call(_driver().cuInit, 0)


def _open_memory(memory: CudaMemory) -> int:
    handle = _driver().CUipcMemHandle()
    _fill(handle, memory.handle)
    flags = _driver().CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    base = _call(_driver().cuIpcOpenMemHandle, handle, flags)
    _, size = _call(_driver().cuMemGetAddressRange, base)
    if size < memory.size:
        _call(_driver().cuIpcCloseMemHandle, base)
        raise Misuse(f"the allocation has {size} bytes, not {memory.size}")
    return int(base)


def _close(opened: _Opened) -> None:
    _call(_driver().cuCtxSetCurrent, opened.context)
    while opened.bases:
        _call(_driver().cuIpcCloseMemHandle, opened.bases.pop())


def _wait_for_event(stream: Any, packed: bytes) -> None:
    handle = _driver().CUipcEventHandle()
    _fill(handle, packed)
    event = _call(_driver().cuIpcOpenEventHandle, handle)
    _call(_driver().cuStreamWaitEvent, stream, event, 0)
    _call(_driver().cuEventDestroy, event)  # freed by CUDA once it is over


def _fill(handle: Any, packed: bytes) -> None:
    """*packed* as the bytes of a handle, whose only field is called `reserved`."""
    if len(packed) != 64:
        raise Misuse(f"a CUDA handle has 64 bytes, not {len(packed)}")
    ctypes.memmove(handle.getPtr(), packed, 64)


def _uuid_of(device: Any) -> bytes:
    return bytes(_call(_driver().cuDeviceGetUuid, device).bytes)


def _driver() -> Any:
    """Imported when it is first needed, so that this module can be looked at without it."""
    try:
        from cuda.bindings import driver  # pyright: ignore[reportMissingImports]
    except ImportError as exc:
        raise Unavailable("CUDA memory needs cuda-bindings: pip install lmcache-trio[cuda]") from exc
    return driver


def _call(fn: Any, *args: Any) -> Any:  # its functions have no types
    """What *fn* gives; `Unavailable` with the driver's own words when it fails."""
    try:
        status, *found = fn(*args)
    except RuntimeError as exc:  # there is no driver
        raise Unavailable(f"{fn.__name__}: {exc}") from exc
    if status != _driver().CUresult.CUDA_SUCCESS:
        name = _driver().cuGetErrorName(status)[1]
        raise Unavailable(f"{fn.__name__}: {name.decode() if name else status}")
    return found[0] if len(found) == 1 else tuple(found) or None
