"""A reset: which chunks go at once, which wait for the sweep, and which wait for their readers."""

from collections.abc import Callable
from typing import Any

import pytest

from lmcache_trio._core.keys import join_digests
from lmcache_trio.errors import Gone

Make = Callable[..., Any]
ALL = 1000


def test_a_chunk_that_was_reset_misses_at_once_and_goes_back_to_the_arena_by_sweeping(world: Make) -> None:
    w = world(8)
    w.store("abc")
    w.index.reset(w.name)
    assert (w.hits("abc"), w.lease("abc"), w.index.hold(w.key("a"))) == (0, None, None)
    assert (w.held["chunks_ready"], w.held["chunks_stale"], w.arena.used) == (0, 3, 3 * 4096)
    assert w.index.sweep(ALL) is False
    assert (w.held["chunks_stale"], w.arena.used) == (0, 0)
    assert w.counted["reset_chunks"] == 3


def test_a_sweep_gives_back_no_more_chunks_than_its_limit(world: Make) -> None:
    w = world(40)
    w.store("abcdefghijklmnopqrstuvwxyz")
    w.index.reset(w.name)
    left, more = 26, True
    while more:
        more = w.index.sweep(2)
        assert left - 2 <= w.held["chunks_stale"] <= left
        left = w.held["chunks_stale"]
    assert left == 0


def test_a_reserve_takes_stale_chunks_before_it_evicts(world: Make) -> None:
    w = world(4)
    w.index.attach(b"B" * 32, [4096])
    old = w.index.reserve(("e", 1), 1, 0, b"B" * 32, b"", join_digests(w.digests("xy")), 0.0)
    w.index.commit(old.id, 1)
    w.store("ab")
    w.index.reset(b"B" * 32)  # though these are more recent than none of the others
    w.touch(["ab"])
    w.index.reset(w.name)
    w.store("cdef")
    assert w.hits("cdef") == 4
    assert w.counted["evictions"] == 0
    assert w.held["chunks_stale"] == 0


def test_a_chunk_of_the_same_name_may_be_stored_before_the_old_one_is_swept(world: Make) -> None:
    w = world(8)
    before = w.store("ab")
    w.index.reset(w.name)
    after = w.store("ab")
    assert {s.offset for s in before.slots}.isdisjoint({s.offset for s in after.slots})
    assert w.index.sweep(ALL) is False
    assert (w.hits("ab"), w.held["chunks_ready"], w.arena.used) == (2, 2, 2 * 4096)


def test_a_chunk_that_has_a_reader_at_its_reset_stays_in_place_until_the_reader_ends(world: Make) -> None:
    w = world(8)
    w.store("ab")
    lease = w.lease("ab")
    pin = w.index.pin(lease.id, "e", w.name, 1, 0, 0, 2)
    w.index.reset(w.name)
    w.index.sweep(ALL)
    assert w.held["bytes_quarantined"] == 2 * 4096
    with pytest.raises(Gone, match="reset"):
        w.index.pin(lease.id, "e", w.name, 1, 0, 0, 2)
    w.index.release(lease.id)
    assert w.held["bytes_quarantined"] == 2 * 4096
    assert w.index.unpin(pin.id, 1) is False
    assert w.arena.used == 0


def test_a_reader_that_ends_before_the_sweep_gives_its_chunks_back(world: Make) -> None:
    w = world(8)
    w.store("ab")
    hold, lease = w.index.hold(w.key("ab")), w.lease("ab")
    w.index.reset(w.name)
    w.index.release(lease.id)
    assert w.arena.used == 4096
    w.index.unhold(hold)
    assert w.arena.used == 0
    w.store("xy")  # in the very rows and places
    assert w.index.sweep(ALL) is False
    assert w.hits("xy") == 2


def test_a_stale_pin_reads_on_and_is_not_believed(world: Make) -> None:
    w = world(2, lease_share=1.0)
    w.store("ab")
    pin = w.index.pin(w.lease("ab").id, "e", w.name, 1, 0, 0, 2)
    w.index.reset(w.name)
    assert w.store("x").dropped == {"no_space": 1}
    assert w.index.unpin(pin.id, 1) is False


def test_a_reset_dooms_a_chunk_that_waits_for_an_unclaimed_shard(world: Make) -> None:
    w = world(8, shards=2)
    w.index.commit(w.reserve("a").id, 1)
    w.index.reset(w.name)
    assert (w.held["chunks_writing"], w.arena.used) == (0, 0)
    late = w.reserve("a", worker=2, shard=1)
    assert w.index.commit(late.id, 2) == []


def test_resets_in_a_row_leave_nothing_behind(world: Make) -> None:
    w = world(8, lease_share=1.0)
    for _ in range(50):
        w.store("abc")
        w.lease("ab", session=1)
        w.index.reset(w.name)
        w.index.reset(w.name)
        w.index.sweep(30)
    w.index.end_session(("e", 1))
    w.index.sweep(10 * ALL)
    assert w.arena.used == 0
    assert w.held["namespaces"] == 1
    assert len(w.index._chunks.generations.numbered) < 12


def test_other_namespaces_keep_their_chunks(world: Make) -> None:
    w = world(8)
    w.index.attach(b"B" * 32, [4096])
    kept = w.index.reserve(("e", 1), 1, 0, b"B" * 32, b"", join_digests(w.digests("ab")), 0.0)
    w.index.commit(kept.id, 1)
    w.store("ab")
    w.index.reset(w.name)
    w.index.sweep(ALL)
    assert w.index.match((b"B" * 32,), w.digests("ab")) == 2


def test_a_namespace_that_no_engine_uses_is_forgotten_with_its_reset(world: Make) -> None:
    w = world(8)
    w.store("ab")
    w.index.detach(w.name)
    w.index.reset(w.name)
    assert (w.held["namespaces"], w.held["chunks_stale"]) == (0, 2)
    w.index.sweep(ALL)
    assert (w.arena.used, w.held["chunks_stale"]) == (0, 0)
