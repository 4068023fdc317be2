"""A small decoder-only transformer, Llama-like: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Its weights are random, drawn from a seed, so any two processes have the same model and nothing is downloaded. What it
says means nothing; what matters is that each id depends on all KV before it. It does no scheduling and no sampling.
"""

import math

import attrs
import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from lmcache_trio.demo.model_kv import ModelKV, ModelKVShape
from lmcache_trio.errors import Misuse

__all__ = ["Model", "ModelConfig"]

_QUERY_GAIN = 3.0
"""Random queries and keys attend almost evenly to everything, and then no single block matters. With attention
scores of standard deviation 3 a few tokens dominate, as in a trained model, and wrong KV changes the output."""


@attrs.frozen
class ModelConfig:
    """Sizes and seed. The default has 11 M parameters and 6 KiB of KV a token in float32."""

    layers: int = 6
    hidden: int = 384
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 1024
    vocabulary: int = 4096
    dtype: str = attrs.field(default="float32", validator=attrs.validators.in_(("float32", "bfloat16")))
    rope_base: float = 10_000.0
    seed: int = 0
    window: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    """Tokens that every second layer attends to, the newest one included; 0: all, as the other layers do."""

    def __attrs_post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise Misuse(f"heads is {self.heads}: it must be a multiple of kv_heads, {self.kv_heads}")
        if self.window == 1:
            raise Misuse("window is 1: a token must see one before it; 0 is no window")
        if self.head_dim % 2:
            raise Misuse(f"head_dim is {self.head_dim}: rotary positions need an even one")

    @property
    def identity(self) -> tuple[str, ...]:
        """Everything that decides the KV of a token: two models with equal identity may share chunks."""
        return tuple(f"{name}={value}" for name, value in attrs.asdict(self).items())

    def has_window(self, layer: int) -> bool:
        """Whether the layer number *layer* attends to a window of tokens only."""
        return self.window > 0 and layer % 2 == 1

    def kv_shape(self, *, num_blocks: int, block_tokens: int) -> ModelKVShape:
        return ModelKVShape(self.layers, num_blocks, block_tokens, self.kv_heads, self.head_dim, self.dtype)


@attrs.frozen(eq=False)
class _Layer:
    qkv: torch.Tensor
    output: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Model:
    """The weights, and one forward pass over a run of tokens of one request."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = c = config
        self._dtype: torch.dtype = getattr(torch, c.dtype)
        self._rng = torch.Generator().manual_seed(c.seed)
        query, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self._embedding = self._draw(c.vocabulary, c.hidden, scale=1.0)
        self._layers = []
        for _ in range(c.layers):
            qkv = self._draw(query + 2 * kv, c.hidden)
            qkv[:query] *= _QUERY_GAIN
            self._layers.append(
                _Layer(
                    qkv=qkv,
                    output=self._draw(c.hidden, query),
                    gate_up=self._draw(2 * c.intermediate, c.hidden),
                    down=self._draw(c.hidden, c.intermediate),
                )
            )
        self._head = self._draw(c.vocabulary, c.hidden)
        self._frequencies = c.rope_base ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, start: int, kv: ModelKV, blocks: torch.Tensor) -> torch.Tensor:
        """Logits, (vocabulary,), after the last of *token_ids*, which stand at positions *start* … of one request.

        Their K and V are written into *kv* through the request's table *blocks* (int64); those of earlier positions
        are read from there.
        """
        x = self._embedding[token_ids]
        rotation = self._rotation(start, len(token_ids))
        masks = {window: _mask(start, len(token_ids), window) for window in (0, self.config.window)}
        for i, layer in enumerate(self._layers):
            mask = masks[self.config.window if self.config.has_window(i) else 0]
            x = x + self._attend(i, layer, _norm(x), rotation, mask, (start, kv, blocks))
            gate, up = linear(_norm(x), layer.gate_up).chunk(2, dim=-1)
            x = x + linear(silu(gate) * up, layer.down)
        return linear(_norm(x[-1]), self._head).float()

    def _attend(
        self,
        index: int,
        layer: _Layer,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        where: tuple[int, ModelKV, torch.Tensor],
    ) -> torch.Tensor:
        c = self.config
        start, kv, blocks = where
        q, k, v = linear(x, layer.qkv).view(len(x), -1, c.head_dim).tensor_split((c.heads, c.heads + c.kv_heads), dim=1)
        kv.write(index, blocks, start, _rotate(k, rotation), v)
        keys, values = kv.read(index, blocks, start + len(x))
        attended = scaled_dot_product_attention(
            _rotate(q, rotation).transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            enable_gqa=True,
        )
        return linear(attended[0].transpose(0, 1).reshape(len(x), -1), layer.output)

    def _rotation(self, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        # In float64 until the end: an angle computed at position 100,000 in float32 is off by 1e-2
        angles = torch.outer(torch.arange(start, start + length, dtype=torch.float64), self._frequencies)[:, None]
        return angles.cos().to(self._dtype), angles.sin().to(self._dtype)

    def _draw(self, rows: int, columns: int, *, scale: float | None = None) -> torch.Tensor:
        scale = 1 / math.sqrt(columns) if scale is None else scale
        return (torch.randn(rows, columns, generator=self._rng) * scale).to(self._dtype)


def _norm(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _mask(start: int, length: int, window: int) -> torch.Tensor | None:
    """Which of `start + length` keys each of *length* queries may see: *window* of them, or all before it if that is 0.

    None: one query that sees all.
    """
    if length == 1 and (not window or start < window):
        return None
    seen = torch.ones(length, start + length, dtype=torch.bool).tril(start)
    return seen.triu(start - window + 1) if window else seen
