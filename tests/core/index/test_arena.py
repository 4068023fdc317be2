"""The arena, as sentences and as a state machine over a plain list of bytes."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmcache_trio._core.index.arena import Arena
from lmcache_trio.errors import Misuse

PAGE = 4096


def arena_of(pages: int) -> Arena:
    arena = Arena()
    arena.grow(pages * PAGE)
    return arena


def test_ranges_begin_on_boundaries_and_occupy_whole_ones() -> None:
    arena = arena_of(4)
    offsets = {arena.allocate(1), arena.allocate(PAGE + 1)}
    assert all(offset is not None and offset % PAGE == 0 for offset in offsets)
    assert arena.used == 3 * PAGE


def test_nothing_is_handed_out_beyond_the_taken_bytes() -> None:
    arena = Arena()
    assert arena.allocate(1) is None
    arena.grow(PAGE + 5)
    assert arena.allocate(PAGE) == 0
    assert arena.allocate(1) is None


def test_a_piece_that_ends_inside_a_page_joins_the_next_one() -> None:
    arena = Arena()
    for taken in (100, PAGE + 100, 3 * PAGE):
        arena.grow(taken)
    assert arena.holes() == [(0, 3 * PAGE)]


@pytest.mark.parametrize("first", ["head", "growth"])
def test_the_head_is_never_handed_out(first: str) -> None:
    arena = Arena()
    if first == "head":
        arena.reserve_head(16)
        arena.grow(3 * PAGE)
    else:
        arena.grow(3 * PAGE)
        arena.reserve_head(16)
    assert arena.allocate(2 * PAGE) == PAGE
    assert arena.allocate(1) is None
    assert arena.capacity == 2 * PAGE


def test_the_smallest_hole_that_fits_is_taken() -> None:
    arena = arena_of(10)
    ranges = [arena.allocate(n * PAGE) for n in (3, 1, 2, 1, 3)]
    arena.free(ranges[0] or 0, 3 * PAGE)
    arena.free(ranges[2] or 0, 2 * PAGE)
    assert arena.allocate(2 * PAGE) == ranges[2]


def test_neighbouring_holes_become_one() -> None:
    arena = arena_of(3)
    ranges = [arena.allocate(PAGE) for _ in range(3)]
    for which in (0, 2, 1):
        arena.free(ranges[which] or 0, PAGE)
    assert arena.holes() == [(0, 3 * PAGE)]
    assert arena.largest_hole == 3 * PAGE


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 2 * PAGE), (0, 3 * PAGE), (PAGE, PAGE), (2 * PAGE, PAGE), (7, PAGE), (-PAGE, PAGE)]
)
def test_a_range_that_was_not_handed_out_is_not_taken_back(offset: int, length: int) -> None:
    arena = arena_of(8)
    assert arena.allocate(4 * PAGE) == 0
    with pytest.raises(Misuse):
        arena.free(offset, length)
    assert arena.used == 4 * PAGE


def test_a_double_free_is_misuse() -> None:
    arena = arena_of(2)
    offset = arena.allocate(PAGE)
    assert offset is not None
    arena.free(offset, PAGE)
    with pytest.raises(Misuse):
        arena.free(offset, PAGE)
    assert arena.free_bytes == 2 * PAGE


def test_taken_never_falls_and_bad_settings_are_misuse() -> None:
    arena = arena_of(2)
    with pytest.raises(Misuse, match="only grows"):
        arena.grow(PAGE)
    for call in (lambda: arena.allocate(0), lambda: arena.reserve_head(0), lambda: Arena(alignment=3)):
        with pytest.raises(Misuse):
            call()
    arena.allocate(1)
    with pytest.raises(Misuse, match="before"):
        arena.reserve_head(1)


def test_two_chunk_sizes_alternating_never_deadlock_by_fragmentation() -> None:
    """Ranges that are given back at random leave a hole that is large enough in the end."""
    arena, draw = arena_of(64), random.Random(7)
    held: list[tuple[int, int]] = []
    for turn in range(4000):
        length = (3 if turn // 50 % 2 else 7) * PAGE
        while (offset := arena.allocate(length)) is None:
            assert held, "nothing is left to evict and there is no room"
            arena.free(*held.pop(draw.randrange(len(held))))
        held.append((offset, length))
    for piece in held:
        arena.free(*piece)
    assert arena.holes() == [(0, 64 * PAGE)]


class ArenaMachine(RuleBasedStateMachine):
    """The model is a list of pages: None is free, otherwise the number of the range that has it."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena()
        self.pages: list[int | None] = []
        self.given: dict[int, tuple[int, int]] = {}
        self.made = 0

    def runs(self) -> list[int]:
        text = "".join("." if owner is None else "#" for owner in self.pages)
        return [len(run) for run in text.split("#") if run]

    @rule(pages=st.integers(0, 6))
    def grow(self, pages: int) -> None:
        self.pages += [None] * pages
        self.arena.grow(len(self.pages) * PAGE)

    @rule(length=st.integers(1, 5 * PAGE))
    def allocate(self, length: int) -> None:
        need = -(-length // PAGE)
        offset = self.arena.allocate(length)
        fitting = [run for run in self.runs() if run >= need]
        assert (offset is not None) == bool(fitting)
        if offset is not None:
            assert offset % PAGE == 0
            first = offset // PAGE
            assert self.pages[first : first + need] == [None] * need
            before, after = first, first + need
            while before and self.pages[before - 1] is None:
                before -= 1
            while after < len(self.pages) and self.pages[after] is None:
                after += 1
            assert after - before == min(fitting), "not the best fit"
            self.made += 1
            self.pages[first : first + need] = [self.made] * need
            self.given[self.made] = (offset, length)

    @precondition(lambda self: self.given)
    @rule(pick=st.integers(0, 99))
    def free(self, pick: int) -> None:
        which = list(self.given)[pick % len(self.given)]
        self.arena.free(*self.given.pop(which))
        self.pages = [None if owner == which else owner for owner in self.pages]

    @rule(page=st.integers(0, 40), length=st.integers(1, 4))
    def free_wrongly(self, page: int, length: int) -> None:
        ranges = {(offset, -(-size // PAGE)) for offset, size in self.given.values()}
        if (page * PAGE, length) not in ranges:
            with pytest.raises(Misuse):
                self.arena.free(page * PAGE, length * PAGE)

    @invariant()
    def bytes_add_up(self) -> None:
        free = self.pages.count(None) * PAGE
        assert self.arena.free_bytes == free
        assert self.arena.used == len(self.pages) * PAGE - free
        assert self.arena.largest_hole == max(self.runs(), default=0) * PAGE
        assert sum(length for _, length in self.arena.holes()) == free
        assert len(self.arena.holes()) == len(self.runs())


TestArenaAgainstItsModel = ArenaMachine.TestCase
TestArenaAgainstItsModel.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
