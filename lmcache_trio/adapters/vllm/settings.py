"""The settings in `kv_connector_extra_config`, which are checked before anything is started.

An unknown key is refused by name: a misspelt one that is silently ignored costs its user a day.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Literal

import attrs

from lmcache_trio.adapters.worker.adapter import Path
from lmcache_trio.config import ClientConfig, default_address, load_client_config
from lmcache_trio.config.addresses import check_address
from lmcache_trio.config.tables import check_chunk_tokens, setting, structure
from lmcache_trio.errors import ConfigError

__all__ = ["ConnectorSettings", "LoadMode", "check_failure_policy", "check_load_mode", "parse_settings"]

PREFIX = "kv_connector_extra_config"


class LoadMode(StrEnum):
    """When a hit's bytes are copied: between steps, beside other requests, or before the step that needs them."""

    ASYNC = "async"
    SYNC = "sync"


def _name(instance: object, attribute: Any, value: str | None) -> None:
    if value == "":
        raise ConfigError(attribute.name, "is empty; give a name, as in 'step-1200', or leave it out")


@attrs.frozen(kw_only=True)
class ConnectorSettings(ClientConfig):
    """One engine's settings: those of a file or the environment, and those of vLLM alone."""

    address: str = setting(
        attrs.Factory(default_address), "Where the server listens, `unix:///…`.", check=check_address
    )
    load: LoadMode = setting(
        LoadMode.ASYNC,
        '`"async"`: a hit is copied between steps, while other requests run. `"sync"`: a hit is copied before the step'
        " that needs it. That saves an idle engine one step and delays every other request.",
    )
    path: Path = setting(
        "auto",
        "Which process moves the KV. `\"auto\"`: the server, if it can open the engine's memory; otherwise vLLM's own"
        ' process. `"device"`: the server only; if it cannot, the engine has no cache, and the log says why. `"shm"`:'
        " vLLM's own process.",
    )
    sync_lookup: bool = setting(
        False,
        "`false`: the scheduler goes on while a lookup is unanswered, and asks again in its next step. `true`: the"
        " scheduler waits.",
    )
    chunk_tokens: int | Literal["auto"] = setting(
        "auto",
        "Tokens of this engine's chunks: the fewest whole blocks that reach this number. `\"auto\"`: as the server's"
        " `chunk_tokens` says.",
        check=check_chunk_tokens,
    )
    namespace: str = setting("", "Keeps engines apart that would otherwise share chunks.")
    weights_version: str | None = setting(
        None, "Names weights that the model's files do not hold. Engines that name the same share.", check=_name
    )


def parse_settings(extra: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> ConnectorSettings:
    """The settings in *extra*, and for those that it lacks the client's in *environ* (`load_client_config`).

    `ConfigError` names the key at fault, and what it may be.
    """
    for key, value in extra.items():
        if value is None:
            raise ConfigError(f"{PREFIX}.{key}", "is null; give a value, or leave the key out")
    return structure(ConnectorSettings, attrs.asdict(load_client_config(environ)) | dict(extra), PREFIX)


def check_failure_policy(policy: str) -> None:
    """Refuse vLLM's default, which ends a request whose load failed: a cache must never cost an answer."""
    if policy != "recompute":
        raise ConfigError(
            "kv_load_failure_policy",
            f"is {policy!r}: a chunk that cannot be loaded would end its request. Add this to --kv-transfer-config, "
            'of a MultiConnector outside of its connectors: "kv_load_failure_policy": "recompute"',
        )


def check_load_mode(load: LoadMode, concurrent_batches: int, replicas: int = 1, *, whole: bool = True) -> None:
    """A synchronous load that fails is noticed after its step ran; vLLM takes back that step alone.

    With asynchronous scheduling or pipeline parallelism the step behind it is under way already, and vLLM 0.32 hands
    out the token that it computed from the blocks that failed. Of *replicas* that hold the same KV the first one stores
    it for all, before it is known that another one's load has failed, and that all computed from it. *whole*: the
    engine keeps the KV of all tokens, so that vLLM can compute on from the first block that failed.
    """
    if load is LoadMode.SYNC and not whole:
        raise ConfigError(
            f"{PREFIX}.load",
            "is 'sync', but this model has several KV groups, a sliding window's or states: after a failed load vLLM"
            " computes such a request from its first token on, and only if it was loaded with 'async'",
        )
    if load is LoadMode.SYNC and replicas > 1:
        raise ConfigError(
            f"{PREFIX}.load",
            f"is 'sync', but {replicas} ranks of this engine hold the same KV, and one of them would store a step that "
            "another one's failed load has spoiled; use 'async'",
        )
    if load is LoadMode.SYNC and concurrent_batches > 1:
        raise ConfigError(
            f"{PREFIX}.load",
            f"is 'sync', but this engine overlaps {concurrent_batches} steps, and after a failed load vLLM would "
            "return a token computed from it; use 'async', or --no-async-scheduling without pipeline parallelism",
        )
