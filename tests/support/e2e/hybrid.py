"""Random models with several KV groups for the end-to-end tests, written by transformers, which vLLM brings along.

They are as wide as the Llamas of `model`, so that one wrong block of KV, or one wrong state, changes what they say.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import attrs
import torch

__all__ = ["HYBRIDS", "Hybrid", "write_hybrid"]


@attrs.frozen
class Hybrid:
    """*config* and *model* are classes of transformers."""

    config: str
    model: str
    settings: Mapping[str, Any]
    dtype: str = "float32"


SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "max_position_embeddings": 8192,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
STATES = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
LATENT = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 512,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "v_head_dim": 32,
}
SHARED_EXPERTS = {
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
}
GEMMA = {"sliding_window": 512, "query_pre_attn_scalar": 32}
LOUD = 19.0
"""Of the norms behind a Gemma's layers: otherwise its embeddings, which are its head too, say each token again."""
SLIDING, FULL = "sliding_attention", "full_attention"

HYBRIDS: Mapping[str, Hybrid] = {
    "gemma2": Hybrid("Gemma2Config", "Gemma2ForCausalLM", GEMMA),
    "gemma3": Hybrid(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**GEMMA, "num_hidden_layers": 6, "layer_types": [SLIDING, SLIDING, FULL] * 2},
    ),
    "gptoss": Hybrid(
        "GptOssConfig",
        "GptOssForCausalLM",
        {"sliding_window": 128, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": [SLIDING, FULL] * 2},
    ),
    "llama4": Hybrid(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "intermediate_size_mlp": 512,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 1024,
            "interleave_moe_layer_step": 2,
        },
    ),
    "mistral": Hybrid("MistralConfig", "MistralForCausalLM", {"sliding_window": 512}),
    "qwen3next": Hybrid(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**EXPERTS, **STATES, "head_dim": 64},
        dtype="bfloat16",  # vLLM's CPU kernels for its states take no other
    ),
    "qwen3next, wide": Hybrid(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**EXPERTS, **STATES, "head_dim": 64, "linear_num_value_heads": 8},
        dtype="bfloat16",
    ),
    "dsv2": Hybrid("DeepseekV2Config", "DeepseekV2ForCausalLM", {**LATENT, **SHARED_EXPERTS}),
}
"""Groups, as vLLM orders them: gemma2, gptoss: a window and full attention; gemma3: two windows and full; llama4: three
of chunked local attention and full; mistral: one window; qwen3next: three of states, and full, in blocks of 256 tokens
(wide: 384); dsv2: latent KV alone.
"""


def write_hybrid(where: Path, name: str, *, seed: int) -> Path:
    """Write the model *name* of HYBRIDS into *where*."""
    transformers = import_module("transformers")  # takes 10 s, and most tests need none

    hybrid = HYBRIDS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, hybrid.config)(**{**SIZES, **hybrid.settings})
    model = getattr(transformers, hybrid.model)(config)
    for parameter, weights in model.named_parameters():
        if name.startswith("gemma") and "post_" in parameter:
            torch.nn.init.constant_(weights, LOUD)
    model.to(getattr(torch, hybrid.dtype)).save_pretrained(where, safe_serialization=True)
    return where
