"""Eviction: which chunks go first when room is needed, and which never go."""

import itertools
import tracemalloc
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_trio._core.index.arena import Arena
from lmcache_trio._core.index.chunks import MOST_EVICTED
from lmcache_trio._core.index.index import Index
from lmcache_trio._core.keys import join_digests


def test_the_least_recently_used_leaf_goes_first(world: Callable[..., Any]) -> None:
    w = world(4)
    for chain in ("ab", "c", "d"):
        w.store(chain)
    w.touch(["ab", "c"])
    w.store("e")
    assert [w.hits(chain) for chain in ("ab", "c", "d", "e")] == [2, 1, 0, 1]


def test_a_leaf_goes_before_its_parent(world: Callable[..., Any]) -> None:
    w = world(3)
    w.store("abc")
    w.store("x")
    assert w.hits("abc") == 2
    w.store("xy")
    assert w.hits("abc") == 1
    assert w.counted["evictions"] == 2


def test_a_store_that_extends_a_chain_touches_its_ancestors(world: Callable[..., Any]) -> None:
    w = world(4)
    w.store("ab")
    w.store("x")
    w.store("abc", known=2)
    w.store("y")
    assert (w.hits("abc"), w.hits("x")) == (3, 0)


def test_a_leased_chunk_is_never_evicted(world: Callable[..., Any]) -> None:
    w = world(2, lease_share=1.0)
    w.store("ab")
    lease = w.lease("ab")
    assert w.store("x").dropped == {"no_space": 1}
    w.index.release(lease.id)
    assert w.store("x").slots


def test_a_pinned_chunk_stays_after_its_lease_ended(world: Callable[..., Any]) -> None:
    w = world(2, lease_share=1.0)
    w.store("ab")
    lease = w.lease("ab")
    pin = w.index.pin(lease.id, "e", w.name, 1, 0, 0, 2)
    w.index.release(lease.id)
    assert not w.store("x").slots
    assert w.index.unpin(pin.id, 1)
    assert w.store("x").slots


def test_a_pinned_leaf_keeps_its_ancestors(world: Callable[..., Any]) -> None:
    w = world(3, lease_share=1.0)
    w.store("abc")
    lease = w.lease("abc")
    pin = w.index.pin(lease.id, "e", w.name, 1, 0, 2, 1)
    w.index.release(lease.id)
    assert not w.store("x").slots
    w.index.unpin(pin.id, 1)
    w.store("x")
    assert w.hits("abc") == 2


def test_a_held_chunk_is_not_evicted(world: Callable[..., Any]) -> None:
    w = world(2)
    w.store("ab")
    hold = w.index.hold(w.key("ab"))
    assert hold.parent == w.digests("a")[0]
    assert not w.store("x").slots
    w.index.unhold(hold)
    w.index.unhold(hold)
    assert w.store("x").slots


def test_a_hold_is_not_a_touch(world: Callable[..., Any]) -> None:
    w = world(3)
    w.store("ab")
    w.store("x")
    w.index.unhold(w.index.hold(w.key("ab")))
    w.store("y")
    w.store("z")
    assert (w.hits("ab"), w.hits("x")) == (0, 1)


def test_a_chunk_being_written_is_never_evicted(world: Callable[..., Any]) -> None:
    w = world(1)
    writing = w.reserve("a")
    assert w.store("x").dropped == {"no_space": 1}
    assert len(w.index.commit(writing.id, 1)) == 1


def test_a_reservation_never_evicts_the_chunks_that_it_extends(world: Callable[..., Any]) -> None:
    w = world(3)
    w.store("abc")
    reservation = w.reserve("abcd", known=3)
    assert reservation.dropped == {"no_space": 1}
    assert w.hits("abc") == 3


def test_a_parent_keeps_its_place_while_a_child_of_it_is_written(world: Callable[..., Any]) -> None:
    w = world(3)
    w.store("a")
    child = w.reserve("ab", known=1, worker=2)
    w.store("x")
    w.store("y")
    assert w.hits("a") == 1
    w.index.commit(child.id, 2)
    assert w.hits("ab") == 2


def test_nothing_is_evicted_if_even_all_idle_chunks_would_not_make_the_room(world: Callable[..., Any]) -> None:
    w = world(4, lease_share=1.0)
    w.store("ab")
    w.store("x")
    w.lease("ab")
    w.index.attach(b"B" * 32, [3 * 4096])
    got = w.index.reserve(("e", 1), 1, 0, b"B" * 32, b"", join_digests(w.digests("z")), 0.0)
    assert got.dropped == {"no_space": 1}
    assert w.hits("x") == 1


def test_an_evicted_chunks_place_goes_to_the_one_that_it_went_for(world: Callable[..., Any]) -> None:
    w = world(2)
    old = w.store("ab")
    new = w.store("xy")
    assert {slot.offset for slot in new.slots} == {slot.offset for slot in old.slots}
    assert (w.arena.used, w.held["bytes_ready"], w.counted["evictions"]) == (2 * 4096, 2 * 4096, 2)


def test_a_place_that_was_handed_over_still_joins_its_neighbours(world: Callable[..., Any]) -> None:
    w = world(3)
    w.store("abc")
    w.store("xyz")
    w.index.attach(b"B" * 32, [3 * 4096])
    got = w.index.reserve(("e", 1), 1, 0, b"B" * 32, b"", join_digests(w.digests("L")), 0.0)
    assert [slot.offset for slot in got.slots] == [0]
    assert w.counted["evictions"] == 6


def test_two_chunk_sizes_alternating_never_deadlock(world: Callable[..., Any]) -> None:
    w = world(16)
    w.index.attach(b"B" * 32, [5 * 4096])
    for turn in range(60):
        for piece in range(4):
            (digest,) = w.digests(chr(300 + 4 * turn + piece))
            namespace = (b"B" * 32, w.name)[turn % 2]
            got = w.index.reserve(("e", 1), 1, 0, namespace, b"", digest, 0.0)
            assert got.slots, got.dropped
            w.index.commit(got.id, 1)


def test_a_reserve_that_finds_no_hole_does_not_flush_the_idle_chunks(world: Callable[..., Any]) -> None:
    """Every eighth chunk is leased, so that no hole of 8 can be made of all the others."""
    w = world(256, lease_share=1.0)
    chunks = [chr(300 + i) for i in range(256)]
    for chunk in chunks:
        w.store(chunk)
    for chunk in chunks[::8]:
        w.lease(chunk)
    w.index.attach(b"B" * 32, [8 * 4096])
    for turn in range(1, 3):
        got = w.index.reserve(("e", 1), 1, 0, b"B" * 32, b"", join_digests(w.digests("xyz")), 0.0)
        assert got.dropped == {"no_space": 3}
        assert w.counted["evictions"] == turn * MOST_EVICTED * 8
    assert sum(w.hits(chunk) for chunk in chunks) == 256 - 2 * MOST_EVICTED * 8


@given(data=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])  # it gives a class
def test_a_reserve_that_finds_no_hole_evicts_at_most_its_bound(world: Callable[..., Any], data: st.DataObject) -> None:
    small, large = data.draw(st.sampled_from([(1, 5), (2, 7), (3, 4), (1, 12)]))
    draw, stride = Random(data.draw(st.integers(0, 2**32))), data.draw(st.integers(1, 2 * large))
    w = world(240, lease_share=1.0)
    extents = {b"S" * 32: small, b"L" * 32: large}
    for namespace, extent in extents.items():
        w.index.attach(namespace, [extent * 4096])
    stored: list[tuple[bytes, list[bytes]]] = []
    leases: list[bytes] = []

    def store(namespace: bytes, name: str) -> None:
        parent, digests = b"", w.digests(name)
        for digest in digests:
            idle = bytes_idle(w)
            got = w.index.reserve(("e", 1), 1, 0, namespace, parent, digest, 0.0)
            if not got.slots:
                assert got.dropped == {"no_space": 1}
                bound = MOST_EVICTED * extents[namespace] + max(extents.values())  # the last one may go beyond
                assert idle - bytes_idle(w) < bound * 4096
                break
            w.index.commit(got.id, 1)
            parent = digest
        stored.append((namespace, digests))

    def lease(turn: int, namespace: bytes, digests: list[bytes]) -> None:
        lease = w.index.lease(("e", turn), (namespace,), digests, 0.0)
        leases.extend([lease.id] if lease else [])

    for i in range(240 // small):
        store(b"S" * 32, chr(300 + i))
        if i % stride == 0:
            lease(1000 + i, *stored[-1])
    for turn in range(60):
        if draw.random() < 0.3:
            lease(turn, *draw.choice(stored))
        elif leases and draw.random() < 0.2:
            w.index.release(leases.pop(draw.randrange(len(leases))))
        else:
            store(draw.choice(list(extents)), chr(600 + turn) + "bcd"[: draw.randrange(4)])


def bytes_idle(w: Any) -> int:
    held: dict[str, int] = w.held
    return held["bytes_ready"] - held["bytes_retained"]


class Replay:
    """Leaf-first LRU, by the book: scan for the oldest childless chunk."""

    def __init__(self, room: int) -> None:
        self.room, self.clock = room, itertools.count()
        self.used: dict[str, float] = {}

    def serve(self, chain: str) -> int:
        hits = 0
        while hits < len(chain) and chain[: hits + 1] in self.used:
            hits += 1
        self.stamp(chain, hits)
        for depth in range(hits, len(chain)):
            self.used[chain[: depth + 1]] = float("inf")
            if len(self.used) > self.room:
                leaves = [c for c in self.used if not any(o[:-1] == c for o in self.used)]
                del self.used[min(leaves, key=self.used.__getitem__)]
        self.stamp(chain, len(chain))
        return hits

    def stamp(self, chain: str, upto: int) -> None:
        for depth in range(upto, 0, -1):
            self.used[chain[:depth]] = next(self.clock)


@pytest.mark.parametrize("seed", range(5))
def test_hits_are_those_of_an_exact_leaf_first_lru(world: Callable[..., Any], seed: int) -> None:
    draw, room = Random(seed), 12
    w, replay = world(room, lease_share=1.0), Replay(room)
    for _ in range(600):
        chain = "".join(draw.choice("abc") for _ in range(draw.randint(1, 6)))
        expected = replay.serve(chain)
        lease = w.lease(chain)
        assert (lease.chunks if lease else 0) == expected
        if lease:
            w.index.release(lease.id)
        w.store(chain, known=expected)


def test_a_chunk_costs_at_most_300_bytes_beyond_its_digest() -> None:
    count, name = 20_000, b"n" * 32
    ids = itertools.count(1)
    digests = [n.to_bytes(32, "little") for n in range(count)]  # made before the measurement, so +32 below
    tracemalloc.start()
    try:
        index = Index(Arena(), new_id=lambda: next(ids).to_bytes(16, "big"))
        index.grow(count * 4096)
        index.attach(name, [4096])
        before, _ = tracemalloc.get_traced_memory()
        for start in range(0, count, 40):
            batch = [bytes(bytearray(digest)) for digest in digests[start : start + 40]]
            index.commit(index.reserve(("e", 1), 1, 0, name, b"", join_digests(batch), 0.0).id, 1)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert index.statistics().held.chunks.chunks_ready == count
    assert (after - before) / count - 32 <= 300
