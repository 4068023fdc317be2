"""`lmcache-trio ping`: whether a server answers, and how fast."""

from typing import TYPE_CHECKING

from lmcache_trio.cli.ask import ask, check_timeout
from lmcache_trio.cli.flags import Address, ServersFile, ServersSets, load_settings
from lmcache_trio.errors import ConfigError

if TYPE_CHECKING:
    from lmcache_trio.client import Client

__all__ = ["ping"]


def ping(
    *,
    config: ServersFile = None,
    sets: ServersSets = (),
    address: Address = None,
    count: int = 5,
    timeout: float = 5.0,
) -> None:
    """Ask a running server whether it is there, and print how long the answers took.

    Parameters
    ----------
    count
        Questions, one after the other.
    timeout
        Seconds to wait for all answers at most.
    """
    import trio

    check_timeout(timeout)
    if not 1 <= count <= 1_000_000:
        raise ConfigError("--count", f"{count} is out of range; give 1 to 1000000")
    where = load_settings(config, sets, address).address

    async def time_answers(client: "Client") -> list[float]:
        took = []
        for _ in range(count):
            asked = trio.current_time()
            await client.ping()
            took.append(trio.current_time() - asked)
        return sorted(took)

    took = trio.run(ask, where, timeout, time_answers)
    least, median, most = (f"{1000 * took[at]:.3f}" for at in (0, len(took) // 2, -1))
    print(f"{where} is alive: {len(took)} round trips of {least} to {most} ms, median {median} ms")
