"""Which of vLLM's blocks are told to be in memory, and taken back: the events, without vLLM."""

from collections.abc import Sequence
from typing import Any

import attrs
import pytest

from lmcache_trio.adapters import CacheChange, Group, Need
from lmcache_trio.adapters.vllm import events as module
from lmcache_trio.adapters.vllm.events import BlockEvents, BlocksRemoved, BlocksStored

HASH, CHUNK = 4, 8
TOKENS = list(range(4 * CHUNK))
FULL = Group(Need.EVERY, 0, HASH)


@attrs.define
class Request:
    """One whose block i has the hash h_i."""

    all_token_ids: Sequence[int] = attrs.field(factory=lambda: list(TOKENS))

    @property
    def block_hashes(self) -> Sequence[bytes]:
        return hashes(0, len(self.all_token_ids) // HASH)


def hashes(first: int, end: int) -> list[bytes]:
    return [b"h%d" % i for i in range(first, end)]


def names(count: int) -> list[bytes]:
    return [b"d%d" % i for i in range(count)]


class Told:
    """What the server has told."""

    def __init__(self) -> None:
        self.changes: list[CacheChange] = []

    def take_changes(self) -> Sequence[CacheChange]:
        taken, self.changes = self.changes, []
        return taken


@pytest.fixture
def told() -> Told:
    return Told()


def events(told: Told, *groups: Group) -> BlockEvents:
    return BlockEvents(told, groups or (FULL,), HASH, lambda request, first, end: (first, end))


def stored(chunk: int, *, on_tier: bool = False) -> BlocksStored:
    first = 2 * chunk
    tokens = tuple(range(chunk * CHUNK, (chunk + 1) * CHUNK))
    return BlocksStored(
        0,
        tuple(hashes(first, first + 2)),
        b"h%d" % (first - 1) if first else None,
        tokens,
        HASH,
        (tokens[0], tokens[-1] + 1),
        on_tier,
    )


def test_a_chunk_is_told_once_the_server_has_it_and_taken_back_by_the_same_hashes(told: Told) -> None:
    made = events(told)
    made.expect(Request(), names(3), 1, CHUNK)
    assert made.take() == ()
    told.changes = [CacheChange(0, names(3))]
    assert made.take() == [stored(1), stored(2)], "chunk 0 was not stored by this engine"
    told.changes = [CacheChange(0, names(3)), CacheChange(0, (), names(2))]
    assert made.take() == [BlocksRemoved(0, tuple(hashes(2, 4)))]
    told.changes = [CacheChange(0, (), names(2))]
    assert made.take() == ()


def test_what_a_lookup_finds_is_told_whoever_stored_it_and_once(told: Told) -> None:
    made = events(told)
    made.found(Request(), names(2), CHUNK)
    made.found(Request(), names(2), CHUNK)
    assert made.take() == [stored(0), stored(1)]


def test_a_chunk_that_left_and_was_found_again_is_told_again(told: Told) -> None:
    """What the server said before the answer comes first."""
    made = events(told)
    made.found(Request(), names(1), CHUNK)
    told.changes = [CacheChange(0, (), names(1)), CacheChange(0, names(1))]
    made.found(Request(), names(1), CHUNK)
    assert made.take() == [stored(0), BlocksRemoved(0, tuple(hashes(0, 2))), stored(0)]


@pytest.mark.parametrize("by", ["server", "reset"])
def test_all_that_was_told_is_taken_back_at_once(told: Told, by: str) -> None:
    made = events(told)
    made.found(Request(), names(2), CHUNK)
    made.take()
    made.expect(Request(), names(3), 2, CHUNK)
    if by == "server":
        told.changes = [CacheChange(cleared=True), CacheChange(0, names(3)[2:])]
    else:
        made.clear()
        told.changes = [CacheChange(0, names(3)[2:])]
    removed = BlocksRemoved(0, hashes(0, 4))
    # What is being stored may still come to the server, and not after the engine's own reset: it has other names then.
    assert made.take() == ([removed, stored(2)] if by == "server" else [removed])
    assert made.take() == ()


def test_of_a_window_the_blocks_of_the_part_are_told(told: Told) -> None:
    """A window of 4 tokens needs of each chunk of 8 the last block."""
    window = Group(Need.WINDOW, 4, HASH)
    made = events(told, FULL, window)
    made.expect(Request(), names(2), 0, CHUNK)
    told.changes = [CacheChange(1, names(2)[1:])]
    assert made.take() == [BlocksStored(1, tuple(hashes(3, 4)), b"h2", tuple(range(12, 16)), HASH, (8, 16))]
    told.changes = [CacheChange(0, names(2)[1:]), CacheChange(1, (), names(2)[1:])]
    assert made.take() == [stored(1), BlocksRemoved(1, tuple(hashes(3, 4)))]


@pytest.mark.parametrize("state_tokens", [CHUNK, 0, 3 * HASH])
def test_a_block_of_several_hashes_has_the_last_one(told: Told, state_tokens: int) -> None:
    wide, state = Group(Need.EVERY, 0, CHUNK), Group(Need.STATE, 0, state_tokens)
    made = events(told, wide, state)
    made.found(Request(), names(2), CHUNK)
    tokens = [tuple(range(CHUNK)), tuple(range(CHUNK, 2 * CHUNK))]
    assert made.take() == [
        BlocksStored(0, (b"h1",), None, tokens[0], CHUNK, (0, 8)),
        BlocksStored(0, (b"h3",), b"h1", tokens[1], CHUNK, (8, 16)),
        BlocksStored(1, (b"h3",), b"h1", tokens[1], CHUNK, (8, 16)),
    ]


def test_beyond_its_bounds_it_takes_back_the_oldest_and_forgets_what_never_came(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_TOLD", 4)
    monkeypatch.setattr(module, "MOST_EXPECTED", 2)
    made = events(told)
    made.found(Request(), names(3), CHUNK)
    assert made.take() == [stored(0), stored(1), stored(2), BlocksRemoved(0, tuple(hashes(0, 2)))]
    made.expect(Request(), [b"x", b"y", b"z"], 0, CHUNK)
    told.changes = [CacheChange(0, [b"x", b"y"])]
    assert [event for event in made.take() if isinstance(event, BlocksStored)] == [stored(1)]


def test_tokens_that_vllm_has_no_hash_for_are_not_told(told: Told) -> None:
    made = events(told)
    short: Any = Request(TOKENS[: CHUNK + 1])
    made.found(short, names(2), CHUNK)
    assert made.take() == [stored(0)]


# --- tiers ----------------------------------------------------------------------------------------------------------


def on_tier(came: Sequence[bytes] = (), left: Sequence[bytes] = (), tier: int = 1) -> CacheChange:
    return CacheChange(0, came, left, tier=tier)


def test_a_chunk_that_was_told_of_memory_is_told_of_a_tier_when_it_is_written_there_later(told: Told) -> None:
    made = events(told)
    made.expect(Request(), names(1), 0, CHUNK)
    told.changes = [CacheChange(0, names(1))]
    assert made.take() == [stored(0)]
    told.changes = [on_tier(names(1)), CacheChange(0, (), names(1))]
    assert made.take() == [stored(0, on_tier=True), BlocksRemoved(0, tuple(hashes(0, 2)))]
    told.changes = [on_tier((), names(1))]
    assert made.take() == [BlocksRemoved(0, tuple(hashes(0, 2)), on_tier=True)]


@pytest.mark.parametrize("in_memory_first", [False, True])
def test_a_tier_may_name_a_chunk_before_the_engine_does(told: Told, in_memory_first: bool) -> None:
    made = events(told)
    if in_memory_first:
        made.found(Request(), names(1), CHUNK)
        made.expect(Request(), [b"other"] * 2, 1, CHUNK)
        assert made.take() == [stored(0)]
        made._expected.clear()  # so many others were stored since
    told.changes = [on_tier([*names(2), b"of another engine"]), on_tier((), names(2)[1:])]
    assert made.take() == ()
    made.found(Request(), names(2), CHUNK)
    memory = [stored(1)] if in_memory_first else [stored(0), stored(1)]
    assert made.take() == [stored(0, on_tier=True), *memory], "chunk 1 left the tier meanwhile"


def test_two_tiers_are_one_medium_and_a_block_leaves_with_the_last(told: Told) -> None:
    made = events(told)
    made.expect(Request(), names(1), 0, CHUNK)
    told.changes = [on_tier(names(1)), on_tier(names(1), tier=2), on_tier((), names(1))]
    assert made.take() == [stored(0, on_tier=True)]
    told.changes = [CacheChange(cleared=True, tier=1)]
    assert made.take() == ()
    told.changes = [on_tier((), names(1), tier=2)]
    assert made.take() == [BlocksRemoved(0, tuple(hashes(0, 2)), on_tier=True)]


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_tier_that_is_cleared_takes_nothing_of_memory_back(told: Told, everywhere: bool) -> None:
    made = events(told)
    made.found(Request(), names(2), CHUNK)
    told.changes = [on_tier([*names(2), b"unnamed"])]
    assert len(made.take()) == 4
    told.changes = [CacheChange(cleared=True, tier=0 if everywhere else 1)]
    of_memory = [BlocksRemoved(0, hashes(0, 4))] if everywhere else []
    assert made.take() == [*of_memory, BlocksRemoved(0, hashes(0, 4), on_tier=True)]
    made.found(Request(), names(2), CHUNK)
    assert made.take() == ([stored(0), stored(1)] if everywhere else ())


def test_chunks_that_no_request_names_are_forgotten_beyond_a_bound(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_UNNAMED", 2)
    made = events(told)
    told.changes = [on_tier([b"x", *names(2)[1:], b"y"])]
    made.found(Request(), names(2), CHUNK)
    assert made.take() == [stored(0), stored(1, on_tier=True), stored(1)]


def test_of_several_groups_each_is_told_where_its_part_is(told: Told) -> None:
    window = Group(Need.WINDOW, 4, HASH)
    made = events(told, FULL, window)
    made.expect(Request(), names(1), 0, CHUNK)
    told.changes = [CacheChange(1, names(1), tier=1), CacheChange(0, names(1))]
    part = BlocksStored(1, tuple(hashes(1, 2)), b"h0", tuple(range(4, 8)), HASH, (0, 8), on_tier=True)
    assert made.take() == [part, stored(0)]
    told.changes = [CacheChange(0, names(1), tier=1), CacheChange(1, (), names(1), tier=1)]
    assert made.take() == [stored(0, on_tier=True), BlocksRemoved(1, tuple(hashes(1, 2)), on_tier=True)]
    made.clear()
    assert made.take() == [BlocksRemoved(0, hashes(0, 2)), BlocksRemoved(0, hashes(0, 2), on_tier=True)]
