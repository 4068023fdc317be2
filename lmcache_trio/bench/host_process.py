"""The process of one client of the benchmark.

Run as `python -m lmcache_trio.bench.host_process SETTINGS RANK RUN ADDRESS [DISK_ADDRESS DIRECTORY]`. It reads one JSON
object per line, and writes one for each: `{"prepare": row, "n": n}` is answered when all is ready, so that several
hosts begin together; `{"go": true}` by what was measured. A line that names an `error` is its last.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lmcache_trio.bench.lookup_host import LookupHost
from lmcache_trio.bench.lookup_phases import LOOKUP_PHASES, Timed
from lmcache_trio.bench.settings import BenchSettings
from lmcache_trio.errors import LMCacheTrioError

if TYPE_CHECKING:
    from lmcache_trio.bench.host import Host

__all__ = ["main", "measure", "serve"]

Phases = Mapping[str, Callable[[int], Timed]]
"""By row: prepares so many operations of it."""


def main(arguments: Sequence[str]) -> None:
    settings, rank, run = BenchSettings.of_json(arguments[0]), int(arguments[1]), arguments[2]
    addresses, directory = [arguments[3], *arguments[4:5]], arguments[5] if len(arguments) > 5 else ""
    try:
        host, phases = _make(settings, rank, run, addresses, directory)
        servers = [site for site in (host.site, host.disk_site) if site is not None]
        gc.collect()
        gc.freeze()  # as engines do
        _say(pids=[site.client._connection.peer_pid for site in servers], left_out=host.left_out)
        serve(host.keep_hot, phases)
        host.close()
    except LMCacheTrioError as exc:
        _say(error=str(exc))


def _make(
    settings: BenchSettings, rank: int, run: str, addresses: Sequence[str], directory: str
) -> tuple["Host | LookupHost", Phases]:
    """The client, and its rows. Without torch it has no KV, and rows of lookups alone."""
    if find_spec("torch") is None:
        asker = LookupHost(settings, rank, run, addresses[0])
        return asker, {row: partial(phase, asker) for row, phase in LOOKUP_PHASES.items()}
    from lmcache_trio.bench.host import Host
    from lmcache_trio.bench.phases import PHASES

    host = Host(settings, rank, run, addresses, directory)
    return host, {row: partial(phase, host) for row, phase in PHASES.items()}


def serve(keep_hot: Callable[[], None], phases: Phases) -> None:
    """Do as standard input says, until it ends."""
    timed: Timed | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "prepare" in asked:
            timed = phases[asked["prepare"]](asked["n"])
            _say(ready=True)
        elif "hot" in asked:
            keep_hot()
            _say(ready=True)
        elif timed is not None:
            _say(**measure(timed))
            timed = None


def measure(timed: Timed) -> dict[str, object]:
    """Run *timed*: one `HostPart`."""
    cpu, began = time.process_time(), time.perf_counter()
    times = timed.run()
    ended, used = time.perf_counter(), time.process_time() - cpu
    timed.finish()
    return {"times": times, "began": began, "ended": ended, "cpu": used, "moved": timed.moved}


def _say(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
