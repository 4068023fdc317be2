"""The server's settings: one tree of frozen classes, and where their values come from.

Defaults < file (TOML) < environment (`LMCACHE_TRIO_MEMORY__SIZE`) < flags (`--set memory.size=4GiB`). Everything is
structured by cattrs with strict hooks: nothing is coerced (`"7"` is no integer), an unknown key is named with the one
that was probably meant. Each problem ends in one `ConfigError` with the dotted key and the fix.

This module refuses to know backends: a backend's table is kept as it is, and structured into the backend's own `Config`
class with `structure` when the backend is found (a field with
`metadata={"unit": "bytes"}` takes `"4GiB"` too, one with the unit "path" takes `"~/kv"`).
"""

import difflib
import grp
import ipaddress
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import attrs
import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError
from cattrs.gen import make_dict_structure_fn

from lmcache_trio import _config_sources
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

Table = dict[str, Any]
"""A backend's own settings, not yet structured."""

T = TypeVar("T")

MAX_SOCKET_PATH = 94
"""Bytes of a socket's path: the kernel's limit is 107, and a client's own socket adds 13 to the rendezvous' path."""

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip


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


def parse_size(text: str) -> int:
    """Bytes of `"4GiB"`, `"512 Mi"`, `"1.5G"` or `"1000000"`. ValueError says what is accepted."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise ValueError(f'{text!r} is no size; write a number of bytes, or one with a unit, as in "4GiB"')
    return int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit


def parse_path(text: str) -> str:
    """The absolute path that *text* is, with `~` and `$NAME` expanded, as a shell does. ValueError says what is wrong.

    A relative one is refused: a server that is started elsewhere would not find what it kept. An empty one stays empty.
    """
    if unset := [name for name in re.findall(r"\$\{?(\w+)", text) if name not in os.environ]:
        raise ValueError(f"{text!r} names the variable {unset[0]}, which is not set; write the absolute path")
    path = os.path.expanduser(os.path.expandvars(text))
    if "\0" in path:
        raise ValueError(f"{text!r} has a zero byte in it; write the absolute path")
    if path and not path.startswith("/"):
        raise ValueError(f"{text!r} is a relative path; write the absolute one, such as {os.path.abspath(path)!r}")
    return path


_PARSERS: Mapping[str, Callable[[str], object]] = {"bytes": parse_size, "path": parse_path}
"""By the `unit` in a field's metadata: what a string in its place means."""


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
_MOST_UID = 2**32 - 2


def check_ids(instance: object, attribute: Any, value: Sequence[int]) -> None:
    """A validator of a field that holds uids or gids."""
    for number in value:
        if not 0 <= number <= _MOST_UID:
            raise ConfigError(attribute.name, f"{number} is no id; give numbers of 0 to {_MOST_UID}")


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
        metadata={"help": "A group whose members may connect, by name or number; a server not of root must be in it."},
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

    sessions: int = _limit(65_536, "Requests of one engine that may be open.")
    digests: int = _limit(
        3 << 20, "Chunks that the open requests of one engine may name together, or the reads of one worker."
    )
    pins: int = _limit(4096, "Reads that one worker may have under way.")
    attaches: int = _limit(2, "Times that one worker may have its memory being opened by the device, without a reply.")
    resets: int = _limit(16, "Resets of one scheduler that may wait for the tiers' deletions.")
    pushes: int = _limit(
        16_384, "Messages that may wait for a client that does not read; with one more, its connection is ended."
    )
    unfinished_bytes: int = attrs.field(
        default=64 << 20,
        validator=_between(4 << 20, 1 << 40),
        metadata={
            "unit": "bytes",
            "help": "Of messages of all clients together whose end has not come; with more, the client that began first"
            " is ended. A message has 4 MiB at most.",
        },
    )
    namespaces: int = _limit(
        256, "Layouts that no engine uses any more and that still hold chunks; the one left longest ago goes first."
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
        metadata={"help": "Tokens a chunk, the unit of caching; a multiple of every engine's block size."},
    )
    lease_timeout: float = attrs.field(
        default=30.0,
        validator=_between(0.0, _DAY, above=True),
        metadata={"help": "Seconds for which a lookup's chunks are kept in place for the engine that asked."},
    )
    lease_share: float = attrs.field(
        default=0.5,
        validator=_between(0.0, 1.0, above=True),
        metadata={"help": "Share of the arena that requests not yet allocated may hold; beyond it, hits are shorter."},
    )
    write_share: float = attrs.field(
        default=0.5,
        validator=_between(0.0, 1.0, above=True),
        metadata={
            "help": "Share of the arena, less what other engines are writing, that one engine may be writing at one"
            " time, its copies that have not ended included; stores beyond it are dropped."
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
        metadata={"help": "Seconds after which a call into a tier hangs: the tier is then not used until it is back."},
    )
    prefetch_budget: float = attrs.field(
        default=2.0,
        validator=_between(0.0, 3600.0),
        metadata={
            "help": "Seconds that a lookup may wait for tiers, if it does not ask for less; then what is in memory by"
            " then is the answer. 0: never. The default is about what computing 20,000 tokens takes."
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
            " chunks that no other extends are dropped.",
        },
    )
    device: Mapping[str, Any] = attrs.field(
        factory=lambda: MappingProxyType({"backend": "auto"}),
        validator=_has_backend,
        metadata={
            "help": "Who moves an engine's KV for the server: `backend` (auto, host, cuda, none) and its settings."
        },
    )
    limits: Limits = attrs.field(
        factory=Limits, metadata={"help": "What a client may have at one time: a table of its own, below."}
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
    from lmcache_trio.client_config import client_config_of

    table, origins = _config_sources.gather(
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


def structure(cls: type[T], table: Mapping[str, Any], key: str = "") -> T:
    """*table* as a *cls*, an attrs class, strictly; *key* is the table's own dotted name, for messages."""
    if not isinstance(table, Mapping):
        _fail(key, "", f"{table!r} is no table; write it as [{key or 'table'}] with one key a line")
    plain = dict(table)
    for field in attrs.fields(cls):  # type: ignore[arg-type]
        parse = _PARSERS.get(field.metadata.get("unit", ""))
        if parse is not None and isinstance(plain.get(field.name), str):
            try:
                plain[field.name] = parse(plain[field.name])
            except ValueError as exc:
                raise ConfigError(_join(key, field.name), str(exc)) from exc
    try:
        return _converter.structure(plain, cls)
    except cattrs.BaseValidationError as exc:
        _explain(exc, key)


def _explain(exc: BaseException, key: str) -> NoReturn:
    """Raise the first problem in cattrs' tree of errors as a ConfigError with its dotted key."""
    if isinstance(exc, ConfigError):
        raise ConfigError(_join(key, exc.key), exc.problem) from exc
    if isinstance(exc, ForbiddenExtraKeysError):
        _unknown(sorted(exc.extra_fields)[0], [f.name for f in attrs.fields(exc.cl)], key)
    if isinstance(exc, ClassValidationError):
        named, others = exc.group_exceptions()
        for other in others:  # first a key that is unknown: a misspelt one is also missing
            _explain(other, key)
        for cause, note in named:
            _explain(cause, _join(key, note.name))
    if isinstance(exc, IterableValidationError):
        for cause, place in exc.group_exceptions()[0]:
            _explain(cause, _join(key, str(place.index)))
    if isinstance(exc, KeyError):
        raise ConfigError(key, "is missing; it has no default") from exc
    raise ConfigError(key or "configuration", str(exc)) from exc


def _unknown(name: str, known: Sequence[str], key: str) -> NoReturn:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
    raise ConfigError(_join(key, name or '""'), f"is no setting; {hint}")


def _fail(key: str, name: str, problem: str) -> NoReturn:
    raise ConfigError(_join(key, name) or "configuration", problem)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _strict(wanted: str, accepts: Callable[[Any], bool], make: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def hook(value: Any, _: Any) -> Any:
        if not accepts(value):
            raise ValueError(f"{value!r} is of type {type(value).__name__}; give {wanted}")
        return make(value)

    return hook


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_integers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(v) is int for v in value)


def _table_of(cls: type[Any], converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """The hook of a table inside another one."""
    make = make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True)
    return _strict("a table", lambda v: isinstance(v, Mapping), lambda v: make(v, cls))


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    is_table: Callable[[Any], bool] = lambda v: isinstance(v, Mapping)  # noqa: E731
    for kind, hook in {
        int: _strict("an integer", lambda v: type(v) is int, int),
        float: _strict("a number", _is_number, float),
        bool: _strict("true or false", lambda v: type(v) is bool, bool),
        str: _strict("a string", lambda v: type(v) is str, str),
        Path: _strict("a path in quotes", lambda v: type(v) is str, Path),
        int | str: _strict("a string or an integer", lambda v: type(v) in (int, str), lambda v: v),
    }.items():
        converter.register_structure_hook(kind, hook)
    table = _strict("a table", is_table, lambda v: MappingProxyType(dict(v)))
    tables = _strict(
        "a list of tables, each written [[tiers]]",
        lambda v: isinstance(v, list | tuple) and all(map(is_table, v)),
        lambda v: tuple(MappingProxyType(dict(t)) for t in v),
    )
    numbers = _strict("a list of integers, as in [1000, 1001]", _are_integers, tuple)
    converter.register_structure_hook_func(lambda t: t == tuple[int, ...], numbers)
    converter.register_structure_hook_factory(attrs.has, lambda cls: _table_of(cls, converter))
    converter.register_structure_hook_func(lambda t: t in (Table, Mapping[str, Any]), table)
    converter.register_structure_hook_func(lambda t: t == tuple[Mapping[str, Any], ...], tables)
    return converter


_converter = _make_converter()
