"""What a server tells an operator: its figures with what is wrong, and its engines and layouts."""

import json
from collections.abc import Iterable
from typing import Any

import attrs
import trio

from lmcache_trio._server.parts import Parts
from lmcache_trio._server.readiness import find_faults
from lmcache_trio.statistics import ServerFacts, table

__all__ = ["inventory", "report"]

MOST_TOLD = 256 << 10
"""Bytes of a list. A reply holds 1 MiB, and a thousand engines take a quarter of that."""


def report(parts: Parts) -> dict[str, Any]:
    """`server`, `faults`, `held`, `counted`, `rates` and `tiers`, as `lmcache-trio status --json` prints them."""
    facts = ServerFacts(parts.version, parts.config.address, trio.current_time() - parts.began)
    faults, _ = _fitting(attrs.asdict(fault) for fault in find_faults(parts))
    return {"server": table(facts), "faults": faults, **parts.statistics().table()}


def inventory(parts: Parts) -> dict[str, Any]:
    """`engines` and `layouts`, as `lmcache-trio ls --json` prints them; *left_out* of each did not fit."""
    engines, engines_left = _fitting(table(engine) for engine in parts.engines.held())
    layouts, layouts_left = _fitting(table(layout) for layout in parts.index.layouts())
    return {
        "engines": engines,
        "layouts": layouts,
        "left_out": {"engines": engines_left, "layouts": layouts_left},
    }


def _fitting(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Those of *rows* that a reply has room for, and how many are left out."""
    told: list[dict[str, Any]] = []
    size, left_out = 0, 0
    for row in rows:
        size += len(json.dumps(row))
        if size > MOST_TOLD:
            left_out += 1
        else:
            told.append(row)
    return told, left_out
