"""What a reset and other weights do to an engine's chunks, to what it has under way, and to other engines' chunks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lmcache_trio.adapters import PollingSchedulerAdapter, SchedulerAdapter
from lmcache_trio.adapters.shared_kv import shared_tensor
from lmcache_trio.errors import Misuse
from lmcache_trio.testing.sides import (
    BLOCK,
    BLOCKS,
    CHUNK,
    HEAD,
    HEADS,
    LAYERS,
    ServerProcess,
    Side,
    make_kv,
    same_blocks,
    wait_until,
)
from lmcache_trio.threads import Handoff

MakeSide = Callable[..., Side]
KV = dict[str, torch.Tensor]
TOKENS = list(range(4 * CHUNK))
AT = list(range(16))
INTO = list(range(32, 48))


def shared_kv(seed: int) -> KV:
    """As `make_kv`, in memory that the server can open: the device path is taken."""
    shape = (2, BLOCKS, BLOCK, HEADS, HEAD)
    elements = 2 * BLOCKS * BLOCK * HEADS * HEAD
    storage = shared_tensor(4 * elements * LAYERS).view(torch.float32)
    kv = {f"layer {i}": storage[i * elements : (i + 1) * elements].view(shape) for i in range(LAYERS)}
    for name, tensor in make_kv(seed).items():
        kv[name].copy_(tensor)
    return kv


both_paths = pytest.mark.parametrize("kv", [make_kv, shared_kv], ids=["shm", "device"])


@contextmanager
def held_back(side: Side) -> Iterator[None]:
    """What the worker is given in the block is submitted there, and reaches the server behind it."""
    entered: Handoff[bool] = Handoff()
    gate: Handoff[bool] = Handoff()

    def wait() -> None:
        entered.set(True)
        gate.wait(60)

    side.worker._link.post(wait)
    assert entered.wait(60)
    try:
        yield
    finally:
        gate.set(True)


def stores_ended(side: Side) -> None:
    wait_until(lambda: side.worker.statistics()["running"] == 0)


def fresh(sides: MakeSide, server: ServerProcess, **settings: object) -> Side:
    return sides(server.address, make_kv(), **settings)


# --- what began before ----------------------------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("when", ["planned", "submitted"])
def test_a_store_that_was_under_way_at_a_reset_is_dropped_and_counted(
    live_server: ServerProcess, sides: MakeSide, kv: Callable[[int], KV], when: str
) -> None:
    one = sides(live_server.address, kv(1))
    assert one.worker.path == ("device" if kv is shared_kv else "shm")
    one.scheduler.extend("r", TOKENS)
    spec = one.scheduler.store_spec("r", 0, AT)
    with held_back(one):
        if when == "submitted":
            one.worker.submit_store(spec)
        assert one.scheduler.reset_cache()
        one.scheduler.set_weights_version("what it was")  # so that its names could be asked for
    if when == "planned":
        one.worker.submit_store(spec)
    stores_ended(one)
    assert one.worker.statistics() == {"running": 0, "dropped_reset": 4}
    assert live_server.statistics()["counted"]["drops"]["reset"] == 4
    for settings in ({}, {"weights_version": "what it was"}):
        assert fresh(sides, live_server, **settings).lookup("q", TOKENS) == 0


def test_a_store_of_another_engine_of_that_model_is_dropped_too(live_server: ServerProcess, sides: MakeSide) -> None:
    one, other = sides(live_server.address, make_kv(1)), sides(live_server.address, make_kv(2))
    other.scheduler.extend("r", TOKENS)
    spec = other.scheduler.store_spec("r", 0, AT)
    assert one.scheduler.reset_cache()
    other.worker.store_now([spec])
    assert other.worker.statistics() == {"running": 0, "dropped_reset": 4}
    other.store("next", TOKENS, AT)
    assert fresh(sides, live_server).lookup("q", TOKENS) == 4 * CHUNK


@pytest.mark.parametrize("change", ["reset", "version"])
@pytest.mark.parametrize("adapter", [SchedulerAdapter, PollingSchedulerAdapter])
def test_a_request_that_lives_stores_nothing_more_until_it_is_looked_up_again(
    live_server: ServerProcess, sides: MakeSide, adapter: type[SchedulerAdapter], change: str
) -> None:
    one = sides(live_server.address, make_kv(1), scheduler=adapter)
    assert one.lookup("r", TOKENS) == 0
    one.store("r", TOKENS[: 2 * CHUNK], AT[:8])
    if change == "reset":
        assert one.scheduler.reset_cache()
    else:
        one.scheduler.set_weights_version("2")
    one.store("r", TOKENS, AT)
    assert one.worker.statistics() == {"running": 0, "stored_chunks": 2, "dropped_reset": 4}
    assert one.lookup("r", TOKENS) == 0  # it is begun anew
    one.store("r", TOKENS, AT)
    assert one.worker.statistics()["stored_chunks"] == 6
    one.scheduler.free_lookup_locks("r")
    assert one.lookup("r", TOKENS) == 4 * CHUNK
    assert one.load("r", 4 * CHUNK, INTO) == set()
    assert same_blocks(one.kv, AT, one.kv, INTO)


@pytest.mark.parametrize("change", ["reset", "version"])
def test_a_store_that_has_its_slots_when_the_weights_change_is_not_published(
    live_server: ServerProcess, sides: MakeSide, change: str
) -> None:
    """It may hold what the next weights computed: a server that was stopped hears of both at one time."""
    entered: Handoff[bool] = Handoff()
    gate: Handoff[bool] = Handoff()

    def probe(point: str, spec: object) -> None:
        if point == "slots known":
            entered.set(True)
            gate.wait(60)

    one = sides(live_server.address, make_kv(1), probe=probe)
    one.scheduler.extend("r", TOKENS)
    one.worker.submit_store(one.scheduler.store_spec("r", 0, AT))
    assert entered.wait(60)
    if change == "reset":
        assert one.scheduler.reset_cache()
    else:
        one.scheduler.set_weights_version("2")
    gate.set(True)
    stores_ended(one)
    assert one.worker.statistics() == {"running": 0, "dropped_aborted": 4}
    assert fresh(sides, live_server).lookup("q", TOKENS) == 0
    wait_until(lambda: live_server.held["bytes_quarantined"] == live_server.held["bytes_writing"] == 0)


def test_a_load_that_is_under_way_when_the_weights_change_is_not_valid(
    live_server: ServerProcess, sides: MakeSide
) -> None:
    one: Side

    def probe(point: str, spec: object) -> None:
        if point == "before valid":
            one.scheduler.set_weights_version("2")

    one = sides(live_server.address, make_kv(1), probe=probe)
    one.store("stored", TOKENS, AT)
    assert one.lookup("r", TOKENS) == 4 * CHUNK
    assert one.load("r", 4 * CHUNK, INTO) == set(INTO)


def test_an_answer_of_before_a_reset_loads_nothing(live_server: ServerProcess, sides: MakeSide) -> None:
    one = sides(live_server.address, make_kv(1))
    one.store("stored", TOKENS, AT)
    assert one.lookup("r", TOKENS) == 4 * CHUNK
    assert one.lookup("s", TOKENS) == 4 * CHUNK
    taken = one.scheduler.update_after_alloc("s", 4 * CHUNK, block_ids=INTO)
    assert taken is not None
    assert one.scheduler.reset_cache()
    assert one.scheduler.check_lookup_result("r") == 0
    assert one.load("r", 4 * CHUNK, INTO) == set(INTO)
    one.worker.retrieve_now([taken])
    assert one.worker.take_failed_blocks() == set(INTO)


# --- whose chunks a reset drops -------------------------------------------------------------------------------------


@pytest.fixture
def disk_server(tmp_path: Path) -> Iterator[ServerProcess]:
    settings = ("tiers.0.backend=disk", f"tiers.0.path={tmp_path}/disk", "tiers.0.size=64MiB", "grace=5.0")
    server = ServerProcess(f"unix://{tmp_path}/s.sock", *settings, "memory.size=16MiB")
    server.start()
    server.wait_tier()
    yield server
    server.kill()


def chunks_on_disk(server: ServerProcess) -> int:
    (tier,) = server.statistics()["tiers"]
    chunks: int = tier["backend"]["chunks"]
    return chunks


def start_again(server: ServerProcess) -> None:
    server.start()
    server.wait_tier()


def test_two_models_of_one_layout_have_chunks_of_their_own_and_a_reset_of_one_leaves_the_others(
    disk_server: ServerProcess, sides: MakeSide
) -> None:
    one = sides(disk_server.address, make_kv(1), identity=["a model"])
    other = sides(disk_server.address, make_kv(2), identity=["another model"])
    one.store("r", TOKENS, AT)
    other.store("r", TOKENS, AT)
    wait_until(lambda: chunks_on_disk(disk_server) == 8)
    assert one.scheduler.reset_cache()
    assert chunks_on_disk(disk_server) == 4
    for server_is_new in (False, True):
        if server_is_new:
            disk_server.end()
            start_again(disk_server)
            wait_until(other.scheduler.is_healthy)
        name = f"new server: {server_is_new}"
        assert other.lookup(name, TOKENS) == 4 * CHUNK
        assert other.load(name, 4 * CHUNK, INTO) == set()
        assert same_blocks(other.kv, AT, other.kv, INTO)
        assert fresh(sides, disk_server, identity=["a model"]).lookup(name, TOKENS) == 0


def test_a_reset_without_a_server_is_true_at_once_and_the_next_server_is_told_first(
    disk_server: ServerProcess, sides: MakeSide
) -> None:
    one = sides(disk_server.address, make_kv(1), weights_version="7")
    one.store("r", TOKENS, AT)
    wait_until(lambda: chunks_on_disk(disk_server) == 4)
    disk_server.end()
    wait_until(lambda: one.scheduler._link.client is None)
    assert one.scheduler.reset_cache()
    one.scheduler.set_weights_version("7")
    start_again(disk_server)
    wait_until(one.scheduler.is_healthy)
    assert one.lookup("q", TOKENS) == 0
    wait_until(lambda: chunks_on_disk(disk_server) == 0)
    wait_until(lambda: not one.scheduler._resets_owed)
    one.store("s", TOKENS, AT)
    assert fresh(sides, disk_server, weights_version="7").lookup("q", TOKENS) == 4 * CHUNK  # told once, and no more


def other_layout(seed: int) -> KV:
    return {name: tensor.half() for name, tensor in make_kv(seed).items()}


def lose_server(server: ServerProcess, one: Side) -> None:
    server.kill()
    wait_until(lambda: one.scheduler._link.client is None)


@pytest.mark.parametrize("lives", [1, 2], ids=["one new server", "the second new server"])
def test_a_reset_without_a_server_is_of_the_layout_of_then_whatever_layout_the_next_server_meets(
    disk_server: ServerProcess, sides: MakeSide, lives: int
) -> None:
    """Nothing but the reset stands between the KV of before and the engine: the weights have the same name again."""
    one = sides(disk_server.address, make_kv(1), weights_version="7")
    other = sides(disk_server.address, make_kv(2), identity=["another model"], weights_version="7")
    for side in (one, other):
        side.store("r", TOKENS, AT)
    wait_until(lambda: chunks_on_disk(disk_server) == 8)
    lose_server(disk_server, one)
    assert one.scheduler.reset_cache()
    one.scheduler.set_weights_version("7")
    one.worker.register_kv_caches(other_layout(3))
    for _ in range(lives):
        lose_server(disk_server, one)
        start_again(disk_server)
        one.wait_healthy()
        assert one.lookup("q", TOKENS) == 0
        wait_until(lambda: not one.scheduler._resets_owed)
        one.scheduler.end_session("q")
    one.worker.register_kv_caches(one.kv)
    one.wait_healthy()
    assert one.lookup("q", TOKENS) == 0
    assert chunks_on_disk(disk_server) == 4
    other.wait_healthy()
    assert other.lookup("q", TOKENS) == 4 * CHUNK
    one.store("s", TOKENS, AT)
    assert fresh(sides, disk_server, weights_version="7").lookup("q", TOKENS) == 4 * CHUNK


def test_a_reset_of_each_of_many_versions_without_a_server_is_carried_out_by_the_next(
    disk_server: ServerProcess, sides: MakeSide
) -> None:
    """As of a trainer that goes on for an hour."""
    one = sides(disk_server.address, make_kv(1), weights_version="0")
    one.store("r", TOKENS, AT)
    wait_until(lambda: chunks_on_disk(disk_server) == 4)
    lose_server(disk_server, one)
    for i in range(40):
        one.scheduler.set_weights_version(f"{i}")
        assert one.scheduler.reset_cache()
    assert len(one.scheduler._resets_owed) == 40
    start_again(disk_server)
    wait_until(lambda: not one.scheduler._resets_owed)
    assert chunks_on_disk(disk_server) == 0


def test_a_reset_of_a_name_that_the_weights_had_before_is_of_the_layout_that_the_engine_has(
    disk_server: ServerProcess, sides: MakeSide
) -> None:
    """This engine never was in its layout under that name, but KV of it may be there: of another engine."""
    writer = sides(disk_server.address, make_kv(1), weights_version="7")
    writer.store("r", TOKENS, AT)
    wait_until(lambda: chunks_on_disk(disk_server) == 4)
    one = sides(disk_server.address, make_kv(2))
    one.wait_healthy()
    writer.close()
    lose_server(disk_server, one)
    one.scheduler.set_weights_version("7")
    assert one.scheduler.reset_cache()
    one.scheduler.set_weights_version("7")
    one.worker.register_kv_caches(other_layout(3))
    start_again(disk_server)
    one.wait_healthy()
    one.worker.register_kv_caches(one.kv)
    one.wait_healthy()
    assert one.lookup("q", TOKENS) == 0


def test_a_reset_that_no_server_has_confirmed_is_of_the_layout_of_then(tmp_path: Path, sides: MakeSide) -> None:
    """The server is lost while its tier deletes: the next one deletes what the engine had then."""
    disk = f'{{backend="disk", path="{tmp_path}/disk", size="64MiB"}}'
    faults = '[{kind="hang", on="delete", at=[1]}]'
    tier = ("tiers.0.backend=faulty", f"tiers.0.inner={disk}", f"tiers.0.faults={faults}", "tier_timeout=60.0")
    address, again = f"unix://{tmp_path}/s.sock", (*tier[:2], "tiers.0.faults=[]")
    server = ServerProcess(address, *tier, "memory.size=16MiB")
    server.start()
    try:
        server.wait_tier()
        one = sides(address, make_kv(1), weights_version="7", lookup_timeout=0.5)
        one.store("r", TOKENS, AT)
        wait_until(lambda: chunks_on_disk(server) == 4)
        assert not one.scheduler.reset_cache()
        lose_server(server, one)
        one.scheduler.set_weights_version("7")
        one.worker.register_kv_caches(other_layout(3))
        server = ServerProcess(address, *again, "memory.size=16MiB")
        server.start()
        server.wait_tier()
        one.wait_healthy()
        one.worker.register_kv_caches(one.kv)
        one.wait_healthy()
        assert one.lookup("q", TOKENS) == 0
        wait_until(lambda: chunks_on_disk(server) == 0)
    finally:
        server.kill()


def test_a_reset_is_owed_until_it_is_confirmed_itself_and_not_an_earlier_one_of_the_same_name(
    tmp_path: Path, sides: MakeSide
) -> None:
    disk = f'{{backend="disk", path="{tmp_path}/disk", size="64MiB"}}'
    faults = '[{kind="delay", on="delete", at=[1], seconds=1.0}, {kind="hang", on="delete", at=[2]}]'
    tier = ("tiers.0.backend=faulty", f"tiers.0.inner={disk}", f"tiers.0.faults={faults}", "tier_timeout=60.0")
    server = ServerProcess(f"unix://{tmp_path}/s.sock", *tier, "memory.size=16MiB")
    server.start()
    try:
        server.wait_tier()
        one = sides(server.address, make_kv(1), weights_version="7", lookup_timeout=0.1)
        assert not one.scheduler.reset_cache()  # its deletion is under way
        first = one.scheduler._resets_owed.copy()
        one.scheduler.set_weights_version("7")
        assert not one.scheduler.reset_cache()
        wait_until(lambda: server.statistics()["tiers"][0]["deletions_owed"] == 1)
        one.scheduler.set_weights_version("8")  # a round trip: what was said before has come
        assert one.scheduler._resets_owed.keys() >= first.keys()
    finally:
        server.kill()


def test_a_store_that_was_planned_before_a_reset_without_a_server_is_not_served_by_the_next(
    live_server: ServerProcess, sides: MakeSide
) -> None:
    one = sides(live_server.address, make_kv(1), weights_version="7")
    one.scheduler.extend("r", TOKENS)
    before = one.scheduler.store_spec("r", 0, AT)
    live_server.kill()
    wait_until(lambda: one.scheduler._link.client is None)
    assert one.scheduler.reset_cache()
    one.scheduler.set_weights_version("7")
    live_server.start()
    wait_until(one.scheduler.is_healthy)
    wait_until(one.worker.is_healthy)
    one.worker.store_now([before, one.scheduler.store_spec("r", 0, AT)])
    assert one.worker.statistics().get("stored_chunks", 0) == 0
    assert fresh(sides, live_server, weights_version="7").lookup("q", TOKENS) == 0


def test_a_reset_that_failed_is_done_again_by_the_next_one(tmp_path: Path, sides: MakeSide) -> None:
    disk = f'{{backend="disk", path="{tmp_path}/disk", size="64MiB"}}'
    faults = '[{kind="error", on="delete", at=[1]}]'
    tier = ("tiers.0.backend=faulty", f"tiers.0.inner={disk}", f"tiers.0.faults={faults}")
    server = ServerProcess(f"unix://{tmp_path}/s.sock", *tier, "memory.size=16MiB")
    server.start()
    try:
        server.wait_tier()
        one = sides(server.address, make_kv(1))
        one.store("r", TOKENS, AT)
        wait_until(lambda: chunks_on_disk(server) == 4)
        assert not one.scheduler.reset_cache()  # the tier cannot delete
        server.wait_tier()
        assert one.scheduler.reset_cache()
        assert not one.scheduler._resets_owed  # what the first one asked for is done, too
    finally:
        server.kill()


def test_an_adapter_that_never_had_a_server_has_nothing_to_reset(tmp_path: Path) -> None:
    alone = SchedulerAdapter(
        f"unix://{tmp_path}/none.sock", engine_id="e", identity=["m"], block_tokens=16, connect_timeout=0.01
    )
    assert alone.reset_cache() is True
    alone.shutdown()
    assert alone.reset_cache() is False  # it can't tell the next server any more


# --- weights --------------------------------------------------------------------------------------------------------


def test_what_is_computed_after_a_reset_is_the_engines_own(live_server: ServerProcess, sides: MakeSide) -> None:
    one, two = sides(live_server.address, make_kv(1)), sides(live_server.address, make_kv(2))
    one.store("r", TOKENS, AT)
    assert two.lookup("r", TOKENS) == 4 * CHUNK
    for side in (one, two):
        assert side.scheduler.reset_cache()
    one.store("s", TOKENS, AT)
    assert one.lookup("t", TOKENS) == 4 * CHUNK
    assert one.load("t", 4 * CHUNK, INTO) == set()
    assert same_blocks(one.kv, AT, one.kv, INTO)
    assert two.lookup("t", TOKENS) == 0
    original = fresh(sides, live_server)
    assert original.lookup("t", TOKENS) == 0
    original.store("u", TOKENS, AT)
    assert one.scheduler.reset_cache()  # of its own chunks, once more
    assert one.lookup("v", TOKENS) == 0
    original.scheduler.free_lookup_locks("t")
    assert original.lookup("v", TOKENS) == 4 * CHUNK


def test_engines_that_name_one_version_of_the_weights_share_it_and_no_other(
    live_server: ServerProcess, sides: MakeSide
) -> None:
    one, two = sides(live_server.address, make_kv(1)), sides(live_server.address, make_kv())
    one.store("original", TOKENS, AT)
    for side in (one, two):
        assert side.scheduler.reset_cache()
        side.scheduler.set_weights_version("step 1")
    one.store("r", TOKENS, AT)
    session = two.scheduler.session_spec("r")
    assert two.lookup("r", TOKENS) == 4 * CHUNK
    two.scheduler.set_weights_version("step 1")  # as it is
    assert two.scheduler.session_spec("r") == session
    assert two.load("r", 4 * CHUNK, INTO) == set()
    assert same_blocks(one.kv, AT, two.kv, INTO)
    two.scheduler.set_weights_version("step 2")
    assert two.lookup("s", TOKENS) == 0
    assert fresh(sides, live_server).lookup("s", TOKENS) == 0
    assert fresh(sides, live_server, weights_version="step 1").lookup("s", TOKENS) == 4 * CHUNK
    assert two.scheduler.reset_cache()  # of step 2
    assert fresh(sides, live_server, weights_version="step 1").lookup("s", TOKENS) == 4 * CHUNK


def test_a_reset_ends_a_version_until_it_is_named_again(live_server: ServerProcess, sides: MakeSide) -> None:
    one = sides(live_server.address, make_kv(1), weights_version="1")
    assert one.scheduler.reset_cache()
    one.store("r", TOKENS, AT)
    assert fresh(sides, live_server, weights_version="1").lookup("r", TOKENS) == 0
    one.scheduler.set_weights_version("1")
    one.store("s", TOKENS, AT)
    assert fresh(sides, live_server, weights_version="1").lookup("r", TOKENS) == 4 * CHUNK


def test_many_resets_leave_no_namespaces_behind(live_server: ServerProcess, sides: MakeSide) -> None:
    one = sides(live_server.address, make_kv(1))
    for i in range(20):
        one.store(f"r{i}", TOKENS, AT)
        assert one.scheduler.reset_cache()
        one.scheduler.set_weights_version(f"{i}")
    wait_until(lambda: live_server.held["bytes_stale"] == 0)
    assert live_server.held["namespaces"] <= 2


@pytest.mark.parametrize("version", ["", None, 7, b"7"])
def test_a_version_that_is_no_name_is_refused(live_server: ServerProcess, sides: MakeSide, version: object) -> None:
    with pytest.raises(Misuse, match="version"):
        sides(live_server.address, make_kv()).scheduler.set_weights_version(version)  # type: ignore[arg-type]
