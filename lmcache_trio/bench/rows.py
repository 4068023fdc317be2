"""What was measured: one `HostPart` a client and round, one `Round` of all clients, one `ResultRow` of all rounds.

Every figure of a row is the median of its rounds', and so is its ratio: each round's figure is divided by the limit
that the same round measured. Nothing here measures or prints.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import attrs

from lmcache_trio.bench.settings import COPIES, DISK
from lmcache_trio.errors import ConfigError

__all__ = [
    "HostPart",
    "ResultRow",
    "Round",
    "client_share",
    "load_rows",
    "percentile",
    "save_rows",
    "speed_of",
    "spread",
    "summarise",
]

_COPYING = frozenset((*COPIES, *DISK))
_WITHOUT_SERVER = ("memcpy", "memcpy_shm", "direct_read", "direct_write")


@attrs.frozen
class HostPart:
    """One client's share of a round: seconds of each operation, and when they were, on the machine's monotonic clock.

    *cpu* is the client's own processor time, all threads; *moved* the bytes that were copied.
    """

    times: Sequence[float]
    began: float
    ended: float
    cpu: float
    moved: int = 0


@attrs.frozen
class Round:
    """All clients together. *server_cpu* is None where the server's processor time cannot be read."""

    parts: Sequence[HostPart]
    server_cpu: float | None

    @property
    def times(self) -> list[float]:
        return [t for part in self.parts for t in part.times]

    @property
    def seconds(self) -> float:
        return max(part.ended for part in self.parts) - min(part.began for part in self.parts)

    @property
    def operations(self) -> int:
        return sum(len(part.times) for part in self.parts)

    @property
    def p50(self) -> float:
        return percentile(self.times, 0.5)

    @property
    def p99(self) -> float:
        return percentile(self.times, 0.99)

    @property
    def bandwidth(self) -> float:
        """Bytes a second: of one client while it copied, of several over the time from the first to the last."""
        moved = sum(part.moved for part in self.parts)
        return moved / (sum(self.times) if len(self.parts) == 1 else self.seconds)


@attrs.frozen
class ResultRow:
    """A line of the table. Microseconds are an operation's; *ratio* is told by docs/performance.md."""

    name: str
    clients: int
    n: int
    p50_us: float | None
    p99_us: float | None
    ops_s: float | None
    gb_s: float | None
    cpu_client_us: float | None
    cpu_server_us: float | None
    ratio: float | None


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of *values* that *share* of them do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


def summarise(measured: Mapping[str, Sequence[Round]]) -> list[ResultRow]:
    """One row a name, in order. `memcpy` and `bare_round_trip`, if there, are what the others are related to."""
    return [_row(name, rounds, measured) for name, rounds in measured.items() if rounds]


def _row(name: str, rounds: Sequence[Round], measured: Mapping[str, Sequence[Round]]) -> ResultRow:
    copying = name in _COPYING
    limits = measured.get("memcpy" if copying else "bare_round_trip", ())
    servers = [r.server_cpu / r.operations for r in rounds if r.server_cpu is not None]
    return ResultRow(
        name,
        len(rounds[0].parts),
        sum(r.operations for r in rounds),
        _micro([r.p50 for r in rounds]),
        _micro([r.p99 for r in rounds]),
        median(r.operations / r.seconds for r in rounds),
        median(r.bandwidth for r in rounds) / 1e9 if copying else None,
        _micro([sum(part.cpu for part in r.parts) / r.operations for r in rounds]),
        _micro(servers) if servers and name not in _WITHOUT_SERVER else None,
        speed_of(rounds, limits) if copying else _delay(rounds, limits),
    )


def speed_of(rounds: Sequence[Round], limits: Sequence[Round]) -> float | None:
    """GB/s of *rounds* by that of *limits*, round by round: the median. None without limits."""
    shares = [r.bandwidth / limit.bandwidth for r, limit in zip(rounds, limits, strict=False)]
    return median(shares) if shares else None


def client_share(rounds: Sequence[Round]) -> float | None:
    """What the client spent of the processor time that it and the server spent. None: the server's is not known."""
    spent = [(sum(part.cpu for part in r.parts), r.server_cpu) for r in rounds]
    shares = [ours / (ours + server) for ours, server in spent if server is not None]
    return median(shares) if shares else None


def _delay(rounds: Sequence[Round], limits: Sequence[Round]) -> float | None:
    shares = [r.p50 / limit.p50 for r, limit in zip(rounds, limits, strict=False)]
    return median(shares) if shares else None


def _micro(seconds: Sequence[float]) -> float:
    return median(seconds) * 1e6


def spread(values: Sequence[float]) -> float:
    """How far apart *values* lie: the range of the middle four fifths of them, as a share of their median."""
    ranked = sorted(values)
    cut = len(ranked) // 10
    inner = ranked[cut : len(ranked) - cut]
    return (inner[-1] - inner[0]) / median(ranked)


def save_rows(path: Path, rows: Sequence[ResultRow]) -> None:
    """Write *rows* as a JSON list of objects."""
    try:
        path.write_text(json.dumps([_rounded(row) for row in rows], indent=1) + "\n")
    except OSError as exc:
        raise ConfigError("--json", f"{path} cannot be written: {exc.strerror}") from exc


def load_rows(path: Path) -> list[ResultRow]:
    """What `save_rows` wrote; `ConfigError` if it is something else."""
    try:
        found: Any = json.loads(path.read_text())
        if not isinstance(found, list):
            raise TypeError("it holds no list")
        return [ResultRow(**row) for row in found]
    except (OSError, ValueError, TypeError) as exc:
        raise ConfigError(path.name, f"{path} is no file that lmcache-trio bench --json wrote: {exc}") from exc


def _rounded(row: ResultRow) -> dict[str, Any]:
    """Five digits: nothing here is known to more."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in attrs.asdict(row).items()}
