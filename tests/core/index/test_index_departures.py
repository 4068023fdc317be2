"""What the index remembers of chunks that left, and for how long a victim had been idle."""

import tracemalloc
from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio._core.departures import MOST, Cause, Departure, Departures

NAMES = st.integers(0, 30).map(lambda number: bytes([number]) * 32)


@given(st.lists(st.tuples(NAMES, st.sampled_from(Cause)), max_size=60), st.integers(1, 20))
def test_the_latest_departures_are_remembered_and_no_others(noted: list[tuple[bytes, Cause]], most: int) -> None:
    departures = Departures(most)
    for now, (digest, cause) in enumerate(noted):
        departures.note(b"n", digest, cause, float(now), now / 2)
    told = {digest: Departure(cause, float(now), now / 2) for now, (digest, cause) in enumerate(noted)}
    recent = {digest for digest, _ in noted[-most:]}
    for number in range(31):
        digest = bytes([number]) * 32
        assert departures.find(b"n", digest) == (told[digest] if digest in recent else None)
        assert departures.find(b"other", digest) is None
    assert len(departures) == len(recent)


def test_all_departures_together_take_what_the_module_says() -> None:
    digests = [Random(number).randbytes(32) for number in range(1000)]
    tracemalloc.start()
    try:
        departures = Departures()
        for number in range(2 * MOST):
            departures.note(b"%d" % number, digests[number % 1000], Cause.EVICTED, float(number), 1.0)
        assert tracemalloc.get_traced_memory()[0] < 11.5e6
    finally:
        tracemalloc.stop()


def test_an_evicted_chunk_is_remembered_with_the_time_for_which_it_was_idle(world: Callable[..., Any]) -> None:
    w = world(3)
    w.store("abc")
    w.now = 10.0
    w.store("x")
    left = w.index.departures.find(w.name, w.key("abc").digest)
    assert left == Departure(Cause.EVICTED, 10.0, 0.0)  # it was used later than the mark before
    w.now = 25.0
    w.store("xy")
    assert w.index.departures.find(w.name, w.key("ab").digest) == Departure(Cause.EVICTED, 25.0, 15.0)
    assert w.index.statistics().evicted_idle == 15.0
    assert w.index.departures.find(w.name, w.key("a").digest) is None


def test_a_use_makes_the_idle_time_begin_anew(world: Callable[..., Any]) -> None:
    w = world(3)
    w.store("a")
    w.store("b")
    w.now = 10.0
    w.store("c")  # with a mark
    w.now = 15.0
    w.touch("a")
    w.now = 20.0
    w.store("d")
    assert w.index.departures.find(w.name, w.key("b").digest) == Departure(Cause.EVICTED, 20.0, 10.0)
    w.now = 40.0
    w.touch("d")
    w.store("e")
    w.store("f")
    assert w.index.departures.find(w.name, w.key("a").digest) == Departure(Cause.EVICTED, 40.0, 20.0)


def test_the_idle_time_is_never_too_long_and_is_close_after_any_number_of_stores(world: Callable[..., Any]) -> None:
    w, random, used = world(50), Random(1), dict[str, float]()
    for number in range(5000):
        w.now += random.random()
        name = chr(256 + random.randrange(200))
        if w.hits(name):
            w.touch([name])
        else:
            w.store(name)
        used[name] = w.now
        for other in list(used):
            left = w.index.departures.find(w.name, w.key(other).digest)
            if left is not None and left.when == w.now and not w.hits(other):
                idle = w.now - used.pop(other)
                assert idle - 8 <= left.idle <= idle, number


def test_a_chunk_that_got_no_slot_is_remembered_and_those_behind_it_are_not(world: Callable[..., Any]) -> None:
    w = world(2, lease_share=1.0)
    w.store("ab")
    assert w.lease("ab") is not None
    w.now = 3.0
    w.reserve("xyz")
    assert w.index.departures.find(w.name, w.key("x").digest) == Departure(Cause.NO_SPACE, 3.0, 0.0)
    assert w.index.departures.find(w.name, w.key("xy").digest) is None


def test_a_store_beyond_the_write_share_is_remembered(world: Callable[..., Any]) -> None:
    w = world(4, write_share=0.5)
    w.reserve("abc")
    assert w.index.departures.find(w.name, w.key("abc").digest) == Departure(Cause.SHARE, 0.0, 0.0)
