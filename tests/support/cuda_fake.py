"""The CUDA driver as far as it is used here, without a GPU: contexts, IPC handles, streams, events, registered memory.

It is as strict as the real one where that has bitten us: a thread without a current context is refused, so are a copy
that crosses from one registration to the next, a handle that nobody exported, and a batch in the order of nothing.
What was given out and not given back stands in `held`. A copy moves its bytes when its stream is waited for.
"""

import ctypes
import itertools
import secrets
import threading  # noqa: TID251 - the driver's contexts belong to threads
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import attrs


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_UNKNOWN = 999


Status = CUresult
OK = CUresult.CUDA_SUCCESS


class Handle:
    """64 bytes behind `getPtr`, as the bindings have it."""

    def __init__(self, packed: bytes = bytes(64)) -> None:
        self.raw = ctypes.create_string_buffer(packed, 64)

    def getPtr(self) -> int:
        return ctypes.addressof(self.raw)


@attrs.define(eq=False)
class Allocation:
    bytes: bytearray
    exportable: bool = True
    base: int = 0


@attrs.frozen
class Uuid:
    bytes: bytes


class Attributes:
    srcAccessOrder: Any = None


class Stream:
    def __init__(self) -> None:
        self.submitted: list[Callable[[], None]] = []


class FakeDriver:
    """Stands in for the module `cuda.bindings.driver`. *gpus* have made-up UUIDs."""

    CUresult = CUresult
    CUipcMemHandle = Handle
    CUipcEventHandle = Handle
    CUmemcpyAttributes = Attributes
    CUdeviceptr = int
    CU_MEMHOSTREGISTER_PORTABLE = 1

    class CUstream_flags(IntEnum):
        CU_STREAM_NON_BLOCKING = 1

    class CUipcMem_flags(IntEnum):
        CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1

    class CUmemcpySrcAccessOrder(IntEnum):
        CU_MEMCPY_SRC_ACCESS_ORDER_STREAM = 1

    def __init__(self, gpus: int = 1) -> None:
        self.uuids = [bytes([i + 1]) * 16 for i in range(gpus)]
        self.held: Counter[str] = Counter()
        self.fails: dict[str, CUresult | Exception] = {}
        """What a function gives from now on, by its name."""
        self.calls: Counter[str] = Counter()
        self.events: dict[bytes, threading.Event] = {}
        self.registered: dict[int, int] = {}
        self._mine = threading.local()
        self._exports: dict[bytes, Allocation] = {}
        self._mapped: dict[int, Allocation] = {}
        self._numbers = itertools.count(1)

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu") or not callable(found):
            return found

        def called(*args: Any) -> Any:
            self.calls[name] += 1
            fault = self.fails.get(name)
            if isinstance(fault, Exception):
                raise fault
            return (fault,) if fault is not None else found(*args)

        called.__name__ = name
        return called

    # --- for tests --------------------------------------------------------------------------------------------------

    def allocate(self, size: int, *, exportable: bool = True) -> Allocation:
        """In the engine's process."""
        made = Allocation(bytearray(size), exportable)
        made.base = self._map(made)
        return made

    def event(self) -> bytes:
        """One that the engine recorded; `events` has what to set when it happens."""
        packed = secrets.token_bytes(64)
        self.events[packed] = threading.Event()
        return packed

    @property
    def leaked(self) -> dict[str, int]:
        return {name: count for name, count in self.held.items() if count}

    def _map(self, allocation: Allocation) -> int:
        base = (0x7F0 << 36) + (next(self._numbers) << 32)
        self._mapped[base] = allocation
        return base

    def _at(self, address: int) -> tuple[Allocation, int, int] | None:
        for base, allocation in self._mapped.items():
            if base <= address < base + len(allocation.bytes):
                return allocation, address - base, base
        return None

    @property
    def _stack(self) -> list[int]:
        if not hasattr(self._mine, "stack"):
            self._mine.stack = []
        stack: list[int] = self._mine.stack
        return stack

    # --- devices and contexts ---------------------------------------------------------------------------------------

    def cuInit(self, flags: int) -> Any:
        return (OK,)

    def cuGetErrorName(self, status: Status) -> Any:
        return OK, status.name.encode()

    def cuDeviceGetCount(self) -> Any:
        return OK, len(self.uuids)

    def cuDeviceGet(self, number: int) -> Any:
        return (OK, number) if number < len(self.uuids) else (CUresult.CUDA_ERROR_INVALID_VALUE, 0)

    def cuDeviceGetUuid(self, device: int) -> Any:
        return OK, Uuid(self.uuids[device])

    def cuDevicePrimaryCtxRetain(self, device: int) -> Any:
        self.held["contexts"] += 1
        return OK, device + 100

    def cuDevicePrimaryCtxRelease(self, device: int) -> Any:
        self.held["contexts"] -= 1
        return (OK,)

    def cuCtxSetCurrent(self, context: int) -> Any:
        self._stack[-1:] = [context]
        return (OK,)

    def cuCtxPushCurrent(self, context: int) -> Any:
        self._stack.append(context)
        return (OK,)

    def cuCtxPopCurrent(self) -> Any:
        return OK, self._stack.pop()

    # --- memory -----------------------------------------------------------------------------------------------------

    def cuMemGetAddressRange(self, address: int) -> Any:
        if not self._stack:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None, None
        found = self._at(address)
        return (OK, found[2], len(found[0].bytes)) if found else (CUresult.CUDA_ERROR_INVALID_VALUE, None, None)

    def cuIpcGetMemHandle(self, address: int) -> Any:
        if not self._stack:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        found = self._at(address)
        if found is None or not found[0].exportable:
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        packed = secrets.token_bytes(64)
        self._exports[packed] = found[0]
        return OK, Handle(packed)

    def cuIpcOpenMemHandle(self, handle: Handle, flags: int) -> Any:
        if not self._stack:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        found = self._exports.get(handle.raw.raw)
        if found is None:
            return CUresult.CUDA_ERROR_INVALID_HANDLE, None
        self.held["opened"] += 1
        return OK, self._map(found)

    def cuIpcCloseMemHandle(self, base: int) -> Any:
        if not self._stack or base not in self._mapped:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        self.held["opened"] -= 1
        del self._mapped[base]
        return (OK,)

    def cuMemHostRegister(self, address: int, size: int, flags: int) -> Any:
        if not self._stack:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        self.held["registered"] += 1
        self.registered[address] = size
        return (OK,)

    def cuMemHostUnregister(self, address: int) -> Any:
        self.held["registered"] -= 1
        del self.registered[address]
        return (OK,)

    # --- streams and events -----------------------------------------------------------------------------------------

    def cuStreamCreate(self, flags: int) -> Any:
        if not self._stack:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        self.held["streams"] += 1
        return OK, Stream()

    def cuStreamDestroy(self, stream: Stream) -> Any:
        self.held["streams"] -= 1
        return (OK,)

    def cuStreamSynchronize(self, stream: Stream) -> Any:
        while stream.submitted:
            stream.submitted.pop(0)()
        return (OK,)

    def cuIpcOpenEventHandle(self, handle: Handle) -> Any:
        if not self._stack or handle.raw.raw not in self.events:
            return CUresult.CUDA_ERROR_INVALID_HANDLE, None
        self.held["events"] += 1
        return OK, self.events[handle.raw.raw]

    def cuEventSynchronize(self, event: threading.Event) -> Any:
        event.wait(60)
        return (OK,)

    def cuEventDestroy(self, event: threading.Event) -> Any:
        self.held["events"] -= 1
        return (OK,)

    # --- copies -----------------------------------------------------------------------------------------------------

    def cuMemcpyDtoHAsync(self, host: int, gpu: int, length: int, stream: Stream) -> Any:
        return (self._copy(stream, host, gpu, length, to_host=True),)

    def cuMemcpyHtoDAsync(self, gpu: int, host: int, length: int, stream: Stream) -> Any:
        return (self._copy(stream, host, gpu, length, to_host=False),)

    def cuMemcpyBatchAsync(  # noqa: PLR0913
        self,
        dsts: list[int],
        srcs: list[int],
        sizes: list[int],
        count: int,
        attrs: list[Attributes],
        attrs_idxs: list[int],
        num_attrs: int,
        stream: Stream,
    ) -> Any:
        ordered = self.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        assert len(dsts) == len(srcs) == len(sizes) == count
        assert (attrs_idxs, num_attrs, attrs[0].srcAccessOrder) == ([0], 1, ordered)
        for into, out_of, length in zip(dsts, srcs, sizes, strict=True):
            to_host = self._at(into) is None
            host, gpu = (into, out_of) if to_host else (out_of, into)
            if not self._pinned(host, length):
                return CUresult.CUDA_ERROR_INVALID_VALUE, 0
            if (status := self._copy(stream, host, gpu, length, to_host=to_host)) is not OK:
                return status, 0
        return OK, 0

    def _pinned(self, host: int, length: int) -> bool:
        return any(start <= host and host + length <= start + size for start, size in self.registered.items())

    def _copy(self, stream: Stream, host: int, gpu: int, length: int, *, to_host: bool) -> Status:
        found = self._at(gpu)
        if not self._stack:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT
        touched = [(a, n) for a, n in self.registered.items() if a < host + length and host < a + n]
        if found is None or found[1] + length > len(found[0].bytes) or (touched and not self._pinned(host, length)):
            return CUresult.CUDA_ERROR_INVALID_VALUE
        allocation, at, _ = found

        def move() -> None:
            if to_host:
                ctypes.memmove(host, bytes(allocation.bytes[at : at + length]), length)
            else:
                allocation.bytes[at : at + length] = ctypes.string_at(host, length)

        stream.submitted.append(move)
        return OK
