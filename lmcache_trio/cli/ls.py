"""`lmcache-trio ls`: what a running server holds of which model, and which engines it has."""

from typing import TYPE_CHECKING, Any

from lmcache_trio.cli.ask import ask, check_timeout
from lmcache_trio.cli.flags import Address, ServersFile, ServersSets, Switch, Timeout, load_settings
from lmcache_trio.cli.text import columns
from lmcache_trio.config import format_size

if TYPE_CHECKING:
    from lmcache_trio.client import Client

__all__ = ["ls"]

SHORT = 12
"""Characters of a namespace that are printed; `clear --namespace` takes them."""


def ls(
    *,
    config: ServersFile = None,
    sets: ServersSets = (),
    address: Address = None,
    json: Switch = False,
    timeout: Timeout = 5.0,
) -> None:
    """List what memory holds, by layout of a model, and the engines that are connected.

    Parameters
    ----------
    json
        Print one JSON object with the keys "engines", "layouts" and "left_out".
    """
    import trio

    check_timeout(timeout)

    async def listed(client: "Client") -> dict[str, Any]:
        return await client.inventory()

    found = trio.run(ask, load_settings(config, sets, address).address, timeout, listed)
    if json:
        from json import dumps

        print(dumps(found, indent=2))
        return
    print(_layouts(found["layouts"], found["left_out"]["layouts"]))
    print(_engines(found["engines"], found["left_out"]["engines"]), end="")


def _layouts(layouts: list[dict[str, Any]], left_out: int) -> str:
    head = ["NAMESPACE", "MODEL", " ENGINES", " CHUNKS", " TOKENS", " BYTES", " IN USE"]
    body = [
        [
            *(layout["namespace"][:SHORT], layout["model"] or "-"),
            *(f"{layout[key]:,}" for key in ("engines", "chunks", "tokens")),
            *(format_size(layout[key]) for key in ("bytes", "bytes_retained")),
        ]
        for layout in sorted(layouts, key=lambda layout: -layout["bytes"])
    ]
    return columns(head, body) + _more(left_out) if body else "Memory holds no layout.\n"


def _engines(engines: list[dict[str, Any]], left_out: int) -> str:
    head = ["ENGINE", "NAMESPACE", " WORKERS", " REQUESTS", " CHUNK TOKENS", " CHUNK BYTES", " TOKENS IN MEMORY"]
    body = [
        [
            *(engine["name"], engine["namespace"][:SHORT] or "-"),
            *(f"{engine[key]:,}" for key in ("workers", "sessions", "chunk_tokens")),
            *(format_size(engine["chunk_bytes"]), f"{engine['tokens_in_memory']:,}"),
        ]
        for engine in engines
    ]
    return columns(head, body) + _more(left_out) if body else "No engine is connected.\n"


def _more(left_out: int) -> str:
    return f"and {left_out:,} more\n" if left_out else ""
