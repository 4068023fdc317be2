"""Why lookups missed, as a server tells it: each reason is provoked, and is counted in tokens."""

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from support.server import SHARD, HeapConfig, Opener, Peer, Rig, digests
from support.tiers import LoopTier, open_world

from lmcache_trio import ConfigError
from lmcache_trio._core.groups import Group, Need
from lmcache_trio._server import records
from lmcache_trio._server.records import RecordFile
from lmcache_trio._server.requests import MOST, TOLD
from lmcache_trio._wire.messages import Ack, Answer, Explain, Explained, Identify, Lookup, Reset
from lmcache_trio.config import Http, Records

TOKENS = 128  # of a chunk


def missed(rig: Rig) -> dict[str, int]:
    """Missed chunks by reason, without those that none was missed for."""
    told = rig.counted()
    chunks = {reason: tokens // TOKENS for reason, tokens in told["missed_tokens"].items() if tokens}
    assert sum(told["missed_tokens"].values()) + sum(told["hit_tokens"].values()) == told["requested_tokens"]
    assert sum(chunks.values()) == told["misses"]
    return chunks


async def explained(rig: Rig, request: str = "") -> list[dict[str, Any]]:
    """What an observer is told of *request*."""
    observer = await rig.observer()
    return list(json.loads((await observer.get(Explained, Explain, request)).json)["requests"])


async def asked(scheduler: Peer, session: int, names: list[bytes]) -> int:
    """A lookup and the end of its request, which is named by its session. Returns the length of its hit."""
    found = await scheduler.get(Answer, Lookup, session, 0, b"".join(names), len(names), -1, f"request {session}")
    await scheduler.end(session)
    return found.chunks


async def test_a_prompt_that_no_engine_stored_was_never_stored(rigs: Opener) -> None:
    async with rigs() as rig:
        scheduler, _ = await rig.engine()
        assert await asked(scheduler, 1, digests(3)) == 0
        assert missed(rig) == {"never_stored": 3}


async def test_of_a_longer_prompt_only_the_tail_is_new(rigs: Opener) -> None:
    async with rigs() as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(3))
        assert await asked(scheduler, 2, digests(3) + digests(2, "new")) == 3
        assert missed(rig) == {"never_stored": 3, "new_tail": 2}


async def test_what_was_evicted_is_told_from_what_is_new(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=4 * SHARD), write_share=1.0) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(4, "old"))
        await rig.stored(scheduler, worker, 2, digests(2, "new"))
        before = missed(rig)
        assert await asked(scheduler, 3, digests(4, "old") + digests(1, "tail")) == 2
        assert missed(rig) == {**before, "evicted": 2, "new_tail": 1}


async def test_what_another_engine_is_storing_is_no_hit_yet(rigs: Opener) -> None:
    async with rigs() as rig:
        (scheduler, worker), (other, _) = await rig.engine(), await rig.engine("other")
        await scheduler.lookup(1, digests(3))
        assert (await worker.reserve(1, digests(3))).reservation
        assert await asked(other, 1, digests(4)) == 0
        assert missed(rig) == {"never_stored": 3, "writing": 3, "new_tail": 1}


async def test_leases_beyond_their_share_shorten_a_hit(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=8 * SHARD), lease_share=0.5, write_share=1.0) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(6))
        before = missed(rig)
        assert await asked(scheduler, 2, digests(6) + digests(1, "tail")) == 4
        assert missed(rig) == {**before, "lease_share": 2, "new_tail": 1}


async def test_a_store_that_got_no_slot_was_not_admitted(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=4 * SHARD), lease_share=1.0, write_share=1.0) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(3))
        assert (await scheduler.lookup(2, digests(3))).chunks == 3  # and keeps them
        await scheduler.lookup(3, digests(3, "other"))
        made = await worker.reserve(3, digests(3, "other"))
        assert dict(made.dropped) == {"no_space": 2}
        await worker.commit(made.reservation)
        await scheduler.end(3)
        before = missed(rig)
        assert await asked(scheduler, 4, digests(3, "other")) == 1
        assert missed(rig) == {**before, "not_admitted": 2}


async def test_an_engine_without_all_its_workers_is_not_registered(rigs: Opener) -> None:
    async with rigs() as rig:
        scheduler = await rig.scheduler()
        assert await asked(scheduler, 1, digests(3)) == 0
        assert missed(rig) == {"not_registered": 3}


async def test_a_chunk_that_memory_cannot_hold_is_too_large(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=4 * SHARD)) as rig:
        scheduler, worker = await rig.scheduler(), await rig.worker()
        await worker.register(shard_bytes=5 * SHARD)
        assert await asked(scheduler, 1, digests(3)) == 0
        assert missed(rig) == {"too_large": 3}


async def test_after_a_reset_prompts_miss_by_it_until_as_much_is_stored_again(rigs: Opener) -> None:
    async with rigs() as rig:
        (scheduler, worker), (other, _) = await rig.engine(), await rig.engine("other")
        await rig.stored(scheduler, worker, 1, digests(3))
        await scheduler.get(Ack, Reset)
        before = missed(rig)
        for peer in (scheduler, other):  # which share the chunks
            assert await asked(peer, 2, digests(3)) == 0
        assert missed(rig) == {**before, "reset": 6}
        await scheduler.get(Ack, Identify, b"i" * 32)  # as adapters do after a reset
        await rig.stored(scheduler, worker, 3, digests(3, "again"))
        assert missed(rig) == {**before, "reset": 9}
        assert await asked(scheduler, 4, digests(2, "more")) == 0
        assert missed(rig) == {**before, "reset": 9, "never_stored": before["never_stored"] + 2}


async def test_a_state_that_was_evicted_is_the_reason_though_all_tokens_are_there(rigs: Opener) -> None:
    groups = (Group(block_tokens=16), Group(Need.STATE, 0, 16))
    named: dict[str, Any] = {"groups": groups, "block_tokens": 16, "chunk_tokens": 128}
    async with rigs(HeapConfig(size=6 * SHARD), write_share=1.0) as rig:
        scheduler, worker = await rig.scheduler(**named), await rig.worker(**named)
        assert await worker.register(shard_bytes=2 * SHARD, part_bytes=(SHARD, SHARD))
        await scheduler.lookup(1, digests(3))
        for group in (1, 0):
            made = await worker.reserve(1, digests(3), group=group)
            assert await worker.commit(made.reservation) == 3
        await scheduler.end(1)
        await scheduler.lookup(2, digests(1, "other"))  # evicts the states of the first two chunks, which are cold
        for group in (1, 0):
            made = await worker.reserve(2, digests(1, "other"), group=group)
            assert await worker.commit(made.reservation) == 1
        await scheduler.end(2)
        before = missed(rig)
        assert await asked(scheduler, 3, digests(2)) == 0
        assert missed(rig) == {**before, "evicted": 2}


# --- tiers ------------------------------------------------------------------------------------------------------------


async def test_what_a_tier_does_not_bring_in_time_is_late_and_the_rest_is_new(
    autojump_clock: trio.testing.MockClock,
) -> None:
    tier = LoopTier()
    async with open_world(tier) as world:
        tier.fill(world.namespace, digests(4))
        tier.stall("load")
        assert (await world.lookup(1, digests(6), budget_ms=250)).chunks == 0
        assert missed(world.rig) == {"late": 4, "new_tail": 2}


async def test_a_lookup_that_leaves_tiers_no_time_is_late_for_what_memory_had(
    autojump_clock: trio.testing.MockClock,
) -> None:
    tier = LoopTier()
    async with open_world(tier, size=4 * SHARD, write_share=1.0) as world:
        await world.store(1, digests(4, "old"))
        await world.settled()
        await world.store(2, digests(2, "new"))
        await world.settled()
        before = missed(world.rig)
        assert (await world.lookup(3, digests(4, "old"), budget_ms=0)).chunks == 2
        assert missed(world.rig) == {**before, "late": before.get("late", 0) + 2}


async def test_what_a_fenced_tier_may_have_is_missed_for_it() -> None:
    tier = LoopTier()
    async with open_world(tier, size=4 * SHARD, write_share=1.0) as world:
        await world.store(1, digests(4, "old"))
        await world.settled()
        await world.store(2, digests(2, "new"))
        await world.settled()
        tier.failing = {"contains": OSError("gone"), "open": OSError("gone")}
        await world.lookup(3, digests(1, "probe"))
        before = missed(world.rig)
        assert (await world.lookup(4, digests(4, "old") + digests(1, "tail"))).chunks == 2
        assert (await world.lookup(5, digests(2, "unknown"))).chunks == 0
        assert missed(world.rig) == {
            **before,
            "tier_fenced": before.get("tier_fenced", 0) + 4,
            "new_tail": before.get("new_tail", 0) + 1,
        }


async def test_what_a_tier_did_not_take_was_not_admitted() -> None:
    class Full(LoopTier):
        async def store(self, records: Any) -> list[bool]:
            return [False] * len(records)

    async with open_world(Full(), size=4 * SHARD, write_share=1.0) as world:
        await world.store(1, digests(4, "old"))
        await world.settled()
        await world.store(2, digests(2, "new"))
        await world.settled()
        before = missed(world.rig)
        assert (await world.lookup(3, digests(4, "old"))).chunks == 2
        assert missed(world.rig) == {**before, "not_admitted": 2}


async def test_what_a_tier_lost_since_was_evicted() -> None:
    tier = LoopTier()
    async with open_world(tier, size=8 * SHARD, write_share=1.0) as world:
        await world.store(1, digests(4, "old"))
        await world.settled()
        await world.store(2, digests(6, "new"))
        await world.settled()
        tier.chunks.clear()
        before = missed(world.rig)
        assert (await world.lookup(3, digests(4, "old") + digests(2, "tail"))).chunks == 2
        assert missed(world.rig) == {**before, "evicted": 2, "new_tail": 2}


async def test_what_a_tier_has_and_no_lease_may_have_is_missed_for_the_share() -> None:
    tier = LoopTier()
    async with open_world(tier, size=8 * SHARD, lease_share=0.5, write_share=1.0) as world:
        tier.fill(world.namespace, digests(6))
        assert (await world.lookup(1, digests(6))).chunks == 4
        assert missed(world.rig) == {"lease_share": 2}


# --- ends -------------------------------------------------------------------------------------------------------------


async def test_a_server_that_ends_says_so(rigs: Opener) -> None:
    async with rigs(grace=30.0) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(3))
        before = missed(rig)
        rig.server._parts.drain.stopping = True
        assert await asked(scheduler, 2, digests(3)) == 0
        assert missed(rig) == {**before, "stopping": 3}


async def test_a_lookup_that_hits_whole_counts_no_miss(rigs: Opener) -> None:
    async with rigs() as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(3))
        before = missed(rig)
        assert await asked(scheduler, 2, digests(3)) == 3
        assert (await scheduler.get(Answer, Lookup, 3, 0, b"", 0)).chunks == 0  # which asks for nothing
        assert missed(rig) == before


async def test_a_lookup_under_cancellation_counts_nothing() -> None:
    tier = LoopTier()
    async with open_world(tier) as world:
        tier.fill(world.namespace, digests(4))
        tier.stall("load")
        await world.ask(1, digests(4))
        await world.scheduler.end(1)
        await world.settled()
        assert missed(world.rig) == {}


# --- recent requests --------------------------------------------------------------------------------------------------


async def test_a_request_that_missed_is_explained_by_its_name(
    rigs: Opener, autojump_clock: trio.testing.MockClock
) -> None:
    async with rigs(HeapConfig(size=4 * SHARD), write_share=1.0) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(4, "old"))
        await trio.sleep(60)
        await rig.stored(scheduler, worker, 2, digests(2, "new"))
        await trio.sleep(10)
        assert await asked(scheduler, 3, digests(4, "old") + digests(1, "tail")) == 2
        (told,) = await explained(rig, "request 3")
        assert await explained(rig, "no such request") == []
        assert [record["request"] for record in await explained(rig)] == ["request 3", "", ""]
    evicted, tail = told.pop("missed_tokens")
    assert evicted.pop("evicted_seconds_ago") == pytest.approx(10)
    assert evicted.pop("idle_seconds") == 0.0  # it was used later than the mark before
    assert evicted == {"reason": "evicted", "from_token": 256, "tokens": 256}
    assert tail == {"reason": "new_tail", "from_token": 512, "tokens": 128}
    assert told.pop("time") > 1.7e9
    assert told == {
        "request": "request 3",
        "engine": "engine",
        "tokens": 640,
        "hit_tokens": {"memory": 256, "tier": 0},
        "wait_seconds": 0.0,
        "bytes": 2 * SHARD,
    }


async def test_what_else_there_is_to_tell_of_a_miss_is_told() -> None:
    tier = LoopTier()
    async with open_world(tier) as world:
        scheduler = await world.rig.scheduler("other")
        await asked(scheduler, 1, digests(1))
        tier.failing = {"contains": OSError("gone"), "open": OSError("gone")}
        await world.lookup(2, digests(1, "probe"))
        await world.lookup(3, digests(1))
        fenced, _, alone = [record["missed_tokens"][0]["detail"] for record in await explained(world.rig)]
    assert alone == "workers [0] of 1 have not registered"
    assert fenced == "the tier 0:LoopTier is fenced: bug: OSError('gone')"


async def test_the_wait_for_a_tier_is_told_and_what_it_brought(autojump_clock: trio.testing.MockClock) -> None:
    tier = LoopTier()
    async with open_world(tier) as world:
        tier.fill(world.namespace, digests(2))
        await world.lookup(1, digests(3))
        tier.stall("contains")
        await world.lookup(2, digests(1, "late"), budget_ms=500)
        late, first = await explained(world.rig)
    assert first["hit_tokens"] == {"memory": 0, "tier": 256}
    assert late["wait_seconds"] == pytest.approx(0.5)
    assert late["missed_tokens"][0]["detail"] == "tiers had not brought it when the time was over"


async def test_only_the_latest_misses_are_remembered(rigs: Opener) -> None:
    async with rigs() as rig:
        scheduler, _ = await rig.engine()
        for session in range(MOST + 5):
            await asked(scheduler, session, digests(1))
        assert len(await explained(rig)) == TOLD
        assert await explained(rig, "request 4") == []
        assert len(await explained(rig, "request 5")) == 1


async def test_they_are_a_page_too(rigs: Opener) -> None:
    async with rigs(http=Http("http://127.0.0.1:0")) as rig, httpx.AsyncClient(trust_env=False, timeout=60) as reader:
        scheduler, _ = await rig.engine()
        await asked(scheduler, 1, digests(1))
        found = (await reader.get(f"{rig.server.http_address}/api/requests")).json()
        assert found == {"requests": await explained(rig)}


# --- records ----------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_each_lookup_is_a_line_in_the_file_of_records(rigs: Opener, tmp_path: Path) -> None:
    path = tmp_path / "records"
    async with rigs(records=Records(str(path)), grace=60.0) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(3))
        assert await asked(scheduler, 2, digests(3)) == 3
        assert await asked(scheduler, 3, digests(4)) == 3
    stored, whole, part = lines(path)
    assert [run["reason"] for run in stored["missed_tokens"]] == ["never_stored"]
    assert (whole["request"], whole["hit_tokens"]["memory"], whole["missed_tokens"]) == ("request 2", 384, [])
    assert [run["reason"] for run in part["missed_tokens"]] == ["new_tail"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_full_is_moved_away_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "records"
    file = RecordFile(str(path), 100, 2)
    for number in range(10):
        file.write([{"number": number, "x": "y" * 20}] * 2)
    found = {entry.name: [line["number"] for line in lines(entry)] for entry in tmp_path.iterdir()}
    assert found == {"records": [9, 9], "records.1": [8, 8], "records.2": [7, 7]}
    alone = RecordFile(str(tmp_path / "alone"), 100, 0)
    for number in range(4):
        alone.write([{"number": number, "x": "y" * 60}])
    assert [line["number"] for line in lines(tmp_path / "alone")] == [3]


def test_a_line_that_could_not_be_written_whole_is_taken_back(tmp_path: Path) -> None:
    file = RecordFile(str(tmp_path / "records"), 1 << 20, 1)
    file.write([{"number": 1}])
    before, written = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, written[1]))
    try:
        with pytest.raises(OSError):
            file.write([{"number": 2, "x": "y" * 100}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, written)
        signal.signal(signal.SIGXFSZ, before)
    file.write([{"number": 3}])
    assert lines(tmp_path / "records") == [{"number": 1}, {"number": 3}]


async def test_records_that_the_disk_does_not_take_are_counted_and_delay_nothing(
    rigs: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MOST_QUEUED", 100)
    path = tmp_path / "records"
    os.mkfifo(path)  # whose opening waits for a reader
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    async with rigs(records=Records(str(path))) as rig:
        scheduler, _ = await rig.engine()
        os.close(reader)
        for session in range(200):
            await asked(scheduler, session, digests(1))
        assert rig.counted()["records_dropped"] > 0
        assert missed(rig) == {"never_stored": 200}


async def test_a_file_that_cannot_be_written_is_named_at_the_start(rigs: Opener, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"records\.path: cannot write .*/none/records: No such file or directory"):
        async with rigs(records=Records(str(tmp_path / "none" / "records"))):
            pass
