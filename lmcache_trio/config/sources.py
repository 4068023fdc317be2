"""The sources of settings: the file, the environment and flags, laid over each other in one plain tree of tables.

It knows no setting: `server` and `client` have the keys.
"""

import logging
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs

from lmcache_trio.config.tables import structure
from lmcache_trio.config.values import closest, expand
from lmcache_trio.errors import ConfigError

__all__ = ["Gathered", "gather", "gather_client"]

T = TypeVar("T")

log = logging.getLogger("lmcache_trio")

ENVIRONMENT_PREFIX = "LMCACHE_TRIO_"
OTHER_VARIABLES = frozenset({"CONFIG", "LOG"})
"""Variables with our prefix that are not settings: the command line reads them."""

_SERVICE_LINK = re.compile(
    r"(?:.*_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
_SERVICE_URL = re.compile(r"(?:tcp|udp|sctp)://")


@attrs.define
class Gathered:
    """Settings in one plain tree of tables, and the variable or flag that set a key, unless the file did."""

    table: dict[str, Any]
    origins: dict[str, str] = attrs.field(factory=dict)

    def put(self, key: str, text: str, origin: str) -> None:
        _put(self.table, key, _value_of(text))
        self.origins[key] = origin

    def into(self, cls: type[T], key: str = "") -> T:
        """The table *key*, or the whole tree, as a *cls*. `ConfigError` also names the source of a wrong setting."""
        try:
            return structure(cls, self.table.get(key, {}) if key else self.table, key)
        except ConfigError as exc:
            if exc.key in self.origins:
                raise ConfigError(exc.key, f"{exc.problem} (set by {self.origins[exc.key]})") from exc
            raise


def gather(path: Path | None, sets: Sequence[str], environ: Mapping[str, str]) -> Gathered:
    """A server's settings from *path*, *environ* and *sets*, later ones winning."""
    found = Gathered(_read(path, "--config") if path is not None else {})
    for name, rest in _ours(environ):
        if rest not in OTHER_VARIABLES and not rest.startswith("CLIENT_"):
            found.put(_key_of(rest), environ[name], f"the environment variable {name}")
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            problem = f"{text!r} is not a setting; write --set key=value, as in --set memory.size=4GiB"
            raise ConfigError("--set", problem)
        found.put(key.strip(), value.strip(), f"--set {text}")
    return found


def gather_client(known: Sequence[str], environ: Mapping[str, str]) -> Gathered:
    """An engine's settings: the `client` table of the file that *environ* names, and over it variables of *environ*.

    A variable with one underscore in place of two belongs to another program, and is ignored, unless it looks like a
    setting in *known*.
    """
    where = ENVIRONMENT_PREFIX + "CONFIG"
    found = Gathered(_read(Path(environ[where]), where) if environ.get(where) else {})
    for name, rest in _ours(environ):
        if rest.startswith("CLIENT__"):
            found.put(_key_of(rest), environ[name], f"the environment variable {name}")
        elif rest.startswith("CLIENT_"):
            if meant := closest(rest.removeprefix("CLIENT_").lower(), known):
                right = f"{ENVIRONMENT_PREFIX}CLIENT__{meant.upper()}"
                raise ConfigError(name, f"is not a setting; two underscores stand for the dot: {right}")
            log.warning("%s is not a setting of lmcache-trio, and is ignored", name)
    return found


def _key_of(rest: str) -> str:
    return rest.lower().replace("__", ".")


def _read(path: Path, named_by: str) -> dict[str, Any]:
    try:
        path = Path(expand(str(path)))
    except ValueError as exc:
        raise ConfigError(named_by, str(exc)) from exc
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(named_by, f"cannot read {str(path)!r}: {exc.strerror}; give a TOML file") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(named_by, f"{str(path)!r} is not TOML: {exc}") from exc


def _ours(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The variables with our prefix, each with the rest of its name, but not those that Kubernetes makes.

    For each Service of a namespace it gives every container NAME_SERVICE_HOST, NAME_SERVICE_PORT, NAME_PORT (a URL),
    NAME_PORT_80_TCP, … Those of a Service named lmcache-trio, or lmcache-trio-client, have our prefix.
    """
    for name in sorted(environ):
        rest = name.removeprefix(ENVIRONMENT_PREFIX)
        if rest == name or _SERVICE_LINK.fullmatch(rest):
            continue
        if (rest == "PORT" or rest.endswith("_PORT")) and _SERVICE_URL.match(environ[name]):
            continue
        yield name, rest


def _value_of(text: str) -> Any:
    """*text* as a TOML value if it is one, otherwise as a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted *key* in nested tables. A number is an index into a list; the next free one appends."""
    *path, last = parts = key.split(".")
    here: Any = table
    for i, part in enumerate(path):
        here = _step(here, part, [] if parts[i + 1].isdecimal() else {}, key)
    if isinstance(here, list):
        _step(here, last, value, key)
        here[int(last)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise ConfigError(key, f"{'.'.join(path)} is a {type(here).__name__}, which has no keys of its own")


def _step(here: Any, part: str, empty: Any, key: str) -> Any:
    if isinstance(here, list):
        if not part.isdecimal() or int(part) > len(here):
            raise ConfigError(key, f"{part!r} is not an index here; give 0 to {len(here)}")
        if int(part) == len(here):
            here.append(empty)
        return here[int(part)]
    if not isinstance(here, dict):
        raise ConfigError(key, f"is inside a {type(here).__name__}, which has no keys of its own")
    return here.setdefault(part, empty)
