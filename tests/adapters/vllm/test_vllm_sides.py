"""Single promises of the connector's two sides, one by one; `test_vllm_steps` holds them together in any order."""

from collections.abc import Sequence

import attrs
import pytest
from vllm_model import BLOCK, CHUNK, Cache, Memory, Mover, Request

from lmcache_trio import Unavailable
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.adapters.vllm.metadata import StepPlan
from lmcache_trio.adapters.vllm.scheduler_side import SchedulerSide, StepOutput
from lmcache_trio.adapters.vllm.worker_side import WorkerSide

TOKENS = list(range(3 * CHUNK + 1))
BLOCKS = list(range(10, 10 + len(TOKENS)))


@pytest.fixture
def cache() -> Cache:
    """It has all chunks of TOKENS."""
    made = Cache(lambda: False)
    for digest in made.extend("seed", TOKENS):
        made.chunks[digest] = [[0] * BLOCK] * (CHUNK // BLOCK)
    made.digests.clear()
    return made


def side(cache: Cache, *, asynchronous: bool = True, loads: bool = True, stores: bool = True) -> SchedulerSide:
    return SchedulerSide(
        cache, block_tokens=BLOCK, asynchronous=asynchronous, identify=lambda _: None, loads=loads, stores=stores
    )


def request(tokens: list[int] = TOKENS, *, skip: bool = False) -> Request:
    return Request("r", list(tokens), len(tokens), 8, skip)


def blocks_of(_: str) -> list[int]:
    return BLOCKS


def load_all(scheduler: SchedulerSide, of: Request) -> LoadSpec:
    tokens, _ = scheduler.offer(of, 0)
    assert tokens is not None
    scheduler.allocated(of, BLOCKS, tokens)
    of.num_computed_tokens = tokens
    (spec,) = scheduler.plan({}, [], blocks_of).loads
    return spec


def test_a_whole_prompt_is_never_offered_for_one_token_must_be_computed(cache: Cache) -> None:
    assert side(cache).offer(request(TOKENS[: 2 * CHUNK]), 0) == (CHUNK, True)


def test_a_local_hit_that_ends_inside_a_chunk_loads_the_chunks_remaining_blocks(cache: Cache) -> None:
    scheduler, asked = side(cache), request()
    local = CHUNK + BLOCK
    assert scheduler.offer(asked, local) == (3 * CHUNK - local, True)
    scheduler.allocated(asked, BLOCKS, 3 * CHUNK - local)
    (spec,) = scheduler.plan({}, [], blocks_of).loads
    assert (spec.start, spec.count, spec.skip_blocks) == (1, 2, 1)
    assert spec.block_ids == tuple(BLOCKS[local // BLOCK : 3 * CHUNK // BLOCK])


def test_a_hit_that_the_engine_has_itself_is_not_loaded(cache: Cache) -> None:
    scheduler, asked = side(cache), request()
    assert scheduler.offer(asked, 3 * CHUNK) == (0, False)
    scheduler.allocated(asked, BLOCKS, 0)
    assert scheduler.plan({}, [], blocks_of).loads == ()
    assert "r" not in cache.answers, "the answer was not given back"


def test_a_request_that_skips_reading_is_stored_and_not_looked_up(cache: Cache) -> None:
    scheduler, asked = side(cache), request(skip=True)
    assert scheduler.offer(asked, 0) == (0, False)
    assert not cache.answers
    scheduler.allocated(asked, BLOCKS, 0)
    (spec,) = scheduler.plan({"r": CHUNK}, [], blocks_of).stores
    assert spec.block_ids == tuple(BLOCKS[: CHUNK // BLOCK])


def test_a_producer_only_stores_and_a_consumer_only_loads(cache: Cache) -> None:
    producer, asked = side(cache, loads=False), request()
    assert producer.offer(asked, 0) == (0, False)
    producer.allocated(asked, BLOCKS, 0)
    assert len(producer.plan({"r": CHUNK}, [], blocks_of).stores) == 1
    consumer, asked = side(cache, stores=False), request()
    assert load_all(consumer, asked).count == 3
    assert consumer.plan({"r": 1}, [], blocks_of).stores == ()
    assert not consumer.finished(asked, BLOCKS)


def test_only_tokens_whose_ids_are_known_are_stored(cache: Cache) -> None:
    """With steps that overlap, the last positions that a step computes have ids that nobody knows yet."""
    scheduler, asked = side(cache), request(TOKENS[: CHUNK - 1])
    scheduler.allocated(asked, BLOCKS, 0)
    assert scheduler.plan({"r": CHUNK}, [], blocks_of).stores == ()
    asked.all_token_ids.append(7)
    asked.num_computed_tokens = CHUNK
    assert len(scheduler.plan({"r": 1}, [], blocks_of).stores) == 1


def test_what_a_decode_completes_is_stored(cache: Cache) -> None:
    scheduler, asked = side(cache), request(TOKENS[: CHUNK - 1])
    scheduler.allocated(asked, BLOCKS, 0)
    assert scheduler.plan({"r": CHUNK - 1}, [], blocks_of).stores == ()
    asked.all_token_ids.append(7)
    asked.num_computed_tokens = CHUNK - 1
    assert len(scheduler.plan({"r": 1}, [], blocks_of).stores) == 1


def test_blocks_are_held_until_the_workers_have_named_the_request(cache: Cache) -> None:
    scheduler, asked = side(cache), request()
    scheduler.allocated(asked, BLOCKS, 0)
    assert scheduler.plan({"r": CHUNK}, [], blocks_of).stores
    asked.num_computed_tokens = CHUNK
    assert scheduler.finished(asked, BLOCKS)
    assert scheduler.plan({}, [], blocks_of).held == ("r",)
    assert "r" in cache.digests, "its session ended under its stores"
    scheduler.output(StepOutput(released=frozenset({"r"})))
    assert "r" not in cache.digests


def test_a_request_that_ends_while_it_loads_is_given_back_by_its_load_alone(cache: Cache) -> None:
    """It had stored something before it was preempted; vLLM frees its blocks when the load is reported."""
    scheduler, asked = side(cache), request()
    scheduler.allocated(asked, BLOCKS, 0)
    assert scheduler.plan({"r": CHUNK}, [], blocks_of).stores
    asked.num_computed_tokens = 0
    scheduler.plan({}, ["r"], blocks_of)
    load_all(scheduler, asked)
    assert not scheduler.finished(asked, BLOCKS)
    scheduler.output(StepOutput(loaded=frozenset({"r"})))
    assert scheduler.statistics() == {"requests": 0, "loading": 0}


def test_a_failed_load_is_not_offered_again_and_what_is_computed_instead_is_stored(cache: Cache) -> None:
    scheduler, asked = side(cache), request()
    spec = load_all(scheduler, asked)
    scheduler.output(StepOutput(frozenset({"r"}), failed_blocks=frozenset(spec.block_ids[CHUNK // BLOCK :])))
    asked.num_computed_tokens = 0
    assert scheduler.offer(asked, 0) == (CHUNK, True)
    scheduler.allocated(asked, BLOCKS, CHUNK)
    asked.num_computed_tokens = CHUNK
    (store,) = scheduler.plan({"r": CHUNK}, [], blocks_of).stores
    assert store.block_ids == tuple(BLOCKS[CHUNK // BLOCK : 2 * CHUNK // BLOCK])


def test_a_request_that_nobody_can_identify_goes_uncached(cache: Cache) -> None:
    def unknown(_: object) -> None:
        raise Unavailable("its adapter's files are gone")

    scheduler = SchedulerSide(cache, block_tokens=BLOCK, asynchronous=True, identify=unknown)
    asked = request()
    assert scheduler.offer(asked, 0) == (0, False)
    scheduler.allocated(asked, BLOCKS, 0)
    assert scheduler.plan({"r": len(TOKENS)}, [], blocks_of).stores == ()
    assert not scheduler.finished(asked, BLOCKS)


def store_of(request_id: str) -> StoreSpec:
    return StoreSpec(request_id, 1, b"", b"d" * 32, (0, 1))


def test_a_failed_synchronous_load_keeps_every_store_back_until_the_scheduler_knows(cache: Cache) -> None:
    """Another request of the step may share the blocks that failed, and its KV be worked out from garbage."""
    mover = Mover(cache, Memory(8, sharing=False), lambda: True)
    worker = WorkerSide(mover, asynchronous=False)
    cache.leases[b"l"] = cache.extend("r", TOKENS)[:1]
    worker.begin(StepPlan(5, settled=4, loads=(LoadSpec("r", 1, b"l", 0, 1, 0, (2, 3)),), stores=(store_of("s"),)))
    worker.load()
    worker.store()
    assert worker.take_failed_blocks() == {2, 3}
    assert worker.failed_step == 5
    worker.begin(StepPlan(6, settled=4, stores=(store_of("s"),)))
    worker.store()
    assert mover.jobs == []
    worker.begin(StepPlan(7, settled=5, stores=(store_of("s"),)))
    worker.store()
    assert mover.jobs == [store_of("s")]
    assert worker.failed_step == 0


def test_a_request_is_not_released_while_a_store_of_it_is_planned_or_under_way(cache: Cache) -> None:
    """vLLM asks what has ended before the step's stores when it drafts tokens behind the step."""
    mover = Mover(cache, Memory(8, sharing=False), lambda: False)
    worker = WorkerSide(mover, asynchronous=True)
    worker.begin(StepPlan(1, stores=(store_of("r"),), held=("r",)))
    assert worker.report().released == set()
    worker.store()
    assert worker.report().released == set()
    mover.jobs.clear()
    mover.stored.add("r")
    assert worker.report().released == {"r"}
    assert worker.report().released == set(), "it was named twice"


def test_a_step_that_computes_nothing_waits_for_no_answer_where_another_may_come_first() -> None:
    cache = Cache(lambda: True)
    scheduler = side(cache)
    for asked in (request(), Request("another", list(TOKENS), len(TOKENS), 8)):
        assert scheduler.offer(asked, 0) == (None, False)
    assert scheduler.plan({}, [], blocks_of).idle
    assert cache.waited_for == []


def test_a_step_that_computes_nothing_waits_for_the_answer_or_the_load_and_no_other_does() -> None:
    slow = [True]
    cache = Cache(lambda: slow[0])
    scheduler, asked = side(cache), request()
    assert scheduler.offer(asked, 0) == (None, False)
    assert not scheduler.plan({"other": 1}, [], blocks_of).idle
    assert cache.waited_for == []
    assert scheduler.offer(asked, 0) == (None, False)
    plan = scheduler.plan({}, [], blocks_of)
    assert plan.idle
    assert cache.waited_for == ["r"]
    slow[0] = False
    assert scheduler.offer(asked, 0) == (0, False)
    scheduler.plan({}, [], blocks_of)
    assert cache.waited_for == ["r"], "it was answered"

    mover = Mover(cache, Memory(1, sharing=False), lambda: False)
    worker = WorkerSide(mover, asynchronous=True)
    for step, waits in ((StepPlan(1), 0), (attrs.evolve(plan, step=2), 1)):
        worker.begin(step)
        worker.load()
        worker.store()
        worker.report()
        assert mover.waits == waits


class Layers:
    """A `LayeredMover` that writes down what it was asked for; loads into *bad* blocks fail."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.said: list[str] = []
        self._bad = bad
        self._failed: set[int] = set()

    def start_retrieves(self, specs: Sequence[LoadSpec]) -> None:
        self.said.append(f"load {len(specs)}")

    def wait_layer(self, name: str) -> None:
        self.said.append(f"wait {name}")

    def wait_retrieves(self) -> None:
        self.said.append("loaded")
        self._failed = set(self._bad)

    def start_stores(self, specs: Sequence[StoreSpec]) -> None:
        self.said.append(f"store {len(specs)}")

    def layer_written(self, name: str) -> None:
        self.said.append(f"written {name}")

    def finish_stores(self) -> None:
        self.said.append("finish")

    def drop_stores(self) -> None:
        self.said.append("drop")

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def take_finished(self) -> tuple[set[str], set[str]]:
        return set(), set()

    def wait_retrieve(self, seconds: float) -> None: ...
    def wait_stores(self, request_ids: object = None) -> None: ...
    def submit_store(self, spec: StoreSpec) -> None: ...
    def submit_retrieve(self, spec: LoadSpec) -> None: ...
    def retrieve_now(self, specs: Sequence[LoadSpec]) -> None: ...


def layered_step(worker: WorkerSide, step: int, *, settled: int = 0) -> None:
    load = LoadSpec("r", 1, b"lease", 0, 1, 0, tuple(range(CHUNK // BLOCK)))
    store = StoreSpec("r", 1, b"", b"d" * 32, tuple(range(CHUNK // BLOCK)))
    worker.begin(StepPlan(step, settled, (load,), (store,)))
    worker.load()
    for name in ("a", "b"):
        worker.wait_layer(name)
        worker.layer_written(name)
    worker.store()


def test_layer_by_layer_a_step_is_stored_after_its_loads_were_valid() -> None:
    layers = Layers()
    worker = WorkerSide(layers, asynchronous=False, layered=layers)
    layered_step(worker, 1)
    moves = ["load 1", "store 1", "wait a", "written a", "wait b", "written b"]
    assert layers.said == [*moves, "loaded", "finish"]
    assert worker.failed_step == 0


def test_layer_by_layer_a_step_with_a_failed_load_is_not_stored_and_neither_is_the_next() -> None:
    layers = Layers(bad=(1, 2))
    worker = WorkerSide(layers, asynchronous=False, layered=layers)
    layered_step(worker, 1)
    assert layers.said[-2:] == ["loaded", "drop"]
    assert worker.failed_step == 1
    assert worker.take_failed_blocks() == {1, 2}
    layers._bad = ()
    layers.said.clear()
    layered_step(worker, 2)
    assert "store 1" not in layers.said
    assert layers.said[-1] == "drop"
    layered_step(worker, 3, settled=1)
    assert layers.said[-1] == "finish"
