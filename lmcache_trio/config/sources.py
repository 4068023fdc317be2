"""Where settings come from: the file, the environment and flags, laid over each other in one plain tree of tables.

It knows no setting: which keys there are, and what they may be, stands in `config`.
"""

import difflib
import logging
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmcache_trio.config.tables import expand
from lmcache_trio.errors import ConfigError

__all__ = ["gather", "gather_client"]

log = logging.getLogger("lmcache_trio")

ENVIRONMENT_PREFIX = "LMCACHE_TRIO_"
OTHER_VARIABLES = frozenset({"CONFIG", "LOG"})
"""Variables with our prefix that are no settings: read by the command line itself. An engine's begin with CLIENT_."""

_SERVICE_LINK = re.compile(
    r"(?:.*_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
_SERVICE_URL = re.compile(r"(?:tcp|udp|sctp)://")


def gather(path: Path | None, sets: Sequence[str], environ: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree from *path*, *environ* and *sets*, later ones winning; and who set a key, if it was not the file."""
    table = _read(path, "--config") if path is not None else {}
    origins: dict[str, str] = {}
    for key, text, origin in (*_from_environment(environ), *_from_flags(sets)):
        _put(table, key, _value_of(text))
        origins[key] = origin
    return table, origins


def gather_client(known: Sequence[str], environ: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """The `client` table of the file that *environ* names, with *environ* over it; and who set a key otherwise.

    A variable without the two underscores belongs to somebody else, and is passed over, unless it looks like a setting
    in *known*.
    """
    where = ENVIRONMENT_PREFIX + "CONFIG"
    table = _read(Path(environ[where]), where) if environ.get(where) else {}
    origins: dict[str, str] = {}
    prefix = ENVIRONMENT_PREFIX + "CLIENT_"
    for name, rest in _ours(environ):
        if not name.startswith(prefix):
            continue
        key = rest.lower().replace("__", ".")
        if not key.startswith("client."):
            close = difflib.get_close_matches(key[7:], known, n=1)
            if close:
                raise ConfigError(
                    name, f"is no setting; two underscores stand for the dot: {prefix}_{close[0].upper()}"
                )
            log.warning("%s is no setting of lmcache-trio, and is passed over", name)
            continue
        _put(table, key, _value_of(environ[name]))
        origins[key] = f"the environment variable {name}"
    return table.get("client", {}), origins


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


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for name, rest in _ours(environ):
        if rest not in OTHER_VARIABLES and not rest.startswith("CLIENT_"):
            yield rest.lower().replace("__", "."), environ[name], f"the environment variable {name}"


def _ours(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The variables with our prefix, each with the rest of its name, but for those that Kubernetes makes.

    For each Service of a namespace every container has NAME_SERVICE_HOST, NAME_SERVICE_PORT, NAME_PORT (a URL),
    NAME_PORT_80_TCP, … One that is named lmcache-trio, or lmcache-trio-client, gives them our prefix.
    """
    for name in sorted(environ):
        rest = name.removeprefix(ENVIRONMENT_PREFIX)
        if rest == name or _SERVICE_LINK.fullmatch(rest):
            continue
        if (rest == "PORT" or rest.endswith("_PORT")) and _SERVICE_URL.match(environ[name]):
            continue
        yield name, rest


def _from_flags(sets: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError("--set", f"{text!r} is no setting; write --set key=value, as in --set memory.size=4GiB")
        yield key.strip(), value.strip(), f"--set {text}"


def _value_of(text: str) -> Any:
    """*text* as a TOML value where it is one, else as the string that it is."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted *key* in nested tables; a number is an index into a list, the next free one appends."""
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
            raise ConfigError(key, f"{part!r} is no index here; give 0 to {len(here)}")
        if int(part) == len(here):
            here.append(empty)
        return here[int(part)]
    if not isinstance(here, dict):
        raise ConfigError(key, f"is inside a {type(here).__name__}, which has no keys of its own")
    return here.setdefault(part, empty)
