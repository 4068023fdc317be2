"""A server's settings: defaults < file (TOML) < environment (`LMCACHE_TRIO_MEMORY__SIZE`) < flags (`--set`).

It refuses to know backends: a backend's table stays a plain table here.
"""

import grp
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import attrs

from lmcache_trio.config import sources
from lmcache_trio.config.addresses import (
    MemoryAddress,
    UnixAddress,
    WebAddress,
    check_address,
    default_address,
    parse_rendezvous,
    parse_web_address,
)
from lmcache_trio.config.client import ClientConfig
from lmcache_trio.config.tables import between, check_chunk_tokens, check_ids, setting
from lmcache_trio.config.values import parse_path
from lmcache_trio.errors import ConfigError

__all__ = ["PRIVATE", "Access", "Config", "Http", "Limits", "Records", "describe", "load_config"]

_DAY = 86_400.0


def _has_backend(instance: object, attribute: Any, value: Mapping[str, Any]) -> None:
    _check_backend(attribute.name, value, "cpu")


def _all_have_backends(instance: object, attribute: Any, value: Sequence[Mapping[str, Any]]) -> None:
    for i, table in enumerate(value):
        _check_backend(f"{attribute.name}.{i}", table, "disk")


def _no_path_twice(instance: object, attribute: Any, value: Sequence[Mapping[str, Any]]) -> None:
    """A directory belongs to one tier, whatever its backend is."""
    owners: dict[str, int] = {}
    for i, table in enumerate(value):
        with suppress(ValueError, TypeError):  # the tier itself says what is wrong with its path
            path = os.path.realpath(parse_path(table["path"])) if table.get("path") else ""
            if path and owners.setdefault(path, i) != i:
                problem = f"{path!r} is the path of tiers.{owners[path]}, too; give each tier one of its own"
                raise ConfigError(f"{attribute.name}.{i}.path", problem)


def _check_backend(key: str, table: Mapping[str, Any], such_as: str) -> None:
    if not isinstance(table.get("backend"), str):
        problem = f'is missing or not a string; name the backend, as in backend = "{such_as}"'
        raise ConfigError(f"{key}.backend", problem)


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
    """Who may connect to a server at a `unix://` address, beside its own uid and root.

    The modes of the directory and of the socket follow from it: 0700 and 0600 by default; with a group 0750 and 0660,
    of that group; with uids 0755 and 0666, because then the server itself refuses other uids.
    """

    uids: tuple[int, ...] = setting((), "Uids that may connect, beside the server's own and root.", check=check_ids)
    group: int | str = setting(
        "",
        "A group, by name or number, whose members may connect; a server that is not root's must be in it.",
        check=_group,
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
"""The server's own uid and root alone."""


_COUNT = between(1, 1 << 40)


@attrs.frozen
class Limits:
    """What a client may have at one time. A request beyond a limit is refused and counted. No engine should reach one.

    The defaults leave room for an engine with 1,000 running requests of 128,000 tokens in chunks of 64: 2,000 chunks in
    each, 2,048,000 digests (62 MiB) together. The reference says what each default costs at most.
    """

    clients: int = setting(
        0,
        "Clients that may be connected; 0: a quarter of the file descriptors that the server may have (ulimit -n), "
        "less 64.",
        check=between(0, 1 << 40),
    )
    sessions: int = setting(65_536, "Requests of one engine that may be open.", check=_COUNT)
    digests: int = setting(
        3 << 20,
        "Chunks that the open requests of one engine may name together, or the reads of one worker.",
        check=_COUNT,
    )
    pins: int = setting(4096, "Reads that one worker may have under way.", check=_COUNT)
    attaches: int = setting(
        2, "Attach requests of one worker that may wait while the device opens its memory.", check=_COUNT
    )
    resets: int = setting(64, "Resets of one scheduler that may wait for the tiers' deletions.", check=_COUNT)
    pushes: int = setting(
        16_384, "Messages that may wait for a client that does not read; one more ends its connection.", check=_COUNT
    )
    unfinished_bytes: int = setting(
        64 << 20,
        "Bytes of messages that all clients together have begun and not ended; with more, the client that began first "
        "is ended. A message has 4 MiB at most.",
        check=between(4 << 20, 1 << 40),
        unit="bytes",
    )
    namespaces: int = setting(
        256,
        "Layouts that no engine uses and that still hold chunks; the one left longest ago goes first.",
        check=_COUNT,
    )


@attrs.frozen
class Http:
    """Where operators read a server by HTTP: health, metrics, status. Off unless `address` is set.

    Anything but loopback and a socket file needs TLS and a key.
    """

    address: str = setting(
        "",
        "Where the server answers HTTP: http://127.0.0.1:PORT, https://HOST:PORT or unix://PATH; empty: nowhere.",
    )
    certificate: str = setting("", "The file of the certificate chain for https://, in PEM.", unit="path")
    private_key: str = setting("", "The file of the certificate's private key, in PEM.", unit="path")
    key_file: str = setting(
        "",
        "A file of mode 0600 with one key a line, two at most; a reader sends one as `Authorization: Bearer KEY`.",
        unit="path",
    )
    connections: int = setting(
        64, "Readers that may be connected; one more is turned away and counted.", check=between(1, 65_536)
    )

    def __attrs_post_init__(self) -> None:
        where = parse_web_address(self.address) if self.address else None
        if not isinstance(where, WebAddress):
            return
        if where.encrypted and not (self.certificate and self.private_key):
            raise ConfigError("address", "is https://: give http.certificate and http.private_key too")
        if not where.loopback and not (where.encrypted and self.key_file):
            raise ConfigError(
                "address",
                f"{where.host} is not loopback: give https:// with http.certificate, http.private_key and"
                " http.key_file, or an address that only this machine reaches",
            )


@attrs.frozen
class Records:
    """A file with a JSON line per lookup: what was asked, hit and missed, and why. Off unless `path` is set.

    It has names of engines and requests, and neither tokens nor digests.
    """

    path: str = setting("", "The file, made with mode 0600; empty: none.", unit="path")
    size: int = setting(
        64 << 20,
        "Bytes of the file after which it is moved to `path`.1, and a new one begun.",
        check=between(1 << 20, 1 << 40),
        unit="bytes",
    )
    former: int = setting(4, "Former files that are kept, as `path`.1 and so on.", check=between(0, 1000))


@attrs.frozen
class Config:
    """All settings of a server. Each field's `metadata["help"]` is its one line of documentation."""

    address: str = setting(
        attrs.Factory(default_address),
        "Where clients find the server: unix://PATH; or, for observers alone, tcp:// on loopback.",
        check=check_address,
    )
    access: Access = setting(attrs.Factory(Access), "Who may connect, beside the server's own uid and root.")
    chunk_tokens: int | Literal["auto"] = setting(
        "auto",
        "Tokens per chunk, the unit of caching, of engines that name none; each gets the fewest whole blocks of its own"
        ' that reach this. `"auto"`: the rule of "How long a chunk should be", by the bytes that the engine keeps per'
        " token.",
        check=check_chunk_tokens,
    )
    lease_timeout: float = setting(
        30.0,
        "Seconds for which a lookup's chunks are kept in place for the engine that asked.",
        check=between(0.0, _DAY, above=True),
    )
    lease_share: float = setting(
        0.5,
        "Share of the arena for leases without allocated blocks; beyond it, hits are shorter.",
        check=between(0.0, 1.0, above=True),
    )
    write_share: float = setting(
        0.5,
        "Share of the arena, less the bytes that other engines are writing, that one engine may be writing at one time,"
        " copies that have not ended included; stores beyond it are dropped.",
        check=between(0.0, 1.0, above=True),
    )
    reservation_timeout: float = setting(
        60.0,
        "Seconds that a writer has to commit a chunk before it is dropped.",
        check=between(0.0, _DAY, above=True),
    )
    grace: float = setting(
        5.0,
        "Seconds after SIGTERM in which the process ends; clients have all but the last 0.5 s (at least half). Below "
        "0.5 s a hung process still takes 0.5 s.",
        check=between(0.0, 3600.0),
    )
    memory: Mapping[str, Any] = setting(
        attrs.Factory(lambda: MappingProxyType({"backend": "cpu"})),
        "The arena: `backend` by name, and that backend's own settings (cpu: `size`).",
        check=_has_backend,
    )
    tiers: tuple[Mapping[str, Any], ...] = setting(
        (),
        "Slower places below memory, nearest first: each a table with `backend` and its settings.",
        check=attrs.validators.and_(_all_have_backends, _no_path_twice),
    )
    tier_timeout: float = setting(
        5.0,
        "Seconds after which a call into a tier counts as hung; the tier is then fenced.",
        check=between(0.0, 3600.0, above=True),
    )
    prefetch_budget: float = setting(
        2.0,
        "Seconds that a lookup may wait for tiers, if it does not ask for less; the answer is then what memory has. 0: "
        "never. The default is about what computing 20,000 tokens takes.",
        check=between(0.0, 3600.0),
    )
    prefetch_bytes: int = setting(
        256 << 20,
        "Bytes that may be on their way from one tier into memory at one time.",
        check=between(1, 1 << 50),
        unit="bytes",
    )
    writeback_bytes: int = setting(
        256 << 20,
        "Bytes that may wait to be written to one tier, at most half of the arena; beyond it, the oldest chunks that no"
        " queued chunk extends are dropped.",
        check=between(1, 1 << 50),
        unit="bytes",
    )
    device: Mapping[str, Any] = setting(
        attrs.Factory(lambda: MappingProxyType({"backend": "auto"})),
        "The device that moves an engine's KV: `backend` (auto, host, cuda, none) and its settings.",
        check=_has_backend,
    )
    limits: Limits = setting(
        attrs.Factory(Limits), "What a client may have at one time: a table of its own, `[limits]`."
    )
    http: Http = setting(
        attrs.Factory(Http), "Health, metrics and status by HTTP, for operators: a table of its own, `[http]`."
    )
    records: Records = setting(
        attrs.Factory(Records), "A line per lookup in a file, for operators: a table of its own, `[records]`."
    )

    def __attrs_post_init__(self) -> None:
        if self.access != PRIVATE and not isinstance(parse_rendezvous(self.address), UnixAddress | MemoryAddress):
            raise ConfigError("access", f"the kernel tells no uid at {self.address}; use a unix:// address with it")


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
    found = sources.gather(None if path is None else Path(path), sets, os.environ if environ is None else environ)
    if isinstance(memory := found.table.get("memory"), dict):
        memory.setdefault("backend", "cpu")
    found.into(ClientConfig, "client")  # the engines' part of the file: theirs to use, ours to refuse
    found.table.pop("client", None)
    return found.into(Config)
