"""`lmcache-trio size`: how much of a model's KV a memory holds, before anything runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lmcache_trio._core.groups import Need
from lmcache_trio._core.index.arena import Arena
from lmcache_trio._core.keys import chunk_tokens_for
from lmcache_trio.cli.planned_kv import PlannedKV, read_model
from lmcache_trio.cli.text import count, rows
from lmcache_trio.config import format_size, parse_size
from lmcache_trio.errors import ConfigError

__all__ = ["size"]

PROMPT = 4096
MILLION = 1_000_000


def size(
    model: Path,
    /,
    *,
    memory: str = "16GiB",
    ranks: int = 1,
    kv_dtype: Literal["auto", "float16", "bfloat16", "float32", "fp8"] = "auto",
    block_tokens: int = 0,
    chunk_tokens: int = 0,
) -> None:
    """Print how much KV of a model a memory holds, in tokens and prompts, and what a tier needs.

    Parameters
    ----------
    model
        The model's folder, or its config.json.
    memory
        The server's memory.size.
    ranks
        Tensor-parallel workers of the engine.
    kv_dtype
        The KV cache's type; auto is the model's own.
    block_tokens
        Tokens of the engine's blocks; 0: 16, and 64 for latent KV.
    chunk_tokens
        Tokens of a chunk; 0: what the setting "auto" gives.
    """
    try:
        room = parse_size(memory)
    except ValueError as exc:
        raise ConfigError("--memory", str(exc)) from exc
    for name, value, least in (("--ranks", ranks, 1), ("--block-tokens", block_tokens, 0)):
        if not least <= value <= 4096:
            raise ConfigError(name, f"{value} is out of range; give {least} to 4096")
    kv = read_model(model, ranks=ranks, dtype=kv_dtype, block_tokens=block_tokens)
    blocks = kv.layers[0].group.block_tokens
    if chunk_tokens < 0 or chunk_tokens % blocks:
        raise ConfigError("--chunk-tokens", f"{chunk_tokens} is not a multiple of the block's {blocks} tokens")
    print(rows(_told(kv, room, chunk_tokens or chunk_tokens_for("auto", blocks, kv.token_bytes))), end="")


def _told(kv: PlannedKV, room: int, tokens: int) -> Iterator[tuple[str, str]]:
    rounded = Arena().rounded
    chunk = sum(kv.shards * rounded(part) for part in kv.part_bytes(tokens))
    held = room // chunk * tokens
    yield "Model", f"{kv.architecture}: {', '.join(_layers(kv))}; each keeps {kv.words}"
    shards = f", in {kv.shards} shards" if kv.shards > 1 else ""
    yield "A token", f"{format_size(chunk / tokens)}{shards}"
    yield "A chunk", f"{count(tokens, 'tokens')}, {format_size(chunk)}"
    prompts = f"{count(held // PROMPT, 'prompts')} of {PROMPT:,} tokens"
    yield "Memory", f"{format_size(room)} holds {count(held, 'tokens')}: {prompts}"
    if not held:
        yield "", "a chunk is larger than this memory, so nothing can be cached"
    yield "A tier", f"needs {format_size(MILLION / tokens * chunk)} for a million tokens"


def _layers(kv: PlannedKV) -> Iterator[str]:
    for layers in kv.layers:
        need, tokens = layers.group.need, layers.group.tokens
        what = {Need.WINDOW: f" with a window of {tokens:,}", Need.LOCAL: f" in chunks of {tokens:,}"}.get(need, "")
        yield f"{count(layers.count, 'layers')}{what}"
