"""How a command asks a running server: within a deadline, and with one line if there is no answer."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from lmcache_trio.cli.ending import NAME
from lmcache_trio.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from lmcache_trio.client import Client

__all__ = ["ask", "check_timeout"]

T = TypeVar("T")


def check_timeout(seconds: float) -> None:
    """ConfigError: *seconds* is not a time to wait."""
    if not 0 < seconds <= 3600:
        raise ConfigError("--timeout", f"{seconds:g} is out of range; give more than 0 and at most 3600 seconds")


async def ask(address: str, seconds: float, question: "Callable[[Client], Awaitable[T]]") -> T:
    """What the server at *address* answers to *question*. `Unavailable`: it does not, within *seconds*."""
    import trio

    from lmcache_trio.client import open_client

    try:
        with trio.fail_after(seconds):
            async with open_client(address, name=f"{NAME} command") as client:
                return await question(client)
    except trio.TooSlowError:
        raise Unavailable(
            f"no answer from {address} within {seconds:g} s; is a server running there, and is it stopped?"
        ) from None
