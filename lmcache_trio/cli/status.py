"""`lmcache-trio status`: how a running server is, in the order in which a person asks; or every figure of it."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import attrs
from cyclopts import Parameter

from lmcache_trio.abc import Tier
from lmcache_trio.cli.ask import ask, check_timeout
from lmcache_trio.cli.ending import end_with, fail
from lmcache_trio.cli.flags import Address, ServersFile, ServersSets, Switch, Timeout, load_settings
from lmcache_trio.cli.text import count, duration, percent, rows
from lmcache_trio.config import format_size
from lmcache_trio.errors import ConfigError, Unavailable
from lmcache_trio.statistics import FIGURES, figures_of

if TYPE_CHECKING:
    from lmcache_trio.client import Client

__all__ = ["status"]

PERIOD = 2.0
"""Seconds between two looks of `--watch`."""
MOST_ENGINES = 20
"""Engines that are listed. `ls` has all of them."""
NEW_SCREEN = "\x1b[H\x1b[2J"

UNKNOWN = ("", "Not known to this release.")

Table = Mapping[str, Any]
Watch = Annotated[tuple[float, ...] | None, Parameter(consume_multiple=True, negative=())]


@attrs.frozen
class Glance:
    """What a server said at one time: its `statistics`, and its `inventory`."""

    figures: Table
    listed: Table


def status(  # noqa: PLR0913  (flags)
    *,
    config: ServersFile = None,
    sets: ServersSets = (),
    address: Address = None,
    all: Switch = False,
    json: Switch = False,
    watch: Watch = None,
    check: Switch = False,
    timeout: Timeout = 5.0,
) -> None:
    """Print how a running server is: what it holds, how many tokens hit, its engines and tiers, and what is wrong.

    Parameters
    ----------
    all
        Print every figure with its unit and its meaning.
    json
        Print one JSON object with the keys "server", "faults", "held", "counted", "rates" and "tiers".
    watch
        Print it again every so many seconds (2 if no number is given), until Ctrl-C.
    check
        Print one line, for probes. Exit status 0: ready; 1: alive, and not ready; 2: no answer.
    """
    import trio

    check_timeout(timeout)
    if check and (all or json or watch is not None):
        raise ConfigError("--check", "prints one line; leave --all, --json and --watch out")
    period = _period(watch) if watch is not None else None
    where = load_settings(config, sets, address).address
    if check:
        end_with(_check(where, timeout))
    elif period is None:
        print(_told(trio.run(ask, where, timeout, _glance), all, json), end="")
    else:
        trio.run(_watch, where, timeout, period, all, json)


def _period(watch: tuple[float, ...]) -> float:
    period = watch[0] if watch else PERIOD
    if len(watch) > 1 or not 0.1 <= period <= 86_400:
        raise ConfigError("--watch", "give one number of seconds, from 0.1 to 86400, or none")
    return period


async def _glance(client: "Client") -> Glance:
    return Glance(await client.statistics(), await client.inventory())


def _check(address: str, timeout: float) -> int:
    import trio

    try:
        faults = trio.run(ask, address, timeout, _glance).figures["faults"]
    except Unavailable as exc:
        return fail(str(exc), 2)
    print("; ".join(map(_fault, faults)) or "ready")
    return 1 if faults else 0


async def _watch(address: str, seconds: float, period: float, every: bool, json: bool) -> None:
    """Print it every *period* seconds. A server that does not answer is told of, and asked again."""
    import trio

    due = trio.current_time()
    while True:
        try:
            told = _told(await ask(address, seconds, _glance), every, json)
        except Unavailable as exc:
            told = f"{exc}\n"
        print(f"{NEW_SCREEN if sys.stdout.isatty() else ''}{told}", flush=True)
        due = max(due + period, trio.current_time())
        await trio.sleep_until(due)


def _told(glance: Glance, every: bool, json: bool) -> str:
    if json:
        from json import dumps

        return dumps(glance.figures, indent=2) + "\n"
    return rows(_figures(glance.figures)) if every else _overview(glance)


# --- the overview -----------------------------------------------------------------------------------------------------


def _overview(glance: Glance) -> str:
    server, held, rates = (glance.figures[part] for part in ("server", "held", "rates"))
    first = f"lmcache-trio {server['version']} at {server['address']}, up {duration(server['uptime'])}"
    table = [
        ("Memory", _memory(held, glance.listed)),
        ("Hits", f"{_hits(rates['recent_requested_tokens'], rates['recent_hit_tokens'])} in the last minute"),
        ("", f"{_all_hits(glance.figures['counted'])} since the start"),
        *_expected(rates),
        *_labelled("Engines", _engines(held, glance.listed)),
        *_labelled("Tiers", [_tier(tier) for tier in glance.figures["tiers"]]),
        *_labelled("Faults", [_fault(fault) for fault in glance.figures["faults"]]),
    ]
    return rows([("", first)])[2:] + rows(table)


def _labelled(label: str, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines or ["none"]):
        yield ("" if number else label), line


def _memory(held: Table, listed: Table) -> str:
    size, used = held["bytes_size"], held["bytes_taken"] - held["bytes_free"]
    said = f"{format_size(used)} of {format_size(size)} ({percent(used, size)})"
    if held["bytes_retained"]:
        said += f", {format_size(held['bytes_retained'])} in use"
    can_hold = sorted({engine["tokens_in_memory"] for engine in listed["engines"] if engine["chunk_bytes"]})
    if can_hold:
        tokens = sum(layout["tokens"] for layout in listed["layouts"])
        by_engine = f", or {count(can_hold[0])} of the engine that keeps most" if len(can_hold) > 1 else ""
        said += f"; holds {count(tokens)} tokens, has room for {count(can_hold[-1])}{by_engine}"
    return said


def _hits(requested: int, hit: int) -> str:
    return f"{percent(hit, requested)} of {count(requested, 'tokens')}" if requested else "no lookup"


def _all_hits(counted: Table) -> str:
    by_source, requested = counted["hit_tokens"], counted["requested_tokens"]
    said = _hits(requested, sum(by_source.values()))
    if by_source.get("tier"):
        sources = ", ".join(f"{source} {percent(tokens, requested)}" for source, tokens in by_source.items())
        said += f" ({sources})"
    return said


def _expected(rates: Table) -> Iterator[tuple[str, str]]:
    """What other sizes would hit, once a lookup has come."""
    for of, what in (("memory", "memory"), ("tiers", "largest tier")):
        told = rates.get(f"expected_hit_ratio_{of}", {})
        if told:
            by_factor = ", ".join(f"{factor} x {percent(ratio, 1)}" for factor, ratio in told.items())
            yield "", f"expected by size of the {what}: {by_factor}"


def _engines(held: Table, listed: Table) -> list[str]:
    engines = listed["engines"]
    lines = [_engine(engine) for engine in engines[:MOST_ENGINES]]
    more = held["engines"] - len(lines)
    return [*lines, f"and {count(more)} more: see lmcache-trio ls"] if more > 0 else lines


def _engine(engine: Table) -> str:
    what = [engine["model"]] if engine["model"] else []
    if engine["no_cache"]:
        what.append(f"no cache: {engine['no_cache']}")
    else:
        tokens = engine["chunk_tokens"]
        what.append(f"chunks of {count(tokens, 'tokens')}, {format_size(engine['chunk_bytes'] / tokens)} a token")
    what.append(count(engine["sessions"], "open requests"))
    return f"{engine['name']}: {', '.join(what)}"


def _tier(tier: Table) -> str:
    said = f"{tier['name']}: {tier['state']}"
    if tier["state"] != "open":
        return said + (f", {tier['reason']}" if tier["reason"] else "")
    own = tier["backend"]
    if "bytes_used" in own:
        said += f", {format_size(own['bytes_used'])}"
        said += f" of {format_size(own['bytes_capacity'])}" if "bytes_capacity" in own else ""
    return said + (f", {format_size(tier['bytes_queued'])} to write" if tier["bytes_queued"] else "")


def _fault(fault: Table) -> str:
    return f"{fault['reason']}: {fault['detail']}"


# --- every figure -----------------------------------------------------------------------------------------------------


def _figures(found: Table) -> Iterator[tuple[str, str]]:
    """Each figure: its place in what `--json` prints, and its value, unit and meaning."""
    for part, cls in FIGURES.items():
        known = figures_of(cls)
        for prefix, table in _tables(part, found[part]):
            for key, value in table.items():
                described = known.get(key, UNKNOWN)
                if isinstance(value, Mapping):
                    own = _figures_of_backend(table["name"]) if key == "backend" else dict.fromkeys(value, described)
                    for name, inner in value.items():
                        yield f"{prefix}.{key}.{name}", _figure(inner, *own.get(name, UNKNOWN))
                else:
                    yield f"{prefix}.{key}", _figure(value, *described)


def _tables(part: str, told: Any) -> list[tuple[str, Table]]:
    """The tables of *part*, each with its place: one, or one per tier or fault."""
    return [(f"{part}.{i}", table) for i, table in enumerate(told)] if isinstance(told, list) else [(part, told)]


def _figures_of_backend(tier: str) -> Mapping[str, tuple[str, str]]:
    """Unit and meaning of what the backend of *tier* tells; nothing if it is not installed here."""
    from lmcache_trio._server.plugins import find_backend

    try:
        cls = find_backend("tiers", "tiers", tier.partition(":")[2])
    except ConfigError:
        return {}
    return cls.figures if issubclass(cls, Tier) else {}


def _figure(value: Any, unit: str, meaning: str) -> str:
    if isinstance(value, bool | str):
        said = {True: "yes", False: "no", "": "(empty)"}.get(value, value)
    else:
        said = f"{value:,} {unit}" if isinstance(value, int) else f"{value:.6g} {unit}"
    return f"{said}: {meaning}"
