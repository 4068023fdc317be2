"""Finds backends by name: entry points in `lmcache_trio.memory`, `lmcache_trio.tiers` and `lmcache_trio.devices`.

The built-in ones are found the same way. Only the backend that was chosen is imported.
"""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from lmcache_trio.abc import Device, Memory, Tier
from lmcache_trio.config import structure
from lmcache_trio.config.values import closest
from lmcache_trio.errors import ConfigError

__all__ = ["find_backend", "make_backend", "make_device", "make_memory"]

P = TypeVar("P", bound=Memory | Tier | Device)


def make_memory(table: Mapping[str, Any]) -> Memory:
    """The memory that the `[memory]` table names, made with the rest of that table."""
    return make_backend("memory", "memory", table, Memory)  # type: ignore[type-abstract]


def make_device(table: Mapping[str, Any]) -> Device | None:
    """The device that the `[device]` table names; None for the name "none"."""
    if table["backend"] == "none":
        return None
    return make_backend("devices", "device", table, Device)  # type: ignore[type-abstract]


def make_backend(kind: str, key: str, table: Mapping[str, Any], interface: type[P]) -> P:
    """The backend of *kind* (`memory`, `tiers`, `devices`) that *table* names; *key* is the table's dotted name."""
    cls: Any = find_backend(kind, key, str(table["backend"]))
    if not issubclass(cls, interface):
        raise ConfigError(f"{key}.backend", f"{table['backend']!r} names {cls!r}, which is not a {interface.__name__}")
    settings = {name: value for name, value in table.items() if name != "backend"}
    config = structure(cls.Config, settings, key)
    try:
        made: P = cls(config)
        return made
    except ConfigError as exc:  # a backend may name its own settings: "size" is "memory.size" to the user
        if exc.key == key or exc.key.startswith(f"{key}."):
            raise
        raise ConfigError(f"{key}.{exc.key}", exc.problem) from exc


def find_backend(kind: str, key: str, name: str) -> type[Any]:
    """The class behind the entry point *name* of group `lmcache_trio.<kind>`; ConfigError lists the installed ones."""
    installed: dict[str, EntryPoint] = {point.name: point for point in entry_points(group=f"lmcache_trio.{kind}")}
    if name not in installed:
        meant = closest(name, installed)
        hint = f"did you mean {meant!r}? " if meant else ""
        there = ", ".join(sorted(installed)) or "none (is lmcache-trio itself installed?)"
        raise ConfigError(f"{key}.backend", f"no backend is called {name!r}; {hint}installed: {there}")
    try:
        found = installed[name].load()
    except (ImportError, AttributeError) as exc:
        raise ConfigError(f"{key}.backend", f"{name!r} ({installed[name].value}) cannot be imported: {exc}") from exc
    if not isinstance(found, type):
        raise ConfigError(f"{key}.backend", f"{name!r} ({installed[name].value}) is not a class")
    return found
