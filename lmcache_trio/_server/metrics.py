"""A server's figures as Prometheus reads them. They are collected when they are scraped; nothing is done before.

Each figure of `lmcache_trio.statistics` is one metric: what is held is a gauge, what is counted a counter. The names
follow Prometheus' rules: `lmcache_trio_`, the figure's key, and its unit in the end. A figure that comes by state, by
reason, by limit or by tier is one metric with a label.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lmcache_trio._server.parts import Parts
from lmcache_trio.statistics import ServerCounted, ServerHeld, ServerRates, TierStatistics, figures_of, table

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["COUNTED_BY_TIERS", "Figure", "ServerMetrics", "figures"]

PREFIX = "lmcache_trio_"
STATES = ("ready", "writing", "quarantined", "stale")
_CALLS, _LOADS = {"failures", "bugs"}, {"loads", "loads_missed", "loads_without_room", "bytes_loaded"}
COUNTED_BY_TIERS = frozenset(_CALLS | _LOADS | {"stores", "stores_refused", "bytes_stored", "dropped"})
"""The figures of a tier that only go up."""
_NAMES = {
    "hits": "hit_chunks",
    "misses": "missed_chunks",
    "evictions": "evicted_chunks",
    "drops": "dropped_chunks",
    "limits": "limited_requests",
    "loads": "loaded_chunks",
    "stores": "stored_chunks",
    "dropped": "dropped_chunks",
    "copy_bytes_running": "copies_running_bytes",
}
"""Keys whose unit can't be told from them."""
_BY_STATE = {
    "chunks": ("chunks", "Chunks in memory, by state."),
    "slots": ("slots", "Slots of the chunks in memory, by state."),
    "bytes": ("chunk_bytes", "Bytes of the chunks in memory, by state."),
}
_LABELS = {"hit_tokens": "source", "missed_tokens": "reason", "limits": "limit", "drops": "reason"}


@attrs.frozen
class Figure:
    """One figure as a metric: its *name*, without the `_total` that a counter gets, and its labels."""

    key: str
    name: str
    meaning: str
    counted: bool
    label: str = ""
    value: str = ""
    """Of *label*; empty where the figure itself is a table by that label."""
    of: str = ""
    """The value of a label `of` before *label*, if the metric has one."""


def figures(cls: type[Any], *, part: str = "", counted: bool | frozenset[str] = False) -> list[Figure]:
    """The metrics of the numbers in *cls*, in its order; *part* comes before each key."""
    found: list[Figure] = []
    for key, (unit, meaning) in figures_of(cls).items():
        thing, _, state = key.rpartition("_")
        counts = key in counted if isinstance(counted, frozenset) else counted
        if state in STATES and thing in _BY_STATE:
            name, words = _BY_STATE[thing]
            found.append(Figure(key, PREFIX + name, words, False, "state", state))
            continue
        if thing == "expected_hit_ratio":
            words = "The share of tokens that would hit with so many times the memory, or the largest tier."
            found.append(Figure(key, PREFIX + thing, words, False, "factor", of=state))
            continue
        name = _NAMES.get(key, f"{key.removeprefix('bytes_')}_bytes" if key.startswith("bytes_") else key)
        if unit == "bytes" and not name.endswith("_bytes"):
            name = f"{name}_bytes"
        elif unit == "seconds" and not name.endswith("_seconds"):
            name = f"{name}_seconds"
        found.append(Figure(key, f"{PREFIX}{part}{name}", meaning.replace("`", ""), counts, _LABELS.get(key, "")))
    return found


HELD = figures(ServerHeld)
COUNTED = figures(ServerCounted, counted=True)
RATES = figures(ServerRates)
OF_TIERS = [
    figure
    for figure in figures(TierStatistics, part="tier_", counted=COUNTED_BY_TIERS)
    if figure.key not in ("name", "state", "fenced", "reason", "backend")
]


class ServerMetrics:
    """The figures of the server of *parts*, in either format that Prometheus asks for."""

    def __init__(self, parts: Parts) -> None:
        from prometheus_client import CollectorRegistry, ProcessCollector

        self._parts = parts
        self._began = time.time()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the format that *accept* prefers, and the type of that format."""
        from prometheus_client.exposition import choose_encoder

        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind

    def collect(self) -> Iterator["Metric"]:
        """Called by the registry, at each scrape."""
        from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

        info = InfoMetricFamily(f"{PREFIX}build", "The version of lmcache-trio.")
        info.add_metric([], {"version": self._parts.version})
        yield info
        began = "When the server started, in seconds since 1970."
        yield GaugeMetricFamily(f"{PREFIX}start_time_seconds", began, self._began)
        statistics = self._parts.statistics()
        yield from _families(HELD, [({}, table(statistics.held))])
        yield from _families(COUNTED, [({}, table(statistics.counted))])
        yield from _families(RATES, [({}, table(statistics.rates))])
        tiers = [({"tier": tier.name}, table(tier)) for tier in statistics.tiers]
        yield from _families(OF_TIERS, tiers)
        up = GaugeMetricFamily(f"{PREFIX}tier_open", "1 if the tier is in use.", labels=["tier"])
        own = GaugeMetricFamily(f"{PREFIX}tier_backend", "The backend's own figures.", labels=["tier", "figure"])
        for tier in statistics.tiers:
            up.add_metric([tier.name], tier.state == "open")
            for key, value in tier.backend.items():
                if isinstance(value, int):
                    own.add_metric([tier.name, key], value)
        yield from (up, own)


def _families(
    asked: Iterable[Figure], told: Sequence[tuple[Mapping[str, str], Mapping[str, Any]]]
) -> Iterator["Metric"]:
    """The families of *asked*, with a sample of each from every table of *told*, which comes with its own labels."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    made: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for figure in asked:
        family = made.get(figure.name)
        if family is None:
            kind = CounterMetricFamily if figure.counted else GaugeMetricFamily
            outer = list(told[0][0]) if told else []
            labels = [*outer, *(["of"] if figure.of else []), *([figure.label] if figure.label else [])]
            family = made[figure.name] = kind(figure.name, figure.meaning, labels=labels)
        for labels_of_it, values in told:
            if figure.key not in values:
                continue
            value = values[figure.key]
            by = value if figure.label and not figure.value else {figure.value: value}
            outer = [*labels_of_it.values(), *([figure.of] if figure.of else [])]
            for label, number in by.items():
                family.add_metric([*outer, *([label] if figure.label else [])], number)
    yield from made.values()
