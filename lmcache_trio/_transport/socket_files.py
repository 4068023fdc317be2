"""What an address may be, and the socket files behind `unix://` and `ipc://` addresses. Opens no connection to anyone.

A path must be absolute: server and clients have different working directories. Abstract sockets are not taken:
they have no owner and no mode, so anyone on the machine could answer in our name.
"""

import contextlib
import errno
import ipaddress
import os
import re
import secrets
import socket
import stat
from urllib.parse import urlsplit

import attrs

from lmcache_trio.errors import ConfigError, Unavailable

__all__ = [
    "USE",
    "Address",
    "FileAddress",
    "IpcAddress",
    "NotToBeUsed",
    "TcpAddress",
    "UnixAddress",
    "claim",
    "forbidden",
    "fresh_path",
    "in_use",
    "is_forbidden",
    "is_listening",
    "pair_address",
    "parse",
    "parse_rendezvous",
    "takes_packets",
    "untrusted",
    "withdraw",
    "wrong_scheme",
]

_SUN_PATH = 107
"""Bytes that the kernel takes for a socket's path, without the closing zero."""
_SUFFIX = 13
"""What a pair's own path is longer than the rendezvous': a dot and 12 hexadecimal digits."""


USE = "use unix:///absolute/path, ipc:///absolute/path or tcp://127.0.0.1:PORT"
"""What to do about an address that is none."""


@attrs.frozen
class UnixAddress:
    """A socket file of our own transport's."""

    path: str

    def __str__(self) -> str:
        return f"unix://{self.path}"


@attrs.frozen
class IpcAddress:
    """A socket file of NNG's."""

    path: str

    def __str__(self) -> str:
        return f"ipc://{self.path}"


@attrs.frozen
class TcpAddress:
    """A port on this machine's loopback interface; port 0 listens at one that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


FileAddress = UnixAddress | IpcAddress
Address = FileAddress | TcpAddress


def parse(address: str, *, limit: int = _SUN_PATH) -> Address:
    """Check *address*; `ConfigError` names the setting `address` and the fix."""
    if address.startswith("unix://"):
        return UnixAddress(_checked_path(address, limit))
    if address.startswith("ipc://"):
        return IpcAddress(_checked_path(address, limit))
    if address.startswith("tcp://"):
        return _parse_tcp(address)
    raise ConfigError("address", f"{address!r} is no address: {USE}")


def parse_rendezvous(address: str) -> Address:
    """`parse`, leaving room for the longer addresses of the pairs beside it."""
    return parse(address, limit=_SUN_PATH - _SUFFIX)


def pair_address(near: str) -> Address:
    """A fresh address beside the rendezvous *near*."""
    beside = parse_rendezvous(near)
    if isinstance(beside, TcpAddress):
        return TcpAddress(beside.host, 0)
    return type(beside)(fresh_path(beside.path))


def fresh_path(beside: str) -> str:
    """A path beside a rendezvous' that nothing has. What is left there by a dead server is removed by the next."""
    return f"{beside}.{secrets.token_hex(6)}"


def claim(address: FileAddress) -> None:
    """Make way for a server at *address*: remove what a dead one left, touch nothing that is anyone else's."""
    path = address.path
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError("address", f"{path} exists and is no socket: move it away or choose another path")
        if not is_listening(path):
            # Taken aside first: what a second starting server put there meanwhile would otherwise be removed.
            aside = fresh_path(path)
            os.rename(path, aside)
            if is_listening(aside):
                os.link(aside, path)
            os.unlink(aside)
        if os.path.lexists(path):
            raise in_use(str(address))
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise ConfigError("address", f"{path}: {exc.strerror}") from exc
    _remove_dead_pairs(path)


def in_use(address: str) -> ConfigError:
    """The error for an address that another server holds."""
    return ConfigError("address", f"{address} is in use: stop the server that listens there or choose another address")


def wrong_scheme(address: str, right: str) -> ConfigError:
    """The error for an *address* where a server listens, but one of the scheme *right*."""
    path = address.partition("://")[2]
    return ConfigError("address", f"{address} is a server's of another kind: use {right}://{path}")


class NotToBeUsed(Unavailable):
    """Something listens there, but not for this process, or not what it believes: somebody must change a setting."""


def forbidden(address: str) -> NotToBeUsed:
    """The error for an *address* that this process may not reach."""
    return NotToBeUsed(
        f"permission denied at {address} for uid {os.geteuid()}: run as the server's user, name this uid or a group of "
        "it in the server's [access] settings, and see that each directory on the way lets it through"
    )


def untrusted(address: str, uid: int) -> NotToBeUsed:
    """The error for an *address* where a process of *uid* listens, which nobody said is the server."""
    return NotToBeUsed(
        f"a process of uid {uid} listens at {address}, not one of this process' uid {os.geteuid()} or of root: nothing "
        f"was sent to it. If it is your server, name the uid: LMCACHE_TRIO_CLIENT__SERVER_UIDS='[{uid}]', or "
        "server_uids in [client]"
    )


def is_listening(path: str) -> bool:
    """Whether a living process has bound the socket at *path*, NNG's or ours. The process notices nothing.

    Connecting a *datagram* socket tells: the kernel refuses it for a dead file, and has the wrong type for a live one.
    A real connection would cost an NNG listener a pause of 100 ms.
    """
    return _probe(path) not in (errno.ECONNREFUSED, errno.ENOENT, errno.ENOTDIR)


def is_forbidden(path: str) -> bool:
    """Whether this process may not reach the socket at *path*."""
    return _probe(path) in (errno.EACCES, errno.EPERM)


def _probe(path: str) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        return probe.connect_ex(path)


def takes_packets(path: str) -> bool:
    """Whether a server of our own transport's listens at *path*, which sees a client come and go; NNG's sees none."""
    kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_UNIX, kind) as probe:
        return probe.connect_ex(path) in (0, errno.EAGAIN)


def withdraw(path: str) -> None:
    """Remove a socket file of our own, if it is still there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _remove_dead_pairs(path: str) -> None:
    """Remove pair addresses that a dead server made beside *path* and nobody took up."""
    folder, base = os.path.split(path)
    ours = re.compile(re.escape(base) + r"\.[0-9a-f]{12}")
    try:
        names = os.listdir(folder)
    except OSError as exc:
        raise ConfigError("address", f"{folder}: {exc.strerror}: make that directory or choose another path") from exc
    for name in filter(ours.fullmatch, names):
        left = os.path.join(folder, name)
        if not is_listening(left):
            withdraw(left)


def _checked_path(address: str, limit: int) -> str:
    scheme, _, path = address.partition("://")
    if not os.path.isabs(path) or path.endswith("/") or "\0" in path:
        raise ConfigError(
            "address", f"{address} names no file: use {scheme}:// and an absolute path, {scheme}:///run/…"
        )
    length = len(os.fsencode(path))
    if length > limit:
        raise ConfigError("address", f"the path {path} has {length} bytes, a socket's has {limit} at most: shorten it")
    return path


def _parse_tcp(address: str) -> TcpAddress:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise ConfigError("address", f"{address}: {exc}: use tcp://127.0.0.1:PORT") from exc
    if not host or port is None or parts.path or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError("address", f"{address} names no host and port: use tcp://127.0.0.1:PORT")
    if host == "localhost":
        host = "127.0.0.1"
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            "address", f"{host} is not this machine's loopback: others are refused until there is authentication"
        )
    return TcpAddress(host, port)
