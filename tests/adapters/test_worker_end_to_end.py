"""Both adapters against a real server over real shared memory: what is stored comes back, and no death hangs anyone."""

from collections.abc import Callable

import pytest

from lmcache_trio.adapters import LoadSpec, StoreSpec
from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv, wait_until

TOKENS = list(range(3 * CHUNK))
FROM = [5, 9, 1, 33, 34, 35, 36, 60, 2, 7, 8, 3]
INTO = [11, 40, 12, 50, 13, 51, 14, 52, 20, 21, 22, 23]

MakeSide = Callable[..., Side]


class Fault:
    """A probe that does what the test wants at one named point of a copy, once."""

    def __init__(self) -> None:
        self.point = ""
        self.fault: Callable[[], None] = lambda: None

    def at(self, point: str, fault: Callable[[], None]) -> None:
        self.point, self.fault = point, fault

    def __call__(self, point: str, spec: StoreSpec | LoadSpec) -> None:
        if point == self.point:
            self.point = ""
            self.fault()


def test_a_store_whose_commit_is_refused_counts_as_dropped_and_not_as_stored(
    live_server: ServerProcess, sides: MakeSide
) -> None:
    probe = Fault()
    one = sides(live_server.address, make_kv(1), probe=probe)

    def reset() -> None:
        assert one.scheduler.reset_cache()

    probe.at("before commit", reset)
    one.store("r", TOKENS, FROM)
    assert one.worker.statistics() == {"running": 0, "dropped_aborted": 3}
    assert live_server.statistics()["counted"]["aborted_chunks"] == 3
    one.store("again", TOKENS, FROM)
    assert one.worker.statistics() == {"running": 0, "dropped_aborted": 3, "stored_chunks": 3}


@pytest.mark.parametrize("point", ["slots known", "half copied", "before commit"])
def test_a_server_killed_in_a_store_drops_it_and_is_used_again_when_it_is_back(
    live_server: ServerProcess, sides: MakeSide, point: str
) -> None:
    probe = Fault()
    one = sides(live_server.address, make_kv(1), probe=probe)
    probe.at(point, live_server.kill)
    one.store("r", TOKENS, FROM)
    assert one.worker.statistics() == {"running": 0, "dropped_unavailable": 3}
    assert one.lookup("q", TOKENS) == 0
    live_server.start()
    one.wait_healthy()
    one.check_round_trip("r", TOKENS, FROM, INTO)


@pytest.mark.parametrize("point", ["slots known", "half copied", "before valid"])
@pytest.mark.parametrize("back", [False, True])
def test_a_server_killed_in_a_retrieve_gives_failed_blocks(
    live_server: ServerProcess, sides: MakeSide, point: str, back: bool
) -> None:
    probe = Fault()
    one = sides(live_server.address, make_kv(1), probe=probe)
    one.store("r", TOKENS, FROM)
    assert one.lookup("q", TOKENS) == 3 * CHUNK

    def fault() -> None:
        live_server.kill()
        if back:
            live_server.start()

    probe.at(point, fault)
    assert one.load("q", 3 * CHUNK, INTO) == set(INTO)


def test_a_store_whose_engine_reset_the_cache_meanwhile_is_never_served(
    live_server: ServerProcess, sides: MakeSide
) -> None:
    probe = Fault()
    one = sides(live_server.address, make_kv(1), probe=probe)
    confirmed: list[bool] = []
    probe.at("half copied", lambda: confirmed.append(one.scheduler.reset_cache()))
    one.store("r", TOKENS, FROM)
    assert confirmed == [True]
    assert one.lookup("q", TOKENS) == 0


def test_a_server_that_falls_silent_bounds_a_store_and_a_retrieve(live_server: ServerProcess, sides: MakeSide) -> None:
    one = sides(live_server.address, make_kv(1), lookup_timeout=0.2)
    one.store("r", TOKENS, FROM)
    assert one.lookup("q", TOKENS) == 3 * CHUNK
    spec = one.scheduler.update_after_alloc("q", 3 * CHUNK, block_ids=INTO)
    assert spec is not None
    live_server.pause()
    one.worker._shm._reply_timeout = 0.1
    one.worker.retrieve_now([spec])
    assert one.worker.take_failed_blocks() == set(INTO)
    one.worker.store_now([one.scheduler.store_spec("r", 0, FROM)])
    assert one.worker.statistics()["dropped_unavailable"] == 3
    live_server.go_on()
    wait_until(lambda: live_server.held["pins"] == 0 and live_server.held["reservations"] == 0)
