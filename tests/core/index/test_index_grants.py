"""Grants: which engine may read and write which chunk, and until when."""

from collections.abc import Callable
from typing import Any

import pytest

from lmcache_trio._core.index.index import SERVER
from lmcache_trio._core.keys import join_digests
from lmcache_trio.errors import Gone, Misuse

Make = Callable[..., Any]


def test_a_lease_covers_the_leading_ready_run(world: Make) -> None:
    w = world(8)
    w.store("abc")
    assert w.lease("abx").chunks == 2
    assert w.lease("xab") is None
    assert (w.counted["chunks_hit"], w.counted["chunks_missed"]) == (2, 4)


def test_offered_leases_hold_at_most_their_share_and_taken_ones_do_not_count(world: Make) -> None:
    w = world(8, lease_share=0.5)
    w.store("abcdef")
    first = w.lease("abc")
    assert w.lease("abcdef").chunks == 4  # distinct bytes: a, b and c are counted once
    w.store("x")
    assert w.lease("x") is None
    w.index.take(first.id)
    assert w.lease("x") is None  # the second lease offers a, b and c still
    w.index.expire(w.now + 31)
    assert w.lease("x").chunks == 1


def test_a_new_lease_of_a_session_ends_its_former_one(world: Make) -> None:
    w = world(8)
    w.store("ab")
    first, second = w.lease("a", session=5), w.lease("ab", session=5)
    with pytest.raises(Gone):
        w.index.pin(first.id, "e", w.name, 1, 0, 0, 1)
    w.index.pin(second.id, "e", w.name, 1, 0, 0, 2)
    assert w.held["leases"] == 1


def test_another_engine_cannot_tell_a_lease_from_none(world: Make) -> None:
    w = world(8)
    w.store("a")
    lease = w.lease("a")
    said = []
    for ident in (lease.id, b"?" * 16):
        with pytest.raises(Gone) as caught:
            w.index.pin(ident, "thief", w.name, 1, 0, 0, 1)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_lease_is_of_no_use_to_an_engine_whose_layout_is_another_by_now(world: Make) -> None:
    w = world(8)
    w.store("a")
    lease = w.lease("a")
    for namespace in (b"o" * 32, b""):
        with pytest.raises(Gone, match="layout"):
            w.index.pin(lease.id, "e", namespace, 1, 0, 0, 1)
    assert w.held["pins"] == 0
    w.index.pin(lease.id, "e", w.name, 1, 0, 0, 1)


@pytest.mark.parametrize(("shard", "start", "count"), [(2, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 0, 0), (0, 1, 2)])
def test_a_pin_outside_its_lease_is_misuse(world: Make, shard: int, start: int, count: int) -> None:
    w = world(8, shards=2)
    w.store("ab")
    lease = w.lease("ab")
    with pytest.raises(Misuse):
        w.index.pin(lease.id, "e", w.name, 1, shard, start, count)
    assert w.held["pins"] == 0


def test_each_shard_of_a_chunk_has_its_own_place(world: Make) -> None:
    w = world(8, shards=2)
    w.store("a")
    lease = w.lease("a")
    pins = [w.index.pin(lease.id, "e", w.name, shard, shard, 0, 1) for shard in (0, 1)]
    assert pins[1].offsets[0] - pins[0].offsets[0] == 4096


def test_only_its_own_worker_ends_a_pin_and_only_once(world: Make) -> None:
    w = world(8)
    w.store("a")
    pin = w.index.pin(w.lease("a").id, "e", w.name, 1, 0, 0, 1)
    assert not w.index.unpin(pin.id, 2)
    assert w.index.unpin(pin.id, 1)
    assert not w.index.unpin(pin.id, 1)


def test_a_lost_worker_loses_its_pins(world: Make) -> None:
    w = world(8)
    w.store("a")
    lease = w.lease("a")
    w.index.pin(lease.id, "e", w.name, 1, 0, 0, 1)
    kept = w.index.pin(lease.id, "e", w.name, 2, 0, 0, 1)
    w.index.lose_worker(1)
    assert w.held["pins"] == 1
    assert w.index.unpin(kept.id, 2)


def test_a_reservation_begun_before_a_reset_never_commits(world: Make) -> None:
    w = world(8)
    reservation = w.reserve("ab")
    w.index.reset(w.name)
    again = w.reserve("ab", worker=2)
    assert {s.offset for s in again.slots}.isdisjoint({s.offset for s in reservation.slots})
    with pytest.raises(Gone):
        w.index.commit(reservation.id, 1)
    assert w.held["bytes_quarantined"] == 0
    assert len(w.index.commit(again.id, 2)) == 2


def test_a_chunk_is_ready_when_every_shard_is(world: Make) -> None:
    w = world(8, shards=2)
    first, second = w.reserve("a"), w.reserve("a", worker=2, shard=1)
    assert w.index.would_keep(first.id) == 1
    assert w.index.commit(first.id, 1) == []
    assert w.hits("a") == 0
    assert w.index.would_keep(second.id) == 1
    assert w.index.commit(second.id, 2) == [w.key("a")]


def test_one_shards_abort_dooms_the_chunk_for_all(world: Make) -> None:
    w = world(8, shards=2)
    first, second = w.reserve("a"), w.reserve("a", worker=2, shard=1)
    w.index.abort(first.id, 1)
    assert w.held["chunks_quarantined"] == 1
    assert (w.index.would_keep(first.id), w.index.would_keep(second.id)) == (0, 0)
    assert w.index.commit(second.id, 2) == []
    assert (w.hits("a"), w.arena.used) == (0, 0)


def test_the_second_of_two_engines_gets_writing_drops(world: Make) -> None:
    w = world(8)
    w.reserve("ab", engine="x")
    assert w.reserve("abc", engine="y", worker=2).dropped == {"writing": 2, "orphan": 1}
    assert w.reserve("abc", engine="x", known=2, worker=1).slots


def test_a_store_without_its_parent_is_an_orphan_and_one_past_the_arena_is_too_large(world: Make) -> None:
    w = world(2)
    assert w.reserve("ab", known=1).dropped == {"orphan": 1}
    w.index.attach(b"L" * 32, [3 * 4096])
    got = w.index.reserve(("e", 1), 1, 0, b"L" * 32, b"", join_digests(w.digests("ab")), 0.0)
    assert (got.id, got.dropped) == (b"", {"too_large": 2})
    assert w.dropped == {"orphan": 1, "too_large": 2}


def test_a_prompt_larger_than_the_arena_keeps_its_leading_chunks(world: Make) -> None:
    w = world(3)
    assert w.store("abcde").dropped == {"no_space": 2}
    assert w.hits("abcde") == 3


def test_a_reservation_from_before_the_end_of_its_session_is_published(world: Make) -> None:
    w = world(8)
    reservation = w.reserve("ab", session=3)
    w.index.end_session(("e", 3))
    assert (w.held["slots_writing"], w.held["slots_quarantined"]) == (2, 0)
    assert len(w.index.commit(reservation.id, 1)) == 2
    assert (w.hits("ab"), w.held["reservations"]) == (2, 0)


def test_a_chunk_that_waits_for_another_shard_waits_on_after_the_end_of_its_session(world: Make) -> None:
    w = world(8, shards=2)
    w.index.commit(w.reserve("ab", session=3).id, 1)
    w.index.end_session(("e", 3))
    assert w.held["chunks_writing"] == 2
    other = w.reserve("ab", worker=2, shard=1, session=3)
    assert len(w.index.commit(other.id, 2)) == 2


def test_a_chunk_of_which_an_ended_session_stored_a_part_is_stored_anew_by_the_next(world: Make) -> None:
    w = world(8, shards=2)
    w.index.commit(w.reserve("ab", session=3).id, 1)
    assert w.reserve("ab", worker=1, shard=0, session=4).dropped == {"writing": 2}  # the other worker may still come
    other = w.reserve("ab", worker=2, shard=1, session=5)  # it has come, for a later session
    assert [slot.position for slot in other.slots] == [0, 1]
    assert w.index.commit(other.id, 2) == []
    last = w.reserve("ab", worker=1, shard=0, session=5)
    assert len(w.index.commit(last.id, 1)) == 2
    assert w.held["chunks_quarantined"] == 0


def test_a_chunk_that_is_named_as_its_own_parent_is_a_root(world: Make) -> None:
    w = world(8, shards=2)
    w.index.commit(w.reserve("a", session=3).id, 1)
    (digest,) = w.digests("a")
    made = w.index.reserve(("e", 4), 2, 1, w.name, digest, digest, 0.0)
    assert [slot.position for slot in made.slots] == [0]
    assert w.index.commit(made.id, 2) == []
    assert len(w.index.commit(w.reserve("a", session=4).id, 1)) == 1
    assert w.hits("a") == 1


def test_a_worker_that_lags_by_a_session_still_completes_what_the_other_stored(world: Make) -> None:
    """Sessions end while a store of theirs waits; many requests share the chunk."""
    w = world(8, shards=2)
    for number in range(1, 10):
        ahead = w.reserve("a", worker=1, shard=0, session=number)
        if ahead.id:
            w.index.commit(ahead.id, 1)
        if number > 1:
            behind = w.reserve("a", worker=2, shard=1, session=number - 1)
            if behind.id:
                w.index.commit(behind.id, 2)
    assert w.hits("a") == 1


def test_a_lost_workers_slots_stay_in_quarantine_until_its_copies_ended(world: Make) -> None:
    w = world(2)
    w.reserve("ab")
    w.index.lose_worker(1)
    assert w.store("x").dropped == {"no_space": 1}
    w.index.copies_ended(1)
    assert w.store("x").slots


def test_a_reservation_that_takes_too_long_is_aborted_but_stays_in_quarantine(world: Make) -> None:
    w = world(2, reservation_timeout=60.0)
    reservation = w.reserve("ab")
    assert w.index.expire(59.0) == 60.0
    assert w.index.expire(60.0) == float("inf")
    assert w.held["slots_quarantined"] == 2
    w.index.abort(reservation.id, 1)
    w.index.abort(reservation.id, 1)
    assert w.arena.used == 0


def test_a_chunk_whose_other_shard_never_came_is_dropped_in_time(world: Make) -> None:
    w = world(8, shards=2)
    w.index.commit(w.reserve("a").id, 1)
    assert w.index.expire(w.now + 60) == float("inf")
    assert w.arena.used == 0


def test_a_late_shards_claim_gives_its_chunk_time_and_no_other(world: Make) -> None:
    w = world(8, shards=2)
    w.index.commit(w.reserve("a").id, 1)
    w.now = 1.0
    w.index.commit(w.reserve("x").id, 1)
    w.now = 50.0
    late = w.reserve("a", worker=2, shard=1)
    assert w.index.expire(61.0) == 110.0
    assert w.held["chunks_writing"] == 1
    assert w.index.commit(late.id, 2) == [w.key("a")]


def test_children_of_an_aborted_chunk_are_found_again_when_it_is_stored_anew(world: Make) -> None:
    w = world(8)
    parent = w.reserve("a")
    w.index.commit(w.reserve("ab", known=1, worker=2).id, 2)
    w.index.abort(parent.id, 1)
    assert w.hits("ab") == 0
    assert w.index.hold(w.key("ab")).parent is None
    w.store("a")
    assert w.hits("ab") == 2


def test_a_load_takes_all_shards_at_once(world: Make) -> None:
    w = world(8, shards=3)
    load = w.index.reserve_load(w.name, b"", w.digests("a")[0], 0.0)
    assert [slot.position for slot in load.slots] == [0, 1, 2]
    assert w.index.reserve_load(w.name, b"", w.digests("a")[0], 0.0) is None
    assert w.index.commit(load.id, SERVER) == [w.key("a")]
    assert w.counted["loaded_chunks"] == 1


def test_a_stranger_neither_commits_nor_aborts_a_reservation(world: Make) -> None:
    w = world(8)
    reservation = w.reserve("a")
    w.index.abort(reservation.id, 2)
    with pytest.raises(Gone):
        w.index.commit(reservation.id, 2)
    assert len(w.index.commit(reservation.id, 1)) == 1


@pytest.mark.parametrize("digest", [b"short", b"x" * 33])
def test_a_digest_of_the_wrong_length_changes_nothing(world: Make, digest: bytes) -> None:
    w = world(8)
    with pytest.raises(Misuse):
        w.index.reserve(("e", 1), 1, 0, w.name, b"", w.digests("a")[0] + digest, 0.0)
    assert w.arena.used == 0


def test_a_namespace_has_one_layout(world: Make) -> None:
    w = world(8)
    w.index.attach(w.name, [4096])
    with pytest.raises(Misuse):
        w.index.attach(w.name, [4097])
    with pytest.raises(Misuse):
        w.index.reserve(("e", 1), 1, 1, w.name, b"", join_digests(w.digests("a")), 0.0)


def test_leases_that_are_overdue_together_are_ended_in_pieces(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_trio._core.index.index.EXPIRED_AT_ONCE", 6)
    w = world(8, lease_share=1.0)
    w.store("abc")
    for session in range(10, 15):
        assert w.index.lease(("e", session), (w.name,), w.digests("abc"), 0.0) is not None
    due = [(w.index.expire(31.0), w.held["leases"]) for _ in range(3)]
    assert due == [(30.0, 3), (30.0, 1), (float("inf"), 0)]


# --- write_share: the bytes that one engine may be writing ------------------------------------------------------------


def test_an_engine_that_never_commits_leaves_the_others_their_share(world: Make) -> None:
    w = world(16, write_share=0.5)
    for chain in ("abcdefghijkl", "mnop", "q"):
        w.reserve(chain, engine="hangs")
    assert w.dropped == {"share": 9}
    assert (w.held["chunks_writing"], w.index.bytes_written_by("hangs")) == (8, 8 * 4096)
    got = w.reserve("ABCD", engine="other", worker=2)
    assert len(w.index.commit(got.id, 2)) == 4


def test_engines_that_never_commit_leave_a_part_however_many_they_are(world: Make) -> None:
    w = world(64, write_share=0.5)
    slots = [len(w.reserve(engine * 60, engine=engine, worker=i).slots) for i, engine in enumerate("abcdfg")]
    assert slots == [32, 16, 8, 4, 2, 1]
    assert len(w.store("xyz").slots) == 1


def test_an_aborted_chunk_counts_for_the_share_until_its_copy_has_ended(world: Make) -> None:
    w = world(8, write_share=0.5, reservation_timeout=60.0)
    made = w.reserve("abcd")
    w.index.expire(61.0)
    assert w.index.overdue_writers() == [1]
    assert w.index.overdue_writers() == []
    assert w.reserve("x").dropped == {"share": 1}
    w.index.abort(made.id, 1)
    assert w.index.bytes_written_by("e") == 0
    assert len(w.reserve("wxyz").slots) == 4


def test_chunks_that_wait_for_a_shard_that_never_comes_count_until_they_are_given_up(world: Make) -> None:
    w = world(16, shards=2, write_share=0.5, reservation_timeout=60.0)
    for chain in ("ab", "cd", "ef"):
        made = w.reserve(chain)
        if made.id:
            w.index.commit(made.id, 1)
    assert w.dropped == {"share": 2}
    w.index.expire(61.0)
    assert len(w.reserve("ef").slots) == 2


def test_workers_of_one_engine_are_charged_once_for_the_chunk_that_they_share(world: Make) -> None:
    w = world(16, shards=4, write_share=0.5)
    made = [w.reserve("ab", shard=shard, worker=shard) for shard in range(4)]
    assert [len(reservation.slots) for reservation in made] == [2, 2, 2, 2]
    assert w.index.bytes_written_by("e") == 2 * 4 * 4096
    for worker, reservation in enumerate(made):
        w.index.commit(reservation.id, worker)
    assert w.index.bytes_written_by("e") == 0


def test_one_engine_may_fill_all_of_the_arena_a_share_at_one_time(world: Make) -> None:
    w = world(8, write_share=0.5)
    w.store("abcd")
    w.store("abcdefgh", known=4)
    assert (w.hits("abcdefgh"), w.dropped, w.arena.free_bytes) == (8, {}, 0)


def test_one_chunk_is_within_every_share_and_one_larger_than_the_arena_is_said_to_be_so(world: Make) -> None:
    w = world(1, write_share=0.1)
    assert w.store("ab").dropped == {"share": 1}
    w.index.attach(b"L" * 32, [3 * 4096])
    w.reserve("x")
    got = w.index.reserve(("e", 1), 1, 0, b"L" * 32, b"", join_digests(w.digests("a")), 0.0)
    assert got.dropped == {"too_large": 1}


def test_a_load_of_the_server_counts_for_the_share_of_no_engine(world: Make) -> None:
    w = world(8, write_share=0.5)
    for chain in ("a", "b", "c", "d", "e", "f"):
        assert w.index.reserve_load(w.name, b"", w.digests(chain)[0], 0.0) is not None


def test_a_reset_leaves_a_chunk_being_written_charged_until_its_copy_has_ended(world: Make) -> None:
    w = world(8, write_share=0.5)
    made = w.reserve("abcd")
    w.index.reset(w.name)
    assert w.reserve("x").dropped == {"share": 1}
    with pytest.raises(Gone):
        w.index.commit(made.id, 1)
    assert w.reserve("x").slots
