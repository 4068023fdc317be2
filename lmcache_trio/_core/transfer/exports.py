"""Exports: the memory of an engine that a server's device may move KV in, and one tensor per layer inside it.

Values only. An `Export` that exists is in bounds, whichever client sent the numbers: its tensors lie inside its memory
and its blocks inside its tensors. Only a device can tell whether the memory exists and is the engine's.

A layer's tensor has one *piece* when its block dimension comes first, and two (K and V) when it comes second. A slot
holds the blocks of one chunk's part in one KV group: layer after layer of that group, and piece after piece, the blocks
in order, each block's bytes as they lie in the engine. Blocks are opaque. Layers of two groups may lie in the same
bytes, since a block belongs to one group at a time.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import attrs

from lmcache_trio._core.groups import MOST_GROUPS
from lmcache_trio.errors import Misuse

__all__ = ["CudaMemory", "DType", "Export", "Piece", "SharedMemory", "TensorView", "read_blocks"]

MAX_PARTS = 4096
"""The most layers, and the most allocations, of one export."""
MAX_RANK = 8
MAX_SIZE = 1 << 48
"""More bytes than any memory has. A larger number is garbage; no sum of smaller ones overflows here."""


class DType(IntEnum):
    """Item types by their code on the wire, under torch's names. Codes are never reused."""

    uint8 = 1
    int8 = 2
    int16 = 3
    int32 = 4
    int64 = 5
    float16 = 6
    bfloat16 = 7
    float32 = 8
    float64 = 9
    float8_e4m3fn = 10
    float8_e5m2 = 11

    @property
    def itemsize(self) -> int:
        return _ITEMSIZE[self]


_ITEMSIZE = {
    DType.uint8: 1,
    DType.int8: 1,
    DType.int16: 2,
    DType.int32: 4,
    DType.int64: 8,
    DType.float16: 2,
    DType.bfloat16: 2,
    DType.float32: 4,
    DType.float64: 8,
    DType.float8_e4m3fn: 1,
    DType.float8_e5m2: 1,
}


@attrs.frozen
class SharedMemory:
    """Host memory: *size* bytes of an anonymous file (memfd), behind *descriptor* of the process that holds this value.

    A message carries the descriptor, which has another number in the process that receives it.
    """

    size: int
    descriptor: int


@attrs.frozen
class CudaMemory:
    """One allocation of a CUDA device, *size* bytes: the driver's 64-byte IPC handle, and the device's UUID."""

    size: int
    handle: bytes
    uuid: bytes


@attrs.frozen
class TensorView:
    """One layer's KV in its *group*: *offset* in bytes into its *allocation*, *shape* and *strides* in items."""

    allocation: int
    offset: int
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    group: int = 0


@attrs.frozen
class Piece:
    """Equal blocks at a constant stride, in bytes of one allocation: block b lies at ``offset + b * stride``."""

    allocation: int
    offset: int
    stride: int
    length: int


@attrs.frozen
class Export:
    """An engine's paged KV: *num_blocks* blocks in each of *layers*. `Misuse` names the part that is out of bounds."""

    memory: tuple[SharedMemory | CudaMemory, ...]
    """All of one kind."""
    layers: tuple[TensorView, ...]
    num_blocks: int
    pieces: tuple[tuple[Piece, ...], ...] = attrs.field(init=False)
    """The pieces of each group's layers, in the order of a slot."""
    group_block_bytes: tuple[int, ...] = attrs.field(init=False)
    """Bytes of one block of each group, over its layers."""
    block_bytes: int = attrs.field(init=False)
    """Bytes of one block over all layers."""

    def __attrs_post_init__(self) -> None:
        for what, parts in (("allocations", self.memory), ("layers", self.layers)):
            if not 1 <= len(parts) <= MAX_PARTS:
                raise Misuse(f"the export has {len(parts)} {what}: give 1 to {MAX_PARTS}")
        if len({type(memory) for memory in self.memory}) != 1:
            raise Misuse("the export's allocations are of two kinds: export either host or CUDA memory")
        for memory in self.memory:
            _check_memory(memory)
        groups = sorted({layer.group for layer in self.layers})
        if groups != list(range(len(groups))) or len(groups) > MOST_GROUPS:
            raise Misuse(f"the export's layers are in the groups {groups}: number up to {MOST_GROUPS} groups from 0 on")
        pieces: list[list[Piece]] = [[] for _ in groups]
        for i, layer in enumerate(self.layers):
            pieces[layer.group] += self._read(i, layer)
        lengths = tuple(sum(piece.length for piece in of_group) for of_group in pieces)
        object.__setattr__(self, "pieces", tuple(tuple(of_group) for of_group in pieces))
        object.__setattr__(self, "group_block_bytes", lengths)
        object.__setattr__(self, "block_bytes", sum(lengths))

    def _read(self, number: int, layer: TensorView) -> list[Piece]:
        where = f"layer {number} (shape {layer.shape}, strides {layer.strides}, offset {layer.offset})"
        if not 0 <= layer.allocation < len(self.memory):
            raise Misuse(f"{where} is in allocation {layer.allocation}: there are {len(self.memory)}")
        if len(layer.shape) != len(layer.strides) or not 2 <= len(layer.shape) <= MAX_RANK:
            raise Misuse(f"{where}: give 2 to {MAX_RANK} dimensions, and a stride for each")
        if not all(0 < n <= MAX_SIZE for n in layer.shape) or not all(0 <= n <= MAX_SIZE for n in layer.strides):
            raise Misuse(f"{where}: sizes must be above 0 and strides 0 or more")
        size, item = self.memory[layer.allocation].size, layer.dtype.itemsize
        reach = sum((n - 1) * step for n, step in zip(layer.shape, layer.strides, strict=True)) * item + item
        if layer.offset < 0 or layer.offset + reach > size:
            raise Misuse(f"{where} ends at byte {layer.offset + reach}: its allocation has {size}")
        return [
            Piece(layer.allocation, layer.offset + start, stride, length)
            for start, stride, length in read_blocks(where, layer.shape, layer.strides, item, self.num_blocks)
        ]


def read_blocks(
    where: str, shape: Sequence[int], strides: Sequence[int], itemsize: int, num_blocks: int
) -> list[tuple[int, int, int]]:
    """(start, stride, length) in bytes of each piece of a tensor. *where* names the tensor in errors.

    `Misuse`: the block dimension is neither the first nor the second after K and V, or a block is not contiguous.
    """
    first = len(shape) > 1 and shape[0] == num_blocks
    second = len(shape) > 2 and shape[0] == 2 and shape[1] == num_blocks
    if first == second:
        problem = "fits both" if first else "fits neither"
        raise Misuse(
            f"{where} {problem} ({num_blocks}, …) and (2, {num_blocks}, …):"
            " pass tensors whose block dimension is the first, or the second after K and V, and is not 2"
        )
    inner = 1 if first else 2
    if not _is_dense(shape[inner:], strides[inner:]):
        raise Misuse(f"{where}: a block's bytes are not contiguous: pass a view in the order of memory")
    length = math.prod(shape[inner:]) * itemsize
    stride = strides[inner - 1] * itemsize
    if num_blocks > 1 and stride < length:
        raise Misuse(f"{where}: blocks overlap: pass a view whose blocks lie apart")
    starts = [0] if first else [0, strides[0] * itemsize]
    return [(start, stride, length) for start in starts]


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the dimensions, in any order, fill one contiguous range."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(strides, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def _check_memory(memory: SharedMemory | CudaMemory) -> None:
    if not 0 < memory.size <= MAX_SIZE:
        raise Misuse(f"an allocation of {memory.size} bytes: give more than 0, and no more than a machine can have")
    if isinstance(memory, SharedMemory):
        if memory.descriptor < 0:
            raise Misuse(f"shared memory has a descriptor, which {memory.descriptor} is not")
    elif len(memory.handle) != 64 or len(memory.uuid) != 16:
        raise Misuse("CUDA memory is named by a handle of 64 bytes and a device UUID of 16")
