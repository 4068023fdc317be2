"""Both sides of the vLLM connector with several KV groups, held by an engine too simple to be wrong.

The engine schedules as vLLM 0.32 does with its hybrid cache manager. Blocks that have left a window are freed while
their request runs, and are used again at once, also by itself. The state of a request moves on from block to block, and
the engine offers it where a step ends at a chunk's end. Loads are asynchronous and fail for a whole request; requests
are preempted and aborted. Copies happen as late as they are allowed to, and the cache loses any part at any time. Then:

- what is stored under the name of a part is that part's KV;
- a load writes each block that its request has for the loaded tokens, once, and no other;
- every step reads KV of the very tokens that it computes with.
"""

from collections.abc import Callable, Mapping

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vllm_groups import HOLE, NULL, GroupCache, GroupMover, Pool
from support.vllm_model import CHUNK, Request

from lmcache_trio.adapters import Group, Need
from lmcache_trio.adapters.vllm.metadata import StepPlan
from lmcache_trio.adapters.vllm.scheduler_side import SchedulerSide, StepOutput
from lmcache_trio.adapters.vllm.worker_side import WorkerSide

BLOCK = 2
EVERY, STATE = Group(Need.EVERY, 0, BLOCK), Group(Need.STATE, 0, CHUNK)
MODELS: Mapping[str, tuple[Group, ...]] = {
    "window": (Group(Need.WINDOW, 5, BLOCK), EVERY),
    "windows, of one block and of more than a chunk": (
        Group(Need.WINDOW, 3, BLOCK),
        Group(Need.WINDOW, 8, BLOCK),
        EVERY,
    ),
    "a window alone": (Group(Need.WINDOW, 6, BLOCK),),
    "attention chunks": (Group(Need.LOCAL, 8, BLOCK), EVERY),
    "attention chunks that end within a chunk": (Group(Need.LOCAL, 6, BLOCK), EVERY),
    "states": (STATE, STATE, Group(Need.EVERY, 0, CHUNK)),
    "states and a window": (STATE, Group(Need.WINDOW, 5, BLOCK), EVERY),
}
LONGEST = 23
"""Tokens of the longest request: a prompt of 14, and 9 answers."""


@attrs.frozen
class Output:
    """One step's, on its way back: what was scheduled, what was sampled, what the worker reported."""

    scheduled: list[tuple[Request, int]]
    tokens: dict[str, int]
    report: StepOutput


class Engine:
    """vLLM's scheduler and one worker. *overlap* steps are under way at once; *draw(n)* picks a number up to n."""

    def __init__(self, draw: Callable[[int], int], groups: tuple[Group, ...], overlap: int) -> None:
        self.draw = draw
        self.groups = groups
        self.overlap = overlap
        self.blocks = sum(-(-LONGEST // group.block_tokens) for group in groups)
        self.pool = Pool(groups, self.blocks)
        self.cache = GroupCache(groups, lambda: not self.draw(4))
        self.mover = GroupMover(self.cache, self.pool, lambda: not self.draw(5))
        self.side = SchedulerSide(self.cache, groups=groups, asynchronous=True, identify=lambda request: None)
        self.worker = WorkerSide(self.mover, asynchronous=True, by_request=True)
        self.lists: dict[str, list[list[int]]] = {}
        self.to_fill: dict[str, set[int]] = {}
        self.failed: set[str] = set()
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.all: list[Request] = []
        self.outputs: list[Output] = []

    def submit(self, prompt: list[int], wanted: int) -> None:
        request = Request(f"r{len(self.all)}", list(prompt), len(prompt), wanted)
        request.real_tokens = list(prompt)
        self.lists[request.request_id] = [[] for _ in self.groups]
        self.all.append(request)
        self.waiting.append(request)

    def known(self, request_id: str) -> list[list[int]]:
        """The request's blocks as the connector is given them."""
        return [[HOLE if block == NULL else block for block in ids] for ids in self.lists[request_id]]

    def step(self) -> None:
        scheduled: list[tuple[Request, int]] = []
        grown: list[int] = []
        preempted = self._schedule_running(scheduled, grown)
        if not preempted:
            self._schedule_waiting(scheduled)
        counts = {request.request_id: count for request, count in scheduled}
        states = {request.request_id: self._states(request, count) for request, count in scheduled}
        gone = [request.request_id for request in preempted]
        plan = self.side.plan(counts, gone, self.known, grown, states)
        starts = [request.num_computed_tokens for request, _ in scheduled]
        for request, count in scheduled:
            request.num_computed_tokens += count
            request.num_in_flight_tokens += count
            if self.overlap > 1 and request.num_computed_tokens >= request.num_tokens + request.placeholders:
                request.placeholders += 1
        self.outputs.append(self._execute(plan, scheduled, starts))
        while len(self.outputs) >= self.overlap:
            self._process(self.outputs.pop(0))

    def _states(self, request: Request, count: int) -> list[tuple[int, int, int]]:
        """vLLM offers the state at the last chunk's end in a prompt, and elsewhere as it likes."""
        end = request.num_computed_tokens + count
        if end % CHUNK or (end != (request.prompt - 1) // CHUNK * CHUNK and self.draw(2)):
            return []
        lists = self.lists[request.request_id]
        return [(i, lists[i][end // CHUNK - 1], end) for i, group in enumerate(self.groups) if group.need is Need.STATE]

    def _count(self, request: Request, computed: int) -> int:
        """Tokens of its next step. A step ends where the state is to be kept."""
        count = min(request.num_tokens + request.placeholders - computed, 1 + self.draw(6))
        return min(count, CHUNK - computed % CHUNK) if STATE in self.groups else count

    def _schedule_running(self, scheduled: list[tuple[Request, int]], grown: list[int]) -> list[Request]:
        preempted: list[Request] = []
        at = 0
        while at < len(self.running):
            request = self.running[at]
            at += 1
            count = self._count(request, request.num_computed_tokens)
            if count <= 0 or request.num_tokens - request.prompt + request.placeholders > request.wanted:
                continue
            lists = self.lists[request.request_id]
            self.pool.skip(lists, request.num_computed_tokens - request.num_in_flight_tokens)
            while (new := self.pool.grow(lists, request.num_computed_tokens + count)) is None:
                if self.running[-1].num_in_flight_tokens:
                    count = 0
                    break
                preempted.append(self.running.pop())
                self.pool.drop(self.lists[preempted[-1].request_id])
                preempted[-1].num_computed_tokens = 0
                preempted[-1].state, preempted[-1].loaded = "waiting", False
                if preempted[-1] is request:
                    count = 0
                    break
            if count:
                grown += new or []
                scheduled.append((request, count))
                self._name(request, request.num_computed_tokens + count)
        self.waiting[:0] = preempted
        self.waiting.sort(key=lambda each: not any(self.lists[each.request_id]))  # first those whose blocks wait too
        return preempted

    def _name(self, request: Request, computed: int) -> None:
        self.pool.name(self.lists[request.request_id], request.all_token_ids[:computed])

    def _schedule_waiting(self, scheduled: list[tuple[Request, int]]) -> None:
        for request in list(self.waiting):
            lists = self.lists[request.request_id]
            if request.state == "loading":
                if not request.loaded:
                    continue
                request.state = "waiting"
                if request.load_failed:
                    self.pool.drop(lists)
                self._name(request, request.num_computed_tokens)
                request.load_failed = False
            shared: list[list[int]] = [[] for _ in self.groups]
            local, external, between = request.num_computed_tokens, 0, False
            if not request.num_computed_tokens:
                local, shared = self.pool.find(request.all_token_ids)
                offered, between = self.side.offer(request, local)
                if offered is None:
                    continue
                external = offered
                assert not external or request.request_id not in self.failed, "what failed was offered again"
            computed = local + external
            count = 0 if between else self._count(request, computed)
            if between and self._crowded(request):
                break
            self.pool.skip(lists, request.num_computed_tokens)
            if self.pool.grow(lists, computed + count, shared, computed) is None:
                break
            self.side.allocated(request, self.known(request.request_id), external)
            request.num_computed_tokens = computed
            if between:
                request.state, request.loaded = "loading", False
                self.to_fill[request.request_id] = {
                    block
                    for group, ids in zip(self.groups, lists, strict=True)
                    for block in ids[local // group.block_tokens :]
                    if block != NULL
                }
                continue
            self.waiting.remove(request)
            self.running.append(request)
            request.state = "running"
            scheduled.append((request, count))
            self._name(request, computed + count)

    def _crowded(self, request: Request) -> bool:
        """Whether requests that wait while holding blocks could come to need more than there are."""
        holding = [request, *(each for each in self.waiting if any(self.lists[each.request_id]))]
        longest = [each.prompt + each.wanted for each in {each.request_id: each for each in holding}.values()]
        return sum(-(-each // group.block_tokens) for each in longest for group in self.groups) > self.blocks

    def _execute(self, plan: StepPlan, scheduled: list[tuple[Request, int]], starts: list[int]) -> Output:
        self.worker.let_go(plan)
        self.worker.begin(plan)
        tokens: dict[str, int] = {}
        for (request, count), start in zip(scheduled, starts, strict=True):
            end = start + count
            self.pool.compute(self.lists[request.request_id], request.real_tokens[:end], start)
            if end == len(request.real_tokens):
                tokens[request.request_id] = sum(request.real_tokens) % 2
                request.real_tokens.append(tokens[request.request_id])
        self.worker.load()
        self.worker.store()
        report = self.worker.report()
        assert self.worker.take_failed_blocks() == set()
        closed, loaded = dict.fromkeys(report.closed, 1), frozenset(report.loaded)
        said = StepOutput(self.worker.step, loaded, closed, failed=frozenset(report.failed))
        return Output(scheduled, tokens, said)

    def _process(self, output: Output) -> None:
        for request in self.all:
            if request.request_id in output.report.failed and request.state == "loading":
                request.num_computed_tokens, request.load_failed = 0, True
                self.failed.add(request.request_id)
        for request, count in output.scheduled:
            request.num_in_flight_tokens -= count
            if request.state != "finished" and request.request_id in output.tokens:
                request.all_token_ids.append(output.tokens[request.request_id])
                request.placeholders -= self.overlap > 1
                if request.num_tokens - request.prompt == request.wanted:
                    self._finish(request)
        self.side.output(output.report)
        for request in self.all:
            if request.request_id in output.report.loaded:
                filled = sorted(self.mover.filled.pop(request.request_id))
                assert filled == sorted(self.to_fill.pop(request.request_id)), "not the needed blocks were filled"
                request.loaded = True
                if request.state == "finished":
                    self.pool.drop(self.lists[request.request_id])

    def abort(self, request: Request) -> None:
        if request.state != "finished":
            self._finish(request)

    def _finish(self, request: Request) -> None:
        loading = request.state == "loading" and not request.loaded
        request.state = "finished"
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        lists = self.lists[request.request_id]
        if not loading:
            self.pool.skip(lists, max(0, request.num_computed_tokens - request.num_in_flight_tokens))
        used = [
            ids[: -(-request.num_computed_tokens // group.block_tokens)]
            for group, ids in zip(self.groups, self.known(request.request_id), strict=True)
        ]
        self.side.finished(request, used)
        if not loading:
            self.pool.drop(lists)  # to be used again in the very next step

    def settle(self) -> None:
        """Run until everything has ended, copies too: in big steps, or thirty requests would take a token a step."""
        self.draw = lambda most: most
        for _ in range(400):
            for job in list(self.mover.jobs):
                self.mover.finish(job)
            busy = self.waiting or self.running or any(any(lists) for lists in self.lists.values())
            if not busy and not self.side.statistics()["requests"]:
                return
            self.step()
        raise AssertionError("it does not come to an end")


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


@pytest.mark.parametrize("overlap", [1, 2], ids=["", "overlapping"])
@pytest.mark.parametrize("groups", MODELS.values(), ids=MODELS.keys())
@settings(max_examples=25)
@given(data=st.data())
def test_every_part_is_stored_and_loaded_as_its_name_says(
    groups: tuple[Group, ...], overlap: int, data: st.DataObject
) -> None:
    def draw(most: int) -> int:
        return data.draw(st.integers(0, most))

    engine = Engine(draw, groups, overlap)
    for _ in range(data.draw(st.integers(5, 30))):
        match draw(8):
            case 0 | 1:
                engine.submit(data.draw(PROMPTS), 1 + draw(8))
            case 2 if engine.mover.jobs:
                engine.mover.finish(engine.mover.jobs[draw(len(engine.mover.jobs) - 1)])
            case 3 if engine.all and not draw(3):
                engine.abort(engine.all[draw(len(engine.all) - 1)])
            case 4 if engine.cache.parts:
                del engine.cache.parts[list(engine.cache.parts)[draw(len(engine.cache.parts) - 1)]]
            case _:
                engine.step()
    engine.settle()
    assert len(engine.pool.free) == engine.blocks, "a block was not given back"
    assert engine.side.statistics() == {"requests": 0, "loading": 0}
    assert not engine.cache.digests, "a session was not ended"
