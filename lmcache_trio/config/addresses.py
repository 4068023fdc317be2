"""Addresses of servers: what one may be, and the one that is used when none is given. It opens nothing.

A path is absolute: server and clients have different working directories. Abstract sockets are refused: they have no
owner and no mode, so anyone on the machine could answer in a server's name.
"""

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs

from lmcache_trio.errors import ConfigError

__all__ = [
    "Address",
    "MemoryAddress",
    "TcpAddress",
    "UnixAddress",
    "WebAddress",
    "check_address",
    "default_address",
    "default_addresses",
    "parse_address",
    "parse_rendezvous",
    "parse_web_address",
    "socket_path",
]

_SUN_PATH = 107
"""Bytes that the kernel takes for a socket's path, without the closing zero."""
_SUFFIX = 13
"""Bytes by which a pair's path is longer than the rendezvous': a dot and 12 hexadecimal digits."""
_USE = "use unix:///absolute/path or tcp://127.0.0.1:PORT"


@attrs.frozen
class UnixAddress:
    """A socket file."""

    path: str

    def __str__(self) -> str:
        return f"unix://{self.path}"


@attrs.frozen
class TcpAddress:
    """A port on this machine's loopback interface. With port 0 a server chooses a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


@attrs.frozen
class MemoryAddress:
    """A name within one run of a Trio loop, for tests."""

    name: str

    def __str__(self) -> str:
        return f"memory://{self.name}"


@attrs.frozen
class WebAddress:
    """Where HTTP is answered. With port 0 a server chooses a free one. *encrypted*: by TLS."""

    host: str
    port: int
    encrypted: bool

    @property
    def loopback(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.encrypted else 'http'}://{host}:{self.port}"


Address = UnixAddress | TcpAddress | MemoryAddress


def default_address(environ: Mapping[str, str] | None = None) -> str:
    """The address of servers and clients of one user that were given none."""
    return default_addresses(environ)[0]


def default_addresses(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """`default_address`, and then those of a server of the same user whose XDG_RUNTIME_DIR is another one: unset (a
    service, cron, ssh without a login session), or set while ours is not.
    """
    runtime = (os.environ if environ is None else environ).get("XDG_RUNTIME_DIR", "")
    places = [f"/tmp/lmcache-trio-{os.getuid()}", f"/run/user/{os.getuid()}/lmcache-trio"]
    if runtime.startswith("/"):
        places.insert(0, f"{runtime}/lmcache-trio")
    return tuple(dict.fromkeys(f"unix://{place}/server.sock" for place in places))


def check_address(instance: object, attribute: Any, value: str) -> None:
    """A validator of a field that holds a server's address."""
    parse_rendezvous(value)


def parse_address(address: str) -> Address:
    """The parts of *address*; `ConfigError` names the setting `address` and the fix."""
    return _parse(address, _SUN_PATH)


def parse_rendezvous(address: str) -> Address:
    """As `parse_address`, for an address that leaves room for the longer ones of its pairs."""
    return _parse(address, _SUN_PATH - _SUFFIX)


def parse_web_address(address: str) -> WebAddress | UnixAddress:
    """The parts of an address for HTTP; `ConfigError` names the setting `address` and the fix."""
    scheme, separator, _ = address.partition("://")
    if separator and scheme == "unix":
        return UnixAddress(_checked_path(address, _SUN_PATH))
    use = "use http://127.0.0.1:PORT, https://IP:PORT or unix:///absolute/path"
    if not separator or scheme not in ("http", "https"):
        raise ConfigError("address", f"{address!r} is not an address for HTTP; {use}")
    host, port = _host_and_port(address, use)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError("address", f"{host!r} is not an IP address of this machine; {use}") from None
    return WebAddress(host, port, scheme == "https")


def socket_path(address: str) -> Path | None:
    """The file of a `unix://` address; None for others."""
    parsed = parse_address(address)
    return Path(parsed.path) if isinstance(parsed, UnixAddress) else None


def _parse(address: str, limit: int) -> Address:
    scheme, separator, rest = address.partition("://")
    if separator and scheme == "unix":
        return UnixAddress(_checked_path(address, limit))
    if separator and scheme == "tcp":
        return _parse_tcp(address)
    if rest and scheme == "memory":
        return MemoryAddress(rest)
    raise ConfigError("address", f"{address!r} is not an address; {_USE}")


def _checked_path(address: str, limit: int) -> str:
    scheme, _, path = address.partition("://")
    if not os.path.isabs(path) or path.endswith("/") or "\0" in path:
        raise ConfigError("address", f"{address!r} does not name a file; use an absolute path, {scheme}:///run/…")
    length = len(os.fsencode(path))
    if length > limit:
        raise ConfigError(
            "address", f"the path of {address!r} has {length} bytes, and {limit} at most; use a shorter directory"
        )
    return path


def _host_and_port(address: str, use: str) -> tuple[str, int]:
    """Those of the URL *address*, which is nothing but a scheme beside; `ConfigError` says *use*."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise ConfigError("address", f"{address!r} names no host and port: {exc}; {use}") from exc
    if not host or port is None or parts.path or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError("address", f"{address!r} names no host and port; {use}")
    return ("127.0.0.1" if host == "localhost" else host), port


def _parse_tcp(address: str) -> TcpAddress:
    host, port = _host_and_port(address, "use tcp://127.0.0.1:PORT")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            "address", f"{host!r} is not loopback, and there is no authentication yet; use 127.0.0.1 or a unix:// path"
        )
    return TcpAddress(host, port)
