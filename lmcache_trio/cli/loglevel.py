"""`lmcache-trio loglevel`: lets a running server log more or less."""

from typing import TYPE_CHECKING, Literal

from lmcache_trio.cli.ask import ask, check_timeout
from lmcache_trio.cli.flags import Address, ServersFile, ServersSets, Timeout, load_settings

if TYPE_CHECKING:
    from lmcache_trio.client import Client

__all__ = ["loglevel"]


def loglevel(
    level: Literal["debug", "info", "warning", "error"],
    /,
    *,
    config: ServersFile = None,
    sets: ServersSets = (),
    address: Address = None,
    timeout: Timeout = 5.0,
) -> None:
    """Set from which level on a running server logs, until it ends.

    Parameters
    ----------
    level
        The least severe level that is logged.
    """
    import trio

    check_timeout(timeout)

    async def set_it(client: "Client") -> None:
        await client.set_log_level(level)

    trio.run(ask, load_settings(config, sets, address).address, timeout, set_it)
    print(f"the log's level is {level}")
