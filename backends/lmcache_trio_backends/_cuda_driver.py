"""The CUDA driver, as `cuda_device` uses it: each call checked, each failure `Unavailable` in the driver's own words.

`cuda-bindings` is imported when it is first needed, so that a server without a GPU never looks for one. Nothing here
knows engines, slots or copies. Not run on a GPU yet: `tests/backends/cuda` runs it on a fake of the driver.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import attrs

from lmcache_trio.abc import CudaMemory
from lmcache_trio.errors import Misuse, Unavailable

__all__ = ["Context", "Move", "call", "driver", "make_context", "open_memory", "submit", "wait_event"]


@attrs.frozen
class Move:
    """Bytes that lie in one piece on both sides: *host* and *gpu* are addresses."""

    host: int
    gpu: int
    length: int


@attrs.define(eq=False)
class Context:
    """A GPU's primary context, retained."""

    device: Any
    handle: Any
    batches: bool = True
    """Does the driver take several copies by one call? CUDA 12.8 and newer do."""

    def enter(self) -> None:
        """Make it the calling thread's."""
        call(driver().cuCtxSetCurrent, self.handle)

    def release(self) -> None:
        call(driver().cuDevicePrimaryCtxRelease, self.device)


def driver() -> Any:  # its functions have no types
    try:
        from cuda.bindings import driver as found  # pyright: ignore[reportMissingImports]
    except ImportError as exc:
        raise Unavailable("CUDA memory needs cuda-bindings: pip install lmcache-trio[cuda]") from exc
    return found


def call(fn: Any, *args: Any) -> Any:
    """What *fn* gives; `Unavailable` with the driver's own words when it fails."""
    try:
        status, *found = fn(*args)
    except RuntimeError as exc:  # there is no driver, or an older one that lacks the function
        raise Unavailable(f"{fn.__name__}: {exc}") from exc
    if status != driver().CUresult.CUDA_SUCCESS:
        name = driver().cuGetErrorName(status)[1]
        raise Unavailable(f"{fn.__name__}: {name.decode() if name else status}")
    return found[0] if len(found) == 1 else tuple(found) or None


def make_context(uuid: bytes) -> Context:
    """The primary context of the GPU with *uuid*, made current in this thread. `Unavailable`: it is not seen here."""
    drv = driver()
    for number in range(call(drv.cuDeviceGetCount)):
        device = call(drv.cuDeviceGet, number)
        if bytes(call(drv.cuDeviceGetUuid, device).bytes) == uuid:
            context = Context(device, call(drv.cuDevicePrimaryCtxRetain, device))
            context.enter()
            return context
    raise Unavailable("the server does not see the engine's GPU (CUDA_VISIBLE_DEVICES)")


def open_memory(memory: CudaMemory) -> int:
    """Where another process' allocation begins here. The caller closes it."""
    drv = driver()
    handle = _filled(drv.CUipcMemHandle(), memory.handle)
    base = call(drv.cuIpcOpenMemHandle, handle, drv.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
    try:
        _, size = call(drv.cuMemGetAddressRange, base)
        if size < memory.size:
            raise Misuse(f"the allocation has {size} bytes, not {memory.size}")
    except BaseException:
        call(drv.cuIpcCloseMemHandle, base)
        raise
    return int(base)


def wait_event(packed: bytes) -> None:
    """Block until what another process recorded has ended; for ever, if it never does."""
    drv = driver()
    event = call(drv.cuIpcOpenEventHandle, _filled(drv.CUipcEventHandle(), packed))
    try:
        call(drv.cuEventSynchronize, event)
    finally:
        call(drv.cuEventDestroy, event)


def submit(context: Context, stream: Any, moves: Sequence[Move], *, to_host: bool, pinned: bool) -> None:
    """Have *stream* carry out *moves*. If this raises, some may have been submitted.

    By few calls where the host's bytes are pinned: what a call costs here is more than a block of 32 KiB takes the GPU.
    """
    drv = driver()
    if pinned and context.batches and hasattr(drv, "cuMemcpyBatchAsync"):
        try:
            _submit_batch(drv, stream, moves, to_host=to_host)
            return
        except Unavailable:  # the driver is older than its bindings; doing some of it twice does no harm
            context.batches = False
    for move in moves:
        if to_host:
            call(drv.cuMemcpyDtoHAsync, move.host, move.gpu, move.length, stream)
        else:
            call(drv.cuMemcpyHtoDAsync, move.gpu, move.host, move.length, stream)


def _submit_batch(drv: Any, stream: Any, moves: Sequence[Move], *, to_host: bool) -> None:
    order = drv.CUmemcpyAttributes()
    order.srcAccessOrder = drv.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    hosts, gpus = ([drv.CUdeviceptr(at) for at in side] for side in zip(*((m.host, m.gpu) for m in moves), strict=True))
    into, out_of = (hosts, gpus) if to_host else (gpus, hosts)
    sizes = [move.length for move in moves]
    call(drv.cuMemcpyBatchAsync, into, out_of, sizes, len(sizes), [order], [0], 1, stream)


def _filled(handle: Any, packed: bytes) -> Any:
    """*packed* as the bytes of a handle, whose only field is called `reserved`."""
    if len(packed) != 64:
        raise Misuse(f"a CUDA handle has 64 bytes, not {len(packed)}")
    ctypes.memmove(handle.getPtr(), packed, 64)
    return handle
