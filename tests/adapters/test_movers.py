"""What any mover promises a worker's host: each test runs on the path `shm` and on the path `device`."""

from collections.abc import Callable

import pytest
import torch

from lmcache_trio.adapters import LoadSpec, WorkerAdapter
from lmcache_trio.adapters.specs import StoreSpec
from lmcache_trio.errors import Unavailable
from lmcache_trio.testing.sides import (
    BLOCKS,
    CHUNK,
    ServerProcess,
    Side,
    make_kv,
    same_blocks,
    shared_kv,
    wait_until,
)

TOKENS = list(range(3 * CHUNK))
FROM = [5, 9, 1, 33, 34, 35, 36, 60, 2, 7, 8, 3]
INTO = [11, 40, 12, 50, 13, 51, 14, 52, 20, 21, 22, 23]

MakeSide = Callable[..., Side]
MakeKV = Callable[..., dict[str, torch.Tensor]]

both_paths = pytest.mark.parametrize("kv", [make_kv, shared_kv], ids=["shm", "device"])


def retrieve(side: Side, request_id: str, tokens: int, blocks: list[int]) -> LoadSpec:
    assert side.lookup(request_id, TOKENS) == 3 * CHUNK
    spec = side.scheduler.update_after_alloc(request_id, tokens, block_ids=blocks)
    assert spec is not None
    return spec


@both_paths
def test_what_one_engine_stored_another_loads_byte_for_byte(
    live_server: ServerProcess, sides: MakeSide, kv: MakeKV
) -> None:
    one, other = sides(live_server.address, kv(1)), sides(live_server.address, kv())
    assert one.worker.path == other.worker.path == ("shm" if kv is make_kv else "device")
    stored = sum(tensor[:, FROM].nbytes for tensor in one.kv.values())
    one.store("r", TOKENS, FROM)
    assert one.worker.statistics() == {"running": 0, "stored_chunks": 3}
    assert (one.worker.bytes_stored, one.worker.bytes_loaded) == (stored, 0)
    other.worker.retrieve_now([retrieve(other, "q", 3 * CHUNK, INTO)])
    assert other.worker.take_failed_blocks() == set()
    assert other.worker.statistics() == {"running": 0, "retrieved_chunks": 3}
    assert (other.worker.bytes_stored, other.worker.bytes_loaded) == (0, stored)
    assert same_blocks(one.kv, FROM, other.kv, INTO)
    untouched = [b for b in range(BLOCKS) if b not in INTO]
    assert same_blocks(other.kv, untouched, make_kv(), untouched)


@both_paths
def test_a_load_writes_only_the_blocks_that_it_names(live_server: ServerProcess, sides: MakeSide, kv: MakeKV) -> None:
    one, other = sides(live_server.address, kv(1)), sides(live_server.address, kv())
    one.store("r", TOKENS, FROM)
    assert other.lookup("q", TOKENS) == 3 * CHUNK
    spec = other.scheduler.update_after_alloc("q", CHUNK + 16, local_tokens=CHUNK - 32, block_ids=INTO[:5])
    assert spec is not None
    assert (spec.start, spec.count, spec.skip_blocks) == (0, 2, 2)
    other.worker.retrieve_now([spec])
    assert other.worker.take_failed_blocks() == set()
    assert same_blocks(one.kv, FROM[2:7], other.kv, INTO[:5])
    untouched = [b for b in range(BLOCKS) if b not in INTO[:5]]
    assert same_blocks(other.kv, untouched, make_kv(), untouched)


@both_paths
def test_jobs_in_the_background_are_reported_once_when_they_are_over(
    live_server: ServerProcess, sides: MakeSide, kv: MakeKV
) -> None:
    one = sides(live_server.address, kv(1))
    one.scheduler.extend("r", TOKENS)
    one.worker.submit_store(one.scheduler.store_spec("r", 0, FROM[:4]))
    one.worker.submit_store(one.scheduler.store_spec("r", 1, FROM[4:]))
    one.worker.wait_stores(["r"])
    finished: set[str] = set()

    def stored() -> bool:
        finished.update(one.worker.take_finished()[0])
        return bool(finished)

    wait_until(stored)
    assert finished == {"r"}
    assert one.worker.take_finished() == (set(), set())
    assert one.lookup("again", TOKENS) == 3 * CHUNK


@both_paths
def test_a_lease_that_is_used_up_or_guessed_comes_back_as_failed_blocks_and_costs_no_other_load(
    live_server: ServerProcess, sides: MakeSide, kv: MakeKV
) -> None:
    one, other = sides(live_server.address, kv(1)), sides(live_server.address, kv())
    one.store("r", TOKENS, FROM)
    used_up = LoadSpec("x", 1, b"", 0, 1, 0, (1, 2, 3, 4))
    guessed = LoadSpec("y", 1, b"guessed lease 16", 0, 1, 0, (5, 6, 7, 8))
    other.worker.retrieve_now([used_up, retrieve(other, "q", CHUNK, INTO[:4]), guessed])
    assert other.worker.take_failed_blocks() == set(range(1, 9))
    assert same_blocks(one.kv, FROM[:4], other.kv, INTO[:4])


@both_paths
def test_without_a_server_jobs_fail_and_with_it_back_they_are_carried_out_again(
    live_server: ServerProcess, sides: MakeSide, kv: MakeKV
) -> None:
    one = sides(live_server.address, kv(1))
    path = one.worker.path
    live_server.kill()
    one.store("r", TOKENS, FROM)
    assert one.worker.statistics() == {"running": 0, "dropped_unavailable": 3}
    one.worker.retrieve_now([LoadSpec("x", 1, b"guessed lease 16", 0, 1, 0, (1, 2, 3, 4))])
    assert one.worker.take_failed_blocks() == {1, 2, 3, 4}
    live_server.start()
    one.wait_healthy()
    one.check_round_trip("r", TOKENS, FROM, INTO)
    assert one.worker.path == path


# --- behind what the engine has submitted: on the path device, `test_device_mover` says it ---------------------------


class Fence:
    """What a GPU's engine would have submitted by now: *said* hears when a copy waited for it."""

    def __init__(self, said: list[str], number: int) -> None:
        self._said, self._number = said, number

    def synchronize(self) -> None:
        self._said.append(f"fence {self._number}")


class Fenced:
    """A probe of a worker whose KV is as if it were on a GPU: each fence has a number."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.made = 0

    def fence(self) -> Fence:
        self.made += 1
        return Fence(self.said, self.made)

    def __call__(self, point: str, spec: StoreSpec | LoadSpec) -> None:
        if point == "slots known":
            self.said.append("copy")

    def at(self, side: Side) -> WorkerAdapter:
        assert side.worker._registered.latest is not None
        side.worker._registered.latest.fence = self.fence  # type: ignore[method-assign]
        return side.worker


def test_a_copy_follows_what_the_engine_had_submitted(live_server: ServerProcess, sides: MakeSide) -> None:
    fenced = Fenced()
    one, other = sides(live_server.address, make_kv(1), probe=fenced), sides(live_server.address, make_kv())
    worker = fenced.at(one)
    one.store("r", TOKENS, FROM)
    worker.retrieve_now([retrieve(one, "q", 3 * CHUNK, INTO)])
    assert fenced.said == ["fence 1", "copy", "fence 2", "copy"]
    assert other.lookup("p", TOKENS) == 3 * CHUNK
    assert other.load("p", 3 * CHUNK, INTO) == set()
    assert same_blocks(one.kv, FROM, other.kv, INTO)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_load_whose_end_is_not_acknowledged_keeps_no_other_pinned(
    live_server: ServerProcess, sides: MakeSide, foreseen: bool
) -> None:
    one = sides(live_server.address, make_kv(1))
    one.store("r", TOKENS, FROM)
    specs = [retrieve(one, "q", 2 * CHUNK, INTO[:8]), retrieve(one, "p", CHUNK, INTO[8:])]
    client = one.worker._link.client
    assert client is not None
    done, failed = client.done, list[bytes]()

    async def first_fails(pin: bytes) -> bool:
        client.done = done  # type: ignore[method-assign]
        failed.append(pin)
        await done(pin)
        raise Unavailable("it is late") if foreseen else ValueError("nobody thought of this")

    client.done = first_fails  # type: ignore[method-assign]
    one.worker.retrieve_now(specs)
    assert len(failed) == 1
    assert one.worker.take_failed_blocks() in (set(INTO[:8]), set(INTO[8:])), "whichever ended first"
    wait_until(lambda: live_server.held["pins"] == 0)
