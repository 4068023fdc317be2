"""An engine's paged KV in CPU memory: read the layout from the tensors, move whole blocks to and from slots.

Blocks are opaque bytes. A layer has one *piece* when its block dimension comes first, and two (K and V) when it comes
second; a slot holds, layer after layer and piece after piece, the chunk's blocks in order. Pieces that lie at a
constant stride in one storage are moved by one call. Nothing as large as a chunk is made on the way, and the GIL is
released.

Measured (32 layers, 32 KiB blocks, scattered, one thread, share of memcpy): gather by `index_select(out=)` 0.93;
scatter by numpy assignment of one void item a block 0.96; block by block 0.81.

It refuses tensors whose blocks are not contiguous, and those that are not in CPU memory: a plain copy from a GPU waits
for its stream in the engine's thread, which is what the device worker is for.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import attrs
import numpy as np
import numpy.typing as npt
import torch

from lmcache_trio.errors import Misuse

__all__ = ["PagedKV"]

_Bytes = npt.NDArray[np.uint8]
_Index = npt.NDArray[np.int64]


@attrs.frozen
class _Piece:
    """Where one piece's blocks lie, in bytes of a storage."""

    storage: torch.UntypedStorage = attrs.field(eq=False)
    address: int
    offset: int
    stride: int
    length: int


@attrs.frozen(eq=False)
class _Group:
    """Pieces moved by one call: bytes as [pieces, blocks, length], and the same as one void item a block."""

    rows: torch.Tensor
    items: list[npt.NDArray[np.void]]
    pieces: int
    length: int


class PagedKV:
    """All layers' KV of one worker. `gather` and `scatter` may run in any thread, and several at once."""

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], *, num_blocks: int | None = None) -> None:
        if not kv_caches:
            raise Misuse("kv_caches is empty: register one tensor a layer")
        self.num_blocks = num_blocks or _guess_blocks(kv_caches)
        pieces: list[_Piece] = []
        layout = hashlib.sha256()
        for name, tensor in kv_caches.items():
            found, description = _read_layer(name, tensor, self.num_blocks)
            pieces += found
            layout.update(description.encode())
        self.layout = layout.digest()
        """What a fingerprint needs to know: equal for engines whose slots hold the same bytes in the same places."""
        self.block_bytes = sum(piece.length for piece in pieces)
        """Bytes of one block, over all layers and pieces."""
        self._groups = [_group(run, self.num_blocks) for run in _runs(pieces)]

    def check(self, block_ids: Sequence[int]) -> _Index:
        """*block_ids* as an index; `Misuse` if one is none of ours."""
        index = np.asarray(block_ids, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.num_blocks):
            raise Misuse(f"block_ids run from {index.min()} to {index.max()}: there are {self.num_blocks} blocks")
        return index

    def gather(self, block_ids: _Index, slot: _Bytes, half: Callable[[], None] | None = None) -> None:
        """Copy one chunk's blocks into *slot*, a writable array of their bytes. *half* is called in the middle."""
        at, count = 0, len(block_ids)
        index, run = torch.from_numpy(block_ids), _is_run(block_ids)
        target = torch.from_numpy(slot)
        for i, group in enumerate(self._groups):
            if half is not None and i == len(self._groups) // 2:
                half()
            size = group.pieces * count * group.length
            out = target[at : at + size].view(group.pieces, count, group.length)
            if run:
                out.copy_(group.rows.narrow(1, int(block_ids[0]), count))
            else:
                torch.index_select(group.rows, 1, index, out=out)
            at += size

    def scatter(
        self, slot: _Bytes, chunk_blocks: int, skip: int, block_ids: _Index, half: Callable[[], None] | None = None
    ) -> None:
        """Copy the chunk's blocks from number *skip* on into the blocks *block_ids*, and into no other.

        *slot* holds *chunk_blocks* blocks; what lies behind the last of *block_ids* stays unread.
        """
        at, count = 0, len(block_ids)
        for i, group in enumerate(self._groups):
            if half is not None and i == len(self._groups) // 2:
                half()
            size = group.pieces * chunk_blocks * group.length
            source = slot[at : at + size].view(f"V{group.length}").reshape(group.pieces, chunk_blocks)
            for piece, items in enumerate(group.items):
                items[block_ids] = source[piece, skip : skip + count]
            at += size


def _is_run(block_ids: _Index) -> bool:
    return len(block_ids) > 0 and bool((np.diff(block_ids) == 1).all())


def _guess_blocks(kv_caches: Mapping[str, torch.Tensor]) -> int:
    """The one number of blocks that fits all layers."""
    fitting = [{*tensor.shape[:1], *(tensor.shape[1:2] if tensor.dim() > 1 and tensor.shape[0] == 2 else ())}
               for tensor in kv_caches.values()]  # fmt: skip
    found = set.intersection(*fitting) - {2}
    if len(found) != 1:
        raise Misuse("the number of blocks cannot be told from the layers' shapes: pass num_blocks")
    return int(found.pop())


def _read_layer(name: str, tensor: torch.Tensor, num_blocks: int) -> tuple[list[_Piece], str]:
    where = f"layer {name!r} (shape {tuple(tensor.shape)}, strides {tensor.stride()})"
    if tensor.device.type != "cpu":
        raise Misuse(f"{where} is on {tensor.device}: KV outside of CPU memory needs the device worker")
    shape, stride = tuple(tensor.shape), tensor.stride()
    first = len(shape) > 1 and shape[0] == num_blocks
    second = len(shape) > 2 and shape[0] == 2 and shape[1] == num_blocks
    if first == second:
        problem = "fits both" if first else "fits neither"
        raise Misuse(
            f"{where} {problem} ({num_blocks}, …) and (2, {num_blocks}, …):"
            " pass tensors whose block dimension is the first, or the second after K and V, and is not 2"
        )
    inner = 1 if first else 2
    if not _is_dense(shape[inner:], stride[inner:]):
        raise Misuse(f"{where}: a block's bytes are not contiguous: pass a view in the order of memory")
    item = tensor.element_size()
    length = math.prod(shape[inner:]) * item
    block_stride = stride[inner - 1] * item
    storage = tensor.untyped_storage()
    starts = [0] if first else [0, stride[0] * item]
    base = int(tensor.storage_offset()) * item
    pieces = [_Piece(storage, storage.data_ptr(), base + start, block_stride, length) for start in starts]
    if num_blocks > 1 and block_stride < length:
        raise Misuse(f"{where}: blocks overlap: pass a view whose blocks lie apart")
    return pieces, f"{tensor.dtype}{inner}{shape[inner:]}{stride[inner:]};"


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Do the dimensions, in whatever order, fill one contiguous range?"""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def _runs(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Consecutive pieces of one storage at a constant stride, together."""
    runs: list[list[_Piece]] = []
    for piece in pieces:
        run = runs[-1] if runs else []
        alike = bool(run) and (run[0].address, run[0].stride, run[0].length) == (
            piece.address,
            piece.stride,
            piece.length,
        )
        step = piece.offset - run[-1].offset if alike else 0
        if step > 0 and (len(run) == 1 or step == run[-1].offset - run[-2].offset):
            run.append(piece)
        else:
            runs.append([piece])
    return runs


def _group(run: list[_Piece], num_blocks: int) -> _Group:
    head = run[0]
    flat = torch.empty(0, dtype=torch.uint8).set_(head.storage)
    step = run[1].offset - head.offset if len(run) > 1 else 0
    rows = flat.as_strided((len(run), num_blocks, head.length), (step, head.stride, 1), head.offset)
    items = [rows[i].numpy().view(f"V{head.length}")[:, 0] for i in range(len(run))]
    return _Group(rows, items, len(run), head.length)
