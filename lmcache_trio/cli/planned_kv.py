"""What KV a model keeps per token, by its `config.json`: for planning, before an engine runs.

An engine says the same by itself. An architecture that is not listed here is refused: a wrong guess would cost memory.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from lmcache_trio._core.groups import Group, Need
from lmcache_trio.errors import ConfigError

__all__ = ["Layers", "PlannedKV", "read_model"]

DENSE = frozenset(
    f"{name}ForCausalLM"
    for name in (
        *("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Phi3", "Granite", "GraniteMoe"),
        *("Olmo", "Olmo2", "OlmoE", "Gemma", "Gemma2", "Gemma3", "Cohere", "Cohere2", "GptOss", "Glm4", "Glm4Moe"),
    )
) | {"Gemma3ForConditionalGeneration", "Llama4ForConditionalGeneration", "Mistral3ForConditionalGeneration"}
LATENT = frozenset({"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "KimiK2ForCausalLM"})
STATES = frozenset(
    {"Qwen3NextForCausalLM", "JambaForCausalLM", "BambaForCausalLM", "NemotronHForCausalLM", "MambaForCausalLM"}
)
"""Models with recurrent states, whose size and blocks the engine chooses at its start."""
_DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4, "fp8": 1}


@attrs.frozen
class Layers:
    """So many layers of one KV *group*."""

    count: int
    group: Group


@attrs.frozen
class PlannedKV:
    """The KV of a model. *layer_bytes* are those that one rank keeps per token in one layer."""

    architecture: str
    layers: tuple[Layers, ...]
    layer_bytes: int
    shards: int
    """Ranks that hold different bytes."""
    words: str
    """What one layer keeps, for people."""

    @property
    def token_bytes(self) -> int:
        """Those that one rank keeps per token, in all layers: what the rule for chunks goes by."""
        return self.layer_bytes * sum(layers.count for layers in self.layers)

    def part_bytes(self, chunk_tokens: int) -> list[int]:
        """The bytes of a chunk's part on one rank, by group."""
        return [
            layers.count * layers.group.part_blocks(chunk_tokens) * layers.group.block_tokens * self.layer_bytes
            for layers in self.layers
        ]


def read_model(where: Path, *, ranks: int, dtype: str, block_tokens: int) -> PlannedKV:
    """The KV of the model in the folder *where*, or of the file `config.json`, split over *ranks*.

    `ConfigError`: it cannot be read, or its architecture is not known here.
    """
    path = where / "config.json" if where.is_dir() else where
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        architecture = str(whole["architectures"][0])
    except OSError as exc:
        raise ConfigError(
            "MODEL", f"cannot read {path}: {exc.strerror}; give a model's folder, or its config.json"
        ) from exc
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        raise ConfigError("MODEL", f"{path} is not a model's config.json: it names no architecture") from exc
    if architecture in STATES:
        problem = "keeps recurrent states, whose size the engine chooses: run it once, and see lmcache-trio ls"
        raise ConfigError("MODEL", f"{architecture} {problem}")
    if architecture not in DENSE | LATENT:
        raise ConfigError("MODEL", f"{architecture} is not known here: run it once, and see lmcache-trio ls")
    config: Mapping[str, Any] = whole.get("text_config") or whole
    try:
        return _kv_of(architecture, config, ranks, dtype, block_tokens)
    except (KeyError, TypeError, ZeroDivisionError) as exc:
        raise ConfigError("MODEL", f"{path} does not say what {architecture} keeps: {exc} is missing or wrong") from exc


def _kv_of(architecture: str, config: Mapping[str, Any], ranks: int, dtype: str, block_tokens: int) -> PlannedKV:
    named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16") if dtype == "auto" else dtype
    width, count = _DTYPES[named], int(config["num_hidden_layers"])
    if architecture in LATENT:
        latent = int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])
        blocks = Group(Need.EVERY, 0, block_tokens or 64)
        return PlannedKV(architecture, (Layers(count, blocks),), latent * width, 1, f"{latent} latent values, {named}")
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    size = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    of_rank = max(1, heads // ranks)
    words = f"{heads} KV heads of {size}, {named}"
    layers = _layers(architecture, config, block_tokens or 16)
    return PlannedKV(architecture, layers, 2 * of_rank * size * width, min(ranks, heads), words)


def _layers(architecture: str, config: Mapping[str, Any], block_tokens: int) -> tuple[Layers, ...]:
    """The layers by group: those of full attention first."""
    kinds = _kinds(architecture, config)
    known = {
        "full_attention": (Need.EVERY, ""),
        "sliding_attention": (Need.WINDOW, "sliding_window"),
        "chunked_attention": (Need.LOCAL, "attention_chunk_size"),
    }
    if unknown := set(kinds) - set(known):
        problem = f"{architecture} has layers of {', '.join(sorted(unknown))}, which are not known here"
        raise ConfigError("MODEL", problem)
    return tuple(
        Layers(kinds.count(kind), Group(need, int(config[length]) if length else 0, block_tokens))
        for kind, (need, length) in known.items()
        if kind in kinds
    )


def _kinds(architecture: str, config: Mapping[str, Any]) -> list[str]:
    """What each layer attends to."""
    count = int(config["num_hidden_layers"])
    if config.get("layer_types"):
        return [str(kind) for kind in config["layer_types"]][:count]
    pattern = int(config.get("sliding_window_pattern") or (2 if architecture == "Gemma2ForCausalLM" else 0))
    if pattern > 1:  # one in so many layers has full attention
        return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
    if config.get("attention_chunk_size") or (config.get("sliding_window") and config.get("use_sliding_window", True)):
        problem = "its config.json names a window and not the layers that have it: run it once, and see lmcache-trio ls"
        raise ConfigError("MODEL", problem)
    return ["full_attention"] * count
