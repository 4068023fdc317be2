"""The connector's figures as vLLM takes them: on their way from its processes, in its log, and in its own `/metrics`.

`figures` counts them. Hits are not among them: vLLM counts those itself, by source.
"""

# vLLM is not installed where this is type-checked: pyright: reportMissingImports=false

from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from lmcache_trio.adapters.vllm.figures import DROPPED, METRICS, Found, added

__all__ = ["Metrics", "Stats"]


class Stats(KVConnectorStats):  # type: ignore[misc]
    """Figures under way in `data`, a dict that any serialiser takes."""

    def reset(self) -> None:
        self.data: Found = {}

    def aggregate(self, other: "Stats") -> "Stats":
        return Stats(added(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        """One number per figure, for vLLM's log: of seconds, their mean and how many there were."""
        found: dict[str, int | float] = {}
        for name, value in self.data.items():
            if isinstance(value, list):
                found |= {f"mean {name}": round(sum(value) / len(value), 6), f"number of {name}": len(value)}
            else:
                found[name] = value
        return found

    def is_empty(self) -> bool:
        return not self.data


class Metrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The metrics of all engines of one front end. `observe` adds the figures of one of them."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[type, type],
        labelnames: list[str],
        per_engine_labelvalues: Mapping[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._made: dict[str, Any] = {}
        for figure, metric in METRICS.items():
            labels = [*labelnames, "reason"] if figure == DROPPED else labelnames
            kind, more = (Histogram, {"buckets": metric.buckets}) if metric.buckets else (Counter, {})
            self._made[figure] = metric_types[kind](
                name=metric.name, documentation=metric.documentation, labelnames=labels, **more
            )
            if figure != DROPPED:
                for values in per_engine_labelvalues.values():
                    self._made[figure].labels(*values)  # shown as 0 from the start

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values = self.per_engine_labelvalues[engine_idx]
        for figure, value in transfer_stats_data.items():
            if figure.startswith(DROPPED):
                self._made[DROPPED].labels(*values, figure.removeprefix(DROPPED)).inc(value)
            elif figure in self._made:
                metric = self._made[figure].labels(*values)
                for seconds in value if isinstance(value, list) else ():
                    metric.observe(seconds)
                if not isinstance(value, list):
                    metric.inc(value)
