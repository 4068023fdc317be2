"""A lookup's plan, played against tiers that answer and load in any order: it finds the true leading run."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio._core.tiers.plan import Place, Plan
from lmcache_trio.errors import Misuse


@given(
    chunks=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()), max_size=12),
    window=st.integers(1, 4),
    data=st.data(),
)
def test_the_plan_ends_at_the_true_leading_run_whatever_comes_when(
    chunks: list[tuple[bool, bool, bool, bool]], window: int, data: st.DataObject
) -> None:
    """A chunk: is it in memory, in the first tier, in the second; and does its load miss?"""
    plan = Plan(len(chunks), 2, window)
    for position, (here, *_) in enumerate(chunks):
        if here:
            plan.here(position)
    to_ask, asked, coming = [0, 1], dict[int, list[int]](), dict[int, int]()
    wanted: list[int] = []
    while not plan.done:
        for position, tier in plan.to_want():
            assert chunks[position][1 + tier]
            assert not chunks[position][0]
            assert coming.get(position - 1, tier) == tier
            coming[position] = tier
            wanted.append(position)
        assert len([position for position in coming if position < plan.cut]) <= window
        steps: list[Any] = [("ask", tier) for tier in to_ask[:1]]
        steps += [("answer", tier) for tier in asked]
        steps += [("end", position) for position in coming]
        assert steps, "nothing is left to happen, and it is not done"
        what, which = data.draw(st.sampled_from(steps))
        if what == "ask":
            to_ask.remove(which)
            asked[which] = plan.ask(which)
        elif what == "answer":
            positions = asked.pop(which)
            plan.answered(which, [chunks[position][1 + which] for position in positions])
        else:
            del coming[which]
            (plan.missed if chunks[which][3] else plan.landed)(which)
    run = 0
    for here, first, second, misses in chunks:
        if not (here or ((first or second) and not misses)):
            break
        run += 1
    assert plan.run == run
    assert len(set(wanted)) == len(wanted)


def test_nothing_behind_the_first_chunk_that_is_nowhere_is_wanted() -> None:
    plan = Plan(5, 1)
    assert plan.ask(0) == [0, 1, 2, 3, 4]
    plan.answered(0, [True, True, False, True, True])
    assert list(plan.to_want()) == [(0, 0), (1, 0)]
    assert (plan.cut, plan.place(2), plan.place(3)) == (2, Place.ABSENT, Place.FOUND)


def test_a_miss_makes_the_run_end_there() -> None:
    plan = Plan(3, 1)
    plan.ask(0)
    plan.answered(0, [True, True, True])
    assert len(list(plan.to_want())) == 3
    plan.missed(1)
    plan.landed(0)
    assert (plan.done, plan.run) == (True, 1)


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
        plan.landed(0)
    with pytest.raises(Misuse):
        plan.missed(1)
