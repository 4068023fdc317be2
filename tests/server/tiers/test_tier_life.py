"""A tier that fails, hangs or has a bug; the writeback; and a reset in the middle of each."""

import logging
from typing import Any

import pytest
import trio
import trio.testing
from support.server import HeapConfig, Opener, digests
from support.tiers import LoopTier, World, Worlds

from lmcache_trio import Config, ConfigError, Unavailable, open_server
from lmcache_trio._core.keys import ChunkKey, layout_of, namespace_of
from lmcache_trio._server import supervise
from lmcache_trio._server.tiers.tiers import FIRST_OPENING
from lmcache_trio._wire.codec import decode
from lmcache_trio._wire.messages import Ack, AnswerState, ErrorKind, ErrorReply, Reset
from lmcache_trio.abc import LocalTier
from lmcache_trio.config import Limits

SHARD = 64 << 10


async def _fenced(world: World, number: int = 0) -> dict[str, Any]:
    await world.settled()
    tier: dict[str, Any] = world.tier(number)
    assert tier["fenced"]
    return tier


# --- the fence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["contains", "load", "store"])
async def test_a_tier_that_fails_is_fenced_and_the_server_goes_on_without_it(
    worlds: Worlds, tier: LoopTier, unavailable: Exception, autojump_clock: trio.testing.MockClock, operation: str
) -> None:
    async with worlds(tier) as world:
        await world.store(1, digests(2))
        await world.settled()
        before = world.held()
        tier.fill(world.namespace, digests(4))
        tier.failing[operation] = unavailable
        start = trio.current_time()
        if operation == "store":
            assert await world.store(2, digests(1, "new")) == 1
            await world.settled()
        else:
            assert (await world.lookup(2, digests(4))).chunks == 2
        assert trio.current_time() - start < 0.01  # at once, not when the budget is used up
        found = await _fenced(world)
        assert (found["reason"], found["failures"]) == ("injected", 1)
        asked = tier.calls.copy()
        answer = await world.ask(3, digests(4))
        assert (answer.state, answer.chunks) == (AnswerState.ANSWERED, 2)
        assert await world.store(4, digests(1, "newer")) == 1
        assert tier.calls == asked
        for session in (2, 3):
            await world.scheduler.end(session)
        await world.settled()
        assert {**world.held(), "tasks": before["tasks"]} == before


async def test_a_fenced_tier_is_opened_again_when_it_works_and_probed_less_often_while_it_does_not(
    worlds: Worlds, tier: LoopTier, unavailable: Exception, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        tier.fill(world.namespace, digests(2))
        tier.failing["load"] = unavailable
        assert (await world.lookup(1, digests(2))).chunks == 0
        tier.failing["open"] = unavailable
        start = trio.current_time()
        await trio.sleep(32)
        opens = [round(when - start) for operation, when in tier.began if operation == "open" and when > start]
        assert opens == [1, 3, 7, 15, 31]
        tier.failing.clear()
        await trio.sleep(40)
        assert not world.tier()["fenced"]
        assert (await world.lookup(2, digests(2))).chunks == 2


async def test_a_tier_that_opens_is_fenced_and_comes_back_says_each_once(
    worlds: Worlds, tier: LoopTier, unavailable: Exception, autojump_clock: trio.testing.MockClock, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "lmcache_trio.server")

    def said() -> list[str]:
        return [message for message in caplog.messages if not message.startswith("engine ")]

    async with worlds(tier) as world:
        name = world.tier()["name"]
        assert said() == [f"the tier {name} is open"]
        tier.fill(world.namespace, digests(2))
        tier.failing["load"] = tier.failing["open"] = unavailable
        assert (await world.lookup(1, digests(2))).chunks == 0
        await trio.sleep(32)
        assert world.tier()["failures"] == 6
        assert said()[1:] == [f"the tier {name} is fenced: injected (tried again in 1.0 s)"]
        tier.failing["open"] = Unavailable("the disk is gone")
        await trio.sleep(100)
        assert said()[2:] == [f"the tier {name} is fenced: the disk is gone (tried again in 60.0 s)"]
        tier.failing.clear()
        await trio.sleep(60)
        assert said()[3:] == [f"the tier {name} is back, after 183.0 s"]


@pytest.mark.parametrize("operation", ["contains", "load", "store"])
@pytest.mark.parametrize("hang", [False, True])
async def test_a_call_that_hangs_fences_the_tier_and_it_serves_again_when_the_call_has_returned(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock, operation: str, hang: bool
) -> None:
    async with worlds(tier, tier_timeout=5.0, prefetch_budget=60.0) as world:
        tier.fill(world.namespace, digests(2))
        tier.stall(operation, hang=hang)
        if operation == "store":
            assert await world.store(1, digests(1, "new")) == 1
        else:
            assert (await world.lookup(1, digests(2), budget_ms=2000)).chunks == 0
            if operation == "load":  # given up by its lookup, an obedient one has ended: so one that waits for long
                await world.ask(2, digests(2), budget_ms=60_000)
        await trio.sleep(6)
        if operation == "load" and not hang:
            answer = await world.pushed()
            assert answer.chunks == 0
        found = world.tier()
        assert (found["failures"], "not returned" in found["reason"]) == (1, True)
        await trio.sleep(30)
        assert tier.opened == (1 if hang else 2)  # one that hangs in a thread cannot be closed
        assert world.tier()["fenced"] is (hang or operation == "contains")  # which the probe asks too
        tier.go_on()
        await trio.sleep(10)
        assert not world.tier()["fenced"]
        assert (await world.lookup(9, digests(2))).chunks == 2


async def test_with_one_tier_hung_another_one_serves(worlds: Worlds, autojump_clock: trio.testing.MockClock) -> None:
    near, far = LoopTier(), LoopTier()
    async with worlds(near, far) as world:
        near.fill(world.namespace, digests(2, "near"))
        near.stall("contains", "load", hang=True)
        assert (await world.lookup(1, digests(2, "near"))).chunks == 0
        await trio.sleep(10)
        far.fill(world.namespace, digests(2))
        start = trio.current_time()
        assert (await world.lookup(2, digests(2))).chunks == 2
        assert trio.current_time() - start < 0.01
        assert [item["fenced"] for item in world.rig.server.statistics()["tiers"]] == [True, False]


async def test_a_bug_in_a_tier_costs_that_tier_and_is_told(
    worlds: Worlds, tier: LoopTier, caplog: Any, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        tier.failing["contains"] = ZeroDivisionError("a bug")
        assert (await world.lookup(1, digests(2))).chunks == 0
        found = await _fenced(world)
        assert (found["bugs"], "a bug" in found["reason"]) == (1, True)
        assert any(record.exc_info for record in caplog.records)
        tier.failing.clear()
        await trio.sleep(2)
        assert not world.tier()["fenced"]


async def test_an_answer_of_the_wrong_length_is_a_bug_in_the_tier(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        tier.fill(world.namespace, digests(2))

        async def load(loads: Any) -> list[bool]:
            await trio.lowlevel.checkpoint()
            return []

        tier.load = load  # type: ignore[method-assign]
        assert (await world.lookup(1, digests(2))).chunks == 0
        assert (await _fenced(world))["bugs"] == 1
        await world.scheduler.end(1)
        await world.settled()
        assert world.held()["chunks_writing"] == 0


async def test_a_tier_that_does_not_open_is_opened_later_and_the_server_is_there_meanwhile(
    worlds: Worlds, tier: LoopTier, unavailable: Exception, autojump_clock: trio.testing.MockClock
) -> None:
    tier.failing["open"] = unavailable
    async with worlds(tier) as world:
        tier.fill(world.namespace, digests(2))
        assert (await world.ask(1, digests(2))).state is AnswerState.ANSWERED
        tier.failing.clear()
        await trio.sleep(2)
        assert (await world.lookup(2, digests(2))).chunks == 2


async def test_a_start_gives_a_slow_tier_its_time_beside_its_other_work_and_no_more(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow = supervise._grow

    async def slow(state: Any, *, task_status: trio.TaskStatus[None]) -> None:
        await trio.sleep(0.2)
        await grow(state, task_status=task_status)

    monkeypatch.setattr(supervise, "_grow", slow)
    tier.stall("open")
    start = trio.current_time()
    async with worlds(tier) as world:
        assert trio.current_time() - start == pytest.approx(FIRST_OPENING)
        tier.fill(world.namespace, digests(2))
        assert (await world.ask(1, digests(2))).state is AnswerState.ANSWERED
        tier.go_on()
        await world.settled()
        assert (await world.lookup(2, digests(2))).chunks == 2


async def test_a_setting_for_which_a_tier_cannot_be_opened_ends_the_start(tier: LoopTier, tmp_path: Any) -> None:
    tier.failing["open"] = ConfigError("path", "is no directory")
    memory = {"backend": "cpu", "size": 1 << 20}
    ready = False
    with pytest.raises(ConfigError, match="is no directory") as caught:
        async with open_server(Config(address=f"unix://{tmp_path}/s.ipc", memory=memory), tiers=[tier]):
            ready = True
    assert caught.value.key == "tiers.0.path"
    assert not ready


async def test_a_server_whose_tier_is_refused_in_the_time_that_a_start_gives_it_is_never_ready(
    rigs: Opener, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    tier.failing["open"] = ConfigError("path", "is no directory")
    tier.stall("open")
    ready = False
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def go_on() -> None:
            await trio.sleep(FIRST_OPENING / 2)
            tier.go_on()

        with pytest.raises(ConfigError, match="is no directory"):
            async with rigs(HeapConfig(), tiers=[tier]):
                ready = True
    assert not ready


@pytest.mark.parametrize("refused", [False, True])
async def test_a_local_tier_has_been_opened_before_a_server_is_ready_however_long_that_takes(
    worlds: Worlds, refused: bool, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    class LocalLoopTier(LoopTier, LocalTier):
        pass

    tier: Any = LocalLoopTier()
    tier.stall("open")
    if refused:
        tier.failing["open"] = ConfigError("path", "holds files of the user's")
    ready, refusals = trio.Event(), []

    async def serve() -> None:
        try:
            async with worlds(tier):
                ready.set()
        except ConfigError as exc:
            refusals.append(exc.key)

    with trio.fail_after(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            await trio.sleep(50)
            assert not ready.is_set()
            assert sum("the start waits for the tier 0:" in line for line in caplog.messages) == 1
            tier.go_on()
    assert ready.is_set() is not refused
    assert refusals == ["tiers.0.path"] * refused


# --- writeback ------------------------------------------------------------------------------------------------------


async def test_a_stored_chunk_is_written_back_with_its_parent_and_held_only_until_then(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        before = world.held()
        tier.stall("store")
        assert await world.store(1, digests(3)) == 3
        await world.settled()
        assert world.held()["holds"] == 3
        tier.go_on()
        await world.settled()
        assert world.held() == before
        chain = digests(3)
        assert tier.keys("store") == [
            (ChunkKey(world.namespace, digest), parent) for digest, parent in zip(chain, [b"", *chain[:2]], strict=True)
        ]
        assert world.tier()["stores"] == 3


async def test_a_store_is_never_delayed_by_a_tier_and_the_oldest_leaves_are_dropped_and_counted(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier, writeback_bytes=6 * SHARD) as world:
        tier.stall("store", hang=True)
        start = trio.current_time()
        assert await world.store(1, digests(1, "first")) == 1  # this one is being written
        await world.settled()
        for i in range(4):
            assert await world.store(2 + i, digests(2, f"prompt {i}")) == 2
        assert trio.current_time() == start
        found = world.tier()
        assert (found["bytes_queued"], found["dropped"]) == (6 * SHARD, 3)
        assert world.held()["holds"] == 6
        tier.go_on()
        await world.settled()
        written = {key.digest for key, _ in tier.keys("store")[1:]}
        assert written == {digests(2, "prompt 1")[0], *digests(2, "prompt 2"), *digests(2, "prompt 3")}


async def test_writeback_is_bounded_by_half_of_a_small_arena(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier, size=1 << 20) as world:
        tier.stall("store", hang=True)
        for i in range(10):
            assert await world.store(i, digests(4, f"prompt {i}")) == 4
        assert world.tier()["bytes_queued"] <= 1 << 19


@pytest.mark.parametrize("why", ["refused", "dropped", "fenced"])
async def test_a_chunk_that_was_not_written_is_offered_again_when_it_is_used(
    worlds: Worlds, tier: LoopTier, unavailable: Exception, autojump_clock: trio.testing.MockClock, why: str
) -> None:
    async with worlds(tier, writeback_bytes=SHARD) as world:
        real = tier.store

        async def refuse(records: Any) -> list[bool]:
            await trio.lowlevel.checkpoint()
            return [False] * len(records)

        if why == "refused":
            tier.store = refuse  # type: ignore[method-assign]
        elif why == "dropped":
            tier.stall("store", hang=True)
            await world.store(8, digests(1, "in the way"))
            await world.settled()
        else:
            tier.failing["contains"] = unavailable
            await world.lookup(8, digests(1))
        await world.store(1, digests(1))
        await world.settled()
        assert ChunkKey(world.namespace, digests(1)[0]) not in tier.chunks
        tier.store = real  # type: ignore[method-assign]
        tier.failing.clear()
        tier.go_on()
        await trio.sleep(2)
        for session in (2, 3):
            assert (await world.lookup(session, digests(1))).chunks == 1
            await world.settled()
        assert ChunkKey(world.namespace, digests(1)[0]) in tier.chunks
        assert len([key for key, _ in tier.keys("store") if key.digest == digests(1)[0]]) == 1


async def test_a_loaded_chunk_goes_to_the_other_tiers_and_not_back_to_its_own(
    worlds: Worlds, autojump_clock: trio.testing.MockClock
) -> None:
    near, far = LoopTier(), LoopTier()
    async with worlds(near, far) as world:
        far.fill(world.namespace, digests(2))
        answer = await world.lookup(1, digests(2))
        assert answer.chunks == 2
        await world.settled()
        assert {key.digest for key, _ in near.keys("store")} == set(digests(2))
        assert far.calls["store"] == 0
        assert near.chunks == far.chunks


async def test_queued_chunks_are_written_before_the_server_ends(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier, grace=5.0) as world:
        tier.stall("store")
        await world.store(1, digests(3))
        await world.settled()
        tier.go_on()
    assert len(tier.chunks) == 3


async def test_a_tier_that_hangs_holds_up_the_end_for_the_grace_only(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock, caplog: Any
) -> None:
    start = 0.0
    with trio.move_on_after(100):
        async with worlds(tier, grace=7.0, tier_timeout=60.0) as world:
            keep, tier.go_on = tier.go_on, lambda: None  # type: ignore[method-assign]
            tier.stall("store")
            await world.store(1, digests(3))
            await world.settled()
            start = trio.current_time()
    assert trio.current_time() - start == pytest.approx(7.0)
    assert caplog.messages == ["the grace is over: 192 KiB were not written to tiers"]
    keep()


# --- reset ----------------------------------------------------------------------------------------------------------


async def test_a_reset_is_acknowledged_when_the_tiers_have_deleted(
    worlds: Worlds, autojump_clock: trio.testing.MockClock
) -> None:
    near, far = LoopTier(), LoopTier()
    async with worlds(near, far) as world:
        other = b"o" * 32
        far.fill(other, digests(1))
        await world.store(1, digests(3))
        await world.settled()
        assert (len(near.chunks), len(far.chunks)) == (3, 4)
        before = world.held()
        far.stall("delete")
        done = []

        async def reset() -> None:
            done.append(await world.scheduler.ask(Reset))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reset)
            await world.settled()
            assert (not done, near.chunks) == (True, {})
            far.go_on()
        assert isinstance(done[0], Ack)
        assert set(far.chunks) == {ChunkKey(other, digests(1)[0])}
        assert (await world.lookup(2, digests(3))).chunks == 0
        await world.scheduler.end(2)
        await world.settled()
        assert world.held() == before


async def test_a_reset_is_acknowledged_when_the_layouts_that_it_names_are_deleted_though_no_engine_has_them(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        former, other, identity = layout_of([b"former"], 16), layout_of([b"other"], 16), b"m" * 32
        for namespace in (namespace_of(former, identity), namespace_of(other, identity), namespace_of(former)):
            tier.fill(namespace, digests(1))
        tier.stall("delete")
        done = []

        async def reset() -> None:
            done.append(await world.scheduler.ask(Reset, identity, former))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reset)
            await world.settled()
            assert not done
            tier.go_on()
        assert isinstance(done[0], Ack)
        assert {key.namespace for key in tier.chunks} == {namespace_of(other, identity), namespace_of(former)}


async def test_a_tier_that_is_fenced_deletes_the_layouts_that_a_reset_names_before_it_serves_again(
    worlds: Worlds, tier: LoopTier, unavailable: Exception, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        former = layout_of([b"former"], 16)
        tier.fill(namespace_of(former), digests(1))
        tier.failing["contains"] = unavailable
        assert (await world.lookup(1, digests(2))).chunks == 0
        await _fenced(world)
        for _ in range(3):
            assert isinstance(await world.scheduler.ask(Reset, b"", former), ErrorReply)
        assert world.tier()["deletions_owed"] == 2, "each namespace once, however often it was asked"
        tier.failing.clear()
        await trio.sleep(3)
        assert (world.tier()["fenced"], tier.chunks) == (False, {})


async def test_a_load_that_began_before_a_reset_never_lands(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        before = world.held()
        tier.fill(world.namespace, digests(2))
        tier.stall("load", hang=True)
        await world.ask(1, digests(2))
        await world.settled()
        assert isinstance(await world.scheduler.ask(Reset), Ack)
        answer = await world.pushed()
        assert answer.chunks == 0
        tier.go_on()
        await world.settled()
        assert (await world.ask(2, digests(2))).chunks == 0
        for session in (1, 2):
            await world.scheduler.end(session)
        await world.settled()
        assert world.held() == before
        assert world.rig.held("chunks_ready") == {"chunks_ready": 0}


async def test_a_write_that_began_before_a_reset_is_deleted_by_it(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        tier.stall("store")
        await world.store(1, digests(2))
        await world.settled()
        await world.store(2, digests(2, "queued"))
        done = []

        async def reset() -> None:
            done.append(await world.scheduler.ask(Reset))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reset)
            await world.settled()
            assert not done
            tier.go_on()
        assert isinstance(done[0], Ack)
        assert tier.chunks == {}
        assert [name for name, _ in tier.log if name in ("store", "delete")] == ["store", "delete"]
        assert await world.store(3, digests(2)) == 2
        await world.settled()
        assert len(tier.chunks) == 2


async def test_while_a_tier_deletes_it_serves_nothing_of_the_namespace(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier, tier_timeout=60.0) as world:
        tier.fill(world.namespace, digests(2))
        tier.stall("delete")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.scheduler.ask, Reset)
            await world.settled()
            assert world.tier()["deletions_owed"] == 1
            second = await world.rig.scheduler("second")
            assert await (await world.rig.worker("second")).register() == world.namespace
            assert (await world.lookup(1, digests(2), second)).chunks == 0
            tier.go_on()


async def test_a_fenced_tier_remembers_its_deletions_and_carries_them_out_before_it_serves_again(
    worlds: Worlds, tier: LoopTier, unavailable: Exception, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        tier.fill(world.namespace, digests(2))
        tier.failing["contains"] = unavailable
        assert (await world.lookup(1, digests(2))).chunks == 0
        await _fenced(world)
        reply = await world.scheduler.ask(Reset)
        assert isinstance(reply, ErrorReply)
        assert reply.kind is ErrorKind.UNAVAILABLE
        assert "reset again" in reply.message
        tier.failing.clear()
        await trio.sleep(3)
        assert (world.tier()["fenced"], tier.chunks) == (False, {})
        assert (await world.lookup(2, digests(2))).chunks == 0
        assert isinstance(await world.scheduler.ask(Reset), Ack)


async def test_a_reset_whose_deletion_fails_is_not_acknowledged(
    worlds: Worlds, tier: LoopTier, unavailable: Exception, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        tier.fill(world.namespace, digests(2))
        tier.failing["delete"] = unavailable
        assert isinstance(await world.scheduler.ask(Reset), ErrorReply)
        assert (await world.lookup(1, digests(2))).chunks == 0
        tier.failing.clear()
        await trio.sleep(3)
        assert tier.chunks == {}


async def test_resets_beyond_the_limit_are_refused_by_name_while_a_tier_deletes(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier, limits=Limits(resets=2)) as world:
        tier.stall("delete")
        for number in range(1001, 1006):
            await world.scheduler.tell(Reset(number))
        await world.settled()
        refused = [await world.scheduler.reply(number) for number in (1003, 1004, 1005)]
        assert all(isinstance(reply, ErrorReply) and "limits.resets" in reply.message for reply in refused)
        tier.go_on()
        done = [decode(await world.scheduler.connection.receive()) for _ in range(2)]
        assert sorted(reply.id for reply in done if isinstance(reply, Ack)) == [1001, 1002]
        assert isinstance(await world.scheduler.ask(Reset), Ack)
        assert world.rig.counted()["limits"]["resets"] == 3
