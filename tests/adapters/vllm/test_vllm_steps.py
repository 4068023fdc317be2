"""Both sides of the vLLM connector, held by an engine too simple to be wrong, in any order of events.

The engine schedules, preempts, frees, shares and overlaps as vLLM does, on a handful of blocks whose bytes are worked
out from the tokens before them, so that wrong KV gives wrong answers. vLLM 0.33 may say where an asynchronous load goes
when the steps under way are over, and until then counts its tokens as computed: *late* engines do. Copies take effect
as late as they are allowed to, and loads fail when Hypothesis likes. Then two things must hold: what is stored under a
name is the KV of that name's tokens, and every request is answered as if there were no cache.
"""

from collections.abc import Callable

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vllm_model import BLOCK, GROUPS, Cache, Memory, Mover, Request, next_kv, sampled, true_answer

from lmcache_trio.adapters.vllm.metadata import StepPlan
from lmcache_trio.adapters.vllm.scheduler_side import SchedulerSide, StepOutput
from lmcache_trio.adapters.vllm.worker_side import WorkerSide


@attrs.frozen
class Output:
    """One step's, on its way back: what was scheduled, what was sampled, what the worker reported."""

    scheduled: list[tuple[Request, int]]
    tokens: dict[str, int]
    report: StepOutput


class Engine:
    """vLLM's scheduler and one worker. *overlap* steps are under way at once; *draw(n)* picks a number up to n.

    *late*: blocks for an asynchronous load are named when the steps that were under way are over.
    """

    def __init__(
        self, draw: Callable[[int], int], *, asynchronous: bool, overlap: int, blocks: int, late: bool = False
    ) -> None:
        self.draw = draw
        self.overlap = overlap
        self.late = late
        self.deferred: dict[str, tuple[Request, int, int]] = {}  # what is to be loaded, behind how many outputs
        self.processed = 0
        self.memory = Memory(blocks, sharing=asynchronous)
        self.cache = Cache(lambda: not draw(4))
        self.mover = Mover(self.cache, self.memory, lambda: not draw(3))
        self.side = SchedulerSide(self.cache, groups=GROUPS, asynchronous=asynchronous, identify=lambda request: None)
        self.worker = WorkerSide(self.mover, asynchronous=asynchronous)
        self.asynchronous = asynchronous
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.all: list[Request] = []
        self.outputs: list[Output] = []

    def submit(self, prompt: list[int], wanted: int, *, skip: bool) -> None:
        request = Request(f"r{len(self.all)}", list(prompt), len(prompt), wanted, skip)
        request.real_tokens = list(prompt)
        self.all.append(request)
        self.waiting.append(request)

    def step(self) -> None:
        scheduled: list[tuple[Request, int]] = []
        grown: list[int] = []
        preempted = self._schedule_running(scheduled, grown)
        if not preempted:
            self._schedule_waiting(scheduled)
        blocks = {request.request_id: request.blocks for request, _ in scheduled}
        counts = {request.request_id: count for request, count in scheduled}
        plan = self.side.plan(
            counts, [request.request_id for request in preempted], lambda each: (blocks[each],), grown
        )
        starts = [request.num_computed_tokens for request, _ in scheduled]
        for request, count in scheduled:
            request.num_computed_tokens += count
            request.num_in_flight_tokens += count
            if self.overlap > 1 and request.num_computed_tokens >= request.num_tokens + request.placeholders:
                request.placeholders += 1
        self.outputs.append(self._execute(plan, scheduled, starts))
        while len(self.outputs) >= self.overlap:
            self._process(self.outputs.pop(0))

    def _schedule_running(self, scheduled: list[tuple[Request, int]], grown: list[int]) -> list[Request]:
        preempted: list[Request] = []
        at = 0
        while at < len(self.running):
            request = self.running[at]
            at += 1
            count = min(request.num_tokens + request.placeholders - request.num_computed_tokens, 1 + self.draw(6))
            if count <= 0 or request.num_tokens - request.prompt + request.placeholders > request.wanted:
                continue
            before = len(request.blocks)
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
                grown += request.blocks[before:]
                scheduled.append((request, count))
                self.memory.name(request.all_token_ids[: request.num_computed_tokens + count], request.blocks)
        self.waiting[:0] = preempted
        self.waiting.sort(key=lambda each: not each.blocks)  # first those whose blocks wait too
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
            if (between and self._crowded(request)) or not self.memory.grow(request, computed + count, shared):
                break
            if between and self.late and self.outputs:
                self.deferred[request.request_id] = request, external, self.processed + len(self.outputs)
            else:
                self.side.allocated(request, (list(request.blocks),), external)
            request.num_computed_tokens = computed
            if between:
                request.state, request.loaded = "loading", False
                continue
            self.waiting.remove(request)
            self.running.append(request)
            request.state = "running"
            scheduled.append((request, count))
            self.memory.name(request.all_token_ids[: computed + count], request.blocks)

    def _crowded(self, request: Request) -> bool:
        """Whether requests that wait while holding blocks could come to need more than there are."""
        holding = [request, *(each for each in self.waiting if each.blocks and each is not request)]
        return sum(-(-(each.prompt + each.wanted) // BLOCK) for each in holding) > BLOCKS

    def _execute(self, plan: StepPlan, scheduled: list[tuple[Request, int]], starts: list[int]) -> Output:
        self.worker.let_go(plan)
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
        closed = dict.fromkeys(report.closed, 1)
        loaded, failed_step = frozenset(report.loaded), self.worker.failed_step
        said = StepOutput(self.worker.step, loaded, closed, failed, failed_step=failed_step)
        return Output(scheduled, tokens, said)

    def _process(self, output: Output) -> None:
        self.processed += 1
        for request, external, behind in list(self.deferred.values()):
            if behind <= self.processed:
                del self.deferred[request.request_id]
                self.side.allocated(request, (list(request.blocks),), external)
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

    def abort(self, request: Request) -> None:
        if request.state != "finished":
            self._finish(request)

    def _finish(self, request: Request) -> None:
        deferred = self.deferred.pop(request.request_id, None)
        loading = request.state == "loading" and not request.loaded and deferred is None
        request.state = "finished"
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        used = request.blocks[: -(-request.num_computed_tokens // BLOCK)]
        self.side.finished(request, (used,))
        if not loading:
            self.memory.drop(request)  # to be used again in the very next step

    def settle(self) -> None:
        """Run until everything has ended, copies too: in big steps, or thirty requests would take a token a step."""
        self.draw = lambda most: most
        for _ in range(400):
            for job in list(self.mover.jobs):
                self.mover.finish(job)
            busy = self.waiting or self.running or any(each.blocks for each in self.all)
            if not busy and not self.side.statistics()["requests"]:
                return
            self.step()
        raise AssertionError("it does not come to an end")


BLOCKS = 12
"""As many as the longest request needs: 14 tokens of prompt and 9 answers."""
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


@pytest.mark.parametrize(
    ("asynchronous", "overlap", "late"),
    [(True, 1, False), (True, 2, False), (True, 2, True), (False, 1, False)],
    ids=["async", "async, overlapping", "async, overlapping, late", "sync"],
)
@settings(max_examples=150)
@given(data=st.data())
def test_every_request_is_answered_as_without_a_cache(
    asynchronous: bool, overlap: int, late: bool, data: st.DataObject
) -> None:
    def draw(most: int) -> int:
        return data.draw(st.integers(0, most))

    engine = Engine(draw, asynchronous=asynchronous, overlap=overlap, blocks=BLOCKS, late=late)
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
    assert len(engine.memory.free) == BLOCKS, "a block was not given back"
    assert engine.side.statistics() == {"requests": 0, "loading": 0}
    assert not engine.cache.digests, "a session was not ended"
