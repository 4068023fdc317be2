"""The socket files behind `unix://` addresses, and the errors of those that can't be used. It opens no connection."""

import contextlib
import errno
import os
import re
import secrets
import socket
import stat

from lmcache_trio.config.addresses import Address, UnixAddress
from lmcache_trio.errors import ConfigError, Unavailable

__all__ = [
    "NotToBeUsed",
    "claim",
    "forbidden",
    "fresh_path",
    "in_use",
    "is_listening",
    "untrusted",
    "withdraw",
]


def fresh_path(beside: str) -> str:
    """An unused path beside the rendezvous' path. The next server removes the files there of one that died."""
    return f"{beside}.{secrets.token_hex(6)}"


def claim(address: UnixAddress) -> None:
    """Make way for a server at *address*: remove the files of a dead one, and no others."""
    path = address.path
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError("address", f"{path} exists and is not a socket: move it away or choose another path")
        if not is_listening(path):
            # It is moved aside first: else the file of a second server that starts now could be removed.
            aside = fresh_path(path)
            os.rename(path, aside)
            if is_listening(aside):
                os.link(aside, path)
            os.unlink(aside)
        if os.path.lexists(path):
            raise in_use(address)
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise ConfigError("address", f"{path}: {exc.strerror}") from exc
    _remove_dead_pairs(path)


def in_use(address: Address) -> ConfigError:
    """The error for an address that another server holds."""
    return ConfigError("address", f"{address} is in use: stop the server that listens there or choose another address")


class NotToBeUsed(Unavailable):
    """A process listens there, but not for this one, or not as a uid that it trusts: a setting must be changed."""


def forbidden(address: UnixAddress) -> NotToBeUsed:
    """The error for an *address* that this process may not reach."""
    return NotToBeUsed(
        f"permission denied at {address} for uid {os.geteuid()}: run as the server's user, name this uid or a group of "
        "it in the server's [access] settings, and see that each directory on the way lets it through"
    )


def untrusted(address: UnixAddress, uid: int) -> NotToBeUsed:
    """The error for an *address* where a process of *uid* listens, which this process does not trust."""
    return NotToBeUsed(
        f"a process of uid {uid} listens at {address}, not one of this process' uid {os.geteuid()} or of root: nothing "
        f"was sent to it. If it is your server, name the uid: LMCACHE_TRIO_CLIENT__SERVER_UIDS='[{uid}]', or "
        "server_uids in [client], or in vLLM's kv_connector_extra_config"
    )


def is_listening(path: str) -> bool:
    """Whether a living process has bound the socket at *path*. The process notices nothing.

    A *datagram* socket is connected: ECONNREFUSED if the file is dead, another error if a process has bound it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        return probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT, errno.ENOTDIR)


def withdraw(path: str) -> None:
    """Remove a socket file of our own, if it is still there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _remove_dead_pairs(path: str) -> None:
    """Remove pair addresses that a dead server made beside *path* and no client took up."""
    folder, base = os.path.split(path)
    ours = re.compile(re.escape(base) + r"\.[0-9a-f]{12}")
    try:
        names = os.listdir(folder)
    except OSError as exc:
        raise ConfigError("address", f"{folder}: {exc.strerror}: make that directory or choose another path") from exc
    for name in filter(ours.fullmatch, names):
        left = os.path.join(folder, name)
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(left).st_mode) and not is_listening(left):
                withdraw(left)
