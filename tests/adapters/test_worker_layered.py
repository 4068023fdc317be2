"""Moves that go layer by layer beside a forward pass, on both paths."""

from collections.abc import Callable

import pytest
import torch

from lmcache_trio.adapters import LoadSpec, StoreSpec, WorkerAdapter
from lmcache_trio.adapters.shared_kv import shared_tensor
from lmcache_trio.adapters.vllm.metadata import StepPlan
from lmcache_trio.adapters.vllm.worker_side import WorkerSide
from lmcache_trio.errors import Misuse, Unavailable
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

TOKENS = list(range(3 * CHUNK))
FROM = [5, 9, 1, 33, 34, 35, 36, 60, 2, 7, 8, 3]
INTO = [11, 40, 12, 50, 13, 51, 14, 52, 20, 21, 22, 23]
NAMES = [f"layer {i}" for i in range(LAYERS)]

MakeSide = Callable[..., Side]
KV = dict[str, torch.Tensor]


def private(seed: int | None = None) -> KV:
    return make_kv(seed)


def shared(seed: int | None = None) -> KV:
    made = make_kv(seed)
    size = sum(t.nbytes for t in made.values())
    layers = shared_tensor(size).view(torch.float32).view(LAYERS, 2, BLOCKS, BLOCK, HEADS, HEAD)
    for layer, tensor in zip(layers, made.values(), strict=True):
        layer.copy_(tensor)
    return dict(zip(made, layers, strict=True))


both_paths = pytest.mark.parametrize("kv", [private, shared], ids=["shm", "device"])


def load_spec(side: Side, request_id: str, tokens: int = 3 * CHUNK, blocks: list[int] | None = None) -> LoadSpec:
    assert side.lookup(request_id, TOKENS) == 3 * CHUNK
    spec = side.scheduler.update_after_alloc(request_id, tokens, block_ids=INTO if blocks is None else blocks)
    assert spec is not None
    return spec


def store_spec(side: Side, request_id: str, tokens: list[int]) -> StoreSpec:
    side.scheduler.extend(request_id, tokens)
    return side.scheduler.store_spec(request_id, 0, FROM)


@both_paths
def test_each_layer_is_there_when_its_wait_returns(
    live_server: ServerProcess, sides: MakeSide, kv: Callable[..., KV]
) -> None:
    one, other = sides(live_server.address, kv(1)), sides(live_server.address, kv())
    one.store("r", TOKENS, FROM)
    half = 2 * CHUNK // BLOCK
    specs = [load_spec(other, "q", 2 * CHUNK, INTO[:half]), load_spec(other, "p", CHUNK, INTO[half:])]
    other.worker.layered.start_retrieves(specs)
    source, into = FROM[:half] + FROM[: CHUNK // BLOCK], INTO
    for name in NAMES:
        other.worker.layered.wait_layer(name)
        assert torch.equal(one.kv[name][:, source], other.kv[name][:, into])
    other.worker.layered.wait_retrieves()
    assert other.worker.take_failed_blocks() == set()
    assert other.worker.take_finished() == (set(), set())
    assert other.worker.statistics() == {"running": 0, "retrieved_chunks": 3}
    untouched = [b for b in range(BLOCKS) if b not in INTO]
    assert same_blocks(other.kv, untouched, make_kv(), untouched)


@pytest.mark.parametrize("error", [Unavailable("it is late"), ValueError("nobody thought of this")])
def test_a_retrieve_whose_end_is_not_acknowledged_keeps_no_other_pinned(
    live_server: ServerProcess, sides: MakeSide, error: Exception
) -> None:
    one = sides(live_server.address, private(1))
    one.store("r", TOKENS, FROM)
    half = 2 * CHUNK // BLOCK
    specs = [load_spec(one, "q", 2 * CHUNK, INTO[:half]), load_spec(one, "p", CHUNK, INTO[half:])]
    client = one.worker._link.client
    assert client is not None
    done = client.done

    async def first_fails(pin: bytes) -> bool:
        client.done = done  # type: ignore[method-assign]
        await done(pin)
        raise error

    client.done = first_fails  # type: ignore[method-assign]
    one.worker.layered.start_retrieves(specs)
    one.worker.layered.wait_retrieves()
    foreseen = isinstance(error, Unavailable)
    assert one.worker.take_failed_blocks() == set(INTO[:half] if foreseen else INTO)
    wait_until(lambda: live_server.held["pins"] == 0)


class Stepwise:
    """A probe that stops behind layer 0 until it is told to go on."""

    def __init__(self) -> None:
        self.stopped: Handoff[bool] = Handoff()
        self.go: Handoff[bool] = Handoff()

    def __call__(self, point: str, spec: StoreSpec | LoadSpec) -> None:
        if point == "layer 0":
            self.stopped.set(True)
            assert self.go.wait(20)


def test_a_layer_may_be_used_before_the_last_has_come(live_server: ServerProcess, sides: MakeSide) -> None:
    stepwise = Stepwise()
    one, other = sides(live_server.address, make_kv(1)), sides(live_server.address, make_kv(), probe=stepwise)
    one.store("r", TOKENS, FROM)
    other.worker.layered.start_retrieves([load_spec(other, "q")])
    other.worker.layered.wait_layer(NAMES[0])
    assert torch.equal(one.kv[NAMES[0]][:, FROM], other.kv[NAMES[0]][:, INTO])
    assert stepwise.stopped.wait(20)
    assert not other.kv[NAMES[2]].any()
    stepwise.go.set(True)
    other.worker.layered.wait_retrieves()
    assert same_blocks(one.kv, FROM, other.kv, INTO)


@both_paths
def test_a_retrieve_that_fails_keeps_no_layer_waiting(
    live_server: ServerProcess, sides: MakeSide, kv: Callable[..., KV]
) -> None:
    one, other = sides(live_server.address, kv(1)), sides(live_server.address, kv())
    one.store("r", TOKENS, FROM)
    good, bad = load_spec(other, "q", CHUNK, INTO[:4]), LoadSpec("x", 1, b"guessed lease 16", 0, 1, 0, (1, 2, 3, 4))
    used_up = LoadSpec("y", 1, b"", 0, 1, 0, (5, 6, 7, 8))
    other.worker.layered.start_retrieves([bad, good, used_up])
    for name in NAMES:
        other.worker.layered.wait_layer(name)
    other.worker.layered.wait_retrieves()
    assert other.worker.take_failed_blocks() == {1, 2, 3, 4, 5, 6, 7, 8}
    assert same_blocks(one.kv, FROM[:4], other.kv, INTO[:4])


@both_paths
def test_without_a_server_every_layer_is_over_at_once(
    live_server: ServerProcess, sides: MakeSide, kv: Callable[..., KV]
) -> None:
    one = sides(live_server.address, kv(1))
    live_server.kill()
    one.worker.layered.start_retrieves([LoadSpec("x", 1, b"guessed lease 16", 0, 1, 0, (1, 2, 3, 4))])
    one.worker.layered.wait_layer(NAMES[-1])
    one.worker.layered.wait_retrieves()
    assert one.worker.take_failed_blocks() == {1, 2, 3, 4}
    one.worker.layered.start_stores([store_spec(one, "s", TOKENS)])
    for name in NAMES:
        one.worker.layered.layer_written(name)
    one.worker.layered.finish_stores()
    one.worker.wait_stores()
    assert one.worker.statistics()["dropped_unavailable"] == 3


@both_paths
def test_a_store_that_went_by_layers_is_what_was_there(
    live_server: ServerProcess, sides: MakeSide, kv: Callable[..., KV]
) -> None:
    one, other = sides(live_server.address, kv(1)), sides(live_server.address, kv())
    one.worker.layered.start_stores([store_spec(one, "r", TOKENS)])
    for name in NAMES:
        one.worker.layered.layer_written(name)
    one.worker.layered.finish_stores()
    finished: set[str] = set()

    def ended() -> bool:
        finished.update(one.worker.take_finished()[0])
        return bool(finished)

    wait_until(ended)
    assert finished == {"r"}
    assert other.lookup("q", TOKENS) == 3 * CHUNK
    assert other.load("q", 3 * CHUNK, INTO) == set()
    assert same_blocks(one.kv, FROM, other.kv, INTO)


def test_a_layer_is_copied_as_soon_as_it_is_written(live_server: ServerProcess, sides: MakeSide) -> None:
    stepwise = Stepwise()
    one, other = sides(live_server.address, make_kv(1), probe=stepwise), sides(live_server.address, make_kv())
    before = {name: tensor.clone() for name, tensor in one.kv.items()}
    one.worker.layered.start_stores([store_spec(one, "r", TOKENS)])
    one.worker.layered.layer_written(NAMES[0])
    assert stepwise.stopped.wait(20)
    one.kv[NAMES[0]].zero_()  # it was copied: nothing looks at it again
    stepwise.go.set(True)
    for name in NAMES[1:]:
        one.worker.layered.layer_written(name)
    one.worker.layered.finish_stores()
    one.worker.wait_stores(["r"])
    wait_until(lambda: one.worker.statistics()["running"] == 0)
    assert other.lookup("q", TOKENS) == 3 * CHUNK
    assert other.load("q", 3 * CHUNK, INTO) == set()
    assert same_blocks(before, FROM, other.kv, INTO)


@both_paths
def test_a_step_that_is_dropped_publishes_nothing(
    live_server: ServerProcess, sides: MakeSide, kv: Callable[..., KV]
) -> None:
    one = sides(live_server.address, kv(1))
    one.worker.layered.start_stores([store_spec(one, "r", TOKENS)])
    one.worker.layered.layer_written(NAMES[0])
    one.worker.layered.drop_stores()
    one.worker.wait_stores()
    wait_until(lambda: one.worker.statistics()["running"] == 0)
    assert one.worker.take_finished() == ({"r"}, set()), "who waits for its blocks was never told"
    assert one.lookup("q", TOKENS) == 0
    wait_until(lambda: live_server.held["bytes_quarantined"] == live_server.held["bytes_writing"] == 0)
    one.store("after", TOKENS, FROM)
    assert one.worker.statistics()["stored_chunks"] == 3, "what was dropped stands in nobody's way"


@both_paths
def test_a_step_that_is_dropped_after_its_last_layer_publishes_nothing(
    live_server: ServerProcess, sides: MakeSide, kv: Callable[..., KV]
) -> None:
    """As when the step's loads were not valid, which is known only when all of it is computed."""
    one = sides(live_server.address, kv(1))
    one.worker.layered.start_stores([store_spec(one, "r", TOKENS)])
    for name in NAMES:
        one.worker.layered.layer_written(name)
    if one.worker.path == "shm":
        one.worker.wait_stores()  # until all is copied
    for link in (one.worker._link, one.scheduler._link):  # what was said until now has been heard, and answered
        assert link.client is not None
        link.call(link.client.ping, timeout=20)
    wait_until(lambda: live_server.held["copies_running"] == live_server.held["transfers_queued"] == 0)
    assert one.lookup("p", TOKENS) == 0
    one.worker.layered.drop_stores()
    wait_until(lambda: one.worker.statistics()["running"] == 0)
    assert one.worker.statistics().get("stored_chunks", 0) == 0
    assert one.lookup("q", TOKENS) == 0
    wait_until(lambda: live_server.held["bytes_quarantined"] == live_server.held["bytes_writing"] == 0)


@both_paths
def test_a_request_whose_step_computed_with_a_failed_load_gets_its_blocks_back(
    live_server: ServerProcess, sides: MakeSide, kv: Callable[..., KV]
) -> None:
    one = sides(live_server.address, kv(1))
    worker = WorkerSide(one.worker, asynchronous=False, layered=one.worker.layered)
    bad = LoadSpec("x", 1, b"guessed lease 16", 0, 1, 0, (1, 2, 3, 4))
    worker.begin(StepPlan(step=1, loads=(bad,), stores=(store_spec(one, "r", TOKENS),), closing=("r",)))
    worker.load()
    for name in NAMES:
        worker.wait_layer(name)
        worker.layer_written(name)
    worker.store()
    assert worker.take_failed_blocks() == {1, 2, 3, 4}
    closed: set[str] = set()

    def given_back() -> bool:
        closed.update(worker.report().closed)
        return bool(closed)

    wait_until(given_back)
    assert closed == {"r"}


@both_paths
def test_stores_of_a_step_that_was_never_finished_keep_no_preemption_waiting(
    live_server: ServerProcess, sides: MakeSide, kv: Callable[..., KV]
) -> None:
    one = sides(live_server.address, kv(1))
    worker = WorkerSide(one.worker, asynchronous=False, layered=one.worker.layered)
    spec = store_spec(one, "r", TOKENS)
    worker.begin(StepPlan(step=1, stores=(spec,)))
    worker.load()
    worker.let_go(StepPlan(step=2, written=spec.block_ids))
    assert one.lookup("q", TOKENS) == 0


@pytest.mark.parametrize("layers", [LAYERS, 2 * LAYERS], ids=["as many layers", "more layers"])
@both_paths
def test_kv_that_is_registered_anew_in_the_middle_of_a_step_ends_it(
    live_server: ServerProcess, sides: MakeSide, kv: Callable[..., KV], layers: int
) -> None:
    """Else chunks of the former layers and of these would be published, and the rest find no place."""
    one = sides(live_server.address, kv(1))
    one.worker.layered.start_stores([store_spec(one, "r", TOKENS)])
    one.worker.layered.layer_written(NAMES[0])
    anew = {f"layer {i}": tensor for i, tensor in enumerate([*kv(2).values(), *kv(3).values()][:layers])}
    if kv is shared:
        one_memory = shared_tensor(sum(t.nbytes for t in anew.values())).view(torch.float32)
        anew = dict(zip(anew, one_memory.view(layers, 2, BLOCKS, BLOCK, HEADS, HEAD), strict=True))
    one.worker.register_kv_caches(anew)
    for name in anew:
        one.worker.layered.layer_written(name)
    one.worker.layered.finish_stores()
    one.worker.wait_stores()
    wait_until(lambda: one.worker.statistics()["running"] == 0)
    assert one.worker.take_finished() == ({"r"}, set())
    assert one.worker.is_healthy()
    assert one.lookup("q", TOKENS) == 0
    wait_until(lambda: live_server.held["bytes_quarantined"] == live_server.held["bytes_writing"] == 0)
    one.store("after", TOKENS, FROM)
    assert one.worker.statistics()["stored_chunks"] == 3


# --- behind what the engine has submitted ---------------------------------------------------------------------------


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
        elif point.startswith("layer"):
            self.said.append(point)

    def at(self, side: Side) -> WorkerAdapter:
        assert side.worker._registered.latest is not None
        side.worker._registered.latest.fence = self.fence  # type: ignore[method-assign]
        return side.worker


def test_a_layer_is_stored_behind_what_writes_it(live_server: ServerProcess, sides: MakeSide) -> None:
    fenced = Fenced()
    worker = fenced.at(one := sides(live_server.address, make_kv(1), probe=fenced))
    worker.layered.start_stores([store_spec(one, "r", TOKENS)])
    begun = fenced.made
    for number, name in enumerate(NAMES, 1):
        worker.layered.layer_written(name)
        assert fenced.made == begun + number, "it is taken while the host says so, and no later"
    worker.layered.finish_stores()
    worker.wait_stores()
    assert fenced.said == [word for i in range(LAYERS) for word in (f"fence {begun + 1 + i}", f"layer {i}")]


def test_a_load_writes_behind_what_still_reads_its_blocks(live_server: ServerProcess, sides: MakeSide) -> None:
    fenced = Fenced()
    one, other = sides(live_server.address, make_kv(1)), sides(live_server.address, make_kv(), probe=fenced)
    one.store("r", TOKENS, FROM)
    worker = fenced.at(other)
    worker.retrieve_now([load_spec(other, "q")])
    assert fenced.said == ["fence 1", "copy"]
    fenced.said.clear()
    worker.layered.start_retrieves([load_spec(other, "p")])
    worker.layered.wait_retrieves()
    assert fenced.said == ["fence 2", *(f"layer {i}" for i in range(LAYERS))]
    assert same_blocks(one.kv, FROM, other.kv, INTO)


def test_a_worker_that_leaves_in_the_middle_of_a_step_leaves_nothing(
    live_server: ServerProcess, sides: MakeSide
) -> None:
    one = sides(live_server.address, make_kv(1))
    one.worker.layered.start_stores([store_spec(one, "r", TOKENS)])
    one.worker.shutdown()
    wait_until(lambda: live_server.held["bytes_quarantined"] == live_server.held["bytes_writing"] == 0)


def test_a_layer_that_was_not_registered_is_refused(live_server: ServerProcess, sides: MakeSide) -> None:
    one = sides(live_server.address, make_kv(1))
    with pytest.raises(Misuse, match="another"):
        one.worker.layered.wait_layer("another")
    with pytest.raises(Misuse, match="another"):
        one.worker.layered.layer_written("another")
