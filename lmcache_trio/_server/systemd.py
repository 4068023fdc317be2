"""What systemd is told of a server that it started with `Type=notify`: ready, ending, and that its loop still runs.

One datagram each, to the socket that the environment names (sd_notify(3)). Elsewhere nothing is told, and nothing is
wrong. The packages for it bring a C library or have not been kept, for these ten lines.
"""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress

import trio

__all__ = ["feed_watchdog", "tell_systemd", "watchdog_interval"]


def tell_systemd(state: str) -> None:
    """Send *state*, as in `READY=1`. A systemd that can't be reached is no reason to stop serving."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path.startswith(("/", "@")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            with suppress(OSError):  # it is gone, or its queue is full
                sock.sendto(state.encode(), path.replace("@", "\0", 1) if path.startswith("@") else path)


def watchdog_interval(environ: Mapping[str, str]) -> float | None:
    """Seconds between two signs of life, half of what systemd waits for one; None if it waits for none of ours."""
    given, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(given) / 2e6 if given.isdecimal() and int(given) and pid == str(os.getpid()) else None


async def feed_watchdog() -> None:
    """Tell that the loop runs, as long as it does. It runs until it is cancelled."""
    interval = watchdog_interval(os.environ)
    while interval is not None:
        tell_systemd("WATCHDOG=1")
        await trio.sleep(interval)
