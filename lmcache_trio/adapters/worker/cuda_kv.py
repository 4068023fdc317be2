"""KV on a GPU, from the engine's side: its export, and plain copies where that can't be done.

Plain copies go through a staging tensor, in the background and behind what the engine had submitted (`fence`). They are
correct, and slow: they serve memory that the server's device cannot open.

Exporting asks the driver, through `cuda-bindings`, for a handle of the whole allocation that a tensor lies in. It is
asked in the loop's thread, which has no CUDA context of its own: the GPU's primary one, which is torch's, is borrowed.
Memory that the driver does not export (expandable segments, a sleep-mode allocator), and a process without a driver or
`cuda-bindings`, raise `Unavailable`: the engine then copies for itself. Written without a GPU at hand; `tests/gpu` runs
it on one, `tests/backends/cuda` on a fake of the driver.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from lmcache_trio._core.transfer.exports import CudaMemory, Piece
from lmcache_trio.adapters.specs import check_whole
from lmcache_trio.adapters.worker.paged import PagedKV
from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio.host_memory import BlockIndex, Bytes, PagedBlocks, in_line

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
class _CudaRun:
    """Pieces on a GPU as [pieces, blocks, bytes of a block]; a copy goes through a tensor of one chunk's size there."""

    rows: torch.Tensor

    @property
    def block_bytes(self) -> int:
        return self.rows.shape[0] * self.rows.shape[2]

    def gather(self, blocks: BlockIndex, part: Bytes) -> None:
        index = torch.from_numpy(blocks).to(self.rows.device)
        self._view(part, len(blocks)).copy_(self.rows.index_select(1, index))  # returns when it has ended

    def scatter(self, part: Bytes, count: int, places: "slice | BlockIndex", blocks: BlockIndex) -> None:
        source = self._view(part, count)[:, places].to(self.rows.device)
        self.rows.index_copy_(1, torch.from_numpy(blocks).to(self.rows.device), source)
        torch.cuda.current_stream(self.rows.device).synchronize()

    def _view(self, part: Bytes, blocks: int) -> torch.Tensor:
        return torch.from_numpy(part).view(self.rows.shape[0], blocks, self.rows.shape[2])


class CudaPagedKV(PagedKV):
    """All layers' KV of one worker, on one GPU."""

    memory = "cuda"

    def __init__(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        *,
        num_blocks: int | None = None,
        groups: Sequence[Sequence[str]] | None = None,
    ) -> None:
        if len({tensor.device for tensor in kv_caches.values()}) != 1:
            raise Misuse("kv_caches lie on several devices: register those of one worker, on one GPU")
        super().__init__(kv_caches, num_blocks=num_blocks, groups=groups)

    def fence(self) -> Any:
        event = torch.cuda.Event(blocking=True, interprocess=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _blocks_of(self, pieces: Sequence[Piece], storages: Sequence[torch.UntypedStorage]) -> PagedBlocks:
        runs = []
        for run in in_line(pieces):
            head, storage = run[0], storages[run[0].allocation]
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            step = run[1].offset - head.offset if len(run) > 1 else 0
            shape = (len(run), self.num_blocks, head.length)
            runs.append(_CudaRun(flat.as_strided(shape, (step, head.stride, 1), head.offset)))
        return PagedBlocks(runs)


def make_paged_kv(
    kv_caches: Mapping[str, torch.Tensor],
    *,
    num_blocks: int | None = None,
    groups: Sequence[Sequence[str]] | None = None,
) -> PagedKV:
    """The engine's blocks, in CPU memory or on a GPU: where its tensors lie. `Misuse` names a layer it can't move."""
    if not isinstance(kv_caches, Mapping):
        raise Misuse(f"kv_caches is a {type(kv_caches).__name__}: give a dict from each layer's name to its tensor")
    for name, tensor in kv_caches.items():
        if not isinstance(tensor, torch.Tensor):
            raise Misuse(f"layer {name!r} is a {type(tensor).__name__}: register a torch tensor")
    if num_blocks is not None:
        check_whole("num_blocks", num_blocks, 1)
    on_gpu = any(tensor.device.type == "cuda" for tensor in kv_caches.values())
    return (CudaPagedKV if on_gpu else PagedKV)(kv_caches, num_blocks=num_blocks, groups=groups)
