"""Random Llamas for the end-to-end tests, written straight to disk: two MiB and a second instead of a download.

The weights are wide on purpose (standard deviation 0.2): greedy outputs are then far apart, so that one wrong block of
KV changes them. There is no tokenizer; prompts are token ids.
"""

import json
from pathlib import Path

import attrs
import torch
from safetensors.torch import save_file

__all__ = ["MID", "NARROW", "TINY", "Shape", "write_llama"]


@attrs.frozen
class Shape:
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    dtype: str
    vocabulary: int = 32_000


TINY = Shape(hidden=256, inner=704, layers=4, heads=8, kv_heads=4, head_size=32, dtype="float32")
"""4 KiB of KV a token. In float32, because a bfloat16 sum depends on how many rows are computed together: half of a
random model's prompts then have one answer alone and another in a batch, without any cache.
"""

NARROW = attrs.evolve(TINY, kv_heads=1)
"""Two ranks of it hold the same KV."""


def _multiplies_bfloat16() -> bool:
    """Has this processor instructions for it? Without them 4,100 tokens of the larger model took 52 s."""
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags)


MID = (
    Shape(hidden=512, inner=1408, layers=16, heads=8, kv_heads=8, head_size=64, dtype="bfloat16")
    if _multiplies_bfloat16()
    else Shape(hidden=256, inner=704, layers=8, heads=8, kv_heads=8, head_size=64, dtype="float32")
)
"""32 KiB of KV a token in either: prefill takes long enough to be worth saving, and not longer."""


def write_llama(where: Path, shape: Shape, *, seed: int) -> Path:
    """Write config.json and model.safetensors into *where*."""
    where.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[shape.dtype]

    def normal(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * 0.2).to(dtype)

    weights = {
        "model.embed_tokens.weight": normal(shape.vocabulary, shape.hidden),
        "model.norm.weight": torch.ones(shape.hidden, dtype=dtype),
        "lm_head.weight": normal(shape.vocabulary, shape.hidden),
    }
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        for name, rows, columns in (
            ("self_attn.q_proj", queries, shape.hidden),
            ("self_attn.k_proj", keys, shape.hidden),
            ("self_attn.v_proj", keys, shape.hidden),
            ("self_attn.o_proj", shape.hidden, queries),
            ("mlp.gate_proj", shape.inner, shape.hidden),
            ("mlp.up_proj", shape.inner, shape.hidden),
            ("mlp.down_proj", shape.hidden, shape.inner),
        ):
            weights[f"{layer}.{name}.weight"] = normal(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = torch.ones(shape.hidden, dtype=dtype)
    save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": shape.dtype,
    }
    (where / "config.json").write_text(json.dumps(config, indent=1))
    return where
