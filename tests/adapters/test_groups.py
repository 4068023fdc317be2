"""Engines of several KV groups at a real server: what a hit needs of each group comes back byte for byte."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest
import torch

from lmcache_trio.adapters import Group, LoadSpec, Need
from lmcache_trio.adapters.shared_kv import shared_tensor
from lmcache_trio.errors import Misuse
from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv, wait_until

PAGES, PAGE = 128, 2048
"""Pages of the engine's pool, and bytes of one. A page is a block of any group."""
BLOCK = 32
"""The least common multiple of the tokens of all groups' blocks."""
HOLE = -1
TOKENS = list(range(6 * CHUNK))

EVERY = Group(Need.EVERY, 0, 16)
WINDOW = Group(Need.WINDOW, 100, 32)
SHORT = Group(Need.WINDOW, 20, 32)
LOCAL = Group(Need.LOCAL, 4 * CHUNK, 16)
STATE = Group(Need.STATE, 0, 512)

KINDS = {
    "windows alone": (WINDOW,),
    "every and window": (EVERY, WINDOW),
    "window first": (WINDOW, EVERY),
    "every, short window, state": (EVERY, SHORT, STATE),
    "every, local, window, state": (EVERY, LOCAL, WINDOW, STATE),
}

Lists = list[list[int]]


def first_needed(group: Group, tokens: int) -> int:
    """The first token that one behind *tokens* others looks at."""
    if group.need is Need.WINDOW:
        return max(0, tokens - (group.tokens - 1))
    if group.need is Need.LOCAL:
        return tokens // group.tokens * group.tokens
    return max(0, tokens - 1) if group.need is Need.STATE else 0


def parts_needed(groups: Sequence[Group], boundary: int) -> int:
    """How many parts a hit of *boundary* chunks needs."""
    return sum(boundary - first_needed(group, boundary * CHUNK) // CHUNK for group in groups)


class Engine:
    """A pool of pages, with the layers of all groups in each, and both sides of an engine on it."""

    def __init__(self, address: str, groups: tuple[Group, ...], path: str, seed: int | None = None) -> None:
        self.groups = groups
        pool = shared_tensor(PAGES * PAGE) if path == "device" else torch.zeros(PAGES * PAGE, dtype=torch.uint8)
        self.pool = pool.view(PAGES, PAGE)
        if seed is not None:
            self.pool.copy_(torch.randint(0, 256, (PAGES, PAGE), generator=torch.Generator().manual_seed(seed)))
        kv: dict[str, torch.Tensor] = {}
        self.layers: list[list[str]] = []
        for number, group in enumerate(groups):
            names = [f"{number} {half}" for half in ("a", "b")]
            if group.need is Need.STATE:
                names = names[:1]
                kv[names[0]] = torch.as_strided(self.pool, (PAGES, 1000), (PAGE, 1))
            else:
                halves = self.pool.view(PAGES, 2, group.block_tokens, PAGE // 2 // group.block_tokens)
                kv |= {name: halves[:, i] for i, name in enumerate(names)}
            self.layers.append(names)
        self.side = Side(address, kv, block_tokens=BLOCK, groups=groups, layers=self.layers)
        assert self.side.worker.path == path
        self._free = list(range(PAGES))

    def close(self) -> None:
        self.side.close()

    def allocate(self, tokens: int, computed: int) -> Lists:
        """Block lists of a request of *tokens* tokens in the step that begins behind *computed* of them.

        There is a hole wherever no token behind those will look.
        """
        lists: Lists = []
        for group in self.groups:
            ends = [(i + 1) * group.block_tokens for i in range(-(-tokens // group.block_tokens))]
            needed = first_needed(group, computed)
            lists.append([self._free.pop() if end > needed else HOLE for end in ends])
        return lists

    def store(self, request_id: str, first: int, end: int, blocks: Lists) -> int:
        """Store the chunks from *first* until *end*, and the states behind them. Returns how many parts were stored."""
        side, before = self.side, self.side.worker.statistics().get("stored_chunks", 0)
        side.scheduler.extend(request_id, TOKENS[: end * CHUNK])
        specs = list(side.scheduler.store_specs(request_id, first, end, blocks))
        for number, group in enumerate(self.groups):
            if group.need is Need.STATE:
                spec = side.scheduler.state_spec(request_id, number, end * CHUNK, blocks[number][-1])
                assert spec is not None
                specs.append(spec)
        side.worker.store_now(specs)
        return side.worker.statistics()["stored_chunks"] - before

    def plan(self, request_id: str, tokens: int, blocks: Lists, *, local: int = 0) -> tuple[LoadSpec, ...]:
        return self.side.scheduler.loads_after_alloc(request_id, tokens - local, local_tokens=local, blocks=blocks)

    def parts(self, number: int, pages: Sequence[int]) -> list[torch.Tensor]:
        """What group *number* has in *pages*."""
        return [self.side.kv[name][list(pages)] for name in self.layers[number]]


def check_loaded(one: Engine, source: Lists, two: Engine, target: Lists, before: torch.Tensor, local: int = 0) -> None:
    """The blocks of *target* that are no holes hold what those of *source* do, and no other page was touched."""
    named = set[int]()
    for number, group in enumerate(one.groups):
        places = [
            at
            for at, page in enumerate(target[number])
            if page != HOLE and (group.need is Need.STATE or at >= local // group.block_tokens)
        ]
        assert places, group
        assert HOLE not in [source[number][at] for at in places]
        wanted = one.parts(number, [source[number][at] for at in places])
        found = two.parts(number, [target[number][at] for at in places])
        assert all(map(torch.equal, wanted, found)), group
        named.update(target[number][at] for at in places)
    others = [page for page in range(PAGES) if page not in named]
    assert torch.equal(two.pool[others], before[others])


@pytest.fixture(params=["shm", "device"])
def path(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


Engines = Callable[..., Engine]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def engines(path: str) -> Iterator[Engines]:
    """Makes engines of the groups *kind* that take *path*."""
    with ExitStack() as stack:

        def make(server: ServerProcess, kind: str, seed: int | None = None) -> Engine:
            made = Engine(server.address, KINDS[kind], path, seed)
            stack.callback(made.close)
            wait_until(made.side.scheduler.is_healthy)
            return made

        yield make


@every_kind
def test_what_one_engine_stored_in_all_groups_another_loads_byte_for_byte(
    live_server: ServerProcess, engines: Engines, kind: str
) -> None:
    one, two = engines(live_server, kind, 1), engines(live_server, kind)
    assert one.side.lookup("cold", TOKENS) == 0
    source = one.allocate(len(TOKENS), 0)
    assert one.store("r", 0, 6, source) == sum(1 if group.need is Need.STATE else 6 for group in one.groups)
    assert two.side.lookup("q", TOKENS) == len(TOKENS)
    target, before = two.allocate(len(TOKENS), len(TOKENS)), two.pool.clone()
    two.side.worker.retrieve_now(two.plan("q", len(TOKENS), target))
    assert two.side.worker.take_failed_blocks() == set()
    assert two.side.worker.take_failed_requests() == set()
    check_loaded(one, source, two, target, before)


@every_kind
@pytest.mark.parametrize("local", [CHUNK // 2, 2 * CHUNK + BLOCK], ids=["in the first chunk", "behind it"])
def test_what_the_engine_has_itself_is_not_loaded_over(
    live_server: ServerProcess, engines: Engines, kind: str, local: int
) -> None:
    one, two = engines(live_server, kind, 1), engines(live_server, kind)
    source = one.allocate(len(TOKENS), 0)
    one.store("r", 0, 6, source)
    assert two.side.lookup("q", TOKENS) == len(TOKENS)
    target, before = two.allocate(len(TOKENS), len(TOKENS)), two.pool.clone()
    two.side.worker.retrieve_now(two.plan("q", len(TOKENS), target, local=local))
    assert two.side.worker.take_failed_requests() == set()
    check_loaded(one, source, two, target, before, local)


@every_kind
def test_a_hit_ends_where_all_groups_have_what_it_needs(
    live_server: ServerProcess, engines: Engines, kind: str
) -> None:
    one, two = engines(live_server, kind, 1), engines(live_server, kind)
    early, late = one.allocate(3 * CHUNK, 0), one.allocate(len(TOKENS), 3 * CHUNK)
    one.store("r", 0, 3, early)
    assert two.side.lookup("early", TOKENS) == 3 * CHUNK
    for number, group in enumerate(one.groups):
        if group.need is Need.EVERY:
            late[number][: len(early[number])] = early[number]
    one.store("r", 3, 6, late)
    assert two.side.lookup("late", TOKENS) == len(TOKENS)
    between = 3 if any(group.need is Need.STATE for group in one.groups) else 5  # a state is that of its boundary
    assert two.side.lookup("between", TOKENS[: 5 * CHUNK]) == between * CHUNK
    assert two.side.lookup("again", TOKENS[: 3 * CHUNK]) == 3 * CHUNK
    target, before = two.allocate(3 * CHUNK, 3 * CHUNK), two.pool.clone()
    two.side.worker.retrieve_now(two.plan("again", 3 * CHUNK, target))
    assert two.side.worker.take_failed_requests() == set()
    check_loaded(one, early, two, target, before)


KIND = "every, local, window, state"


def test_a_part_that_was_evicted_makes_the_hit_shorter_and_breaks_none(tmp_path: Path, engines: Engines) -> None:
    server = ServerProcess(f"unix://{tmp_path}/s.sock", "memory.size=2MiB")
    server.start()
    try:
        one, two = engines(server, KIND, 1), engines(server, KIND)
        # Parts that neither boundary needs are not stored: they would be evicted first.
        early, late = one.allocate(3 * CHUNK, 3 * CHUNK), one.allocate(len(TOKENS), len(TOKENS))
        late[0][: len(early[0])] = early[0]
        one.store("r", 0, 3, early)
        one.store("r", 3, 6, late)
        assert two.side.lookup("all", TOKENS) == len(TOKENS)
        assert two.side.lookup("the first", TOKENS[: 3 * CHUNK]) == 3 * CHUNK
        two.side.scheduler.end_session("all")
        two.side.scheduler.end_session("the first")  # whose parts were used last
        other = Side(server.address, make_kv(2), identity=["another model"])
        for number in range(1000):
            tokens = [number, *range(1, CHUNK)]
            other.store(f"filler {number}", tokens, [0, 1, 2, 3])
            other.scheduler.end_session(f"filler {number}")
            if server.statistics()["counted"]["evictions"]:
                break
        other.close()
        assert server.statistics()["counted"]["evictions"]
        assert two.side.lookup("q", TOKENS) == 3 * CHUNK
        target, before = two.allocate(3 * CHUNK, 3 * CHUNK), two.pool.clone()
        two.side.worker.retrieve_now(two.plan("q", 3 * CHUNK, target))
        assert two.side.worker.take_failed_requests() == set()
        check_loaded(one, early, two, target, before)
    finally:
        server.kill()


def test_a_load_that_fails_names_its_request_once_all_of_its_loads_are_over(
    live_server: ServerProcess, engines: Engines
) -> None:
    one, two = engines(live_server, KIND, 1), engines(live_server, KIND)
    one.store("r", 0, 6, one.allocate(len(TOKENS), 0))
    lists = []
    for name in ("good", "bad"):
        assert two.side.lookup(name, TOKENS) == len(TOKENS)
        lists.append(two.allocate(len(TOKENS), len(TOKENS)))
    good, bad = (two.plan(name, len(TOKENS), blocks) for name, blocks in zip(("good", "bad"), lists, strict=True))
    guessed = attrs.evolve(bad[-1], lease=b"guessed lease 16")  # the state's
    finished = set[str]()
    for spec in (*bad[:-1], guessed, *good):
        two.side.worker.submit_retrieve(spec)

    def over() -> bool:
        finished.update(two.side.worker.take_finished()[1])
        return finished == {"good", "bad"}

    wait_until(over)
    assert two.side.worker.take_failed_requests() == {"bad"}
    assert two.side.worker.take_failed_blocks() == set(guessed.block_ids)
    assert two.side.worker.take_failed_requests() == set()
    wait_until(lambda: live_server.held["pins"] == 0)


def test_an_answer_that_is_used_up_fails_in_every_group(live_server: ServerProcess, engines: Engines) -> None:
    one = engines(live_server, KIND, 1)
    one.store("r", 0, 6, one.allocate(len(TOKENS), 0))
    assert one.side.lookup("q", TOKENS) == len(TOKENS)
    assert one.side.scheduler.reset_cache()
    blocks, before = one.allocate(len(TOKENS), len(TOKENS)), one.pool.clone()
    specs = one.plan("q", len(TOKENS), blocks)
    assert {spec.group for spec in specs} == set(range(4))
    one.side.worker.retrieve_now(specs)
    assert one.side.worker.take_failed_requests() == {"q"}
    assert one.side.worker.take_failed_blocks() == {page for pages in blocks for page in pages} - {HOLE}
    assert torch.equal(one.pool, before)


@pytest.mark.parametrize("kind", ["every and window", KIND])
def test_a_disk_has_all_parts_after_a_restart_and_a_lookup_loads_those_that_it_needs(
    tmp_path: Path, engines: Engines, kind: str
) -> None:
    settings = ("tiers.0.backend=disk", f"tiers.0.path={tmp_path}/disk", "tiers.0.size=64MiB")
    server = ServerProcess(f"unix://{tmp_path}/s.sock", *settings, "grace=5.0", "memory.size=16MiB")
    server.start()
    try:
        server.wait_tier()
        one = engines(server, kind, 1)
        early, late = one.allocate(3 * CHUNK, 0), one.allocate(len(TOKENS), 3 * CHUNK)
        late[0][: len(early[0])] = early[0]
        stored = one.store("r", 0, 3, early) + one.store("r", 3, 6, late)
        wait_until(lambda: server.statistics()["tiers"][0]["stores"] == stored)
        server.end()
        server.start()
        server.wait_tier()
        two = engines(server, kind)
        assert two.side.lookup("q", TOKENS) == len(TOKENS)
        (tier,) = server.statistics()["tiers"]
        assert tier["loads"] == parts_needed(one.groups, 6) < stored
        target, before = two.allocate(len(TOKENS), len(TOKENS)), two.pool.clone()
        two.side.worker.retrieve_now(two.plan("q", len(TOKENS), target))
        assert two.side.worker.take_failed_requests() == set()
        check_loaded(one, late, two, target, before)
        two.side.scheduler.end_session("q")
        names = ("leases", "holds", "prefetches", "pins", "sessions", "chunks_writing", "reservations")
        wait_until(lambda: not any(server.held[name] for name in names))
    finally:
        server.kill()


def test_a_worker_names_the_layers_of_each_group(live_server: ServerProcess, engines: Engines) -> None:
    one = engines(live_server, "every and window")
    for layers in (None, one.layers[:1], [*one.layers, []]):
        with pytest.raises(Misuse, match="groups"):
            one.side.worker.register_kv_caches(one.side.kv, groups=layers)
    one.side.worker.register_kv_caches(one.side.kv, groups=one.layers)
