"""`lmcache-trio status`: what a running server holds, and what it has counted."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lmcache_trio.cli.ending import NAME
from lmcache_trio.cli.flags import ConfigFile, Sets, load_settings
from lmcache_trio.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["status"]


def status(
    *,
    config: ConfigFile = None,
    sets: Sets = (),
    address: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    timeout: float = 5.0,
) -> None:
    """Print what a running server holds, and what it has counted since it started.

    Parameters
    ----------
    config
        The server's own TOML file, which has its address; by default the one that LMCACHE_TRIO_CONFIG names.
    sets
        Settings as key=value, as for serve.
    address
        The server's address; short for --set address=….
    json
        Print one JSON object with the keys "held", "counted" and "tiers".
    timeout
        Seconds to wait for the server at most.
    """
    import trio

    if not 0 < timeout <= 3600:
        raise ConfigError("--timeout", f"{timeout:g} is out of range; give more than 0 and at most 3600 seconds")
    where = load_settings(config, sets, address).address
    statistics = trio.run(_statistics, where, timeout)
    if json:
        from json import dumps

        print(dumps(statistics, indent=2))
        return
    from rich.console import Console

    console = Console()
    with console.capture() as tables:  # rich itself would end with another status where nobody reads
        for part in ("held", "counted"):
            console.print(_table(part, statistics[part]))
    print(tables.get(), end="")


async def _statistics(address: str, seconds: float) -> dict[str, dict[str, Any]]:
    import trio

    from lmcache_trio.client import open_client

    try:
        with trio.fail_after(seconds):
            async with open_client(address, name=f"{NAME} status") as client:
                return await client.statistics()
    except trio.TooSlowError:
        raise Unavailable(
            f"no answer from {address} within {seconds:g} s; is a server running there, and is it stopped?"
        ) from None


def _table(title: str, part: Mapping[str, Any]) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in _flat(part):
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    return table


def _flat(part: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in part.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return rows
