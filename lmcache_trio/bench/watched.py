"""A server that also times its own loop: `python -m lmcache_trio.bench.watched --address ADDRESS --set KEY=VALUE …`.

On SIGUSR1 it writes one JSON object, seconds since the one before: the longest time for which the loop waited for no
I/O, by the clock (`pause`, which on a busy machine holds the time of others too) and by its own processor time
(`pause_cpu`); and how long a full garbage collection takes at this moment (`collection`, `collection_cpu`).
"""

import gc
import json
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

import trio

from lmcache_trio._server.supervise import Server, serve
from lmcache_trio.config import load_config

__all__ = ["PauseInstrument", "main"]


class PauseInstrument(trio.abc.Instrument):
    """How long a loop was away from its I/O, at most."""

    def __init__(self) -> None:
        self.pause = self.pause_cpu = 0.0
        self._since: tuple[float, float] | None = None

    def after_io_wait(self, timeout: float) -> None:
        self._since = (time.perf_counter(), time.thread_time())

    def before_io_wait(self, timeout: float) -> None:
        if self._since is not None:
            self.pause = max(self.pause, time.perf_counter() - self._since[0])
            self.pause_cpu = max(self.pause_cpu, time.thread_time() - self._since[1])

    def tell(self, signum: int, frame: FrameType | None) -> None:
        began, cpu = time.perf_counter(), time.thread_time()
        gc.collect()
        took = {"collection": time.perf_counter() - began, "collection_cpu": time.thread_time() - cpu}
        print(json.dumps({"pause": self.pause, "pause_cpu": self.pause_cpu, **took}), flush=True)
        self.pause = self.pause_cpu = 0.0
        self._since = None


def main(arguments: Sequence[str]) -> None:
    address, sets = arguments[1], [item for item in arguments[2:] if item != "--set"]
    watch = PauseInstrument()

    def on_ready(server: Server) -> None:
        signal.signal(signal.SIGUSR1, watch.tell)
        trio.lowlevel.add_instrument(watch)
        print(f"ready: {server.address}", flush=True)

    serve(load_config(None, [*sets, f"address={address}"]), on_ready)


if __name__ == "__main__":
    main(sys.argv[1:])
