"""A lookup's plan, played against tiers that answer and load in any order: it finds the true longest hit."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio._core.groups import EVERY, Group, Need
from lmcache_trio._core.tiers.plan import Place, Plan
from lmcache_trio.errors import Misuse

CHUNK = 16
WINDOW, LOCAL, STATE = Group(Need.WINDOW, 33, 16), Group(Need.LOCAL, 48, 16), Group(Need.STATE)
GROUPS = st.one_of(
    st.just((EVERY,)),
    st.lists(st.sampled_from([EVERY, WINDOW, LOCAL, STATE]), min_size=1, max_size=3).map(tuple),
)


Part = tuple[bool, bool, bool, int]
"""Is it in memory, in the first tier, in the second; and its fate: 0 if its load misses."""


def is_to_be_had(part: Part) -> bool:
    here, first, second, fate = part
    return here or ((first or second) and fate > 0)


def needed(groups: tuple[Group, ...], boundary: int) -> list[tuple[int, int]]:
    return [
        (number, position)
        for number, group in enumerate(groups)
        for position in range(group.first(boundary, CHUNK), boundary)
    ]


@given(groups=GROUPS, count=st.integers(0, 10), window=st.integers(1, 4), data=st.data())
def test_the_plan_ends_at_the_true_longest_hit_whatever_comes_when(
    groups: tuple[Group, ...], count: int, window: int, data: st.DataObject
) -> None:
    part = st.tuples(st.integers(0, 3).map(lambda n: n == 0), st.booleans(), st.booleans(), st.integers(0, 5))
    parts = [data.draw(st.lists(part, min_size=count, max_size=count)) for _ in groups]

    plan = Plan(count, 2, groups, CHUNK, window)
    for number in range(len(groups)):
        for position in range(count):
            if parts[number][position][0]:
                plan.here(number, position)
    to_ask, asked = [0, 1], dict[int, list[tuple[int, int]]]()
    coming, wanted = dict[tuple[int, int], int](), list[tuple[int, int]]()
    while not plan.done:
        for number, position, tier in plan.to_want():
            assert parts[number][position][1 + tier]
            assert plan.needs(number, position)
            assert (number, position) in needed(groups, plan.boundary)
            if groups[number] is EVERY:
                assert coming.get((number, position - 1), tier) == tier
                assert all(plan.place(number, before) in (Place.COMING, Place.HERE) for before in range(position))
            else:
                assert not [p for p in needed(groups, plan.boundary) if plan.place(*p) in (Place.UNKNOWN, Place.ABSENT)]
            coming[number, position] = tier
            wanted.append((number, position))
        assert len([which for which in coming if plan.needs(*which)]) <= window
        steps: list[Any] = [("ask", tier) for tier in to_ask[:1]]
        steps += [("answer", tier) for tier in asked]
        steps += [("end", which) for which in coming]
        assert steps, "nothing is left to happen, and it is not done"
        what, which = data.draw(st.sampled_from(steps))
        if what == "ask":
            to_ask.remove(which)
            asked[which] = plan.ask(which)
        elif what == "answer":
            plan.answered(which, [bool(parts[number][position][1 + which]) for number, position in asked.pop(which)])
        else:
            del coming[which]
            (plan.landed if is_to_be_had(parts[which[0]][which[1]]) else plan.missed)(*which)
        if data.draw(st.booleans()):  # as the server does, or the loads end on their own
            coming = {which: tier for which, tier in coming.items() if plan.needs(*which)}
    longest = [n for n in range(1, count + 1) if all(is_to_be_had(parts[g][at]) for g, at in needed(groups, n))]
    assert plan.boundary == max(longest, default=0)
    assert len(set(wanted)) == len(wanted)
    assert not [which for which in wanted if parts[which[0]][which[1]][0]]


def test_nothing_behind_the_first_chunk_that_is_nowhere_is_wanted() -> None:
    plan = Plan(5, 1)
    assert plan.ask(0) == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)]
    plan.answered(0, [True, True, False, True, True])
    assert list(plan.to_want()) == [(0, 0, 0), (0, 1, 0)]
    assert (plan.boundary, plan.place(0, 2), plan.place(0, 3)) == (2, Place.ABSENT, Place.FOUND)


def test_a_miss_makes_the_hit_end_there() -> None:
    plan = Plan(3, 1)
    plan.ask(0)
    plan.answered(0, [True, True, True])
    assert len(list(plan.to_want())) == 3
    plan.missed(0, 1)
    plan.landed(0, 0)
    assert (plan.done, plan.boundary) == (True, 1)
    plan.landed(0, 2)
    assert plan.done


def test_only_the_last_parts_of_a_group_are_wanted_of_which_a_hit_needs_no_more() -> None:
    plan = Plan(6, 1, (EVERY, WINDOW, STATE), CHUNK)
    plan.ask(0)
    plan.answered(0, [True] * 18)
    assert list(plan.to_want()) == [(1, 4, 0), (1, 5, 0), (2, 5, 0), *[(0, position, 0) for position in range(6)]]


def test_what_a_shorter_hit_needs_is_wanted_when_a_load_misses() -> None:
    plan = Plan(6, 1, (EVERY, STATE), CHUNK)
    plan.ask(0)
    plan.answered(0, [True] * 6 + [False, False, True, False, True, False])
    assert plan.boundary == 5
    assert next(iter(plan.to_want())) == (1, 4, 0)
    assert len(list(plan.to_want())) == 5
    plan.missed(1, 4)
    assert plan.boundary == 3
    assert [plan.needs(0, position) for position in range(5)] == [True, True, True, False, False]
    assert list(plan.to_want()) == [(1, 2, 0)]
    for group, position in ((1, 2), (0, 0), (0, 1), (0, 2)):
        assert not plan.done
        plan.landed(group, position)
    assert plan.done


def test_parts_that_need_no_other_wait_until_it_is_known_that_a_hit_may_be() -> None:
    plan = Plan(2, 2, (EVERY, STATE), CHUNK)
    plan.ask(0)
    plan.answered(0, [True, False, True, True])
    assert list(plan.to_want()) == [(0, 0, 0)]
    assert plan.ask(1) == [(0, 1)]
    plan.answered(1, [True])
    assert list(plan.to_want()) == [(1, 1, 0)]  # the second chunk waits for the first, which another tier loads


def test_an_answer_or_a_load_that_the_plan_did_not_ask_for_is_misuse() -> None:
    plan = Plan(2, 1)
    with pytest.raises(Misuse):
        plan.answered(0, [True, True])
    plan.ask(0)
    with pytest.raises(Misuse):
        plan.ask(0)
    with pytest.raises(Misuse):
        plan.answered(0, [True])
    with pytest.raises(Misuse):
        plan.landed(0, 0)
    with pytest.raises(Misuse):
        plan.missed(0, 1)
