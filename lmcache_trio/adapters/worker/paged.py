"""An engine's paged KV in CPU memory: read the layout from the tensors, move whole blocks to and from slots.

Blocks are opaque bytes. A layer has one *piece* when its block dimension comes first, and two (K and V) when it comes
second; a slot holds, layer after layer and piece after piece, the chunk's blocks in order. Pieces that lie at a
constant stride in one storage are moved by one call. Nothing as large as a chunk is made on the way, and the GIL is
released.

Measured (32 layers, 32 KiB blocks, scattered, caches cold, one thread, share of memcpy's processor time): gather by
`ndarray.take(out=)` 0.86, by torch's `index_select(out=)` 0.81, which copies the whole KV first where blocks lie apart;
block by block 0.78. Scatter by numpy assignment of one void item a block 0.90, by `put` 0.91, by torch's `index_copy_`
0.65.

KV on a GPU is moved by plain copies through a staging tensor, in the background and behind what the engine had
submitted (`fence`): correct, and slow, for memory that the server's device cannot open. It refuses tensors whose blocks
are not contiguous.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import attrs
import numpy as np
import numpy.typing as npt
import torch

from lmcache_trio._core.transfer.exports import read_blocks
from lmcache_trio.errors import Misuse

__all__ = ["BlockIndex", "Bytes", "PagedKV", "PieceGroup", "StoredPiece"]

Bytes = npt.NDArray[np.uint8]
BlockIndex = npt.NDArray[np.int64]


@attrs.frozen
class StoredPiece:
    """Where the blocks of one piece lie, in bytes of a storage."""

    storage: torch.UntypedStorage = attrs.field(eq=False)
    address: int
    offset: int
    stride: int
    length: int


class PieceGroup(Protocol):
    """Pieces moved by one call, in CPU memory or on a GPU."""

    @property
    def pieces(self) -> int: ...
    @property
    def length(self) -> int: ...
    def gather(self, block_ids: BlockIndex, slot: Bytes) -> None: ...
    def scatter(self, slot: Bytes, chunk_blocks: int, skip: int, block_ids: BlockIndex) -> None: ...


@attrs.frozen(eq=False)
class _CpuPieces:
    """Pieces in CPU memory, moved by one call: two views of the same memory."""

    rows: Bytes
    """[pieces, blocks, bytes of a block]."""
    dense: bool
    """Do a piece's blocks lie one after the other?"""
    items: list[npt.NDArray[np.void]]
    """A piece each, one void item a block."""
    pieces: int
    length: int

    def gather(self, block_ids: BlockIndex, slot: Bytes) -> None:
        """Blocks *block_ids* of every piece into *slot*, which has just their length."""
        out = slot.reshape(self.pieces, len(block_ids), self.length)
        if self.dense:
            for piece in range(self.pieces):  # ids were checked; the mode "raise" would make a temporary
                self.rows[piece].take(block_ids, axis=0, out=out[piece], mode="clip")
        else:  # `take`, and torch's index_select too, would first copy all of the KV into one piece
            for i, block in enumerate(block_ids):
                np.copyto(out[:, i], self.rows[:, block])

    def scatter(self, slot: Bytes, chunk_blocks: int, skip: int, block_ids: BlockIndex) -> None:
        """*slot*'s blocks from number *skip* on into the blocks *block_ids* of every piece."""
        source = slot.view(f"V{self.length}").reshape(self.pieces, chunk_blocks)
        for piece, items in enumerate(self.items):
            items[block_ids] = source[piece, skip : skip + len(block_ids)]


class PagedKV:
    """All layers' KV of one worker. `gather` and `scatter` may run in any thread, and several at once."""

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], *, num_blocks: int | None = None) -> None:
        if not kv_caches:
            raise Misuse("kv_caches is empty: register one tensor a layer")
        self.tensors = dict(kv_caches)
        self.num_blocks = num_blocks or _guess_blocks(kv_caches)
        pieces: list[StoredPiece] = []
        layout = hashlib.sha256()
        for name, tensor in kv_caches.items():
            found, description = _read_layer(name, tensor, self.num_blocks, self._memory)
            pieces += found
            layout.update(f"{name!r}: {description}".encode())
        self.layout = layout.digest()
        """What a fingerprint needs to know: equal for engines whose slots hold the same layers, in the same order, with
        the same bytes in the same places.
        """
        self.block_bytes = sum(piece.length for piece in pieces)
        """Bytes of one block, over all layers and pieces."""
        self._groups: list[PieceGroup] = [self._group(run) for run in _runs(pieces)]

    _memory = "cpu"

    def _group(self, run: list[StoredPiece]) -> PieceGroup:
        return _group(run, self.num_blocks)

    def fence(self) -> Any:
        """Called in the engine's thread: what a copy that is submitted now must wait for."""
        return None

    def check(self, block_ids: Sequence[int]) -> BlockIndex:
        """*block_ids* as an index; `Misuse` if one is none of ours."""
        index = np.asarray(block_ids, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.num_blocks):
            raise Misuse(f"block_ids run from {index.min()} to {index.max()}: there are {self.num_blocks} blocks")
        return index

    def _check_slot(self, slot: Bytes, blocks: int) -> None:
        """A slot that is longer than a chunk would be published half empty, a shorter one read and written over."""
        if slot.size != blocks * self.block_bytes:
            raise Misuse(
                f"the slot has {slot.size} bytes, which {blocks} blocks of {self.block_bytes} bytes do not fill exactly"
            )

    def gather(self, block_ids: BlockIndex, slot: Bytes, *, half: Callable[[], None] | None = None) -> None:
        """Copy the blocks of one chunk into *slot*, a writable array of their bytes.

        *half* is called in the middle. `Misuse`, and nothing is copied, unless *slot* is as long as a chunk.
        """
        count, at = len(block_ids), 0
        self._check_slot(slot, count)
        for i, group in enumerate(self._groups):
            if half is not None and i == len(self._groups) // 2:
                half()
            size = group.pieces * count * group.length
            group.gather(block_ids, slot[at : at + size])
            at += size

    def scatter(
        self,
        slot: Bytes,
        chunk_blocks: int,
        skip: int,
        block_ids: BlockIndex,
        *,
        half: Callable[[], None] | None = None,
    ) -> None:
        """Copy the chunk's blocks from number *skip* on into the blocks *block_ids*, and into no other.

        *slot* holds *chunk_blocks* blocks; those behind the last of *block_ids* stay unread. Else as `gather`.
        """
        at = 0
        self._check_slot(slot, chunk_blocks)
        for i, group in enumerate(self._groups):
            if half is not None and i == len(self._groups) // 2:
                half()
            size = group.pieces * chunk_blocks * group.length
            group.scatter(slot[at : at + size], chunk_blocks, skip, block_ids)
            at += size


def _guess_blocks(kv_caches: Mapping[str, torch.Tensor]) -> int:
    """The one number of blocks that fits all layers."""
    fitting = [{*tensor.shape[:1], *(tensor.shape[1:2] if tensor.dim() > 1 and tensor.shape[0] == 2 else ())}
               for tensor in kv_caches.values()]  # fmt: skip
    found = set.intersection(*fitting) - {2}
    if len(found) != 1:
        raise Misuse("the number of blocks cannot be told from the layers' shapes: pass num_blocks")
    return int(found.pop())


def _read_layer(name: str, tensor: torch.Tensor, num_blocks: int, memory: str) -> tuple[list[StoredPiece], str]:
    where = f"layer {name!r} (shape {tuple(tensor.shape)}, strides {tensor.stride()})"
    if tensor.device.type != memory:
        raise Misuse(f"{where} is on {tensor.device}: KV must lie in CPU memory, or all of it on one GPU")
    shape, stride, item = tuple(tensor.shape), tensor.stride(), tensor.element_size()
    blocks = read_blocks(where, shape, stride, item, num_blocks)
    storage, base = tensor.untyped_storage(), int(tensor.storage_offset()) * item
    pieces = [StoredPiece(storage, storage.data_ptr(), base + start, step, length) for start, step, length in blocks]
    inner = len(pieces)  # dimensions before a block's own
    return pieces, f"{tensor.dtype}{inner}{shape[inner:]}{stride[inner:]};"


def _runs(pieces: Sequence[StoredPiece]) -> list[list[StoredPiece]]:
    """Consecutive pieces of one storage at a constant stride, together."""
    runs: list[list[StoredPiece]] = []
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


def _group(run: list[StoredPiece], num_blocks: int) -> _CpuPieces:
    head = run[0]
    flat = torch.empty(0, dtype=torch.uint8).set_(head.storage)
    step = run[1].offset - head.offset if len(run) > 1 else 0
    rows = flat.as_strided((len(run), num_blocks, head.length), (step, head.stride, 1), head.offset).numpy()
    items = [piece.view(f"V{head.length}")[:, 0] for piece in rows]
    return _CpuPieces(rows, head.stride == head.length, items, len(run), head.length)
