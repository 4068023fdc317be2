"""From a plain table to a frozen class: strict types, units, ids, and the fix in each message.

Everything is structured by cattrs with strict hooks: nothing is coerced (`"7"` is no integer), an unknown key is named
with the one that was probably meant. Each problem ends in one `ConfigError` with the dotted key and the fix. A field
with `metadata={"unit": "bytes"}` takes `"4GiB"` too, one with the unit "path" takes `"~/kv"`.

It knows no setting: those of a server stand in `config`, those of an engine in `client_config`, a backend's in its own
`Config` class. `config` re-exports what plugins use.
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import attrs
import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError
from cattrs.gen import make_dict_structure_fn

from lmcache_trio.errors import ConfigError

__all__ = ["Table", "check_ids", "expand", "parse_path", "parse_size", "structure"]

Table = dict[str, Any]
"""A backend's own settings, not yet structured."""

T = TypeVar("T")

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip


_MOST_UID = 2**32 - 2


def parse_size(text: str) -> int:
    """Bytes of `"4GiB"`, `"512 Mi"`, `"1.5G"` or `"1000000"`. ValueError says what is accepted."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise ValueError(f'{text!r} is no size; write a number of bytes, or one with a unit, as in "4GiB"')
    return int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit


def expand(text: str) -> str:
    """*text* with `~` and `$NAME` expanded, as a shell does. ValueError: it names a variable that is not set."""
    if unset := [name for name in re.findall(r"\$\{?(\w+)", text) if name not in os.environ]:
        raise ValueError(f"{text!r} names the variable {unset[0]}, which is not set; write the absolute path")
    return os.path.expanduser(os.path.expandvars(text))


def parse_path(text: str) -> str:
    """The absolute path that *text* is, with `~` and `$NAME` expanded, as a shell does. ValueError says what is wrong.

    A relative one is refused: a server that is started elsewhere would not find what it kept. An empty one stays empty.
    """
    path = expand(text)
    if "\0" in path:
        raise ValueError(f"{text!r} has a zero byte in it; write the absolute path")
    if path and not path.startswith("/"):
        raise ValueError(f"{text!r} is a relative path; write the absolute one, such as {os.path.abspath(path)!r}")
    return path


_PARSERS: Mapping[str, Callable[[str], object]] = {"bytes": parse_size, "path": parse_path}
"""By the `unit` in a field's metadata: what a string in its place means."""


def check_ids(instance: object, attribute: Any, value: Sequence[int]) -> None:
    """A validator of a field that holds uids or gids."""
    for number in value:
        if not 0 <= number <= _MOST_UID:
            raise ConfigError(attribute.name, f"{number} is no id; give numbers of 0 to {_MOST_UID}")


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
