"""The specs of an engine of several KV groups: which blocks they name, against a model that counts in tokens."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio._core.keys import DIGEST_BYTES
from lmcache_trio.adapters import Group, LoadSpec, Need, SchedulerAdapter, StoreSpec
from lmcache_trio.errors import Misuse

CHUNK, BLOCK = 128, 32
MOST = 8  # chunks
HOLE = -1

WIDTHS = st.sampled_from([16, 32])
GROUPS = st.one_of(
    st.builds(lambda width: Group(Need.EVERY, 0, width), WIDTHS),
    st.builds(lambda tokens, width: Group(Need.WINDOW, tokens, width), st.integers(2, 400), WIDTHS),
    st.builds(lambda tokens, width: Group(Need.LOCAL, tokens, width), st.integers(1, 400), WIDTHS),
    st.builds(lambda width: Group(Need.STATE, 0, width), st.sampled_from([0, 16, 32, 512])),
)


@contextmanager
def adapter_of(*groups: Group) -> Iterator[SchedulerAdapter]:
    """A scheduler's side of *groups*, without a server."""
    adapter = SchedulerAdapter(
        "unix:///nowhere",
        engine_id="e",
        identity=["a model"],
        block_tokens=BLOCK,
        chunk_tokens=CHUNK,
        groups=groups,
        connect_timeout=0.001,
    )
    try:
        yield adapter
    finally:
        adapter.shutdown()


@attrs.frozen
class Lists:
    """Block lists of a request of *tokens* tokens, with holes, by group."""

    groups: tuple[Group, ...]
    tokens: int
    blocks: tuple[list[int], ...]


@st.composite
def lists(draw: st.DrawFn) -> Lists:
    groups = tuple(draw(st.lists(GROUPS, min_size=1, max_size=4)))
    if len(groups) == 1 and groups[0].need is Need.EVERY:
        groups = (Group(Need.EVERY, 0, BLOCK),)
    tokens = CHUNK * draw(st.integers(1, MOST))
    blocks = []
    for number, group in enumerate(groups):
        count = -(-tokens // group.block_tokens) if group.block_tokens else 1
        ids = [1000 * number + i for i in range(count + draw(st.integers(0, 3)))]
        if group.need is Need.STATE:
            kept = [(tokens - 1) // group.block_tokens] if group.block_tokens else [len(ids) - 1]
        else:
            kept = []
        lost = draw(st.one_of(st.just(0), st.integers(0, count)))  # as an engine lets go of what is behind
        holes = draw(st.sets(st.integers(0, count - 1), max_size=4)) | set(range(lost))
        for hole in holes - set(kept):
            ids[hole] = HOLE
        blocks.append(ids)
    return Lists(groups, tokens, tuple(blocks))


def positions(spec: LoadSpec | StoreSpec, group: Group, blocks: Sequence[int], first: int, skip: int) -> list[int]:
    """The place of each block of *spec* in *blocks*. A part is the last blocks of its chunk."""
    width, found = group.part_blocks(CHUNK), []
    for i, block in enumerate(spec.block_ids):
        chunk, place = divmod(i + skip, width)
        at = (first + chunk + 1) * CHUNK // group.block_tokens - width + place
        assert blocks[at] == block
        found.append(at)
    return found


def held_by(group: Group, tokens: Iterable[int]) -> set[int]:
    """The places of the blocks that hold *tokens*."""
    return {token // group.block_tokens for token in tokens}


def attended(group: Group, tokens: int) -> range:
    """The tokens whose KV the first token behind *tokens* others reads."""
    if group.need is Need.WINDOW:
        return range(max(0, tokens - (group.tokens - 1)), tokens)
    return range(tokens // group.tokens * group.tokens if group.need is Need.LOCAL else 0, tokens)


@given(lists(), st.data())
def test_loads_name_each_needed_block_that_the_engine_lacks_once_and_no_hole(it: Lists, data: st.DataObject) -> None:
    local = data.draw(st.integers(0, it.tokens // BLOCK - 1)) * BLOCK
    with adapter_of(*it.groups) as adapter:
        specs = adapter.loads_after_alloc("r", it.tokens - local, local_tokens=local, blocks=it.blocks)
    boundary = it.tokens // CHUNK
    assert [spec.group for spec in specs] == sorted(spec.group for spec in specs)
    for number, (group, blocks) in enumerate(zip(it.groups, it.blocks, strict=True)):
        mine = [spec for spec in specs if spec.group == number]
        for spec in mine:
            assert group.first(boundary, CHUNK) <= spec.start
            assert spec.start + spec.count <= boundary, "a lease has no more"
        if group.need is Need.STATE:
            (state,) = mine
            place = (it.tokens - 1) // group.block_tokens if group.block_tokens else len(blocks) - 1
            assert (state.start, state.count, state.skip_blocks) == (boundary - 1, 1, 0)
            assert state.block_ids == (blocks[place],)
            continue
        named = [at for spec in mine for at in positions(spec, group, blocks, spec.start, spec.skip_blocks)]
        assert len(named) == len(set(named))
        assert HOLE not in [blocks[at] for at in named]
        assert all(local // group.block_tokens <= at < it.tokens // group.block_tokens for at in named)
        lacked = {at for at in held_by(group, attended(group, it.tokens)) if at * group.block_tokens >= local}
        assert {at for at in lacked if blocks[at] != HOLE} <= set(named)


@given(lists(), st.data())
def test_stores_name_each_part_without_a_hole_once(it: Lists, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, it.tokens // CHUNK - 1))
    end = data.draw(st.integers(first + 1, it.tokens // CHUNK))
    with adapter_of(*it.groups) as adapter:
        digests = adapter.extend("r", range(it.tokens))
        specs = adapter.store_specs("r", first, end, it.blocks)
    for number, (group, blocks) in enumerate(zip(it.groups, it.blocks, strict=True)):
        stored = []
        for spec in (spec for spec in specs if spec.group == number):
            at = digests.index(spec.digests[:DIGEST_BYTES])
            assert spec.digests == b"".join(digests[at : at + spec.chunks])
            assert spec.parent == (digests[at - 1] if at else b"")
            assert HOLE not in spec.block_ids
            places = positions(spec, group, blocks, at, 0)
            assert places == [
                place
                for chunk in range(at, at + spec.chunks)
                for place in sorted(held_by(group, range(chunk * CHUNK, (chunk + 1) * CHUNK)))[-spec.chunk_blocks :]
            ]
            stored += list(range(at, at + spec.chunks))
        width = group.part_blocks(CHUNK)
        whole = [] if group.need is Need.STATE else [
            chunk
            for chunk in range(first, end)
            if HOLE not in blocks[: (chunk + 1) * CHUNK // group.block_tokens][-width:]
        ]  # fmt: skip
        assert stored == whole


@given(st.integers(0, MOST * CHUNK))
def test_a_state_is_stored_where_a_hit_can_end_and_nowhere_else(boundary: int) -> None:
    with adapter_of(Group(Need.EVERY, 0, BLOCK), Group(Need.STATE)) as adapter:
        digests = adapter.extend("r", range(3 * CHUNK))
        spec = adapter.state_spec("r", 1, boundary, 7)
        if boundary not in (CHUNK, 2 * CHUNK, 3 * CHUNK):
            assert spec is None
            return
        at = boundary // CHUNK - 1
        assert spec is not None
        assert (spec.group, spec.digests, spec.block_ids) == (1, digests[at], (7,))
        assert spec.parent == (digests[at - 1] if at else b"")


def test_an_engine_of_one_group_may_ask_either_way() -> None:
    with adapter_of() as adapter:
        digests = adapter.extend("r", range(3 * CHUNK))
        blocks = list(range(12))
        assert adapter.store_specs("r", 1, 3, [blocks]) == (adapter.store_spec("r", 1, blocks[4:]),)
        assert adapter.store_specs("r", 1, 3, [blocks])[0].digests == b"".join(digests[1:])
        wanted = adapter.update_after_alloc("r", 2 * CHUNK, local_tokens=64, block_ids=blocks[2:10])
        assert adapter.loads_after_alloc("r", 2 * CHUNK, local_tokens=64, blocks=[blocks]) == (wanted,)
        assert adapter.loads_after_alloc("r", 0, blocks=[blocks]) == ()


def test_one_group_that_keeps_every_token_is_as_none() -> None:
    every = Group(Need.EVERY, 0, BLOCK)
    with adapter_of(every) as adapter, adapter_of() as other:
        assert adapter._link.hello.groups == other._link.hello.groups == ()


def test_a_group_that_needs_nothing_at_the_boundary_loads_nothing() -> None:
    with adapter_of(Group(Need.LOCAL, CHUNK, BLOCK)) as adapter:
        assert adapter.loads_after_alloc("r", CHUNK, blocks=[[HOLE] * 4]) == ()


WINDOWED = (Group(Need.EVERY, 0, 16), Group(Need.WINDOW, 100, 32), Group(Need.STATE, 0, 512))
GIVEN = [list(range(16)), list(range(20, 28)), [40]]


def test_what_does_not_fit_the_groups_is_named() -> None:
    def wrong(says: str) -> "pytest.RaisesExc[Misuse]":
        return pytest.raises(Misuse, match=says)

    with adapter_of(*WINDOWED) as adapter:
        adapter.extend("r", range(2 * CHUNK))
        with wrong("call loads_after_alloc"):
            adapter.update_after_alloc("r", CHUNK, block_ids=[1] * 4)
        with wrong("call store_specs"):
            adapter.store_spec("r", 0, [1] * 4)
        for call in (
            lambda blocks: adapter.loads_after_alloc("r", 2 * CHUNK, blocks=blocks),
            lambda blocks: adapter.store_specs("r", 0, 2, blocks),
        ):
            with wrong("of each of 3 groups"):
                call(GIVEN[:2])
            with wrong("7 blocks of 32 tokens"):
                call([GIVEN[0], GIVEN[1][:7], GIVEN[2]])
        for block in ([], [HOLE]):
            with wrong("no block for the state behind 256 tokens"):
                adapter.loads_after_alloc("r", 2 * CHUNK, blocks=[*GIVEN[:2], block])
        with wrong("a whole number of chunks of 128"):
            adapter.loads_after_alloc("r", CHUNK + BLOCK, blocks=GIVEN)
        with wrong("multiple of block_tokens"):
            adapter.loads_after_alloc("r", CHUNK, local_tokens=16, blocks=GIVEN)
        with wrong("chunk 2 is to be stored, and 2 chunks were hashed"):
            adapter.store_specs("r", 0, 3, [[*blocks] * 2 for blocks in GIVEN])
        for group in (0, 1, 3):
            with wrong(f"group {group} is not a group of states"):
                adapter.state_spec("r", group, CHUNK, 7)
    wrong_groups: list[tuple[list[Any], str]] = [
        ([7], "give a tuple of Group"),
        ([Group(Need.EVERY, 0, 48)], "blocks of 48"),
        ([Group(Need.WINDOW, 1, 16)], "tokens 1"),
        ([Group(Need.EVERY, 0, 16)], "only group has blocks of 16 tokens, and block_tokens is 32"),
    ]
    for groups, says in wrong_groups:
        with wrong(says), adapter_of(*groups):
            pass


def test_a_shorter_hit_than_the_answer_is_no_answer_to_an_engine_with_windows() -> None:
    """What a shorter hit needs lies before what the lease has."""
    for groups, kept in ((WINDOWED, False), ((Group(Need.EVERY, 0, 16), Group(Need.EVERY, 0, 32)), True)):
        with adapter_of(*groups) as adapter:
            request, server = adapter._lookups.open("r"), object()
            request.lookup.told(server, 2)
            request.lookup.submit(1, 2, 1e12)
            assert request.lookup.answer(server, 1, 2, b"lease", 1e12)
            adapter.mark_failed("r", CHUNK)
            assert adapter.check_lookup_result("r") == (CHUNK if kept else 0)
            specs = adapter.loads_after_alloc("r", CHUNK, blocks=GIVEN[: len(groups)])
            assert {spec.lease for spec in specs} == {b"lease" if kept else b""}


# --- what a worker makes of a spec -----------------------------------------------------------------------------------


def store(**fields: object) -> StoreSpec:
    given = {"request_id": "r", "session": 1, "parent": b"", "digests": bytes(64), "block_ids": (1, 2, 3, 4)}
    return StoreSpec(**given | fields)  # type: ignore[arg-type]


def test_a_worker_fills_in_the_blocks_of_a_part_and_refuses_those_of_another() -> None:
    group = (Group(Need.EVERY, 0, 16), Group(Need.WINDOW, 50, 32))
    planned = store(group=1).planned_for(CHUNK, BLOCK, group)
    assert (planned.part_blocks, planned.chunk_tokens, planned.block_tokens) == (2, CHUNK, BLOCK)
    assert store().planned_for(64, 32, ()).part_blocks == 0
    assert [part.block_ids for part in planned.parts(1, 100)] == [(1, 2), (3, 4)]
    load = LoadSpec("r", 1, b"l", 3, 2, 1, (1, 2, 3), group=1).planned_for(CHUNK, BLOCK, group)
    assert load.chunk_blocks == 2
    assert [(part.start, part.skip_blocks, part.block_ids) for part in load.parts(2)] == [(3, 1, (1,)), (4, 0, (2, 3))]
    for spec, groups, says in (
        (store(group=2), group, "for group 2, and this worker has 2"),
        (store(group=1), (), "for group 1, and this worker has 1"),
        (store(group=1, part_blocks=2), (group[0], group[0]), "parts of 2 blocks, and this worker's have 8"),
        (store(part_blocks=2), (), "parts of 2 blocks, and this worker's have all"),
        (store(), group, "has 2 blocks a chunk, and a part in group 0 has 8"),
    ):
        with pytest.raises(Misuse, match=says):
            spec.planned_for(CHUNK, BLOCK, groups)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"group": -1}, "group is -1"),
        ({"group": 16}, "group is 16"),
        ({"group": "1"}, "group is '1'"),
        ({"part_blocks": -1}, "part_blocks is -1"),
        ({"part_blocks": 3}, "has 2 blocks a chunk, and a part in group 0 has 3"),
    ],
)
def test_a_spec_of_a_group_that_cannot_be_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(Misuse, match=says):
        store(**fields)
