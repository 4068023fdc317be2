"""An `Export` as bytes: fixed, versioned, little-endian. Nothing in them is run or imported, as a pickle would be.

    magic "LTKV" | version u16 | kind u8 (1 host, 2 CUDA) | 0 u8 | allocations u16 | layers u16 | blocks u64
    an allocation, 88 bytes:   size u64 | handle 64 | device UUID 16 (zeros on a host)
        a host's handle:       64 zeros; its descriptor comes with the message, in the order of the allocations
    a layer:                   allocation u16 | dtype u8 | rank u8 | group u8 | 0 u8 | offset u64
                               | shape rank × u64 | strides rank × u64

Lengths are checked before anything is allocated. Malformed bytes raise `ProtocolError`, and so do well-formed ones that
are out of bounds: one `except` covers everything that a peer may send.
"""

import struct
from collections.abc import Sequence
from typing import Any

from lmcache_trio._core.transfer.exports import MAX_PARTS, MAX_RANK, CudaMemory, DType, Export, SharedMemory, TensorView
from lmcache_trio.errors import Misuse, ProtocolError

__all__ = ["HANDLES_VERSION", "MAX_EXPORT", "decode_export", "descriptors_of", "encode_export"]

HANDLES_VERSION = 3
MAX_EXPORT = 1 << 20
"""Bytes of the longest export."""

_MAGIC = b"LTKV"
_HEAD = struct.Struct("<4sHBBHHQ")
_MEMORY = struct.Struct("<Q64s16s")
_LAYER = struct.Struct("<HBBBBQ")
_KIND_HOST, _KIND_CUDA = 1, 2
_NO_HANDLE, _NO_UUID = bytes(64), bytes(16)


def descriptors_of(export: Export) -> list[int]:
    """The descriptors that travel with *export*: one for each allocation of host memory, in order."""
    return [memory.descriptor for memory in export.memory if isinstance(memory, SharedMemory)]


def encode_export(export: Export) -> bytes:
    """The bytes of *export*, which travel beside `descriptors_of` it. `Misuse`: they are more than `MAX_EXPORT`."""
    cuda = isinstance(export.memory[0], CudaMemory)
    kind = _KIND_CUDA if cuda else _KIND_HOST
    parts = [_HEAD.pack(_MAGIC, HANDLES_VERSION, kind, 0, len(export.memory), len(export.layers), export.num_blocks)]
    for memory in export.memory:
        if isinstance(memory, CudaMemory):
            parts.append(_MEMORY.pack(memory.size, memory.handle, memory.uuid))
        else:
            parts.append(_MEMORY.pack(memory.size, _NO_HANDLE, _NO_UUID))
    for layer in export.layers:
        rank = len(layer.shape)
        parts.append(_LAYER.pack(layer.allocation, layer.dtype, rank, layer.group, 0, layer.offset))
        parts.append(struct.pack(f"<{2 * rank}Q", *layer.shape, *layer.strides))
    packed = b"".join(parts)
    if len(packed) > MAX_EXPORT:
        raise Misuse(f"an export of {len(packed)} bytes is longer than {MAX_EXPORT}")
    return packed


def decode_export(packed: bytes, descriptors: Sequence[int]) -> Export:
    """The `Export` in *packed*, with the *descriptors* that came along and stay the caller's. `ProtocolError`: it is
    malformed, or out of bounds.
    """
    try:
        return _Reader(packed, descriptors).export()
    except (struct.error, ValueError, Misuse) as exc:
        raise ProtocolError(f"not an export of KV memory: {exc}") from exc


class _Reader:
    def __init__(self, packed: bytes, descriptors: Sequence[int]) -> None:
        if len(packed) > MAX_EXPORT:
            raise ValueError(f"{len(packed)} bytes are more than {MAX_EXPORT}")
        self._packed = packed
        self._descriptors = descriptors
        self._at = 0

    def export(self) -> Export:
        magic, version, kind, reserved, allocations, layers, blocks = self._take(_HEAD)
        if magic != _MAGIC or version != HANDLES_VERSION or reserved:
            raise ValueError(f"it begins with {magic!r}, version {version}; this side reads version {HANDLES_VERSION}")
        if kind not in (_KIND_HOST, _KIND_CUDA):
            raise ValueError(f"memory of kind {kind} is not known")
        if not 1 <= allocations <= MAX_PARTS or not 1 <= layers <= MAX_PARTS:
            raise ValueError(f"{allocations} allocations and {layers} layers: give 1 to {MAX_PARTS} of each")
        views: tuple[TensorView, ...]
        wanted = allocations if kind == _KIND_HOST else 0
        if len(self._descriptors) != wanted:
            raise ValueError(f"{len(self._descriptors)} descriptors came with {wanted} allocations of host memory")
        if kind == _KIND_CUDA:
            cuda = tuple(self._cuda() for _ in range(allocations))
            views = tuple(self._layer() for _ in range(layers))
            self._end()
            return Export(cuda, views, blocks)
        host = tuple(self._host(descriptor) for descriptor in self._descriptors)
        views = tuple(self._layer() for _ in range(layers))
        self._end()
        return Export(host, views, blocks)

    def _cuda(self) -> CudaMemory:
        size, handle, uuid = self._take(_MEMORY)
        return CudaMemory(size, handle, uuid)

    def _host(self, descriptor: int) -> SharedMemory:
        size, handle, uuid = self._take(_MEMORY)
        if handle != _NO_HANDLE or uuid != _NO_UUID:
            raise ValueError("host memory has bytes where there must be zeros")
        return SharedMemory(size, descriptor)

    def _layer(self) -> TensorView:
        allocation, dtype, rank, group, reserved, offset = self._take(_LAYER)
        if not 2 <= rank <= MAX_RANK or reserved:
            raise ValueError(f"a tensor of rank {rank}: give 2 to {MAX_RANK}, and a zero where one must be")
        numbers = self._take(struct.Struct(f"<{2 * rank}Q"))
        return TensorView(allocation, offset, DType(dtype), numbers[:rank], numbers[rank:], group)

    def _take(self, form: struct.Struct) -> tuple[Any, ...]:
        found = form.unpack_from(self._packed, self._at)
        self._at += form.size
        return found

    def _end(self) -> None:
        if self._at != len(self._packed):
            raise ValueError(f"{len(self._packed) - self._at} bytes follow its end")
