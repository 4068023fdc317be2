"""KV on a GPU, from the engine's side: what there is to export of it, and plain copies where that can't be done.

Exporting asks the driver, through `cuda-bindings`, for a handle of the whole allocation that a tensor lies in. It is
asked in the loop's thread, which has no CUDA context of its own: the GPU's primary one, which is torch's, is borrowed.
Memory that the driver does not export (expandable segments, a sleep-mode allocator), and a process without a driver or
`cuda-bindings`, raise `Unavailable`: the engine then copies for itself. Written without a GPU at hand; `tests/gpu` runs
it on one, `tests/backends/cuda` on a fake of the driver.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import attrs
import torch

from lmcache_trio._core.transfer.exports import CudaMemory
from lmcache_trio.adapters.specs import check_whole
from lmcache_trio.adapters.worker.paged import BlockIndex, Bytes, PagedKV, PieceGroup, StoredPiece
from lmcache_trio.errors import Misuse, Unavailable

__all__ = ["CudaPagedKV", "cuda_memory_of", "make_paged_kv"]


def cuda_memory_of(tensor: torch.Tensor) -> tuple[CudaMemory, int]:
    """The allocation that *tensor* lies in, and its address. `Unavailable`: it cannot be exported, and why."""
    try:
        from cuda.bindings import driver  # pyright: ignore[reportMissingImports]
    except ImportError as exc:
        raise Unavailable("exporting CUDA memory needs cuda-bindings: pip install lmcache-trio[cuda]") from exc

    def call(fn: Any, *args: Any) -> Any:
        try:
            status, *found = fn(*args)
        except RuntimeError as exc:  # there is no driver
            raise Unavailable(f"exporting CUDA memory needs a driver ({fn.__name__}: {exc})") from exc
        if status != driver.CUresult.CUDA_SUCCESS:
            raise Unavailable(f"the driver does not export this memory ({fn.__name__}: {status.name})")
        return found[0] if len(found) == 1 else tuple(found)

    device = call(driver.cuDeviceGet, tensor.device.index or 0)
    context = call(driver.cuDevicePrimaryCtxRetain, device)
    try:
        call(driver.cuCtxPushCurrent, context)
        try:
            base, size = call(driver.cuMemGetAddressRange, tensor.data_ptr())
            handle = call(driver.cuIpcGetMemHandle, base)
        finally:
            call(driver.cuCtxPopCurrent)
    finally:
        call(driver.cuDevicePrimaryCtxRelease, device)
    uuid = bytes(call(driver.cuDeviceGetUuid, device).bytes)
    return CudaMemory(int(size), ctypes.string_at(handle.getPtr(), 64), uuid), int(base)


@attrs.frozen(eq=False)
class _CudaPieces:
    """Pieces on a GPU as [pieces, blocks, bytes of a block]; a copy goes through a tensor of one chunk's size there."""

    rows: torch.Tensor
    pieces: int
    length: int

    def gather(self, block_ids: BlockIndex, slot: Bytes) -> None:
        index = torch.from_numpy(block_ids).to(self.rows.device)
        self._view(slot, len(block_ids)).copy_(self.rows.index_select(1, index))  # returns when it has ended

    def scatter(self, slot: Bytes, chunk_blocks: int, skip: int, block_ids: BlockIndex) -> None:
        source = self._view(slot, chunk_blocks)[:, skip : skip + len(block_ids)].to(self.rows.device)
        self.rows.index_copy_(1, torch.from_numpy(block_ids).to(self.rows.device), source)
        torch.cuda.current_stream(self.rows.device).synchronize()

    def _view(self, slot: Bytes, count: int) -> torch.Tensor:
        return torch.from_numpy(slot).view(self.pieces, count, self.length)


class CudaPagedKV(PagedKV):
    """All layers' KV of one worker, on one GPU."""

    _memory = "cuda"

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], *, num_blocks: int | None = None) -> None:
        if len({tensor.device for tensor in kv_caches.values()}) != 1:
            raise Misuse("kv_caches lie on several devices: register those of one worker, on one GPU")
        super().__init__(kv_caches, num_blocks=num_blocks)

    def fence(self) -> Any:
        event = torch.cuda.Event(blocking=True, interprocess=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _group(self, run: list[StoredPiece]) -> PieceGroup:
        head = run[0]
        flat = torch.empty(0, dtype=torch.uint8, device=head.storage.device).set_(head.storage)
        step = run[1].offset - head.offset if len(run) > 1 else 0
        rows = flat.as_strided((len(run), self.num_blocks, head.length), (step, head.stride, 1), head.offset)
        return _CudaPieces(rows, len(run), head.length)


def make_paged_kv(kv_caches: Mapping[str, torch.Tensor], *, num_blocks: int | None = None) -> PagedKV:
    """The engine's blocks, in CPU memory or on a GPU: where its tensors lie. `Misuse` names a layer it can't move."""
    if not isinstance(kv_caches, Mapping):
        raise Misuse(f"kv_caches is a {type(kv_caches).__name__}: give a dict from each layer's name to its tensor")
    for name, tensor in kv_caches.items():
        if not isinstance(tensor, torch.Tensor):
            raise Misuse(f"layer {name!r} is a {type(tensor).__name__}: register a torch tensor")
    if num_blocks is not None:
        check_whole("num_blocks", num_blocks, 1)
    on_gpu = any(tensor.device.type == "cuda" for tensor in kv_caches.values())
    return (CudaPagedKV if on_gpu else PagedKV)(kv_caches, num_blocks=num_blocks)
