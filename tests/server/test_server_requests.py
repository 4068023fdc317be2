"""What a server answers: lookups, stores, retrieves, sessions, engines; each rule by its words."""

from typing import Any

import attrs
import pytest
import trio
import trio.testing
from support.server import SHARD, Opener, Peer, Rig, digests, error_of

from lmcache_trio._core.keys import DEFAULT_CHUNK_TOKENS, layout_of
from lmcache_trio._transport import dial_pair, introduce
from lmcache_trio._wire.codec import OFFSETS, POSITIONS, decode, encode
from lmcache_trio._wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    Answer,
    AnswerState,
    Commit,
    Committed,
    CopiesEnded,
    Done,
    ErrorKind,
    ErrorReply,
    Finished,
    Hello,
    Identify,
    Lookup,
    LookupStatus,
    NamespaceKnown,
    Ping,
    Pinned,
    Pong,
    Refused,
    Register,
    Release,
    Reserve,
    Reset,
    Retrieve,
    Role,
    Statistics,
    StatisticsReply,
    Welcome,
)


async def test_a_chunk_that_one_engine_stored_is_a_hit_for_an_equal_engine(rig: Rig) -> None:
    scheduler, worker = await rig.engine("one")
    await rig.stored(scheduler, worker, 1, digests(4))
    other, its_worker = await rig.engine("other")
    answer = await other.lookup(9, digests(6))
    assert (answer.state, answer.chunks, answer.asked) == (AnswerState.ANSWERED, 4, answer.id)
    pinned = await its_worker.get(Pinned, Retrieve, answer.lease, 1, 3)
    offsets = OFFSETS.unpack(pinned.offsets)
    assert len(set(offsets)) == 3
    assert all(offset % 4096 == 0 and offset >= 4096 for offset in offsets)
    assert (await its_worker.get(Finished, Done, pinned.pin)).valid
    assert (await its_worker.get(Finished, Done, pinned.pin)).valid is False


async def test_until_all_workers_registered_every_lookup_is_a_miss_and_every_store_is_dropped(rig: Rig) -> None:
    scheduler = await rig.scheduler(shards=2)
    first, second = await rig.worker(shard=0, shards=2), await rig.worker(shard=1, shards=2)
    assert await first.register() == b""
    assert (await scheduler.lookup(1, digests(2))).chunks == 0
    reserved = await first.reserve(1, digests(2))
    assert (reserved.reservation, reserved.dropped) == (b"", {"no_namespace": 2})
    namespace = await second.register()
    assert len(namespace) == 32
    for peer in (scheduler, first):
        assert (await peer.pushed(NamespaceKnown)).namespace == namespace
    counted = rig.counted()
    assert (counted["hits"], counted["misses"], counted["drops"]["no_namespace"]) == (0, 2, 2)


async def test_a_chunk_is_ready_when_both_shards_are_committed(rig: Rig) -> None:
    scheduler = await rig.scheduler(shards=2)
    workers = [await rig.worker(shard=shard, shards=2) for shard in range(2)]
    for worker in workers:
        await worker.register()
    await scheduler.lookup(1, digests(2))
    made = [await worker.reserve(1, digests(2)) for worker in workers]
    assert [POSITIONS.unpack(m.positions) for m in made] == [(0, 1), (0, 1)]
    first = await workers[0].get(Committed, Commit, made[0].reservation)
    assert (first.published, first.kept) == (0, 2)
    assert (await scheduler.lookup(2, digests(2))).chunks == 0
    second = await workers[1].get(Committed, Commit, made[1].reservation)
    assert (second.published, second.kept) == (2, 2)
    assert (await scheduler.lookup(2, digests(2))).chunks == 2


async def test_a_scheduler_whose_namespace_has_other_lengths_is_refused_and_the_server_goes_on(rig: Rig) -> None:
    """A fingerprint does not tell two layouts apart: under one identity they would be one namespace."""
    hello = Hello(PROTOCOL_VERSION, "test", b"t" * 16, Role.SCHEDULER, "one", identity=b"m" * 32)
    admitted = decode(await introduce(rig.server.address, encode(hello)))
    assert isinstance(admitted, Welcome)
    scheduler = Peer(admitted, await dial_pair(admitted.address), b"t" * 16)
    worker, other = await rig.worker("one"), await rig.worker("other")
    await worker.register()
    await other.register(shard_bytes=2 * SHARD)
    await rig.stored(scheduler, worker, 1, digests(2))
    refused = decode(await introduce(rig.server.address, encode(attrs.evolve(hello, engine="other", token=b"u" * 16))))
    assert isinstance(refused, Refused)
    assert refused.kind is ErrorKind.MISUSE
    assert "a fingerprint must tell" in refused.reason
    nameless = await rig.scheduler("other")
    assert error_of(await nameless.ask(Identify, b"m" * 32)).kind is ErrorKind.MISUSE
    assert (await nameless.lookup(1, digests(2))).chunks == 0
    assert (await scheduler.lookup(2, digests(2))).chunks == 2


async def test_shards_of_two_sessions_never_make_one_chunk(rig: Rig) -> None:
    """A rank that fails to load has the others' stores of that step be wrong, and says so by ending the session."""
    scheduler = await rig.scheduler(shards=2)
    first, second = [await rig.worker(shard=shard, shards=2) for shard in range(2)]
    for worker in (first, second):
        await worker.register()
    await scheduler.lookup(1, digests(2))
    wrong = await second.reserve(1, digests(2))
    assert await second.commit(wrong.reservation) == 0
    await scheduler.end(1)
    assert (await scheduler.lookup(2, digests(2))).chunks == 0
    made = await first.reserve(2, digests(2))
    assert POSITIONS.unpack(made.positions) == (0, 1)
    assert await first.commit(made.reservation) == 0
    assert (await scheduler.lookup(3, digests(2))).chunks == 0
    late = await second.reserve(1, digests(2))
    assert (late.reservation, late.dropped) == (b"", {"writing": 2})
    again = await second.reserve(2, digests(2))
    assert await second.commit(again.reservation) == 2
    assert (await scheduler.lookup(3, digests(2))).chunks == 2


async def test_the_shards_of_a_session_that_has_ended_are_joined(rig: Rig) -> None:
    """A submitted store outlives its session; with it, the stores of other sessions wait."""
    scheduler = await rig.scheduler(shards=2)
    first, second = [await rig.worker(shard=shard, shards=2) for shard in range(2)]
    for worker in (first, second):
        await worker.register()
    await scheduler.lookup(1, digests(2))
    under_way = await first.reserve(1, digests(2))
    await scheduler.end(1)
    await scheduler.lookup(2, digests(2))
    assert (await second.reserve(2, digests(2))).dropped == {"writing": 2}
    made = await second.reserve(1, digests(2))
    assert await second.commit(made.reservation) == 0
    assert await first.commit(under_way.reservation) == 2
    assert (await scheduler.lookup(3, digests(2))).chunks == 2


async def test_a_worker_that_registers_again_with_another_layout_changes_the_namespace(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await rig.stored(scheduler, worker, 1, digests(2))
    former = (await scheduler.pushed(NamespaceKnown)).namespace
    assert await worker.register(fingerprint=b"g" * 32) != former
    assert (await scheduler.pushed(NamespaceKnown)).namespace != former
    assert (await scheduler.lookup(2, digests(2))).chunks == 0


async def test_one_fingerprint_with_two_lengths_is_misuse_and_changes_nothing(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    _, other = await rig.scheduler("other"), await rig.worker("other")
    error = error_of(await other.ask(Register, b"f" * 32, 4096, 16))
    assert error.kind is ErrorKind.MISUSE
    await rig.stored(scheduler, worker, 1, digests(1))


async def test_a_block_size_that_does_not_divide_the_chunk_is_refused_naming_both(rig: Rig) -> None:
    worker = await rig.worker()
    error = error_of(await worker.ask(Register, b"f" * 32, 4096, 48))
    assert error.kind is ErrorKind.MISUSE
    assert "128" in error.message
    assert "48" in error.message


async def test_the_status_of_a_lookup_is_idempotent_and_unknown_is_told_from_ended(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await rig.stored(scheduler, worker, 1, digests(3))
    assert (await scheduler.get(Answer, LookupStatus, 1)).state is AnswerState.UNKNOWN
    answer = await scheduler.lookup(2, digests(3))
    for _ in range(3):
        status = await scheduler.get(Answer, LookupStatus, 2)
        assert (status.state, status.chunks, status.lease, status.asked) == (
            AnswerState.ANSWERED,
            3,
            answer.lease,
            answer.id,
        )
    await scheduler.end(2)
    assert (await scheduler.get(Answer, LookupStatus, 2)).state is AnswerState.UNKNOWN


async def test_a_digest_is_sent_once_and_a_growing_request_extends_its_chain(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await rig.stored(scheduler, worker, 1, digests(5))
    assert (await scheduler.lookup(2, digests(5)[:2])).chunks == 2
    again = await scheduler.get(Answer, Lookup, 2, 2, b"", 2)
    assert again.chunks == 2
    assert (await scheduler.lookup(2, digests(5)[2:], start=2)).chunks == 5
    assert rig.held("leases", "sessions") == {"leases": 1, "sessions": 1}


async def test_a_lookup_that_leaves_a_gap_in_the_chain_is_misuse_and_leaves_the_answer(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await rig.stored(scheduler, worker, 1, digests(2))
    answer = await scheduler.lookup(2, digests(2))
    for start, upto in ((3, 3), (2, 4)):
        assert error_of(await scheduler.ask(Lookup, 2, start, b"", upto)).kind is ErrorKind.MISUSE
    assert (await scheduler.get(Answer, LookupStatus, 2)).lease == answer.lease


async def test_a_reused_session_number_starts_afresh(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await rig.stored(scheduler, worker, 1, digests(2))
    assert (await scheduler.lookup(1, digests(2, "other"))).chunks == 0


async def test_release_ends_the_lease_and_keeps_the_chain(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await rig.stored(scheduler, worker, 1, digests(2))
    await scheduler.lookup(2, digests(2))
    await scheduler.tell(Release(2))
    assert (await scheduler.get(Answer, LookupStatus, 2)).state is AnswerState.UNKNOWN
    assert rig.held("leases", "sessions") == {"leases": 0, "sessions": 1}
    assert (await scheduler.get(Answer, Lookup, 2, 2, b"", 2)).chunks == 2


async def test_an_answer_whose_lease_ran_out_reads_as_zero_chunks(
    rigs: Opener, autojump_clock: trio.testing.MockClock
) -> None:
    async with rigs(lease_timeout=10.0) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(2))
        answer = await scheduler.lookup(2, digests(2))
        assert answer.ttl_ms == 10_000
        await trio.sleep(10.5)
        assert rig.held("leases", "sessions") == {"leases": 0, "sessions": 1}
        status = await scheduler.get(Answer, LookupStatus, 2)
        assert (status.state, status.chunks, status.lease) == (AnswerState.ANSWERED, 0, b"")


async def test_a_reservation_that_is_not_committed_in_time_is_dropped_and_its_late_commit_refused(
    rigs: Opener, autojump_clock: trio.testing.MockClock
) -> None:
    async with rigs(reservation_timeout=10.0) as rig:
        scheduler, worker = await rig.engine()
        await scheduler.lookup(1, digests(2))
        made = await worker.reserve(1, digests(2))
        await trio.sleep(10.5)
        assert rig.held("slots_writing", "slots_quarantined") == {"slots_writing": 0, "slots_quarantined": 2}
        assert await worker.commit(made.reservation) == 0
        assert rig.held("slots_quarantined") == {"slots_quarantined": 0}
        assert (await scheduler.lookup(2, digests(2))).chunks == 0


async def test_a_store_goes_on_after_the_end_of_its_session_whether_it_has_its_slots_yet_or_not(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await scheduler.lookup(1, digests(4))
    made = await worker.reserve(1, digests(2))
    await scheduler.end(1)
    await scheduler.get(Pong, Ping)
    assert rig.held("slots_writing", "sessions") == {"slots_writing": 2, "sessions": 0}
    late = await worker.reserve(1, digests(4)[2:], parent=digests(4)[1])
    assert (await worker.commit(made.reservation), await worker.commit(late.reservation)) == (2, 2)
    assert (await scheduler.lookup(2, digests(4))).chunks == 4
    assert rig.held("reservations", "slots_quarantined") == {"reservations": 0, "slots_quarantined": 0}


async def test_a_reset_bars_the_stores_of_sessions_that_had_ended_too(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await scheduler.lookup(1, digests(1))
    await scheduler.end(1)
    await scheduler.get(Ack, Reset)
    assert (await worker.reserve(1, digests(1))).dropped == {"reset": 1}
    await scheduler.lookup(1, digests(1))  # the number again is another session
    assert (await worker.reserve(1, digests(1))).reservation


async def test_a_reset_while_a_worker_is_away_is_carried_out_before_anything_is_served(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await rig.stored(scheduler, worker, 1, digests(2))
    worker.connection.close()
    await rig.until(connections=1)
    await scheduler.get(Ack, Reset)
    assert await (await rig.worker(token=worker.token)).register()
    assert (await scheduler.lookup(2, digests(2))).chunks == 0
    assert rig.held("slots_ready") == {"slots_ready": 0}


async def test_a_reset_drops_the_layouts_that_it_names_and_the_next_one(rig: Rig) -> None:
    """Whichever of them the engine comes back with first."""
    scheduler, worker = await rig.engine()
    other = b"o" * 32
    await rig.stored(scheduler, worker, 1, digests(2))
    layout = (await scheduler.pushed(NamespaceKnown)).layout
    assert len(layout) == 32
    assert await worker.register(other)
    assert (await scheduler.pushed(NamespaceKnown)).layout == layout_of([other], DEFAULT_CHUNK_TOKENS)
    await rig.stored(scheduler, worker, 2, digests(2))
    worker.connection.close()
    await rig.until(connections=1)
    assert (await scheduler.pushed(NamespaceKnown)).layout == b""
    await scheduler.get(Ack, Reset, b"", layout)
    assert rig.held("chunks_ready") == {"chunks_ready": 2}  # the next layout's may be any
    again = await rig.worker(token=worker.token)
    assert await again.register(other)
    assert (await scheduler.lookup(3, digests(2))).chunks == 0
    assert rig.counted()["resets"] == 2
    assert await again.register()
    assert (await scheduler.lookup(4, digests(2))).chunks == 0
    await rig.stored(scheduler, again, 5, digests(2))
    assert await again.register(other)
    assert await again.register()
    assert (await scheduler.lookup(6, digests(2))).chunks == 2, "it was carried out once"


@pytest.mark.parametrize("known", [False, True], ids=["no layout is known", "another layout is known"])
async def test_a_reset_that_names_no_layout_is_carried_out_in_each_that_the_engine_comes_to(
    rig: Rig, known: bool
) -> None:
    """Its scheduler was never told of one, so it may be of any of them."""
    scheduler, worker = await rig.engine()
    other = b"o" * 32
    await rig.stored(scheduler, worker, 1, digests(2))
    if known:
        assert await worker.register(other)
    else:
        worker.connection.close()
        await rig.until(connections=1)
        worker = await rig.worker(token=worker.token)
    await scheduler.get(Ack, Reset)
    assert await worker.register(other)
    assert (await scheduler.lookup(2, digests(2))).chunks == 0
    await rig.stored(scheduler, worker, 3, digests(1))
    assert await worker.register()
    assert (await scheduler.lookup(4, digests(2))).chunks == 0
    await rig.stored(scheduler, worker, 5, digests(1))
    for fingerprint in (other, b"f" * 32):
        assert await worker.register(fingerprint)
        assert (await scheduler.lookup(6, digests(2))).chunks == 1, "it was carried out once"


async def test_a_reset_that_names_no_layout_stays_due_however_many_layouts_come(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await rig.stored(scheduler, worker, 1, digests(2))
    assert await worker.register(b"o" * 32)
    await scheduler.get(Ack, Reset)
    for number in range(40):
        assert await worker.register(b"%032d" % number)
    assert await worker.register()
    assert (await scheduler.lookup(2, digests(2))).chunks == 0


async def test_more_resets_without_a_layout_than_are_kept_are_refused_by_name(rig: Rig) -> None:
    scheduler, _ = await rig.engine()
    for number in range(64):
        await scheduler.get(Ack, Reset, b"%d" % number)
    await scheduler.get(Ack, Reset, b"0")
    assert "name its layouts" in (await scheduler.get(ErrorReply, Reset, b"64")).message
    layout = (await scheduler.pushed(NamespaceKnown)).layout
    await scheduler.get(Ack, Reset, b"64", layout)


async def test_a_store_for_a_session_that_was_never_opened_is_dropped_and_counted(rig: Rig) -> None:
    _, worker = await rig.engine()
    assert (await worker.reserve(5, digests(3))).dropped == {"no_session": 3}
    assert rig.counted()["drops"]["no_session"] == 3


async def test_a_lost_scheduler_ends_its_sessions_and_leases_while_pins_of_workers_live_on(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await rig.stored(scheduler, worker, 1, digests(2))
    answer = await scheduler.lookup(2, digests(2))
    pinned = await worker.get(Pinned, Retrieve, answer.lease, 0, 2)
    scheduler.connection.close()
    await rig.until(connections=1, sessions=0, leases=0)
    assert rig.held("pins") == {"pins": 1}
    assert (await worker.get(Finished, Done, pinned.pin)).valid


async def test_a_lost_workers_pins_end_and_its_engine_has_no_namespace_until_it_is_back(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await rig.stored(scheduler, worker, 1, digests(2))
    namespace = (await scheduler.pushed(NamespaceKnown)).namespace
    answer = await scheduler.lookup(2, digests(2))
    await worker.get(Pinned, Retrieve, answer.lease, 0, 2)
    worker.connection.close()
    await rig.until(connections=1, pins=0)
    assert (await scheduler.pushed(NamespaceKnown)).namespace == b""
    assert (await scheduler.lookup(3, digests(2))).chunks == 0
    again = await rig.worker(token=worker.token)
    assert await again.register() == namespace
    assert (await scheduler.lookup(4, digests(2))).chunks == 2


async def test_slots_of_a_lost_writer_wait_for_its_word_after_a_reconnect(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await scheduler.lookup(1, digests(2))
    await worker.reserve(1, digests(2))
    worker.connection.close()
    await rig.until(connections=1, lost_writers=1)
    assert rig.held("slots_quarantined") == {"slots_quarantined": 2}
    stranger = await rig.worker("other")
    assert error_of(await stranger.ask(CopiesEnded, worker.token)).kind is ErrorKind.MISUSE
    assert rig.held("lost_writers") == {"lost_writers": 1}
    again = await rig.worker(token=worker.token)
    await again.get(Ack, CopiesEnded, worker.token)
    await rig.until(lost_writers=0, slots_quarantined=0, reservations=0)


async def test_a_lease_of_another_engine_cannot_be_used(rig: Rig) -> None:
    scheduler, worker = await rig.engine("one")
    await rig.stored(scheduler, worker, 1, digests(2))
    answer = await scheduler.lookup(2, digests(2))
    _, other = await rig.engine("other")
    assert error_of(await other.ask(Retrieve, answer.lease, 0, 2)).kind in (ErrorKind.GONE, ErrorKind.MISUSE)
    assert rig.held("pins") == {"pins": 0}
    assert len(answer.lease) == 16


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (Retrieve, (b"x" * 16, 0, 1)),
        (Commit, (b"x" * 16,)),
    ],
)
async def test_an_unknown_id_gets_an_error_reply(rig: Rig, cls: Any, arguments: Any) -> None:
    _, worker = await rig.engine()
    assert error_of(await worker.ask(cls, *arguments)).kind is ErrorKind.GONE
    await worker.get(Pong, Ping)


async def test_each_role_may_send_its_own_messages_only(rig: Rig) -> None:
    scheduler, worker, observer = await rig.scheduler(), await rig.worker(), await rig.observer()
    for peer, cls, arguments in (
        (scheduler, Reserve, (1, b"", b"")),
        (scheduler, Register, (b"f", 1, 1)),
        (worker, Lookup, (1, 0, b"", 0)),
        (worker, Reset, ()),
        (observer, LookupStatus, (1,)),
        (observer, Retrieve, (b"", 0, 1)),
    ):
        error = error_of(await peer.ask(cls, *arguments))
        assert error.kind is ErrorKind.MISUSE
        assert cls.__name__ in error.message
    for peer in (scheduler, worker, observer):
        assert isinstance(await peer.ask(Statistics), StatisticsReply)


async def test_reset_drops_the_namespace_and_answers_given_under_it_read_as_zero(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await rig.stored(scheduler, worker, 1, digests(3))
    answer = await scheduler.lookup(2, digests(3))
    pinned = await worker.get(Pinned, Retrieve, answer.lease, 0, 3)
    made = await worker.reserve(2, digests(1, "more"), parent=digests(3)[2])
    assert made.reservation
    await scheduler.get(Ack, Reset)
    assert (await scheduler.get(Answer, LookupStatus, 2)).chunks == 0
    assert (await worker.get(Finished, Done, pinned.pin)).valid is False
    assert await worker.commit(made.reservation) == 0
    assert (await scheduler.lookup(3, digests(3))).chunks == 0
    held = rig.held("slots_ready", "slots_writing", "slots_quarantined", "bytes_ready")
    assert set(held.values()) == {0}


async def test_statistics_over_the_wire_are_one_json_object_with_all_parts(rig: Rig) -> None:
    import json

    observer = await rig.observer()
    found = json.loads((await observer.get(StatisticsReply, Statistics)).json)
    assert set(found) == {"server", "faults", "held", "counted", "rates", "tiers"}
    told = json.loads(json.dumps(rig.server.statistics()))
    assert told["server"].pop("uptime") >= found["server"].pop("uptime") > 0
    assert found == told
    assert found["held"]["connections"] == 1
    # the clock, the device's, the watches', the front door, a connection's reader and its writer
    assert found["held"]["tasks"] == 6
