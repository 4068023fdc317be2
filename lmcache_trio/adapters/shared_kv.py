"""KV in memory that a server on the same machine can open, and the export of an engine's tensors.

If an engine allocates its KV cache with `shared_tensor`, the server's `host` device can move its blocks. The driver
exports CUDA tensors. Other memory cannot be exported: `Unavailable` says why, and the engine then copies by itself.
"""

import fcntl
import mmap
import os
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lmcache_trio._core.transfer.exports import CudaMemory, DType, Export, SharedMemory, TensorView
from lmcache_trio.errors import Misuse, Unavailable

if TYPE_CHECKING:
    import torch

__all__ = ["SharedRegion", "export_of", "shared_tensor"]


class SharedRegion:
    """*size* bytes of zeros in an anonymous file that cannot shrink. It lives as long as `array`, or a view of it."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise Misuse(f"size is {size}: it must be 1 or more")
        self.size = size
        self.descriptor = os.memfd_create("lmcache-trio kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.descriptor)
        try:
            os.posix_fallocate(self.descriptor, 0, size)
        except OSError as exc:
            raise Unavailable(f"there is no memory for {size} bytes of shared KV: {exc.strerror}") from exc
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        mapped = np.frombuffer(mmap.mmap(self.descriptor, size), dtype=np.uint8)
        self.start = mapped.ctypes.data
        _regions.add(self)
        self._whole = weakref.ref(mapped)
        self._array: _Array = mapped[:].view(_Array)

    def take_array(self) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        """The memory. It can be taken once; it and its views keep the region alive."""
        array, array.region = self._array, self
        del self._array
        return array

    def memory(self) -> SharedMemory:
        """The region as an export names it."""
        return SharedMemory(self.size, self.descriptor)


class _Array(np.ndarray[tuple[int], np.dtype[np.uint8]]):
    region: SharedRegion


_regions: "weakref.WeakSet[SharedRegion]" = weakref.WeakSet()


def shared_tensor(size: int) -> "torch.Tensor":
    """A flat uint8 tensor of *size* bytes, zeros, that the server can open. Views of it can be exported, too."""
    import torch

    return torch.from_numpy(SharedRegion(size).take_array())


def export_of(
    kv_caches: "Mapping[str, torch.Tensor]", num_blocks: int, group_of: Mapping[str, int] | None = None
) -> Export:
    """The export of *kv_caches*. `Unavailable` says why the server can't open them; `Misuse`: they are not blocks.

    *group_of*: the number of each layer's KV group, if there are several.
    """
    memory: list[SharedMemory | CudaMemory] = []
    places: dict[int, int] = {}  # by address: number in memory
    layers = []
    for name, tensor in kv_caches.items():
        found, start = _memory_of(name, tensor)
        if start not in places:
            places[start] = len(memory)
            memory.append(found)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DType.__members__:
            raise Unavailable(f"layer {name!r} is of {dtype}, which has no code on the wire")
        offset = tensor.data_ptr() - start
        shape, strides, group = tuple(tensor.shape), tuple(tensor.stride()), (group_of or {}).get(name, 0)
        layers.append(TensorView(places[start], offset, DType[dtype], shape, strides, group))
    return Export(tuple(memory), tuple(layers), num_blocks)


def _memory_of(name: str, tensor: "torch.Tensor") -> tuple[SharedMemory | CudaMemory, int]:
    """The allocation that *tensor* lies in, and its address."""
    address = tensor.data_ptr()
    if tensor.device.type == "cuda":
        from lmcache_trio.adapters.worker.cuda_kv import cuda_memory_of

        return cuda_memory_of(tensor)
    for region in _regions:
        if tensor.device.type == "cpu" and region.start <= address < region.start + region.size:
            return region.memory(), region.start
    raise Unavailable(f"layer {name!r} lies in private {tensor.device} memory, which no other process can open")
