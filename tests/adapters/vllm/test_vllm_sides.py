"""Single promises of the connector's two sides, one by one; `test_vllm_steps` holds them together in any order."""

from collections.abc import Sequence

import attrs
import pytest
from support.vllm_model import BLOCK, CHUNK, GROUPS, Cache, Memory, Mover, Request, true_kv

from lmcache_trio import Unavailable
from lmcache_trio.adapters import LoadSpec, StoreSpec
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


def side(
    cache: Cache, *, asynchronous: bool = True, loads: bool = True, stores: bool = True, workers: int = 1
) -> SchedulerSide:
    return SchedulerSide(
        cache,
        groups=GROUPS,
        asynchronous=asynchronous,
        identify=lambda _: None,
        loads=loads,
        stores=stores,
        workers=workers,
    )


def request(tokens: list[int] = TOKENS, *, skip: bool = False) -> Request:
    return Request("r", list(tokens), len(tokens), 8, skip)


def blocks_of(_: str) -> tuple[list[int]]:
    return (BLOCKS,)


def load_all(scheduler: SchedulerSide, of: Request) -> LoadSpec:
    tokens, _ = scheduler.offer(of, 0)
    assert tokens is not None
    scheduler.allocated(of, (BLOCKS,), tokens)
    of.num_computed_tokens = tokens
    (spec,) = scheduler.plan({}, [], blocks_of).loads
    return spec


def test_a_whole_prompt_is_never_offered_for_one_token_must_be_computed(cache: Cache) -> None:
    assert side(cache).offer(request(TOKENS[: 2 * CHUNK]), 0) == (CHUNK, True)


def test_a_local_hit_that_ends_inside_a_chunk_loads_the_chunks_remaining_blocks(cache: Cache) -> None:
    scheduler, asked = side(cache), request()
    local = CHUNK + BLOCK
    assert scheduler.offer(asked, local) == (3 * CHUNK - local, True)
    scheduler.allocated(asked, (BLOCKS,), 3 * CHUNK - local)
    (spec,) = scheduler.plan({}, [], blocks_of).loads
    assert (spec.start, spec.count, spec.skip_blocks) == (1, 2, 1)
    assert spec.block_ids == tuple(BLOCKS[local // BLOCK : 3 * CHUNK // BLOCK])


def test_blocks_may_be_named_a_step_after_their_load_was_offered(cache: Cache) -> None:
    """From vLLM 0.33 on: they are used anew, and steps under way may still read what they held."""
    scheduler, asked = side(cache), request()
    assert scheduler.offer(asked, BLOCK) == (3 * CHUNK - BLOCK, True)
    asked.num_computed_tokens = 3 * CHUNK
    plan = scheduler.plan({"other": 1}, [], blocks_of)
    assert (plan.loads, plan.stores, plan.written) == ((), (), ())
    scheduler.output(StepOutput(step=1))
    scheduler.allocated(asked, (BLOCKS,), 3 * CHUNK - BLOCK)
    plan = scheduler.plan({"other": 1}, [], blocks_of)
    (spec,) = plan.loads
    assert spec.block_ids == tuple(BLOCKS[1 : 3 * CHUNK // BLOCK])
    assert plan.written == tuple(BLOCKS[1:])
    scheduler.output(StepOutput(step=2, loaded=frozenset({"r"})))
    scheduler.allocated(asked, (BLOCKS,), 0)
    assert scheduler.plan({"r": 1}, [], blocks_of).stores == (), "the hit was stored again"


@pytest.mark.parametrize("reset", [False, True], ids=["without a reset", "with a reset"])
def test_a_request_that_ends_before_its_blocks_were_named_has_nothing_to_store(cache: Cache, reset: bool) -> None:
    """vLLM counts the tokens of the load as computed, and nobody has written them."""
    scheduler, asked = side(cache), request()
    assert scheduler.offer(asked, 0) == (3 * CHUNK, True)
    asked.num_computed_tokens = 3 * CHUNK
    scheduler.plan({"other": 1}, [], blocks_of)
    if reset:
        scheduler.reset()
    scheduler.finished(asked, (BLOCKS,))
    plan = scheduler.plan({"other": 1}, [], blocks_of)
    assert (plan.loads, plan.last_stores) == ((), ())
    assert "r" not in cache.answers, "the answer was not given back"
    assert scheduler.statistics() == {"requests": 0, "loading": 0}


def test_a_hit_that_the_engine_has_itself_is_not_loaded(cache: Cache) -> None:
    scheduler, asked = side(cache), request()
    assert scheduler.offer(asked, 3 * CHUNK) == (0, False)
    scheduler.allocated(asked, (BLOCKS,), 0)
    assert scheduler.plan({}, [], blocks_of).loads == ()
    assert "r" not in cache.answers, "the answer was not given back"


@pytest.mark.parametrize(("local", "loaded", "of_tiers"), [(0, 2, 2), (0, 0, 0), (2, 2, 1), (0, 3, 3)])
def test_tokens_that_a_tier_brought_are_told_from_those_of_memory(
    cache: Cache, local: int, loaded: int, of_tiers: int
) -> None:
    """They are the last ones of the hit, so the engine's own come off those of memory first."""
    cache.loaded["r"] = loaded * CHUNK
    scheduler, asked = side(cache), request()
    assert scheduler.from_tiers("r", CHUNK) == 0
    assert scheduler.offer(asked, local * CHUNK) == ((3 - local) * CHUNK, True)
    scheduler.allocated(asked, (BLOCKS,), (3 - local) * CHUNK)
    assert scheduler.from_tiers("r", (3 - local) * CHUNK) == of_tiers * CHUNK


def test_a_request_that_skips_reading_is_stored_and_not_looked_up(cache: Cache) -> None:
    scheduler, asked = side(cache), request(skip=True)
    assert scheduler.offer(asked, 0) == (0, False)
    assert not cache.answers
    scheduler.allocated(asked, (BLOCKS,), 0)
    (spec,) = scheduler.plan({"r": CHUNK}, [], blocks_of).stores
    assert spec.block_ids == tuple(BLOCKS[: CHUNK // BLOCK])


def test_a_producer_only_stores_and_a_consumer_only_loads(cache: Cache) -> None:
    producer, asked = side(cache, loads=False), request()
    assert producer.offer(asked, 0) == (0, False)
    producer.allocated(asked, (BLOCKS,), 0)
    assert len(producer.plan({"r": CHUNK}, [], blocks_of).stores) == 1
    consumer, asked = side(cache, stores=False), request()
    assert load_all(consumer, asked).count == 3
    assert consumer.plan({"r": 1}, [], blocks_of).stores == ()
    consumer.finished(asked, (BLOCKS,))
    plan = consumer.plan({}, [], blocks_of)
    assert (plan.last_stores, plan.closing) == ((), ())


def test_only_tokens_whose_ids_are_known_are_stored(cache: Cache) -> None:
    """With steps that overlap, the last positions that a step computes have ids that nobody knows yet."""
    scheduler, asked = side(cache), request(TOKENS[: CHUNK - 1])
    scheduler.allocated(asked, (BLOCKS,), 0)
    assert scheduler.plan({"r": CHUNK}, [], blocks_of).stores == ()
    asked.all_token_ids.append(7)
    asked.num_computed_tokens = CHUNK
    assert len(scheduler.plan({"r": 1}, [], blocks_of).stores) == 1


def test_what_a_decode_completes_is_stored(cache: Cache) -> None:
    scheduler, asked = side(cache), request(TOKENS[: CHUNK - 1])
    scheduler.allocated(asked, (BLOCKS,), 0)
    assert scheduler.plan({"r": CHUNK - 1}, [], blocks_of).stores == ()
    asked.all_token_ids.append(7)
    asked.num_computed_tokens = CHUNK - 1
    assert len(scheduler.plan({"r": 1}, [], blocks_of).stores) == 1


def test_a_session_ends_when_every_worker_has_closed_the_request_whose_blocks_are_free_at_once(cache: Cache) -> None:
    scheduler, asked = side(cache, workers=2), request()
    scheduler.allocated(asked, (BLOCKS,), 0)
    assert scheduler.plan({"r": CHUNK}, [], blocks_of).stores
    asked.num_computed_tokens = CHUNK
    scheduler.finished(asked, (BLOCKS,))
    assert scheduler.plan({}, [], blocks_of).closing == ("r",)
    assert scheduler.plan({}, [], blocks_of).closing == (), "it was named twice"
    scheduler.output(StepOutput(closed={"r": 1}))
    assert "r" in cache.digests, "its session ended under a worker's stores"
    scheduler.output(StepOutput(closed={"r": 1}))
    assert "r" not in cache.digests


def test_what_a_finished_request_completed_last_is_stored_before_its_blocks_are_written(cache: Cache) -> None:
    """With steps that overlap, the ids of its last tokens are known when it has finished, and not before."""
    scheduler, asked = side(cache), request(TOKENS[: CHUNK - 1])
    scheduler.allocated(asked, (BLOCKS,), 0)
    assert scheduler.plan({"r": CHUNK}, [], blocks_of).stores == ()
    asked.all_token_ids.append(7)
    asked.num_computed_tokens = CHUNK
    scheduler.finished(asked, (BLOCKS,))
    plan = scheduler.plan({"other": 1}, [], lambda _: ((),), grown=BLOCKS)
    (last,) = plan.last_stores
    assert last.block_ids == tuple(BLOCKS[: CHUNK // BLOCK])
    memory = Memory(len(BLOCKS) + BLOCKS[0], sharing=False)
    for i, kv in enumerate(true_kv(asked.all_token_ids)):
        memory.cells[BLOCKS[i // BLOCK]][i % BLOCK] = kv
    worker = WorkerSide(Mover(cache, memory, lambda: False), asynchronous=True)
    worker.let_go(plan)
    assert cache.chunks[cache.extend("seen", asked.all_token_ids)[0]], "its blocks would be overwritten unread"


def test_after_a_reset_nothing_is_stored_from_free_blocks(cache: Cache) -> None:
    """vLLM may have given their memory back, as it does before it sleeps."""
    scheduler, asked = side(cache), request(TOKENS[: CHUNK - 1])
    scheduler.allocated(asked, (BLOCKS,), 0)
    scheduler.plan({"r": CHUNK}, [], blocks_of)
    asked.all_token_ids.append(7)
    asked.num_computed_tokens = CHUNK
    scheduler.finished(asked, (BLOCKS,))
    scheduler.reset()
    assert scheduler.plan({}, [], blocks_of).last_stores == ()
    assert scheduler.statistics() == {"requests": 0, "loading": 0}


def test_an_id_that_comes_again_is_another_request(cache: Cache) -> None:
    scheduler, asked = side(cache), request()
    scheduler.allocated(asked, (BLOCKS,), 0)
    assert scheduler.plan({"r": CHUNK}, [], blocks_of).stores
    asked.num_computed_tokens = CHUNK
    scheduler.finished(asked, (BLOCKS,))
    scheduler.plan({}, [], blocks_of)
    other = request([*reversed(TOKENS)])
    assert scheduler.offer(other, 0) == (0, False)
    assert cache.ended == ["r"]
    scheduler.allocated(other, (BLOCKS,), 0)
    scheduler.output(StepOutput(closed={"r": 1}))  # of the first one
    assert len(scheduler.plan({"r": CHUNK}, [], blocks_of).stores) == 1


def test_a_copy_ends_before_its_blocks_are_written_and_no_other_is_waited_for(cache: Cache) -> None:
    """Another request owns them now: they were freed when theirs had finished or was preempted."""
    mover = Mover(cache, Memory(8, sharing=False), lambda: False)
    worker = WorkerSide(mover, asynchronous=True)
    busy, free = store_of("busy", (0, 1)), store_of("free", (2, 3))
    for tokens in ([0] * CHUNK, [1] * CHUNK):
        cache.extend("r", tokens)
    worker.begin(StepPlan(1, stores=(busy, free)))
    worker.store()
    mover.copy = lambda spec: None  # type: ignore[method-assign]
    worker.let_go(StepPlan(2, written=(1, 5)))
    assert mover.jobs == [free]
    worker.report()
    worker.let_go(StepPlan(3, written=(0, 1)))
    assert mover.jobs == [free], "it is copied no more"


def borrowing(cache: Cache, *, tokens: int = CHUNK) -> tuple[SchedulerSide, Request]:
    """A request of which another connector brought the first *tokens*; its first step is planned next."""
    scheduler, asked = side(cache), request([*reversed(TOKENS)])
    assert scheduler.offer(asked, 0) == (0, False)
    scheduler.allocated(asked, (BLOCKS,), 0)
    asked.num_computed_tokens = tokens
    return scheduler, asked


def test_what_begins_with_another_connectors_tokens_is_stored_when_its_first_step_was_valid(cache: Cache) -> None:
    scheduler, asked = borrowing(cache)
    first = scheduler.plan({"r": CHUNK}, [], blocks_of)
    assert first.stores == (), "nobody knows yet whether it was loaded"
    asked.num_computed_tokens = 2 * CHUNK
    assert scheduler.plan({"r": 1}, [], blocks_of).stores == (), "nor before the step's output"
    scheduler.output(StepOutput(first.step))
    (store,) = scheduler.plan({"r": 1}, [], blocks_of).stores
    assert store.block_ids == tuple(BLOCKS[: 2 * CHUNK // BLOCK])


def test_what_another_connector_failed_to_load_is_never_stored(cache: Cache) -> None:
    scheduler, asked = borrowing(cache)
    first = scheduler.plan({"r": CHUNK}, [], blocks_of)
    asked.num_computed_tokens = 0  # vLLM computes it, from the first block that failed
    scheduler.output(StepOutput(first.step, failed_blocks=frozenset(BLOCKS[:1])))
    assert scheduler.plan({}, [], blocks_of).stores == ()
    (store,) = scheduler.plan({"r": CHUNK}, [], blocks_of).stores
    assert store.block_ids == tuple(BLOCKS[: CHUNK // BLOCK])


def test_requests_beside_one_that_borrows_are_stored_when_its_step_was_valid(cache: Cache) -> None:
    """They may share the blocks that are loaded in the step: vLLM's own cache knows them already."""
    scheduler, _ = borrowing(cache)
    beside = Request("beside", [5, *TOKENS], len(TOKENS) + 1, 8)
    scheduler.allocated(beside, (BLOCKS,), 0)
    first = scheduler.plan({"r": CHUNK, "beside": CHUNK}, [], blocks_of)
    assert first.stores == ()
    beside.num_computed_tokens = CHUNK
    scheduler.output(StepOutput(first.step))
    assert [store.request_id for store in scheduler.plan({"beside": 1}, [], blocks_of).stores] == ["beside"]


@pytest.mark.parametrize("failed", [False, True])
def test_a_request_that_borrows_and_ends_with_its_first_step_is_stored_if_that_was_valid(
    cache: Cache, failed: bool
) -> None:
    """vLLM says that it has finished before it says what the step's output was."""
    scheduler, asked = borrowing(cache)
    first = scheduler.plan({"r": CHUNK}, [], blocks_of)
    asked.num_computed_tokens = 2 * CHUNK
    scheduler.finished(asked, (BLOCKS,))
    scheduler.output(StepOutput(first.step, failed_blocks=frozenset(BLOCKS[1:2] if failed else ())))
    assert len(scheduler.plan({}, [], blocks_of).last_stores) == (not failed)


def test_a_request_that_nobody_can_identify_may_borrow_too(cache: Cache) -> None:
    def identify(each: object) -> None:
        if getattr(each, "request_id", "") == "r":
            raise Unavailable("its adapter's files are gone")

    scheduler = SchedulerSide(cache, groups=GROUPS, asynchronous=True, identify=identify)
    unknown, beside = request(), Request("beside", [5, *TOKENS], len(TOKENS) + 1, 8)
    for each in (unknown, beside):
        scheduler.offer(each, 0)
        scheduler.allocated(each, (BLOCKS,), 0)
    unknown.num_computed_tokens = CHUNK
    assert scheduler.plan({"r": CHUNK, "beside": CHUNK}, [], blocks_of).stores == ()


def test_a_request_that_ends_while_it_loads_is_over_when_its_load_is(cache: Cache) -> None:
    """It had stored something before it was preempted; vLLM frees its blocks when the load is reported."""
    scheduler, asked = side(cache), request()
    scheduler.allocated(asked, (BLOCKS,), 0)
    assert scheduler.plan({"r": CHUNK}, [], blocks_of).stores
    asked.num_computed_tokens = 0
    scheduler.plan({}, ["r"], blocks_of)
    load_all(scheduler, asked)
    scheduler.finished(asked, (BLOCKS,))
    assert scheduler.plan({}, [], blocks_of).closing == ()
    scheduler.output(StepOutput(loaded=frozenset({"r"})))
    assert scheduler.plan({}, [], blocks_of).closing == ("r",)
    scheduler.output(StepOutput(closed={"r": 1}))
    assert scheduler.statistics() == {"requests": 0, "loading": 0}


def test_a_failed_load_is_not_offered_again_and_what_is_computed_instead_is_stored(cache: Cache) -> None:
    scheduler, asked = side(cache), request()
    spec = load_all(scheduler, asked)
    scheduler.output(StepOutput(loaded=frozenset({"r"}), failed_blocks=frozenset(spec.block_ids[CHUNK // BLOCK :])))
    asked.num_computed_tokens = 0
    assert scheduler.offer(asked, 0) == (CHUNK, True)
    scheduler.allocated(asked, (BLOCKS,), CHUNK)
    asked.num_computed_tokens = CHUNK
    (store,) = scheduler.plan({"r": CHUNK}, [], blocks_of).stores
    assert store.block_ids == tuple(BLOCKS[CHUNK // BLOCK : 2 * CHUNK // BLOCK])


def test_a_request_that_nobody_can_identify_goes_uncached(cache: Cache) -> None:
    def unknown(_: object) -> None:
        raise Unavailable("its adapter's files are gone")

    scheduler = SchedulerSide(cache, groups=GROUPS, asynchronous=True, identify=unknown)
    asked = request()
    assert scheduler.offer(asked, 0) == (0, False)
    scheduler.allocated(asked, (BLOCKS,), 0)
    assert scheduler.plan({"r": len(TOKENS)}, [], blocks_of).stores == ()
    scheduler.finished(asked, (BLOCKS,))
    plan = scheduler.plan({}, [], blocks_of)
    assert (plan.last_stores, plan.closing) == ((), ())


def store_of(request_id: str, block_ids: tuple[int, ...] = (0, 1)) -> StoreSpec:
    return StoreSpec(request_id, 1, b"", b"d" * 32, block_ids)


def test_a_request_is_closed_by_a_worker_whose_kv_memory_was_taken_away_and_given_back(cache: Cache) -> None:
    """Or its session would never end. Its copies have ended with the mover that had that memory."""
    worker = WorkerSide(Mover(cache, Memory(8, sharing=False), lambda: False), asynchronous=True)
    worker.begin(StepPlan(1, stores=(store_of("s"),), closing=("s",)))
    worker.store()
    assert worker.report().closed == set()
    worker.replace_mover(Mover(cache, Memory(8, sharing=False), lambda: False))
    worker.begin(StepPlan(2))
    assert worker.report().closed == {"s"}


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


def test_a_request_is_not_closed_while_a_store_of_it_is_planned_or_under_way(cache: Cache) -> None:
    """vLLM asks what has ended before the step's stores when it drafts tokens behind the step."""
    mover = Mover(cache, Memory(8, sharing=False), lambda: False)
    worker = WorkerSide(mover, asynchronous=True)
    worker.begin(StepPlan(1, stores=(store_of("r"),), closing=("r",)))
    assert worker.report().closed == set()
    worker.store()
    assert worker.report().closed == set()
    mover.jobs.clear()
    mover.stored.add("r")
    assert worker.report().closed == {"r"}
    assert worker.report().closed == set(), "it was named twice"


def test_a_step_that_computes_nothing_waits_for_any_of_the_answers_however_many_are_missing() -> None:
    """Turning around, the engine would keep the interpreter from the very thread that takes the answers."""
    cache = Cache(lambda: True)
    scheduler = side(cache)
    asked = [Request(name, list(TOKENS), len(TOKENS), 8) for name in "abc"]
    for each in asked:
        assert scheduler.offer(each, 0) == (None, False)
    cache.waited_for.clear()
    assert scheduler.plan({}, [], blocks_of).idle
    assert cache.waited_for == [("a", "b", "c")]


def test_a_lookup_that_memory_answers_costs_no_step() -> None:
    """Its answer comes in less than a millisecond, where the step that it would miss may take a second."""
    answered: list[bool] = []
    cache = Cache(lambda: not answered)
    scheduler, asked = side(cache), request()
    wait = cache.wait_lookups

    def answer(request_ids: Sequence[str], seconds: float) -> None:
        wait(request_ids, seconds)
        answered.append(True)

    cache.wait_lookups = answer  # type: ignore[method-assign]
    assert scheduler.offer(asked, 0) == (0, False)
    assert cache.waited_for == [("r",)]


def test_a_step_waits_for_one_missing_answer_and_then_for_no_other() -> None:
    cache = Cache(lambda: True)
    scheduler = side(cache)
    asked = [Request(name, list(TOKENS), len(TOKENS), 8) for name in "ab"]
    for _ in range(2):
        for each in asked:
            assert scheduler.offer(each, 0) == (None, False)
        scheduler.plan({"other": 1}, [], blocks_of)
    assert cache.waited_for == [("a",)]


def test_a_step_that_computes_nothing_waits_for_the_answer_or_the_load_and_no_other_does() -> None:
    slow = [True]
    cache = Cache(lambda: slow[0])
    scheduler, asked = side(cache), request()
    assert scheduler.offer(asked, 0) == (None, False)
    assert not scheduler.plan({"other": 1}, [], blocks_of).idle
    cache.waited_for.clear()
    assert scheduler.offer(asked, 0) == (None, False)
    plan = scheduler.plan({}, [], blocks_of)
    assert plan.idle
    assert cache.waited_for == [("r",)]
    slow[0] = False
    assert scheduler.offer(asked, 0) == (0, False)
    scheduler.plan({}, [], blocks_of)
    assert cache.waited_for == [("r",)], "it was answered"

    mover = Mover(cache, Memory(1, sharing=False), lambda: False)
    worker = WorkerSide(mover, asynchronous=True)
    for step, waits in ((StepPlan(1), 0), (attrs.evolve(plan, step=2), 1)):
        worker.begin(step)
        worker.load()
        worker.store()
        worker.report()
        assert mover.waits == waits


class Weights:
    """A `WeightsWatch` whose weights change when *others* is set."""

    def __init__(self) -> None:
        self.others = False

    def take(self) -> None:
        self.others = False

    def begin(self) -> None: ...

    def changed(self) -> bool:
        return self.others


def test_what_other_weights_compute_is_not_stored_until_the_next_reset(cache: Cache) -> None:
    mover, weights = Mover(cache, Memory(8, sharing=False), lambda: False), Weights()
    worker = WorkerSide(mover, asynchronous=True, weights=weights)
    weights.others = True
    for step in (1, 2):
        plan = StepPlan(step, stores=(store_of("s"),), last_stores=(store_of("t"),))
        worker.let_go(plan)
        worker.begin(plan)
        worker.store()
        assert mover.jobs == []
        assert worker.changed
    plan = StepPlan(3, stores=(store_of("s"),), resets=1)
    worker.let_go(plan)
    worker.begin(plan)
    worker.store()
    assert mover.jobs == [store_of("s")]
    assert not worker.changed


def test_an_engine_with_other_weights_is_offered_nothing_and_told_once_to_reset(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, asked = side(cache), request()
    plan = scheduler.plan({}, [], blocks_of)
    for _ in range(2):
        scheduler.output(StepOutput(plan.step, changed=True))
    assert [record.getMessage().count("reset_connector=True") for record in caplog.records] == [1]
    assert scheduler.offer(asked, 0) == (0, False)
    assert cache.answers == {}
    scheduler.allocated(asked, (BLOCKS,), 0)
    assert scheduler.plan({"r": CHUNK}, [], blocks_of).stores == ()
    scheduler.reset()
    scheduler.output(StepOutput(plan.step, changed=True))  # of a step that came before it
    assert len(scheduler.plan({"r": CHUNK}, [], blocks_of).stores) == 1
    assert scheduler.plan({}, [], blocks_of).resets == 1


class Recorder:
    """`WorkerVerbs` that write down what they were asked for; loads into *bad* blocks fail."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.said: list[str] = []
        self.bad = bad
        self._failed: set[int] = set()

    def retrieve_now(self, specs: Sequence[LoadSpec]) -> None:
        self.said.append(f"load {len(specs)}")
        self._failed = set(self.bad)

    def submit_store(self, spec: StoreSpec) -> None:
        self.said.append("store")

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def take_finished(self) -> tuple[set[str], set[str]]:
        return set(), set()

    def submit_retrieve(self, spec: LoadSpec) -> None: ...
    def wait_retrieve(self, seconds: float) -> None: ...
    def wait_stores(self, request_ids: object = None) -> None: ...
    def take_failed_requests(self) -> set[str]: ...  # type: ignore[empty-body]


def synchronous_step(worker: WorkerSide, step: int, *, settled: int = 0) -> None:
    load = LoadSpec("r", 1, b"lease", 0, 1, 0, tuple(range(CHUNK // BLOCK)))
    store = StoreSpec("r", 1, b"", b"d" * 32, tuple(range(CHUNK // BLOCK)))
    worker.begin(StepPlan(step, settled, (load,), (store,), closing=("r",)))
    worker.load()
    worker.store()


def test_a_step_is_stored_after_its_synchronous_loads_were_valid() -> None:
    recorder = Recorder()
    worker = WorkerSide(recorder, asynchronous=False)
    synchronous_step(worker, 1)
    assert recorder.said == ["load 1", "store"]
    assert worker.failed_step == 0


def test_a_step_with_a_failed_synchronous_load_is_not_stored_and_neither_is_the_next() -> None:
    recorder = Recorder(bad=(1, 2))
    worker = WorkerSide(recorder, asynchronous=False)
    synchronous_step(worker, 1)
    assert recorder.said == ["load 1"]
    assert worker.failed_step == 1
    assert worker.take_failed_blocks() == {1, 2}
    assert worker.report().closed == {"r"}, "a request whose store was not begun gets its blocks back"
    recorder.bad = ()
    synchronous_step(worker, 2)
    assert "store" not in recorder.said
    synchronous_step(worker, 3, settled=1)
    assert recorder.said[-1] == "store"
