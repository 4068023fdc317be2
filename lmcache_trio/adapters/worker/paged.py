"""An engine's paged KV in CPU memory: its layout, as the tensors have it. `host_memory` copies its blocks.

Blocks are opaque bytes. A layer has one *piece* when its block dimension comes first, and two (K and V) when it comes
second. A slot holds the part of a chunk in one KV group: layer after layer of the group and piece after piece, the
part's blocks in order. Layers of several groups may share a storage, as their blocks are numbered alike. Tensors whose
blocks are not contiguous are refused. `cuda_kv` has KV on a GPU.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lmcache_trio._core.transfer.exports import Piece, read_blocks
from lmcache_trio.errors import Misuse
from lmcache_trio.host_memory import BlockIndex, PagedBlocks, blocks_of

__all__ = ["PagedKV"]


class PagedKV:
    """All layers' KV of one worker. *groups*: the names of the layers of each KV group, if there are several."""

    memory = "cpu"
    """The type of the device that its tensors are on."""

    def __init__(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        *,
        num_blocks: int | None = None,
        groups: Sequence[Sequence[str]] | None = None,
    ) -> None:
        if not kv_caches:
            raise Misuse("kv_caches is empty: register one tensor a layer")
        self.tensors = dict(kv_caches)
        self.num_blocks = num_blocks or _guess_blocks(kv_caches)
        self.group_of = _group_of(self.tensors, groups)
        """The number of each layer's group."""
        pieces: list[list[Piece]] = [[] for _ in range(max(self.group_of.values()) + 1)]
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
            group = self.group_of[name]
            pieces[group] += [Piece(number, base + start, step, length) for start, step, length in found]
            inner = len(found)  # dimensions before a block's own
            if groups is not None:
                layout.update(f"group {group} ".encode())
            layout.update(f"{name!r}: {tensor.dtype}{inner}{shape[inner:]}{stride[inner:]};".encode())
        self.layout = layout.digest()
        """What a fingerprint needs to know: equal for engines whose slots hold the same layers, in the same order, with
        the same bytes in the same places.
        """
        self.groups = [self._blocks_of(of_group, list(storages.values())) for of_group in pieces]
        """The blocks of each group."""

    def _blocks_of(self, pieces: Sequence[Piece], storages: Sequence[torch.UntypedStorage]) -> PagedBlocks:
        flat = [torch.empty(0, dtype=torch.uint8).set_(storage).numpy() for storage in storages]
        return blocks_of(pieces, flat, self.num_blocks)

    def fence(self) -> Any:
        """Called in the engine's thread: what a copy that is submitted now must wait for."""
        return None

    def check(self, block_ids: Sequence[int]) -> BlockIndex:
        """*block_ids* as an index. `Misuse`: the KV has no such block."""
        index = np.asarray(block_ids, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.num_blocks):
            raise Misuse(f"block_ids run from {index.min()} to {index.max()}: there are {self.num_blocks} blocks")
        return index


def _group_of(layers: Mapping[str, torch.Tensor], groups: Sequence[Sequence[str]] | None) -> dict[str, int]:
    """The number of each layer's group. `Misuse`: a layer is in none, in two, or is not there."""
    if groups is None:
        return dict.fromkeys(layers, 0)
    found: dict[str, int] = {}
    for number, names in enumerate(groups):
        if isinstance(names, str) or not names:
            raise Misuse(f"groups[{number}] is {names!r:.80}: give the names of its layers, one or more")
        for name in names:
            if name not in layers or name in found:
                problem = f"in group {found[name]} already" if name in found else "not among kv_caches"
                raise Misuse(f"groups[{number}] has layer {name!r:.80}, which is {problem}")
            found[name] = number
    if missing := [name for name in layers if name not in found]:
        raise Misuse(f"layer {missing[0]!r} is in no group: name each layer in one of groups")
    return found


def _guess_blocks(kv_caches: Mapping[str, torch.Tensor]) -> int:
    """The one number of blocks that fits all layers."""
    fitting = [{*tensor.shape[:1], *(tensor.shape[1:2] if tensor.dim() > 1 and tensor.shape[0] == 2 else ())}
               for tensor in kv_caches.values()]  # fmt: skip
    found = set.intersection(*fitting) - {2}
    if len(found) != 1:
        raise Misuse("the number of blocks cannot be told from the layers' shapes: pass num_blocks")
    return int(found.pop())
