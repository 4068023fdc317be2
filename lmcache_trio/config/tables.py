"""From a plain table to a frozen class: strict types, units, bounds, and the fix in each message.

cattrs structures everything, with strict hooks: nothing is coerced (`"7"` is not an integer), and an unknown key is
named with the one that was probably meant. Each problem ends in one `ConfigError` with the dotted key and the fix. A
field with `metadata={"unit": "bytes"}` takes `"4GiB"` too, one with the unit "path" takes `"~/kv"`.

It knows no setting: those of a server are in `server`, of an engine in `client`, of a backend in its `Config` class.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError
from cattrs.gen import make_dict_structure_fn

from lmcache_trio.config.values import closest, parse_path, parse_size
from lmcache_trio.errors import ConfigError

__all__ = ["Table", "between", "check_chunk_tokens", "check_ids", "setting", "structure"]

Table = dict[str, Any]
"""A backend's own settings, not yet structured."""

T = TypeVar("T")

_PARSERS: Mapping[str, Callable[[str], object]] = {"bytes": parse_size, "path": parse_path}
"""By the `unit` in a field's metadata: the reader of a string in its place."""

_MOST_UID = 2**32 - 2


def setting(default: Any, help: str, *, check: Callable[..., None] | None = None, unit: str = "") -> Any:
    """A field of a class of settings, with its line of documentation."""
    return attrs.field(default=default, validator=check, metadata={"help": help, "unit": unit})


def between(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[object, Any, float], None]:
    """A validator: *low* to *high*, both allowed unless *above* (then more than *low*); NaN and infinity never are."""

    def check(instance: object, attribute: Any, value: float) -> None:
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            least = f"more than {low:g}" if above else f"{low:g} or more"
            most = f", and at most {high:g}" if math.isfinite(high) else ""
            raise ConfigError(attribute.name, f"{value!r} is out of range; give {least}{most}")

    return check


def check_chunk_tokens(instance: object, attribute: Any, value: int | str) -> None:
    """A validator of a field that holds the length of a chunk in tokens, or "auto"."""
    if isinstance(value, int):
        between(1, 65_536)(instance, attribute, value)


def check_ids(instance: object, attribute: Any, value: Sequence[int]) -> None:
    """A validator of a field that holds uids or gids."""
    for number in value:
        if not 0 <= number <= _MOST_UID:
            raise ConfigError(attribute.name, f"{number} is not an id; give numbers of 0 to {_MOST_UID}")


def structure(cls: type[T], table: Mapping[str, Any], key: str = "") -> T:
    """*table* as a *cls*, an attrs class, strictly; *key* is the table's own dotted name, for messages."""
    try:
        return _converter.structure(table, cls)
    except (cattrs.BaseValidationError, ValueError) as exc:
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
    meant = closest(name, known)
    hint = f"did you mean {meant!r}?" if meant else f"known here: {', '.join(known)}"
    raise ConfigError(_join(key, name or '""'), f"is not a setting; {hint}")


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


def _choice(choices: Sequence[Any], value: Any) -> Any:
    if value not in choices:
        raise ValueError(f"{value!r} is not a choice; give {', '.join(repr(str(choice)) for choice in choices)}")
    return choices[choices.index(value)]


def _is_literal(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin is Literal


def _string(value: Any, kind: Any) -> Any:
    """A StrEnum comes here too, as a subclass of str."""
    if kind is not str:
        return _choice(list(kind), value)
    return _TEXT(value, kind)


_TEXT = _strict("a string", lambda v: type(v) is str, str)


def _table_of(cls: type[Any], converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """The hook of a class of settings."""
    parsers = {field.name: _PARSERS.get(field.metadata.get("unit", "")) for field in attrs.fields(cls)}
    hooks: dict[str, Any] = {
        name: cattrs.override(struct_hook=_parsed(parse, converter)) for name, parse in parsers.items() if parse
    }
    make = make_dict_structure_fn(
        cls, converter, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True, **hooks
    )
    return _strict("a table", lambda v: isinstance(v, Mapping), lambda v: make(dict(v), cls))


def _parsed(parse: Callable[[str], object], converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """The hook of a field with a unit."""
    return lambda value, kind: parse(value) if isinstance(value, str) else converter.structure(value, kind)


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    is_table: Callable[[Any], bool] = lambda v: isinstance(v, Mapping)  # noqa: E731
    for kind, hook in {
        int: _strict("an integer", lambda v: type(v) is int, int),
        float: _strict("a number", _is_number, float),
        bool: _strict("true or false", lambda v: type(v) is bool, bool),
        str: _string,
        Path: _strict("a path in quotes", lambda v: type(v) is str, Path),
        int | str: _strict("a string or an integer", lambda v: type(v) in (int, str), lambda v: v),
        int | Literal["auto"]: _strict('an integer or "auto"', lambda v: type(v) is int or v == "auto", lambda v: v),
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
    converter.register_structure_hook_func(_is_literal, lambda value, kind: _choice(get_args(kind), value))
    converter.register_structure_hook_factory(attrs.has, lambda cls: _table_of(cls, converter))
    converter.register_structure_hook_func(lambda t: t in (Table, Mapping[str, Any]), table)
    converter.register_structure_hook_func(lambda t: t == tuple[Mapping[str, Any], ...], tables)
    return converter


_converter = _make_converter()
