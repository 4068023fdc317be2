"""`lmcache-trio clear`: drops chunks of a running server, from memory and from its tiers."""

import sys
from typing import TYPE_CHECKING, Any

from lmcache_trio.cli.ask import ask, check_timeout
from lmcache_trio.cli.flags import Address, ServersFile, ServersSets, Switch, Timeout, load_settings
from lmcache_trio.cli.ls import SHORT
from lmcache_trio.cli.text import count
from lmcache_trio.config import format_size
from lmcache_trio.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from lmcache_trio._wire.messages import Cleared
    from lmcache_trio.client import Client

__all__ = ["clear"]


def clear(  # noqa: PLR0913  (flags)
    *,
    config: ServersFile = None,
    sets: ServersSets = (),
    address: Address = None,
    namespace: str = "",
    model: str = "",
    all: Switch = False,
    yes: Switch = False,
    timeout: Timeout = 60.0,
) -> None:
    """Drop what a running server caches of some layouts, in memory and in its tiers. Chunks in use stay.

    Parameters
    ----------
    namespace
        Layouts whose namespace begins with this, as ls prints it.
    model
        Layouts of the model of this name, as ls prints it.
    all
        All layouts that the server knows.
    yes
        Do not ask first.
    """
    import trio

    check_timeout(timeout)
    if all == bool(namespace or model):
        raise ConfigError("clear", "say which layouts: --namespace, --model or both; or --all")
    where = load_settings(config, sets, address).address
    if not yes:
        _confirm(trio.run(ask, where, timeout, _inventory), namespace, model)

    async def clear_it(client: "Client") -> "Cleared":
        return await client.clear(namespace=namespace, model=model)

    done = trio.run(ask, where, timeout, clear_it)
    said = f"cleared {count(done.chunks, 'chunks')} ({format_size(done.bytes)}) of {count(done.layouts, 'layouts')}"
    print(said + (f"; {count(done.used, 'chunks')} in use stayed" if done.used else ""))


async def _inventory(client: "Client") -> dict[str, Any]:
    return await client.inventory()


def _confirm(listed: dict[str, Any], namespace: str, model: str) -> None:
    """Print what would go, and return if the user agrees. Unavailable: the user does not."""
    found = [
        layout
        for layout in listed["layouts"]
        if layout["namespace"].startswith(namespace) and model in ("", layout["model"])
    ]
    if not found:
        raise Unavailable("no layout is called so; lmcache-trio ls lists them")
    for layout in found:
        held = f"{count(layout['tokens'], 'tokens')}, {format_size(layout['bytes'])}"
        print(f"{layout['namespace'][:SHORT]}  {layout['model'] or '-'}  {held} in memory")
    if not sys.stdin.isatty():
        raise ConfigError("--yes", "is needed where nobody can be asked")
    if input("Drop them, from the tiers too? [y/N] ").strip().lower() not in ("y", "yes"):
        raise Unavailable("nothing was dropped")
