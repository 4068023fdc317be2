"""An engine's own settings, where its adapter was not given them: defaults < file (`[client]`) < environment.

The file is the one that `LMCACHE_TRIO_CONFIG` names, which may be the server's too; in the environment,
`LMCACHE_TRIO_CLIENT__LOOKUP_TIMEOUT` stands for `client.lookup_timeout`. What an engine gives to its adapter wins.

It refuses to read the server's settings, and to be wrong because one of those is.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import attrs

from lmcache_trio.config import sources
from lmcache_trio.config.tables import check_ids, structure
from lmcache_trio.errors import ConfigError

__all__ = ["ClientConfig", "check_interval", "client_config_of", "load_client_config"]


def check_interval(poll_interval: float, lookup_timeout: float, key: str = "poll_interval") -> None:
    """ConfigError, naming *key*, for a period of questions that is longer than the wait for the answer."""
    if poll_interval > lookup_timeout:
        raise ConfigError(key, f"{poll_interval:g} s is longer than lookup_timeout ({lookup_timeout:g} s); give less")


def _seconds(instance: object, attribute: "attrs.Attribute[float]", value: float) -> None:
    if not 0 < value < math.inf:  # NaN is neither
        raise ConfigError(attribute.name, f"is {value:g}; give a number of seconds above 0")


@attrs.frozen
class ClientConfig:
    """What an adapter reads when it is not given it."""

    lookup_timeout: float = attrs.field(
        default=5.0,
        validator=_seconds,
        metadata={"help": "Seconds after which a lookup without an answer counts as 0 tokens."},
    )
    poll_interval: float = attrs.field(
        default=0.005,
        validator=_seconds,
        metadata={"help": "Seconds of silence after which a waiting lookup asks for its status, repeatedly."},
    )
    server_uids: tuple[int, ...] = attrs.field(
        default=(),
        validator=check_ids,
        metadata={"help": "Uids whose server an engine trusts, beside its own uid and root."},
    )

    def __attrs_post_init__(self) -> None:
        check_interval(self.poll_interval, self.lookup_timeout)


def client_config_of(table: Any) -> ClientConfig:
    """The `[client]` *table* of a file, checked."""
    return structure(ClientConfig, table, "client")


def load_client_config(environ: Mapping[str, str] | None = None) -> ClientConfig:
    """The settings of an engine in *environ*, by default this process's.

    `ConfigError` names the one that is wrong, and who set it.
    """
    known = [field.name for field in attrs.fields(ClientConfig)]
    table, origins = sources.gather_client(known, os.environ if environ is None else environ)
    try:
        return client_config_of(table)
    except ConfigError as exc:
        if exc.key in origins:
            raise ConfigError(exc.key, f"{exc.problem} (set by {origins[exc.key]})") from exc
        raise
