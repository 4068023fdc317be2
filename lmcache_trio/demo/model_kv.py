"""A paged KV cache as engines keep it: a pool of equal blocks, one tensor a layer, all of them views of one storage.

It knows nothing of requests, tokens or the cache server: who holds which block is the engine's business, and it only
refuses to hand out a block twice or to take one back twice.
"""

from collections import deque
from collections.abc import Iterable
from enum import Enum

import attrs
import torch

from lmcache_trio.errors import Misuse

__all__ = ["BlockPool", "KVLayout", "ModelKV", "ModelKVShape", "layer_name"]


def layer_name(number: int) -> str:
    """The name of a layer's KV."""
    return f"layers.{number}.attention"


class KVLayout(Enum):
    """Where the block dimension stands in a layer's tensor. Engines use both; adapters must read either."""

    KV_FIRST = "kv_first"  # (2, num_blocks, block_tokens, kv_heads, head_dim): a block is two pieces
    BLOCK_FIRST = "block_first"  # (num_blocks, 2, block_tokens, kv_heads, head_dim): a block is one piece


class BlockPool:
    """Block numbers `0 … num_blocks - 1`, each free or handed out. FIFO, so that a freed block is reused late."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise Misuse(f"num_blocks is {num_blocks}: a pool needs 1 or more")
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._taken: set[int] = set()

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """*count* blocks, or None (and nothing taken) when fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.popleft() for _ in range(count)]
        self._taken.update(blocks)
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Take *blocks* back. `Misuse` (and nothing changed) if one of them isn't handed out."""
        returned = list(blocks)
        if len(set(returned)) != len(returned) or not self._taken.issuperset(returned):
            raise Misuse(f"blocks {returned} are not all handed out: free each block once")
        self._taken.difference_update(returned)
        self._free.extend(returned)


@attrs.frozen
class ModelKVShape:
    """Sizes of a paged KV cache. *dtype* is a torch dtype's name."""

    layers: int
    num_blocks: int
    block_tokens: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"

    @property
    def layer_shape(self) -> tuple[int, int, int, int, int]:
        return (2, self.num_blocks, self.block_tokens, self.kv_heads, self.head_dim)

    @property
    def numel(self) -> int:
        return self.layers * 2 * self.num_blocks * self.block_tokens * self.kv_heads * self.head_dim


class ModelKV:
    """The tensors of a paged KV cache.

    `layers` maps a layer's name to its tensor in *layout*'s shape: this is what `register_kv_caches` takes. *storage*,
    a flat tensor of the right dtype, may be handed in (one in shared memory, say); by default it is private memory.
    """

    def __init__(
        self, shape: ModelKVShape, *, layout: KVLayout = KVLayout.KV_FIRST, storage: torch.Tensor | None = None
    ) -> None:
        dtype: torch.dtype = getattr(torch, shape.dtype)
        if storage is None:
            storage = torch.zeros(shape.numel, dtype=dtype)
        if storage.dtype is not dtype or storage.numel() < shape.numel or storage.dim() != 1:
            raise Misuse(
                f"storage is {storage.dtype} {tuple(storage.shape)}: it must be a flat {dtype} tensor of "
                f"{shape.numel} items or more"
            )
        self.shape = shape
        self.layout = layout
        self.storage = storage
        two, blocks, tokens, heads, dim = shape.layer_shape
        if layout is KVLayout.KV_FIRST:
            stacked = storage[: shape.numel].view(shape.layers, two, blocks, tokens, heads, dim)
        else:
            stacked = storage[: shape.numel].view(shape.layers, blocks, two, tokens, heads, dim)
        self.layers: dict[str, torch.Tensor] = {layer_name(i): stacked[i] for i in range(shape.layers)}
        # K and V of every layer as (num_blocks, block_tokens, kv_heads, head_dim), whatever the layout
        axis = 0 if layout is KVLayout.KV_FIRST else 1
        self._halves = [(t.select(axis, 0), t.select(axis, 1)) for t in self.layers.values()]

    def write(self, layer: int, blocks: torch.Tensor, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put *keys* and *values*, each (tokens, kv_heads, head_dim), at positions *start* … of the table *blocks*."""
        positions = torch.arange(start, start + keys.shape[0])
        at = (blocks[positions // self.shape.block_tokens], positions % self.shape.block_tokens)
        k, v = self._halves[layer]
        k[at] = keys
        v[at] = values

    def read(self, layer: int, blocks: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of positions `0 … length - 1` of the table *blocks*, each (length, kv_heads, head_dim)."""
        used = blocks[: -(-length // self.shape.block_tokens)]
        k, v = self._halves[layer]
        return k[used].flatten(0, 1)[:length], v[used].flatten(0, 1)[:length]
