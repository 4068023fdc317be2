"""A store that was submitted is finished, whatever becomes of its session; and its end can be waited for."""

from collections.abc import Callable

import pytest

from lmcache_trio.adapters import LoadSpec, StoreSpec
from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv
from lmcache_trio.threads import Handoff

MakeSide = Callable[..., Side]
TOKENS = list(range(4 * CHUNK))
AT = list(range(16))


class Gate:
    """A probe: the copies have ended, and nothing is committed until it is let go on."""

    def __init__(self) -> None:
        self.gate: Handoff[bool] = Handoff()

    def __call__(self, point: str, spec: StoreSpec | LoadSpec) -> None:
        if point == "before commit":
            self.gate.wait(60)


def submit(side: Side, request: str) -> None:
    side.scheduler.extend(request, TOKENS)
    side.worker.submit_store(side.scheduler.store_spec(request, 0, AT))


def test_a_store_is_published_though_its_session_ended_as_soon_as_its_blocks_were_free(
    live_server: ServerProcess, sides: MakeSide
) -> None:
    one = sides(live_server.address, make_kv(1))
    for i in range(20):
        one.scheduler.extend(f"r{i}", [i, *TOKENS])
        one.worker.submit_store(one.scheduler.store_spec(f"r{i}", 0, AT))
        one.worker.wait_stores()
        one.scheduler.end_session(f"r{i}")
    one.worker.wait_published()
    assert one.worker.statistics() == {"running": 0, "stored_chunks": 80}
    assert one.lookup("q", [7, *TOKENS]) == 4 * CHUNK


def test_a_store_that_has_no_slots_yet_is_published_though_its_session_ended(
    live_server: ServerProcess, sides: MakeSide
) -> None:
    one = sides(live_server.address, make_kv(1))
    entered: Handoff[bool] = Handoff()
    gate: Handoff[bool] = Handoff()

    def wait() -> None:
        entered.set(True)
        gate.wait(60)

    one.worker._link.post(wait)
    assert entered.wait(60)
    submit(one, "r")  # reaches the server after the end of its session
    one.scheduler.end_session("r")
    assert one.lookup("q", TOKENS) == 0  # so it is over there
    gate.set(True)
    one.worker.wait_published(["r"])
    one.scheduler.free_lookup_locks("q")
    assert one.worker.statistics() == {"running": 0, "stored_chunks": 4}
    assert one.lookup("q", TOKENS) == 4 * CHUNK


@pytest.mark.parametrize("requests", [None, ["r"]])
def test_wait_published_returns_when_what_was_submitted_can_be_loaded(
    live_server: ServerProcess, sides: MakeSide, requests: list[str] | None
) -> None:
    probe = Gate()
    one, other = sides(live_server.address, make_kv(1), probe=probe), sides(live_server.address, make_kv())
    submit(one, "r")
    one.worker.wait_published(["of another request"])
    assert other.lookup("before", TOKENS) == 0
    probe.gate.set(True)
    one.worker.wait_published(requests)
    assert one.worker.take_finished() == ({"r"}, set())
    assert other.lookup("after", TOKENS) == 4 * CHUNK


def test_wait_published_returns_when_the_server_is_gone(live_server: ServerProcess, sides: MakeSide) -> None:
    probe = Gate()
    one = sides(live_server.address, make_kv(1), probe=probe)
    submit(one, "r")
    live_server.kill()
    probe.gate.set(True)
    one.worker.wait_published()
    assert one.worker.take_finished() == ({"r"}, set())
    assert one.worker.statistics().get("stored_chunks", 0) == 0
