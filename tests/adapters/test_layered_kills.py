"""An engine that is killed in the middle of a pass, between two layers of what it stores."""

from collections.abc import Callable

import pytest

from lmcache_trio.testing.forks import engines
from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv, wait_until

TOKENS = list(range(3 * CHUNK))
OTHERS = list(range(10_000, 10_000 + 3 * CHUNK))
FROM = [5, 9, 1, 33, 34, 35, 36, 60, 2, 7, 8, 3]
INTO = [11, 40, 12, 50, 13, 51, 14, 52, 20, 21, 22, 23]

ENGINE = f"""
import sys
from lmcache_trio.adapters.shared_kv import shared_tensor
from lmcache_trio.testing import sides
from lmcache_trio.threads import Handoff

copied = Handoff()

def tell(point, spec):
    if point.startswith("layer"):
        copied.set(True)

sides.engine_ids = iter(["an engine process"])
address, path = sys.argv[1:]
kv = sides.make_kv(1)
if path == "device":
    private, kv = kv, {{n: shared_tensor(t.nbytes).view(t.dtype).view(t.shape) for n, t in kv.items()}}
    for name, tensor in private.items():
        kv[name].copy_(tensor)
side = sides.Side(address, kv, probe=tell)
assert side.worker.path == path, side.worker.path_reason
side.store("a", {TOKENS}, {FROM})
side.scheduler.extend("b", {OTHERS})
side.worker.layered.start_stores([side.scheduler.store_spec("b", 0, {FROM})])
side.worker.layered.layer_written("layer 0")
if path == "shm":
    assert copied.wait(60)
else:
    client = side.worker._link.client
    while not side.worker._jobs.stores(["b"])[0].asked.is_set():
        side.worker._link.call(client.ping, timeout=60)
    side.worker._link.call(client.ping, timeout=60)  # asked after it: the server has heard of the layer
print("between", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("path", ["shm", "device"])
def test_an_engine_killed_between_two_layers_publishes_nothing_and_leaves_nothing(
    live_server: ServerProcess, sides: Callable[..., Side], path: str
) -> None:
    wait_until(lambda: live_server.held["bytes_taken"] == live_server.held["bytes_size"])
    before = live_server.held
    with engines.start(["-c", ENGINE, live_server.address, path], stdin=True) as engine:
        try:
            assert engine.stdout is not None
            assert engine.stdout.readline() == "between\n"
            wait_until(lambda: live_server.held["copies_running"] == live_server.held["transfers_queued"] == 0)
            during = live_server.held
            assert during["bytes_writing"] > 0
            assert during["attached"] == (path == "device")
        finally:
            engine.kill()
    wait_until(lambda: live_server.held["engines"] == 0)
    survivor = sides(live_server.address, make_kv())
    assert survivor.lookup("b", OTHERS) == 0
    assert survivor.lookup("a", TOKENS) == 3 * CHUNK
    assert survivor.load("a", 3 * CHUNK, INTO) == set()
    survivor.close()
    # What was stored whole stays, and the bytes that it takes
    stays = {"namespaces", "chunks_ready", "slots_ready", "bytes_ready", "bytes_free", "largest_hole"}

    def as_before() -> bool:
        after = live_server.held
        return {name for name in after if after[name] != before[name]} <= stays

    wait_until(as_before)
    assert live_server.held["chunks_ready"] == 3
