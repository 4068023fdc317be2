"""Both sides of the vLLM connector, held by an engine too simple to be wrong, in any order of events.

The engine schedules, preempts, frees, shares and overlaps as vLLM 0.32 does, on a handful of blocks whose bytes are
worked out from the tokens before them, so that wrong KV gives wrong answers. Copies take effect as late as they are
allowed to, and loads fail when Hypothesis likes. Then two things must hold: what is stored under a name is the KV of
that name's tokens, and every request is answered as if there were no cache.
"""

from collections.abc import Callable, Iterable, Sequence

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_trio._core.keys import chain_digests, join_digests, split_digests
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.adapters.vllm.metadata import StepPlan
from lmcache_trio.adapters.vllm.scheduler_side import Extras, SchedulerSide, StepOutput
from lmcache_trio.adapters.vllm.worker_side import WorkerSide

BLOCK, CHUNK = 2, 4
SEED = b"s" * 32
KV = int


def next_kv(before: KV, token: int) -> KV:
    return hash((before, token, "kv"))


def sampled(kv: KV) -> int:
    return kv % 3


def true_kv(tokens: Sequence[int]) -> list[KV]:
    kv, found = 0, []
    for token in tokens:
        kv = next_kv(kv, token)
        found.append(kv)
    return found


def true_answer(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sampled(true_kv(tokens)[-1]))
    return tokens[len(prompt) :]


@attrs.define(eq=False)
class Request:
    request_id: str
    all_token_ids: list[int]
    prompt: int
    wanted: int
    skip_reading_prefix_cache: bool = False
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    placeholders: int = 0
    state: str = "waiting"  # waiting, loading, running, finished
    loaded: bool = False
    load_failed: bool = False
    blocks: list[int] = attrs.Factory(list)
    real_tokens: list[int] = attrs.Factory(list)  # what the worker knows, ahead of the scheduler

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


class Memory:
    """The device's blocks and the engine's own prefix cache: a block is found again until it is written by another."""

    def __init__(self, blocks: int, *, sharing: bool) -> None:
        self.cells: dict[int, list[KV]] = {block: [0] * BLOCK for block in range(blocks)}
        self.users = dict.fromkeys(range(blocks), 0)
        self.free = list(range(blocks))
        self.names: dict[tuple[int, ...], int] = {}
        self.sharing = sharing

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Blocks of the longest prefix that leaves a token to compute."""
        found: list[int] = []
        while (len(found) + 1) * BLOCK < len(tokens):
            block = self.names.get(tuple(tokens[: (len(found) + 1) * BLOCK]))
            if block is None:
                break
            found.append(block)
        return found

    def name(self, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        for i in range(min(len(tokens) // BLOCK, len(blocks)) if self.sharing else 0):
            self.names.setdefault(tuple(tokens[: (i + 1) * BLOCK]), blocks[i])

    def grow(self, request: Request, tokens: int, shared: Sequence[int] = ()) -> bool:
        """Blocks for *tokens*, the leading ones *shared*; all or nothing."""
        need = -(-tokens // BLOCK) - len(request.blocks) - len(shared)
        fresh = [block for block in self.free if block not in shared]
        if need > len(fresh):
            return False
        for block in shared:
            self.users[block] += 1
            if block in self.free:
                self.free.remove(block)
        taken = fresh[: max(0, need)]
        for block in taken:
            self.free.remove(block)
            self.users[block] = 1
            self.names = {name: known for name, known in self.names.items() if known != block}
        request.blocks += [*shared, *taken]
        return True

    def drop(self, request: Request) -> None:
        for block in request.blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.insert(0, block)  # used again as soon as possible
        request.blocks = []


class Cache:
    """A server with room for everything, and the scheduler's adapter to it."""

    chunk_tokens = CHUNK

    def __init__(self, slow: Callable[[], bool]) -> None:
        self.slow = slow
        self.chunks: dict[bytes, list[list[KV]]] = {}
        self.tokens: dict[bytes, tuple[int, ...]] = {}
        self.digests: dict[str, list[bytes]] = {}
        self.answers: dict[str, int] = {}
        self.failed: dict[str, int] = {}
        self.attempts: dict[tuple[str, int], int] = {}
        self.leases: dict[bytes, list[bytes]] = {}

    def maybe_submit_lookup_request(
        self, request_id: str, token_ids: Sequence[int], *, extras: Extras | None = None, max_tokens: int | None = None
    ) -> None:
        if request_id not in self.answers:
            digests = self.extend(request_id, token_ids)[: (max_tokens or 0) // CHUNK]
            hits = 0
            while hits < min(len(digests), self.failed.get(request_id, len(digests))) and digests[hits] in self.chunks:
                hits += 1
            self.answers[request_id] = hits * CHUNK

    def check_lookup_result(self, request_id: str) -> int | None:
        return None if self.slow() else self.answers.get(request_id, 0)

    def update_after_alloc(
        self, request_id: str, external_tokens: int, *, local_tokens: int = 0, block_ids: Sequence[int] = ()
    ) -> LoadSpec | None:
        answer = self.answers.pop(request_id)
        if not external_tokens:
            return None
        assert local_tokens + external_tokens == answer
        assert len(block_ids) * BLOCK == external_tokens
        lease = len(self.leases).to_bytes(4, "big")
        self.leases[lease] = self.digests[request_id][: answer // CHUNK]
        start = local_tokens // CHUNK
        self.attempts[request_id, answer] = self.attempts.get((request_id, answer), 0) + 1
        skip = local_tokens % CHUNK // BLOCK
        return LoadSpec(request_id, 1, lease, start, answer // CHUNK - start, skip, tuple(block_ids))

    def extend(self, request_id: str, token_ids: Sequence[int], *, extras: Extras | None = None) -> list[bytes]:
        digests = chain_digests(SEED, token_ids, CHUNK)
        for i, digest in enumerate(digests):
            self.tokens[digest] = tuple(token_ids[: (i + 1) * CHUNK])
        known = self.digests.get(request_id, [])
        self.digests[request_id] = known + digests[len(known) :]
        return digests

    def store_spec(self, request_id: str, first_chunk: int, block_ids: Sequence[int]) -> StoreSpec:
        count = len(block_ids) * BLOCK // CHUNK
        digests = self.digests[request_id]
        assert first_chunk + count <= len(digests)
        parent = digests[first_chunk - 1] if first_chunk else b""
        return StoreSpec(
            request_id, 1, parent, join_digests(digests[first_chunk : first_chunk + count]), tuple(block_ids)
        )

    def mark_failed(self, request_id: str, first_failed_token: int) -> None:
        self.failed[request_id] = min(first_failed_token // CHUNK, self.failed.get(request_id, 1 << 30))

    def free_lookup_locks(self, request_id: str) -> None:
        pass

    def end_session(self, request_id: str) -> None:
        for known in (self.digests, self.answers, self.failed):
            known.pop(request_id, None)


class Mover:
    """The worker's adapter. A copy happens when it is told to, or waited for, and not a moment earlier."""

    def __init__(self, cache: Cache, memory: Memory, fails: Callable[[], bool]) -> None:
        self.cache = cache
        self.memory = memory
        self.fails = fails
        self.jobs: list[StoreSpec | LoadSpec] = []
        self.stored: set[str] = set()
        self.retrieved: set[str] = set()
        self.failed: set[int] = set()

    def submit_store(self, spec: StoreSpec) -> None:
        self.jobs.append(spec)

    def submit_retrieve(self, spec: LoadSpec) -> None:
        self.jobs.append(spec)

    def retrieve_now(self, specs: Sequence[LoadSpec]) -> None:
        for spec in specs:
            self.copy(spec)

    def wait_stores(self, request_ids: Iterable[str] | None = None) -> None:
        wanted = set(request_ids or ())
        for spec in [job for job in self.jobs if isinstance(job, StoreSpec) and job.request_id in wanted]:
            self.finish(spec)

    def finish(self, spec: StoreSpec | LoadSpec) -> None:
        self.jobs.remove(spec)
        self.copy(spec)
        (self.stored if isinstance(spec, StoreSpec) else self.retrieved).add(spec.request_id)

    def copy(self, spec: StoreSpec | LoadSpec) -> None:
        cells, width = self.memory.cells, CHUNK // BLOCK
        if isinstance(spec, StoreSpec):
            for i, digest in enumerate(split_digests(spec.digests)):
                blocks = [list(cells[block]) for block in spec.block_ids[i * width : (i + 1) * width]]
                flat = [kv for block in blocks for kv in block]
                assert flat == true_kv(self.cache.tokens[digest])[-CHUNK:], "stored under the name of other tokens"
                self.cache.chunks[digest] = blocks
            return
        digests = self.cache.leases[spec.lease][spec.start : spec.start + spec.count]
        source = [block for digest in digests for block in self.cache.chunks[digest]][spec.skip_blocks :]
        assert len(source) == len(spec.block_ids)
        failed = self.fails()
        for block, found in zip(spec.block_ids, source, strict=True):
            assert self.memory.users[block] <= 1, "a shared block was written"
            cells[block] = [-1] * BLOCK if failed else list(found)
        if failed:
            self.failed.update(spec.block_ids)

    def take_finished(self) -> tuple[set[str], set[str]]:
        busy = {(type(job), job.request_id) for job in self.jobs}
        stored = {each for each in self.stored if (StoreSpec, each) not in busy}
        retrieved, self.retrieved = self.retrieved, set()
        self.stored -= stored
        return stored, retrieved

    def take_failed_blocks(self) -> set[int]:
        failed, self.failed = self.failed, set()
        return failed


@attrs.frozen
class Output:
    """One step's, on its way back: what was scheduled, what was sampled, what the worker reported."""

    scheduled: list[tuple[Request, int]]
    tokens: dict[str, int]
    report: StepOutput


class Engine:
    """vLLM's scheduler and one worker. *overlap* steps are under way at once; *draw(n)* picks a number up to n."""

    def __init__(self, draw: Callable[[int], int], *, asynchronous: bool, overlap: int, blocks: int) -> None:
        self.draw = draw
        self.overlap = overlap
        self.memory = Memory(blocks, sharing=asynchronous)
        self.cache = Cache(lambda: not draw(4))
        self.mover = Mover(self.cache, self.memory, lambda: not draw(3))
        self.side = SchedulerSide(
            self.cache, block_tokens=BLOCK, asynchronous=asynchronous, identify=lambda request: None
        )
        self.worker = WorkerSide(self.mover, asynchronous=asynchronous)
        self.asynchronous = asynchronous
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.held: dict[str, Request] = {}
        self.all: list[Request] = []
        self.outputs: list[Output] = []

    def submit(self, prompt: list[int], wanted: int, *, skip: bool) -> None:
        request = Request(f"r{len(self.all)}", list(prompt), len(prompt), wanted, skip)
        request.real_tokens = list(prompt)
        self.all.append(request)
        self.waiting.append(request)

    def step(self) -> None:
        scheduled: list[tuple[Request, int]] = []
        preempted = self._schedule_running(scheduled)
        if not preempted:
            self._schedule_waiting(scheduled)
        blocks = {request.request_id: request.blocks for request, _ in scheduled}
        counts = {request.request_id: count for request, count in scheduled}
        plan = self.side.plan(counts, [request.request_id for request in preempted], lambda each: blocks[each])
        starts = [request.num_computed_tokens for request, _ in scheduled]
        for request, count in scheduled:
            request.num_computed_tokens += count
            request.num_in_flight_tokens += count
            if self.overlap > 1 and request.num_computed_tokens >= request.num_tokens + request.placeholders:
                request.placeholders += 1
        self.outputs.append(self._execute(plan, scheduled, starts))
        while len(self.outputs) >= self.overlap:
            self._process(self.outputs.pop(0))

    def _schedule_running(self, scheduled: list[tuple[Request, int]]) -> list[Request]:
        preempted: list[Request] = []
        at = 0
        while at < len(self.running):
            request = self.running[at]
            at += 1
            count = min(request.num_tokens + request.placeholders - request.num_computed_tokens, 1 + self.draw(6))
            if count <= 0 or request.num_tokens - request.prompt + request.placeholders > request.wanted:
                continue
            while not self.memory.grow(request, request.num_computed_tokens + count):
                if self.running[-1].num_in_flight_tokens:
                    count = 0
                    break
                preempted.append(self.running.pop())
                self.memory.drop(preempted[-1])
                preempted[-1].num_computed_tokens = 0
                preempted[-1].state, preempted[-1].loaded = "waiting", False
                if preempted[-1] is request:
                    count = 0
                    break
            if count:
                scheduled.append((request, count))
                self.memory.name(request.all_token_ids[: request.num_computed_tokens + count], request.blocks)
        self.waiting[:0] = preempted
        return preempted

    def _schedule_waiting(self, scheduled: list[tuple[Request, int]]) -> None:
        for request in list(self.waiting):
            if request.state == "loading":
                if not request.loaded:
                    continue
                request.state = "waiting"
                if request.load_failed and not request.num_computed_tokens:
                    self.memory.drop(request)
                self.memory.name(request.all_token_ids[: request.num_computed_tokens], request.blocks)
                request.load_failed = False
            shared: list[int] = []
            external, between = 0, False
            if not request.num_computed_tokens:
                shared = [] if request.skip_reading_prefix_cache else self.memory.find(request.all_token_ids)
                offered, between = self.side.offer(request, len(shared) * BLOCK)
                if offered is None:
                    continue
                external = offered
            computed = request.num_computed_tokens or len(shared) * BLOCK + external
            count = 0 if between else min(request.num_tokens - computed, 1 + self.draw(6))
            if not self.memory.grow(request, computed + count, shared):
                break
            self.side.allocated(request, list(request.blocks), external)
            request.num_computed_tokens = computed
            if between:
                request.state, request.loaded = "loading", False
                continue
            self.waiting.remove(request)
            self.running.append(request)
            request.state = "running"
            scheduled.append((request, count))
            self.memory.name(request.all_token_ids[: computed + count], request.blocks)

    def _execute(self, plan: StepPlan, scheduled: list[tuple[Request, int]], starts: list[int]) -> Output:
        self.worker.let_go(plan.preempted)
        self.worker.begin(plan)
        if not self.asynchronous:
            self.worker.load()
        tokens: dict[str, int] = {}
        for (request, count), start in zip(scheduled, starts, strict=True):
            cells = self.memory.cells
            for position in range(start, start + count):
                before = cells[request.blocks[(position - 1) // BLOCK]][(position - 1) % BLOCK] if position else 0
                kv = next_kv(before, request.real_tokens[position])
                cells[request.blocks[position // BLOCK]][position % BLOCK] = kv
            if start + count == len(request.real_tokens):
                tokens[request.request_id] = sampled(kv)
                request.real_tokens.append(sampled(kv))
        if self.asynchronous:
            self.worker.load()
        self.worker.store()
        report = self.worker.report()
        failed = frozenset(self.worker.take_failed_blocks())
        said = StepOutput(frozenset(report.loaded), frozenset(report.released), failed, self.worker.failed_step)
        return Output(scheduled, tokens, said)

    def _process(self, output: Output) -> None:
        skipped: set[str] = set()
        counts = {request.request_id: count for request, count in output.scheduled}
        for request in [*self.running, *(each for each in self.waiting if each.state == "loading")]:
            reach = request.num_computed_tokens - counts.get(request.request_id, 0)
            for i, block in enumerate(request.blocks[: -(-reach // BLOCK)]):
                if block in output.report.failed_blocks:
                    request.num_computed_tokens = i * BLOCK
                    request.load_failed = request.state == "loading"
                    skipped.add(request.request_id)
                    del request.real_tokens[request.num_tokens :]
                    break
        for request, count in output.scheduled:
            request.num_in_flight_tokens -= count
            if request.request_id in skipped or request.state == "finished":
                continue
            if request.request_id in output.tokens:
                request.all_token_ids.append(output.tokens[request.request_id])
                request.placeholders -= self.overlap > 1
                if request.num_tokens - request.prompt == request.wanted:
                    self._finish(request)
        self.side.output(output.report)
        for request in self.all:
            if request.request_id in output.report.loaded:
                request.loaded = True
                if request.state == "finished":
                    self.memory.drop(request)
            if request.request_id in output.report.released:
                self.memory.drop(self.held.pop(request.request_id))

    def abort(self, request: Request) -> None:
        if request.state != "finished":
            self._finish(request)

    def _finish(self, request: Request) -> None:
        loading = request.state == "loading" and not request.loaded
        request.state = "finished"
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        used = request.blocks[: -(-request.num_computed_tokens // BLOCK)]
        if self.side.finished(request, used):
            assert not loading, "vLLM would free the blocks twice"
            self.held[request.request_id] = request
        elif not loading:
            self.memory.drop(request)

    def settle(self) -> None:
        """Run until everything has ended, copies too."""
        for _ in range(400):
            for job in list(self.mover.jobs):
                self.mover.finish(job)
            if not (self.waiting or self.running or self.held or any(each.blocks for each in self.all)):
                return
            self.step()
        raise AssertionError("it does not come to an end")


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


@pytest.mark.parametrize(
    ("asynchronous", "overlap"), [(True, 1), (True, 2), (False, 1)], ids=["async", "async, overlapping", "sync"]
)
@settings(max_examples=150)
@given(data=st.data())
def test_every_request_is_answered_as_without_a_cache(asynchronous: bool, overlap: int, data: st.DataObject) -> None:
    def draw(most: int) -> int:
        return data.draw(st.integers(0, most))

    engine = Engine(draw, asynchronous=asynchronous, overlap=overlap, blocks=12)
    aborted = set()
    for _ in range(data.draw(st.integers(5, 30))):
        match draw(7):
            case 0 | 1:
                engine.submit(data.draw(PROMPTS), 1 + draw(8), skip=not draw(7))
            case 2 if engine.mover.jobs:
                engine.mover.finish(engine.mover.jobs[draw(len(engine.mover.jobs) - 1)])
            case 3 if engine.all and not draw(3):
                request = engine.all[draw(len(engine.all) - 1)]
                aborted.add(request.request_id)
                engine.abort(request)
            case _:
                engine.step()
    engine.settle()
    for request in engine.all:
        if request.request_id not in aborted:
            assert request.all_token_ids[request.prompt :] == true_answer(
                request.all_token_ids[: request.prompt], request.wanted
            )
    assert len(engine.memory.free) == 12, "a block was not given back"
    assert engine.side.statistics() == {"requests": 0, "loading": 0}
    assert not engine.cache.digests, "a session was not ended"
