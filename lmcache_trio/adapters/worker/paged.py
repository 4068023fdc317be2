"""An engine's paged KV in CPU memory: read the layout from the tensors, move whole blocks to and from slots.

Blocks are opaque bytes. A layer has one *piece* when its block dimension comes first, and two (K and V) when it comes
second; a slot holds, layer after layer and piece after piece, the chunk's blocks in order. `host_memory` moves them.

KV on a GPU is moved by plain copies through a staging tensor, in the background and behind what the engine had
submitted (`fence`): correct, and slow, for memory that the server's device cannot open. It refuses tensors whose blocks
are not contiguous.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from lmcache_trio._core.transfer.exports import Piece, read_blocks
from lmcache_trio.errors import Misuse
from lmcache_trio.host_memory import BlockIndex, Bytes, runs_of

__all__ = ["PagedKV", "Run"]


class Run(Protocol):
    """Pieces moved by one call, in CPU memory (`host_memory.BlockRun` says how) or on a GPU."""

    def slot_bytes(self, blocks: int) -> int: ...
    def gather(self, blocks: BlockIndex, part: Bytes) -> None: ...
    def scatter(self, part: Bytes, count: int, places: slice, blocks: BlockIndex) -> None: ...


class PagedKV:
    """All layers' KV of one worker. `gather` and `scatter` may run in any thread, and several at once."""

    memory = "cpu"
    """The type of the device that its tensors are on."""

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], *, num_blocks: int | None = None) -> None:
        if not kv_caches:
            raise Misuse("kv_caches is empty: register one tensor a layer")
        self.tensors = dict(kv_caches)
        self.num_blocks = num_blocks or _guess_blocks(kv_caches)
        pieces: list[Piece] = []
        storages: dict[int, torch.UntypedStorage] = {}  # by address
        layout = hashlib.sha256()
        for name, tensor in kv_caches.items():
            where = f"layer {name!r} (shape {tuple(tensor.shape)}, strides {tensor.stride()})"
            if tensor.device.type != self.memory:
                raise Misuse(f"{where} is on {tensor.device}: KV must lie in CPU memory, or all of it on one GPU")
            shape, stride, item = tuple(tensor.shape), tensor.stride(), tensor.element_size()
            found = read_blocks(where, shape, stride, item, self.num_blocks)
            storage, base = tensor.untyped_storage(), int(tensor.storage_offset()) * item
            storages.setdefault(storage.data_ptr(), storage)
            number = list(storages).index(storage.data_ptr())
            pieces += [Piece(number, base + start, step, length) for start, step, length in found]
            inner = len(found)  # dimensions before a block's own
            layout.update(f"{name!r}: {tensor.dtype}{inner}{shape[inner:]}{stride[inner:]};".encode())
        self.layout = layout.digest()
        """What a fingerprint needs to know: equal for engines whose slots hold the same layers, in the same order, with
        the same bytes in the same places.
        """
        self.block_bytes = sum(piece.length for piece in pieces)
        """Bytes of one block, over all layers and pieces."""
        self._runs = self._make_runs(pieces, list(storages.values()))

    def _make_runs(self, pieces: Sequence[Piece], storages: Sequence[torch.UntypedStorage]) -> Sequence[Run]:
        flat = [torch.empty(0, dtype=torch.uint8).set_(storage).numpy() for storage in storages]
        return runs_of(pieces, flat, self.num_blocks)

    def fence(self) -> Any:
        """Called in the engine's thread: what a copy that is submitted now must wait for."""
        return None

    def check(self, block_ids: Sequence[int]) -> BlockIndex:
        """*block_ids* as an index; `Misuse` if one is none of ours."""
        index = np.asarray(block_ids, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.num_blocks):
            raise Misuse(f"block_ids run from {index.min()} to {index.max()}: there are {self.num_blocks} blocks")
        return index

    def gather(self, block_ids: BlockIndex, slot: Bytes, *, half: Callable[[], None] | None = None) -> None:
        """Copy the blocks of one chunk into *slot*, a writable array of their bytes.

        *half* is called in the middle. `Misuse`, and nothing is copied, unless *slot* is as long as a chunk: a longer
        one would be published half empty.
        """
        count, at = len(block_ids), 0
        if slot.size != count * self.block_bytes:
            raise self._misfit(slot, count)
        for i, run in enumerate(self._runs):
            if half is not None and i == len(self._runs) // 2:
                half()
            part = slot[at : at + run.slot_bytes(count)]
            run.gather(block_ids, part)
            at += len(part)

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

        *slot* holds *chunk_blocks* blocks; those behind the last of *block_ids* stay unread. Else as `gather`: a
        shorter slot would be read, and written over.
        """
        if slot.size != chunk_blocks * self.block_bytes:
            raise self._misfit(slot, chunk_blocks)
        places, at = slice(skip, skip + len(block_ids)), 0
        for i, run in enumerate(self._runs):
            if half is not None and i == len(self._runs) // 2:
                half()
            part = slot[at : at + run.slot_bytes(chunk_blocks)]
            run.scatter(part, chunk_blocks, places, block_ids)
            at += len(part)

    def _misfit(self, slot: Bytes, blocks: int) -> Misuse:
        return Misuse(
            f"the slot has {slot.size} bytes, which {blocks} blocks of {self.block_bytes} bytes do not fill exactly"
        )


def _guess_blocks(kv_caches: Mapping[str, torch.Tensor]) -> int:
    """The one number of blocks that fits all layers."""
    fitting = [{*tensor.shape[:1], *(tensor.shape[1:2] if tensor.dim() > 1 and tensor.shape[0] == 2 else ())}
               for tensor in kv_caches.values()]  # fmt: skip
    found = set.intersection(*fitting) - {2}
    if len(found) != 1:
        raise Misuse("the number of blocks cannot be told from the layers' shapes: pass num_blocks")
    return int(found.pop())
