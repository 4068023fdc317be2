"""The server's settings: one tree of frozen classes, and where their values come from.

Defaults < file (TOML) < environment (`LMCACHE_TRIO_MEMORY__SIZE`) < flags (`--set memory.size=4GiB`). `structure` makes
the classes from plain tables, strictly, and each problem ends in one `ConfigError` with the dotted key and the fix.

This module refuses to know backends: a backend's table is kept as it is, and structured into the backend's own `Config`
class when the backend is found.
"""

import grp
import ipaddress
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs

from lmcache_trio.config import sources
from lmcache_trio.config.client import client_config_of
from lmcache_trio.config.tables import Table, check_ids, parse_path, parse_size, structure
from lmcache_trio.errors import ConfigError

__all__ = [
    "PRIVATE",
    "Access",
    "Config",
    "Limits",
    "Table",
    "check_ids",
    "default_address",
    "default_addresses",
    "describe",
    "format_size",
    "load_config",
    "parse_path",
    "parse_size",
    "structure",
]

MAX_SOCKET_PATH = 94
"""Bytes of a socket's path: the kernel's limit is 107, and a client's own socket adds 13 to the rendezvous' path."""


def default_address(environ: Mapping[str, str] | None = None) -> str:
    """The address that servers and clients of one user meet at when none is given."""
    return default_addresses(environ)[0]


def default_addresses(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """`default_address`, and behind it where a server of the same user listens if its XDG_RUNTIME_DIR is another: not
    set (a service, cron, ssh without a login session), or set where ours is not.
    """
    runtime = (os.environ if environ is None else environ).get("XDG_RUNTIME_DIR", "")
    places = [f"/tmp/lmcache-trio-{os.getuid()}", f"/run/user/{os.getuid()}/lmcache-trio"]
    if runtime.startswith("/"):
        places.insert(0, f"{runtime}/lmcache-trio")
    return tuple(dict.fromkeys(f"unix://{place}/server.sock" for place in places))


def format_size(size: float) -> str:
    """*size* bytes as people say it: `"4 GiB"`, `"1.5 MiB"`, `"17 bytes"`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def _address(instance: object, attribute: "attrs.Attribute[str]", value: str) -> None:
    scheme, separator, rest = value.partition("://")
    if not separator or not rest:
        raise ConfigError(
            "address", f"{value!r} is no address; write unix:///run/…/server.sock, ipc:///… or tcp://127.0.0.1:5555"
        )
    if scheme in ("unix", "ipc"):
        if not rest.startswith("/"):
            raise ConfigError("address", f"{value!r} has a relative path; write the absolute one, {scheme}:///…")
        if len(os.fsencode(rest)) > MAX_SOCKET_PATH:
            raise ConfigError(
                "address", f"the path of {value!r} is over {MAX_SOCKET_PATH} bytes; use a shorter directory"
            )
    elif scheme == "tcp":
        host, _, port = rest.rpartition(":")
        if not port.isdecimal() or not int(port) < 65536:
            raise ConfigError("address", f"{value!r} has no port; write tcp://127.0.0.1:PORT, up to 65535")
        if not _is_loopback(host):
            raise ConfigError(
                "address",
                f"{host!r} is not loopback, and there is no authentication yet; use 127.0.0.1 or a unix:// path",
            )
    elif scheme != "memory":
        raise ConfigError("address", f"{scheme!r} is no transport; use unix://PATH, ipc://PATH or tcp://127.0.0.1:PORT")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _between(low: float, high: float, *, above: bool = False) -> Callable[[object, Any, float], None]:
    """*low* to *high*, both allowed unless *above* (then more than *low*); NaN and infinity never are."""

    def check(instance: object, attribute: Any, value: float) -> None:
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            bound = f"more than {low:g}" if above else f"{low:g} or more"
            raise ConfigError(attribute.name, f"{value!r} is out of range; give {bound}, and at most {high:g}")

    return check


def _has_backend(instance: object, attribute: Any, value: Mapping[str, Any]) -> None:
    if not isinstance(value.get("backend"), str):
        raise ConfigError(
            f"{attribute.name}.backend", 'is missing or no string; name the backend, as in backend = "cpu"'
        )


def _all_have_backends(instance: object, attribute: Any, value: Sequence[Mapping[str, Any]]) -> None:
    for i, table in enumerate(value):
        if not isinstance(table.get("backend"), str):
            raise ConfigError(f"tiers.{i}.backend", 'is missing or no string; name the backend, as in backend = "disk"')


_DAY = 86_400.0


def _group(instance: object, attribute: Any, value: int | str) -> None:
    if isinstance(value, int):
        return check_ids(instance, attribute, (value,))
    if value:
        try:
            grp.getgrnam(value)
        except KeyError:
            raise ConfigError(attribute.name, f"there is no group {value!r} here; give its number") from None


@attrs.frozen
class Access:
    """Who may connect to a server at a `unix://` address: its own uid, root, and those named here.

    The directory and the socket get their modes from it: 0700 and 0600 with nobody named; 0750 and 0660, of that group,
    with a group; 0755 and 0666 with uids, since then the server alone tells who comes.
    """

    uids: tuple[int, ...] = attrs.field(
        default=(), validator=check_ids, metadata={"help": "Uids that may connect, beside the server's own and root."}
    )
    group: int | str = attrs.field(
        default="",
        validator=_group,
        metadata={
            "help": "A group, by name or number, whose members may connect; a server that is not root's must be in it."
        },
    )

    @property
    def gid(self) -> int | None:
        if isinstance(self.group, int):
            return self.group
        return grp.getgrnam(self.group).gr_gid if self.group else None

    @property
    def directory_mode(self) -> int:
        return 0o755 if self.uids else 0o750 if self.group != "" else 0o700

    @property
    def socket_mode(self) -> int:
        return 0o666 if self.uids else 0o660 if self.group != "" else 0o600

    def admits(self, uid: int, groups: Collection[int]) -> bool:
        """May a process of *uid*, in *groups*, connect to this process?"""
        return uid in (0, os.geteuid(), *self.uids) or (self.group != "" and self.gid in groups)


PRIVATE = Access()
"""Nobody but the server's own uid and root."""


def _limit(default: int, text: str) -> int:
    made: int = attrs.field(default=default, validator=_between(1, 1 << 40), metadata={"help": text})
    return made


@attrs.frozen
class Limits:
    """What a client may have at one time. A request beyond is refused, and counted; none is meant to be felt.

    The defaults leave room for an engine with 1,000 running requests of 128,000 tokens in chunks of 64: 2,000 chunks a
    request, 2,048,000 digests (62 MiB) together. The reference says what each default costs at most.
    """

    clients: int = attrs.field(
        default=0,
        validator=_between(0, 1 << 40),
        metadata={
            "help": "Clients that may be connected; 0: a quarter of the file descriptors that the server may have"
            " (ulimit -n), less 64."
        },
    )
    sessions: int = _limit(65_536, "Requests of one engine that may be open.")
    digests: int = _limit(
        3 << 20, "Chunks that the open requests of one engine may name together, or the reads of one worker."
    )
    pins: int = _limit(4096, "Reads that one worker may have under way.")
    attaches: int = _limit(2, "Attach requests of one worker that may wait while the device opens its memory.")
    resets: int = _limit(16, "Resets of one scheduler that may wait for the tiers' deletions.")
    pushes: int = _limit(
        16_384, "Messages that may wait for a client that does not read; one more ends its connection."
    )
    unfinished_bytes: int = attrs.field(
        default=64 << 20,
        validator=_between(4 << 20, 1 << 40),
        metadata={
            "unit": "bytes",
            "help": "Bytes of messages that all clients together have begun and not ended; with more, the client that"
            " began first is ended. A message has 4 MiB at most.",
        },
    )
    namespaces: int = _limit(
        256, "Layouts that no engine uses and that still hold chunks; the one left longest ago goes first."
    )


@attrs.frozen
class Config:
    """All settings of a server. Each field's `metadata["help"]` is its one line of documentation."""

    address: str = attrs.field(
        factory=default_address,
        validator=_address,
        metadata={
            "help": "Where clients find the server: unix://PATH; or, for observers alone, ipc://PATH or tcp:// on"
            " loopback."
        },
    )
    access: Access = attrs.field(
        factory=Access, metadata={"help": "Who may connect, beside the server's own uid and root."}
    )
    chunk_tokens: int = attrs.field(
        default=256,
        validator=_between(1, 65_536),
        metadata={"help": "Tokens per chunk, the unit of caching; a multiple of every engine's block size."},
    )
    lease_timeout: float = attrs.field(
        default=30.0,
        validator=_between(0.0, _DAY, above=True),
        metadata={"help": "Seconds for which a lookup's chunks are kept in place for the engine that asked."},
    )
    lease_share: float = attrs.field(
        default=0.5,
        validator=_between(0.0, 1.0, above=True),
        metadata={"help": "Share of the arena for leases without allocated blocks; beyond it, hits are shorter."},
    )
    write_share: float = attrs.field(
        default=0.5,
        validator=_between(0.0, 1.0, above=True),
        metadata={
            "help": "Share of the arena, less the bytes that other engines are writing, that one engine may be writing"
            " at one time, copies that have not ended included; stores beyond it are dropped."
        },
    )
    reservation_timeout: float = attrs.field(
        default=60.0,
        validator=_between(0.0, _DAY, above=True),
        metadata={"help": "Seconds that a writer has to commit a chunk before it is dropped."},
    )
    grace: float = attrs.field(
        default=5.0,
        validator=_between(0.0, 3600.0),
        metadata={
            "help": "Seconds after SIGTERM in which the process ends; clients have all but the last 0.5 s (at least"
            " half). Below 0.5 s a hung process still takes 0.5 s."
        },
    )
    memory: Mapping[str, Any] = attrs.field(
        factory=lambda: MappingProxyType({"backend": "cpu"}),
        validator=_has_backend,
        metadata={"help": "The arena: `backend` by name, and that backend's own settings (cpu: `size`)."},
    )
    tiers: tuple[Mapping[str, Any], ...] = attrs.field(
        default=(),
        validator=_all_have_backends,
        metadata={"help": "Slower places below memory, nearest first: each a table with `backend` and its settings."},
    )
    tier_timeout: float = attrs.field(
        default=5.0,
        validator=_between(0.0, 3600.0, above=True),
        metadata={"help": "Seconds after which a call into a tier counts as hung; the tier is then fenced."},
    )
    prefetch_budget: float = attrs.field(
        default=2.0,
        validator=_between(0.0, 3600.0),
        metadata={
            "help": "Seconds that a lookup may wait for tiers, if it does not ask for less; the answer is then what"
            " memory has. 0: never. The default is about what computing 20,000 tokens takes."
        },
    )
    prefetch_bytes: int = attrs.field(
        default=256 << 20,
        validator=_between(1, 1 << 50),
        metadata={"unit": "bytes", "help": "Bytes that may be on their way from one tier into memory at one time."},
    )
    writeback_bytes: int = attrs.field(
        default=256 << 20,
        validator=_between(1, 1 << 50),
        metadata={
            "unit": "bytes",
            "help": "Bytes that may wait to be written to one tier, at most half of the arena; beyond it, the oldest"
            " chunks that no queued chunk extends are dropped.",
        },
    )
    device: Mapping[str, Any] = attrs.field(
        factory=lambda: MappingProxyType({"backend": "auto"}),
        validator=_has_backend,
        metadata={"help": "The device that moves an engine's KV: `backend` (auto, host, cuda, none) and its settings."},
    )
    limits: Limits = attrs.field(
        factory=Limits, metadata={"help": "What a client may have at one time: a table of its own, `[limits]`."}
    )

    def __attrs_post_init__(self) -> None:
        if self.access != PRIVATE and not self.address.startswith(("unix://", "memory://")):
            raise ConfigError("access", f"{self.address} does not tell who connects; use a unix:// address with it")


def describe(cls: type[Any] = Config) -> list[tuple[str, object, str]]:
    """(name, default, help) of each setting of *cls*, for documentation and the command line."""
    made = cls()
    return [(f.name, getattr(made, f.name), str(f.metadata.get("help", ""))) for f in attrs.fields(cls)]


def load_config(
    path: str | os.PathLike[str] | None = None, sets: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Config:
    """The settings from *path* (TOML), *environ* and *sets* (`"key=value"`), later ones winning.

    *environ* is this process's, if not given.
    """
    table, origins = sources.gather(
        None if path is None else Path(path), sets, os.environ if environ is None else environ
    )
    if isinstance(memory := table.get("memory"), dict):
        memory.setdefault("backend", "cpu")
    client_config_of(table.pop("client", {}))  # the engines' part of the file: theirs to use, ours to refuse
    try:
        return structure(Config, table)
    except ConfigError as exc:
        if exc.key in origins:
            raise ConfigError(exc.key, f"{exc.problem} (set by {origins[exc.key]})") from exc
        raise
