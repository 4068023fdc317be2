"""`lmcache-trio serve`: a server, its log on standard error, and the line that says that it is ready."""

import logging
import os
from typing import TYPE_CHECKING

from lmcache_trio._log_handler import LEVELS, GatheringHandler
from lmcache_trio.cli.ending import NAME, discard_output
from lmcache_trio.cli.flags import ConfigFile, Sets, load_settings
from lmcache_trio.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from lmcache_trio._server.supervise import Server

__all__ = ["serve"]

_OTHER_LEVELS = {"warn": "warning", "critical": "error", "fatal": "error"}
"""Names that others have for levels."""


def serve(*, config: ConfigFile = None, sets: Sets = (), address: str | None = None) -> None:
    """Run a server until SIGINT, SIGTERM or SIGHUP; a second one, 0.5 s later or more, ends it at once.

    Parameters
    ----------
    config
        A TOML file with settings; by default the one that LMCACHE_TRIO_CONFIG names. ~ and $NAME are expanded in
        both.
    sets
        Settings as key=value, as in --set memory.size=4GiB. They win over the file and the environment.
    address
        Short for --set address=….
    """
    settings = load_settings(config, sets, address)
    _log_to_stderr()
    from lmcache_trio._server.supervise import serve as run

    run(settings, _say_ready)


def _log_to_stderr() -> None:
    given = os.environ.get("LMCACHE_TRIO_LOG") or "info"
    level = given.strip().lower()
    level = _OTHER_LEVELS.get(level, level)
    if level not in LEVELS:
        raise ConfigError("LMCACHE_TRIO_LOG", f"{given!r} is no level; give one of {', '.join(LEVELS)}")
    logging.basicConfig(level=level.upper(), handlers=[GatheringHandler()])


def _say_ready(server: "Server") -> None:
    from lmcache_trio.config import format_size

    size = format_size(server.statistics()["held"]["bytes_size"])
    try:
        print(f"{NAME} is ready: address {server.address}, arena {size}, pid {os.getpid()}", flush=True)
    except OSError as exc:  # whoever waits for this line waits in vain
        discard_output()
        raise Unavailable(f"standard output does not take the line that says it is ready: {exc.strerror}") from exc
