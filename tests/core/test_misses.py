"""The reason of a missed chunk, by what the server knows."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio._core.departures import Cause, Departure
from lmcache_trio._core.misses import InMemory, InTiers, Missed, Reason, Seen, known_run, reason_of, reasons_of

EVICTED = Departure(Cause.EVICTED, 5.0, 60.0)
LEFT = st.none() | st.builds(Departure, st.sampled_from(Cause), st.just(5.0), st.just(60.0))
SEEN = st.builds(
    Seen,
    st.integers(0, 5),
    st.sampled_from(InMemory),
    st.sampled_from(InTiers),
    LEFT,
    *[st.booleans()] * 4,
)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, Reason.NEVER_STORED),
        ({"position": 3}, Reason.NEW_TAIL),
        ({"left": EVICTED}, Reason.EVICTED),
        ({"left": EVICTED, "position": 3}, Reason.EVICTED),
        ({"left": EVICTED, "tiers": InTiers.UNASKED}, Reason.LATE),
        ({"left": EVICTED, "tiers": InTiers.CLOSED}, Reason.TIER_FENCED),
        ({"left": EVICTED, "tiers": InTiers.UNWRITTEN}, Reason.NOT_ADMITTED),
        ({"left": Departure(Cause.NO_SPACE, 5.0, 0.0)}, Reason.NOT_ADMITTED),
        ({"left": Departure(Cause.SHARE, 5.0, 0.0), "tiers": InTiers.CLOSED}, Reason.NOT_ADMITTED),
        ({"memory": InMemory.WRITING}, Reason.WRITING),
        ({"memory": InMemory.READY}, Reason.LEASE_SHARE),
        ({"tiers": InTiers.NO_SHARE}, Reason.LEASE_SHARE),
        ({"tiers": InTiers.NO_ROOM}, Reason.NOT_ADMITTED),
        ({"tiers": InTiers.LATE}, Reason.LATE),
        ({"tiers": InTiers.LATE, "left": EVICTED}, Reason.LATE),
        ({"tiers": InTiers.UNASKED}, Reason.NEVER_STORED),
        ({"tiers": InTiers.CLOSED}, Reason.TIER_FENCED),
        ({"tiers": InTiers.CLOSED, "position": 3}, Reason.NEW_TAIL),
        ({"refill": True}, Reason.RESET),
        ({"refill": True, "position": 3}, Reason.NEW_TAIL),
        ({"refill": True, "left": EVICTED}, Reason.EVICTED),
        ({"fits": False}, Reason.TOO_LARGE),
        ({"registered": False}, Reason.NOT_REGISTERED),
        ({"stopping": True, "left": EVICTED}, Reason.STOPPING),
    ],
)
def test_each_state_of_a_chunk_has_its_reason(facts: dict[str, Any], reason: Reason) -> None:
    assert reason_of(Seen(**{"position": 0, **facts})) is reason


@given(SEEN)
def test_what_memory_has_is_never_said_to_be_absent(seen: Seen) -> None:
    reason = reason_of(seen)
    if seen.memory is not InMemory.ABSENT:
        assert reason not in (Reason.EVICTED, Reason.NEVER_STORED, Reason.NEW_TAIL, Reason.RESET, Reason.TIER_FENCED)
    if reason is Reason.NEVER_STORED:
        assert not seen.position
        assert seen.left is None


@given(SEEN, st.integers(1, 50), st.integers(0, 60))
def test_each_missed_chunk_has_exactly_one_reason(seen: Seen, count: int, known: int) -> None:
    end = seen.position + count
    runs = reasons_of(seen, end, lambda: known)
    assert runs[0].reason is reason_of(seen)
    assert [chunk for run in runs for chunk in range(run.position, run.position + run.chunks)] == list(
        range(seen.position, end)
    )
    assert all(run.chunks > 0 for run in runs)
    assert [run.reason for run in runs[1:]] in ([], [Reason.NEW_TAIL])


def test_a_run_is_cut_where_nothing_is_known_any_more() -> None:
    assert reasons_of(Seen(2, left=EVICTED), 10, lambda: 7) == [
        Missed(Reason.EVICTED, 2, 5),
        Missed(Reason.NEW_TAIL, 7, 3),
    ]
    assert reasons_of(Seen(0, fits=False), 10, lambda: 7) == [Missed(Reason.TOO_LARGE, 0, 10)]


@given(st.integers(0, 300), st.data())
def test_the_end_of_the_known_run_is_found_in_few_questions(start: int, data: st.DataObject) -> None:
    end = data.draw(st.integers(start + 1, start + 300))
    known_end = data.draw(st.integers(start + 1, end))
    asked: list[int] = []

    def known(position: int) -> bool:
        assert start < position < end
        asked.append(position)
        return position < known_end

    assert known_run(known, start, end) == known_end
    assert len(asked) <= 2 * (known_end - start).bit_length() + 2


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_of_chunks_with_gaps_the_run_ends_at_a_gap_or_at_the_end(known: list[bool]) -> None:
    found = known_run(known.__getitem__, 0, len(known))
    assert found == len(known) or not known[found]
    assert found > 0
