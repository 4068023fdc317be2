"""What was planned for one layout is never moved under another: the two sides of an engine, its server, its KV."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from lmcache_trio.adapters import Group, LoadSpec, Need, SchedulerAdapter, StoreSpec, WorkerAdapter
from lmcache_trio.adapters.shared_kv import shared_tensor
from lmcache_trio.adapters.vllm.scheduler_side import SchedulerSide
from lmcache_trio.adapters.worker.cuda_kv import make_paged_kv
from lmcache_trio.client import Client
from lmcache_trio.errors import Misuse
from lmcache_trio.testing.sides import BLOCK, CHUNK, ServerProcess, Side, make_kv, same_blocks, wait_until

TOKENS = list(range(3 * CHUNK))
FROM = [5, 9, 1, 33, 34, 35, 36, 60, 2, 7, 8, 3]
INTO = [11, 40, 12, 50, 13, 51, 14, 52, 20, 21, 22, 23]
LONG = list(range(1000, 1000 + 4 * 256))

KV = dict[str, torch.Tensor]
MakeSide = Callable[..., Side]


def shared(seed: int | None = None) -> KV:
    made = make_kv(seed)
    for name, tensor in made.items():
        made[name] = shared_tensor(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return made


both_paths = pytest.mark.parametrize("kv", [make_kv, shared], ids=["shm", "device"])


@pytest.fixture
def adapters() -> Iterator[Callable[..., Any]]:
    """Makes adapters of one engine, which are shut down at the end."""
    with ExitStack() as stack:

        def make(kind: type[Any], address: str, *, engine: str = "an engine", **settings: Any) -> Any:
            more = {"identity": ["a model"]} if issubclass(kind, SchedulerAdapter) else {"reply_timeout": 30.0}
            made = kind(address, engine_id=engine, **more, **settings)
            stack.callback(made.shutdown)
            return made

        yield make


def store(worker: WorkerAdapter, specs: Sequence[StoreSpec], how: str) -> None:
    if how == "now":
        worker.store_now(specs)
    else:
        for spec in specs:
            worker.submit_store(spec)
    wait_until(lambda: worker.statistics()["running"] == 0)


def retrieve(worker: WorkerAdapter, specs: Sequence[LoadSpec], how: str) -> set[int]:
    if how == "now":
        worker.retrieve_now(specs)
    else:
        for spec in specs:
            worker.submit_retrieve(spec)
    wait_until(lambda: worker.statistics()["running"] == 0)
    return worker.take_failed_blocks()


WAYS = ("now", "submitted")
every_way = pytest.mark.parametrize("how", WAYS)


@pytest.mark.parametrize(("planned", "own"), [(16, 32), (32, 16)], ids=["smaller blocks", "larger blocks"])
def test_a_spec_that_was_planned_for_blocks_of_another_length_is_refused_at_submit(
    live_server: ServerProcess, sides: MakeSide, adapters: Callable[..., Any], planned: int, own: int
) -> None:
    """It would write past its slot into a chunk of others, or publish chunks that are half filled."""
    scheduler = adapters(SchedulerAdapter, live_server.address, block_tokens=planned)
    worker = adapters(WorkerAdapter, live_server.address, block_tokens=own)
    worker.register_kv_caches(make_kv(1))
    scheduler.extend("r", TOKENS)
    spec = scheduler.store_spec("r", 0, FROM[: 3 * CHUNK // planned])
    for how in WAYS:
        with pytest.raises(Misuse, match=f"blocks of {planned} tokens.* worker's have {own}.*same block_tokens"):
            store(worker, [spec], how)
    scheduler.maybe_submit_lookup_request("r", TOKENS)
    wait_until(lambda: scheduler.check_lookup_result("r") is not None)
    load = scheduler.update_after_alloc("r", CHUNK, block_ids=INTO[: CHUNK // planned])
    for how in WAYS:
        with pytest.raises(Misuse, match=f"blocks of {planned} tokens.* worker's have {own}.*same block_tokens"):
            retrieve(worker, [load], how)
    assert worker.statistics() == {"running": 0}
    assert live_server.held["chunks_ready"] == 0


def test_blocks_that_do_not_fill_their_chunks_are_refused_at_submit(
    live_server: ServerProcess, sides: MakeSide
) -> None:
    one = sides(live_server.address, make_kv(1))
    one.scheduler.extend("r", TOKENS)
    whole = one.scheduler.store_spec("r", 0, FROM)
    for blocks in (1, 2, 8):
        by_hand = StoreSpec("r", whole.session, b"", whole.digests, tuple(range(3 * blocks)))
        for how in WAYS:
            with pytest.raises(Misuse, match=f"{blocks} blocks of 16 tokens a chunk.* 64 tokens: give 4 blocks"):
                store(one.worker, [by_hand], how)
    store(one.worker, [StoreSpec("r", whole.session, b"", whole.digests, tuple(FROM))], "now")
    assert one.worker.statistics()["stored_chunks"] == 3


@every_way
@both_paths
def test_a_store_that_was_planned_before_the_server_came_is_dropped_and_those_of_the_next_step_fit(
    tmp_path: Path, sides: MakeSide, adapters: Callable[..., Any], kv: Callable[..., KV], how: str
) -> None:
    """Its chunks have 128 tokens, the server's 16: eight times its slots would be written."""
    server = ServerProcess(f"unix://{tmp_path}/s.sock", f"chunk_tokens={BLOCK}")
    early = adapters(SchedulerAdapter, server.address, block_tokens=BLOCK, connect_timeout=0.01)
    worker = adapters(WorkerAdapter, server.address, block_tokens=BLOCK, connect_timeout=0.01)
    mine = kv(1)
    worker.register_kv_caches(mine)
    early.extend("r", LONG)
    planned = early.store_spec("r", 0, range(48))
    server.start()
    try:
        other = sides(server.address, make_kv(2))
        wait_until(lambda: early.is_healthy() and worker.is_healthy())
        other.store("neighbour", TOKENS, FROM)
        early.extend("r", LONG)
        again = early.store_spec("r", 0, range(16))  # which opens the session
        store(worker, [planned], how)
        assert worker.statistics() == {"running": 0, "dropped_layout": 6}
        assert other.lookup("q", TOKENS) == len(TOKENS)
        assert other.load("q", len(TOKENS), INTO) == set()
        assert same_blocks(other.kv, FROM, other.kv, INTO)
        store(worker, [again], how)
        assert worker.statistics() == {"running": 0, "dropped_layout": 6, "stored_chunks": 16}
        reader = sides(server.address, make_kv())
        assert reader.lookup("q", LONG) == 4 * CHUNK
        assert reader.load("q", 4 * CHUNK, list(range(16))) == set()
        assert same_blocks(mine, list(range(16)), reader.kv, list(range(16)))
    finally:
        server.kill()


@both_paths
def test_a_load_that_was_planned_for_chunks_of_another_length_fails_and_writes_nothing(
    live_server: ServerProcess, sides: MakeSide, kv: Callable[..., KV]
) -> None:
    one, other = sides(live_server.address, make_kv(1)), sides(live_server.address, kv())
    one.store("r", TOKENS, FROM)
    assert other.lookup("q", TOKENS) == 3 * CHUNK
    spec = other.scheduler.update_after_alloc("q", 3 * CHUNK, block_ids=INTO)
    assert spec is not None
    former = attrs.evolve(spec, chunk_tokens=2 * CHUNK)
    for how in WAYS:
        assert retrieve(other.worker, [former], how) == set(INTO)
        assert same_blocks(other.kv, list(range(64)), make_kv(), list(range(64)))
    assert other.worker.statistics() == {"running": 0, "failed_chunks": 3 * len(WAYS)}
    assert retrieve(other.worker, [spec], "now") == set()


@attrs.define
class Request:
    """What the connector reads of one of vLLM's requests."""

    request_id: str
    all_token_ids: Sequence[int]
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    skip_reading_prefix_cache: bool = True
    block_hashes: Sequence[bytes] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


class Adopting(SchedulerAdapter):
    """The first server comes at a point that the test names."""

    at = ""

    def _come(self, point: str) -> None:
        if self.at == point:
            self.at = ""
            self.adopt()

    def adopt(self) -> None:
        with self._lock:
            self._adopt_chunk_tokens(BLOCK)

    def extend(self, *args: Any, **kwargs: Any) -> list[bytes]:
        self._come("before the digests")
        found = super().extend(*args, **kwargs)
        self._come("behind the digests")
        return found

    def extras(self, first: int, end: int) -> bytes:
        self._come("while it hashes")
        return b""


@pytest.mark.parametrize("at", ["", "before the digests", "while it hashes", "behind the digests"])
def test_the_connector_plans_only_whole_chunks_of_one_length_whenever_the_first_server_comes(
    tmp_path: Path, adapters: Callable[..., Any], at: str
) -> None:
    cache = adapters(Adopting, f"unix://{tmp_path}/s.sock", block_tokens=BLOCK, connect_timeout=0.01)
    groups = (Group(Need.EVERY, 0, BLOCK),)
    side = SchedulerSide(cache, groups=groups, asynchronous=False, identify=lambda request: cache.extras)
    request = Request("r", LONG)
    blocks = list(range(100, 100 + len(LONG) // BLOCK))
    side.offer(request, 0)
    side._track(request)
    planned = []
    for step in range(4):
        cache.at = at if step == 1 else ""
        if step == 1 and not at:
            cache.adopt()
        planned.append(side.plan({"r": 256}, (), lambda _: (blocks,)).stores)
        request.num_computed_tokens += 256
    assert [spec.chunk_tokens for spec in planned[0]] == [128]
    expected = adapters(
        SchedulerAdapter, f"unix://{tmp_path}/t.sock", block_tokens=BLOCK, chunk_tokens=BLOCK, connect_timeout=0.01
    ).extend("r", LONG)
    stored: dict[bytes, tuple[int, ...]] = {}
    for spec in (spec for plan in planned[1:] for spec in plan):
        assert (spec.chunk_tokens, spec.block_tokens) == (BLOCK, BLOCK)
        for i in range(spec.chunks):
            stored[spec.digests[32 * i : 32 * i + 32]] = spec.block_ids[i : i + 1]
    assert stored == {digest: (blocks[i],) for i, digest in enumerate(expected)}


@pytest.mark.parametrize(("block_tokens", "chunk"), [(16, 128), (48, 144), (129, 129), (512, 512), (544, 544)])
def test_without_a_server_a_chunk_is_the_fewest_whole_blocks_of_128_tokens_or_more(
    tmp_path: Path, adapters: Callable[..., Any], block_tokens: int, chunk: int
) -> None:
    made = adapters(SchedulerAdapter, f"unix://{tmp_path}/s.sock", block_tokens=block_tokens, connect_timeout=0.01)
    assert made.chunk_tokens == chunk
    tokens = list(range(chunk))
    made.maybe_submit_lookup_request("r", tokens)
    assert made.check_lookup_result("r") == 0
    spec = made.store_spec("r", 0, range(chunk // block_tokens))
    assert (spec.chunks, spec.chunk_tokens, spec.block_tokens) == (1, chunk, block_tokens)
    assert made.update_after_alloc("r", 0) is None


# --- KV caches that are registered anew -----------------------------------------------------------------------------


def lay_out(tensors: Sequence[torch.Tensor], names: Sequence[str], kv: Callable[..., KV]) -> KV:
    """*tensors* under *names*, in memory of the kind that *kv* makes."""
    made = dict(zip(names, tensors, strict=True))
    if kv is shared:
        for name, tensor in made.items():
            made[name] = shared_tensor(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return made


def other_dtype(seed: int | None, kv: Callable[..., KV]) -> KV:
    """As many bytes a block, read as numbers of another kind."""
    former = make_kv(seed)
    return lay_out([tensor.view(torch.int32) for tensor in former.values()], list(former), kv)


def other_order(seed: int | None, kv: Callable[..., KV]) -> KV:
    former = make_kv(seed)
    names = list(reversed(former))
    return lay_out([former[name] for name in names], names, kv)


def other_shape(seed: int | None, kv: Callable[..., KV]) -> KV:
    former = make_kv(seed)
    return lay_out([tensor.transpose(-1, -2).contiguous() for tensor in former.values()], list(former), kv)


def fewer_layers(seed: int | None, kv: Callable[..., KV]) -> KV:
    former = make_kv(seed)
    return lay_out(list(former.values())[:2], list(former)[:2], kv)


def other_tensors(seed: int | None, kv: Callable[..., KV]) -> KV:
    """Of just the same layout."""
    return lay_out(list(make_kv(seed).values()), list(make_kv()), kv)


OTHER_LAYOUTS = (other_dtype, other_order, other_shape, fewer_layers)
other_layouts = pytest.mark.parametrize("anew", OTHER_LAYOUTS, ids=lambda make: make.__name__)


@both_paths
def test_an_answer_that_was_given_before_other_kv_was_registered_comes_back_as_failed_blocks(
    live_server: ServerProcess, sides: MakeSide, kv: Callable[..., KV]
) -> None:
    """Else float16 1.0 would come back as bfloat16 0.0078."""
    writer = sides(live_server.address, make_kv(1))
    writer.store("r", TOKENS, FROM)
    for anew in OTHER_LAYOUTS:
        one = sides(live_server.address, kv())
        assert one.lookup("q", TOKENS) == 3 * CHUNK
        caches = anew(None, kv)
        one.worker.register_kv_caches(caches)
        spec = one.scheduler.update_after_alloc("q", 3 * CHUNK, block_ids=INTO)
        assert spec is not None
        assert retrieve(one.worker, [spec], "now") == set(INTO)
        assert not any(tensor.any() for tensor in caches.values())
        assert live_server.held["leases"] == 0
        assert one.lookup("again", TOKENS) == 0
        back = kv(2)
        one.worker.register_kv_caches(back)
        assert one.lookup("back", TOKENS) == 3 * CHUNK
        assert one.load("back", 3 * CHUNK, INTO) == set()
        assert same_blocks(writer.kv, FROM, back, INTO)
        one.scheduler.end_session("back")


class AtPoint:
    """A probe that does what the test wants at one point of a copy, once, in the copying thread."""

    def __init__(self) -> None:
        self.point = ""
        self.act: Callable[[], None] = lambda: None

    def __call__(self, point: str, spec: StoreSpec | LoadSpec) -> None:
        if point == self.point:
            self.point = ""
            self.act()


@other_layouts
def test_a_reservation_of_the_former_layout_is_not_published(
    live_server: ServerProcess, sides: MakeSide, anew: Callable[..., KV]
) -> None:
    at = AtPoint()
    one, reader = sides(live_server.address, make_kv(1), probe=at), sides(live_server.address, make_kv())
    for number, point in enumerate(("slots known", "half copied", "before commit")):
        tokens = [number, *TOKENS[1:]]
        one.worker.register_kv_caches(one.kv)
        at.act = lambda: one.worker.register_kv_caches(anew(2, make_kv))
        at.point = point
        one.store(f"r{number}", tokens, FROM)
        assert one.worker.statistics()["dropped_aborted"] == 3 * (number + 1)
        assert one.lookup(f"q{number}", tokens) == 0
        assert reader.lookup(f"q{number}", tokens) == 0
        wait_until(lambda: live_server.held["bytes_quarantined"] == live_server.held["bytes_writing"] == 0)
    one.store("after", TOKENS, FROM)
    assert one.lookup("after", TOKENS) == 3 * CHUNK


@pytest.mark.parametrize("anew", [*OTHER_LAYOUTS, other_tensors], ids=lambda make: make.__name__)
def test_a_load_into_kv_that_was_replaced_meanwhile_is_not_called_valid(
    live_server: ServerProcess, sides: MakeSide, anew: Callable[..., KV]
) -> None:
    """Its blocks are those of the KV that was registered when it was submitted."""
    at = AtPoint()
    writer, one = sides(live_server.address, make_kv(1)), sides(live_server.address, make_kv(), probe=at)
    writer.store("r", TOKENS, FROM)
    for point in ("slots known", "half copied", "before valid"):
        one.worker.register_kv_caches(one.kv)
        assert one.lookup(point, TOKENS) == 3 * CHUNK
        caches = anew(None, make_kv)
        at.act = partial(one.worker.register_kv_caches, caches)
        at.point = point
        assert one.load(point, 3 * CHUNK, INTO) == set(INTO)
        assert not any(tensor.any() for tensor in caches.values())
    wait_until(lambda: live_server.held["pins"] == 0)


class Overtaken(WorkerAdapter):
    """While the test says so, what it asked has no answer before it has said, too, that it registers other KV."""

    go_on: Callable[[], None] = staticmethod(lambda: None)

    async def _register(self, client: Client, seconds: float) -> None:
        self._link.post(self.go_on)
        await super()._register(client, seconds)


@both_paths
def test_queued_moves_keep_to_the_kv_that_was_registered_when_they_were_submitted(
    live_server: ServerProcess, sides: MakeSide, kv: Callable[..., KV]
) -> None:
    """A store has the bytes of that KV or is dropped, a load does not end well."""
    one, reader = sides(live_server.address, kv(1), worker=Overtaken), sides(live_server.address, make_kv())
    others = list(range(5000, 5000 + 3 * CHUNK))
    one.store("there", others, FROM)
    for number, anew in enumerate((other_tensors, *OTHER_LAYOUTS)):
        one.worker.register_kv_caches(one.kv)
        tokens = [number, *TOKENS[1:]]
        one.scheduler.extend("r", tokens)
        specs = [one.scheduler.store_spec("r", i, FROM[4 * i : 4 * i + 4]) for i in range(3)]
        assert one.lookup("l", others) == 3 * CHUNK
        load = one.scheduler.update_after_alloc("l", 3 * CHUNK, block_ids=INTO)
        assert load is not None
        caches = anew(2, kv)
        before = {name: tensor.clone() for name, tensor in caches.items()}
        live_server.pause()
        for spec in specs:
            one.worker.submit_store(spec)
        one.worker.submit_retrieve(load)
        one.worker.go_on = live_server.go_on  # type: ignore[attr-defined]
        one.worker.register_kv_caches(caches)
        del one.worker.go_on  # type: ignore[attr-defined]
        wait_until(lambda: one.worker.statistics()["running"] == 0)
        assert one.worker.take_failed_blocks() == set(INTO)
        assert all(torch.equal(tensor, before[name]) for name, tensor in caches.items())
        found = reader.lookup(f"q{number}", tokens)
        if found:
            assert reader.load(f"q{number}", found, INTO[: found // BLOCK]) == set()
            assert same_blocks(one.kv, FROM[: found // BLOCK], reader.kv, INTO[: found // BLOCK])
        one.scheduler.end_session("r")
        one.scheduler.end_session("l")
    counted = one.worker.statistics()
    assert counted["failed_chunks"] == 15
    assert counted["dropped_layout"] > 0


@both_paths
def test_a_registration_that_comes_while_another_is_answered_is_not_forgotten(
    live_server: ServerProcess, adapters: Callable[..., Any], kv: Callable[..., KV]
) -> None:
    """The KV that was registered last is the one that is moved, whatever a new connection was told first."""

    class Anew(WorkerAdapter):
        latest: KV | None = None

        async def _register(self, client: Client, seconds: float) -> None:
            if self._registered.latest is not None and self.latest is not None:
                latest, self.latest = self.latest, None
                ask = client.register

                async def register(*args: Any, **kwargs: Any) -> bytes:
                    client.register = ask  # type: ignore[method-assign]
                    self._registered.latest = make_paged_kv(latest)  # as the host's thread does
                    return await ask(*args, **kwargs)

                client.register = register  # type: ignore[method-assign]
            await super()._register(client, seconds)

    worker = adapters(Anew, live_server.address, block_tokens=BLOCK)
    first, second = kv(1), other_dtype(2, kv)
    worker.latest = second
    worker.register_kv_caches(first)
    assert worker._registered.known is worker._registered.latest
    assert worker._registered.latest.tensors == second
    assert live_server.held["namespaces"] == 1  # the first one is of no use to anyone
    assert worker.path == ("device" if kv is shared else "shm")
