"""What a user may write into `kv_connector_extra_config`, checked before anything is started.

A key that is not known here is refused by name: a misspelt key that is silently ignored costs its user a day.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, get_args

import attrs

from lmcache_trio.adapters.worker.dispatcher import Path
from lmcache_trio.config import check_interval, default_address, load_client_config
from lmcache_trio.errors import ConfigError

__all__ = ["ConnectorSettings", "LoadMode", "check_failure_policy", "check_load_mode", "parse_settings"]

PREFIX = "kv_connector_extra_config"


class LoadMode(StrEnum):
    """When a hit's bytes are copied: between steps, while other requests run on, or before the step that needs them."""

    ASYNC = "async"
    SYNC = "sync"


@attrs.frozen
class ConnectorSettings:
    """One engine's settings. *namespace* keeps engines apart that would otherwise share chunks.

    *weights_version* names weights that the model's files do not hold: engines that say the same share.

    *layerwise*, with `load = sync` alone: a step begins before its last layer is loaded, and stores as layers finish.
    *path*: who moves the KV. `auto`: the server where it can open the engine's memory, else the engine's own process.
    """

    address: str = attrs.field(factory=default_address)
    sync_lookup: bool = False
    lookup_timeout: float = 5.0
    poll_interval: float = 0.005
    load: LoadMode = LoadMode.ASYNC
    namespace: str = ""
    weights_version: str | None = None
    layerwise: bool = False
    path: Path = "auto"


def parse_settings(extra: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> ConnectorSettings:
    """The settings in *extra*, and where it says nothing, the client's in *environ* (`load_client_config`).

    ConfigError names the key at fault and what it may be.
    """
    fields = attrs.fields_dict(ConnectorSettings)
    for key in extra:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"{PREFIX}.{key}", f"is not known; {hint}known are {', '.join(fields)}")
    given = {key: _CHECKS[key](f"{PREFIX}.{key}", value) for key, value in extra.items()}
    configured = attrs.asdict(load_client_config(environ))
    found = ConnectorSettings(**{**{key: value for key, value in configured.items() if key in fields}, **given})
    check_interval(found.poll_interval, found.lookup_timeout, f"{PREFIX}.poll_interval")
    if found.layerwise and found.load is not LoadMode.SYNC:
        raise ConfigError(
            f"{PREFIX}.layerwise", "is true, but an asynchronous load ends between steps; add 'load': 'sync'"
        )
    return found


def check_failure_policy(policy: str) -> None:
    """vLLM's default ends a request whose load failed; a cache must never cost an answer, so it is refused at start."""
    if policy != "recompute":
        raise ConfigError(
            "kv_load_failure_policy",
            f"is {policy!r}: a chunk that cannot be loaded would end its request. Add this to --kv-transfer-config, "
            'of a MultiConnector outside of its connectors: "kv_load_failure_policy": "recompute"',
        )


def check_load_mode(load: LoadMode, concurrent_batches: int) -> None:
    """A synchronous load that fails is noticed after its step ran; vLLM takes back that step alone.

    With asynchronous scheduling or pipeline parallelism the step behind it is under way already, and vLLM 0.32 hands
    out the token that it computed from the blocks that failed.
    """
    if load is LoadMode.SYNC and concurrent_batches > 1:
        raise ConfigError(
            f"{PREFIX}.load",
            f"is 'sync', but this engine overlaps {concurrent_batches} steps, and after a failed load vLLM would "
            "return a token computed from it; use 'async', or --no-async-scheduling without pipeline parallelism",
        )


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(key, f"is {value!r}; give a string")
    return value


def _version(key: str, value: Any) -> str:
    if not _text(key, value):
        raise ConfigError(key, "is empty; give a name, as in 'step-1200', or leave it out")
    return str(value)


def _address(key: str, value: Any) -> str:
    if "://" not in _text(key, value):
        raise ConfigError(key, f"is {value!r}; give the server's, as in unix:///run/user/1000/lmcache-trio/server.sock")
    return str(value)


def _truth(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(key, f"is {value!r}; give true or false")
    return value


def _seconds(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(key, f"is {value!r}; give a number of seconds above 0")
    return float(value)


def _load(key: str, value: Any) -> LoadMode:
    try:
        return LoadMode(value)
    except ValueError:
        raise ConfigError(key, f"is {value!r}; give 'async' or 'sync'") from None


def _path(key: str, value: Any) -> Path:
    if value not in get_args(Path):
        raise ConfigError(key, f"is {value!r}; give {', '.join(map(repr, get_args(Path)))}")
    found: Path = value
    return found


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "address": _address,
    "sync_lookup": _truth,
    "lookup_timeout": _seconds,
    "poll_interval": _seconds,
    "load": _load,
    "layerwise": _truth,
    "path": _path,
    "namespace": _text,
    "weights_version": _version,
}
