"""An engine's own settings, where its adapter was not given them: defaults < file (`[client]`) < environment.

`LMCACHE_TRIO_CONFIG` names the file, which may be the server's too. In the environment,
`LMCACHE_TRIO_CLIENT__LOOKUP_TIMEOUT` stands for `client.lookup_timeout`. A value that an engine gives to its adapter
wins.

A wrong setting of the server in the same file does not matter here.
"""

import os
from collections.abc import Collection, Mapping

import attrs

from lmcache_trio.config import sources
from lmcache_trio.config.tables import between, check_ids, setting, structure
from lmcache_trio.errors import ConfigError

__all__ = ["ClientConfig", "check_interval", "check_server_uids", "load_client_config"]


def check_interval(poll_interval: float, lookup_timeout: float, key: str = "poll_interval") -> None:
    """ConfigError, naming *key*, for a period of questions that is longer than the wait for the answer."""
    if poll_interval > lookup_timeout:
        raise ConfigError(key, f"{poll_interval:g} s is longer than lookup_timeout ({lookup_timeout:g} s); give less")


@attrs.frozen
class ClientConfig:
    """The settings that an adapter was not given."""

    lookup_timeout: float = setting(
        5.0, "Seconds after which a lookup without an answer counts as 0 tokens.", check=between(0.0, above=True)
    )
    poll_interval: float = setting(
        0.005,
        "Seconds of silence after which a waiting lookup asks for its status, repeatedly.",
        check=between(0.0, above=True),
    )
    server_uids: tuple[int, ...] = setting(
        (), "Uids whose server an engine trusts, beside its own uid and root.", check=check_ids
    )

    def __attrs_post_init__(self) -> None:
        check_interval(self.poll_interval, self.lookup_timeout)


def check_server_uids(uids: Collection[int] | None) -> None:
    """ConfigError for *uids* that an adapter was given, unless they are None or could be the setting `server_uids`."""
    if uids is not None:
        structure(ClientConfig, {"server_uids": list(uids) if isinstance(uids, Collection) else uids})


def load_client_config(environ: Mapping[str, str] | None = None) -> ClientConfig:
    """The settings of an engine in *environ*, by default this process's.

    `ConfigError` names the setting that is wrong, and its source.
    """
    known = [field.name for field in attrs.fields(ClientConfig)]
    found = sources.gather_client(known, os.environ if environ is None else environ)
    return found.into(ClientConfig, "client")
