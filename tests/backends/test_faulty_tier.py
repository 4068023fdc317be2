"""Tiers that fail on purpose: what each fault does, and that the disk under faults never serves a wrong byte."""

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from lmcache_trio_backends.disk import DiskConfig, DiskTier

from lmcache_trio._server.plugins import make_backend
from lmcache_trio.abc import ChunkKey, Load, Record, Tier
from lmcache_trio.errors import ConfigError, Unavailable
from lmcache_trio.testing.faults import KINDS, MEANT_FOR, OPERATIONS
from lmcache_trio.testing.faulty_tier import Fault, FaultyTier
from lmcache_trio.testing.tier_contract import MakeTier, TierContract, is_right, key_of, load_of, record_of

MIB = 1 << 20


@attrs.frozen
class DictConfig:
    size: int = 24 * MIB


class DictTier(Tier):
    """The simplest tier there can be: it checks nothing, so what is done to its bytes shows."""

    Config = DictConfig

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config)
        self.kept: dict[ChunkKey, list[bytes]] = {}
        self.is_open = False

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False

    async def _pass(self) -> None:
        if not self.is_open:
            raise Unavailable("not open")
        await trio.lowlevel.checkpoint()

    async def contains(self, keys: Sequence[ChunkKey]) -> Sequence[bool]:
        await self._pass()
        return [key in self.kept for key in keys]

    async def load(self, loads: Sequence[Load]) -> Sequence[bool]:
        await self._pass()
        hits = []
        for load in loads:
            kept = self.kept.get(load.key, [])
            hits.append(bool(kept) and [len(s) for s in kept] == [len(view) for view in load.shards])
            for view, shard in zip(load.shards, kept, strict=False) if hits[-1] else ():
                view[:] = shard
        return hits

    async def store(self, records: Sequence[Record]) -> Sequence[bool]:
        await self._pass()
        taken = []
        for record in records:
            new = [bytes(view) for view in record.shards]
            taken.append(record.key in self.kept or self._used() + sum(map(len, new)) <= self.config.size)
            if taken[-1]:
                self.kept.setdefault(record.key, new)
        return taken

    async def delete(self, namespace: bytes) -> None:
        await self._pass()
        self.kept = {key: kept for key, kept in self.kept.items() if key.namespace != namespace}

    def _used(self) -> int:
        return sum(len(shard) for kept in self.kept.values() for shard in kept)

    def statistics(self) -> dict[str, int | str]:
        return {"chunks": len(self.kept), "bytes_used": self._used(), "bytes_capacity": self.config.size}


class TestDictTier(TierContract):
    @pytest.fixture
    def make_tier(self) -> MakeTier:
        return lambda size: DictTier(DictConfig(size))


class TestFaultyTierWithoutFaults(TierContract):
    @pytest.fixture
    def make_tier(self) -> MakeTier:
        return lambda size: FaultyTier.around(DictTier(DictConfig(size)))


class TestDiskUnderAFaultyTierWithoutFaults(TierContract):
    @pytest.fixture
    def make_tier(self, tmp_path: Path) -> MakeTier:
        return lambda size: FaultyTier.around(disk(tmp_path, size))


def disk(path: Path, size: int = 24 * MIB) -> DiskTier:
    return DiskTier(DiskConfig(path=str(path), size=size, slab_size=4 * MIB))


@pytest.fixture(params=["disk", "dict"])
def inner(request: pytest.FixtureRequest, tmp_path: Path) -> Tier:
    return disk(tmp_path) if request.param == "disk" else DictTier(DictConfig())


async def ask(tier: Tier, operation: str) -> list[bool]:
    if operation == "contains":
        return list(await tier.contains([key_of(1)]))
    if operation == "load":
        return list(await tier.load([load_of(key_of(1))]))
    if operation == "store":
        return list(await tier.store([record_of(key_of(2))]))
    await tier.delete(key_of(1).namespace)
    return []


CALLS = ["contains", "load", "store", "delete"]


@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize("kind", ["error", "no_space"])
async def test_an_error_is_unavailable_in_the_nth_call_and_no_other(inner: Tier, operation: str, kind: str) -> None:
    tier = FaultyTier.around(inner, [Fault(kind, on=operation, at=(2,))])
    async with tier.open():
        await tier.store([record_of(key_of(1))]) if operation != "store" else await ask(tier, "store")
        if operation != "store":
            await ask(tier, operation)
            await tier.store([record_of(key_of(1))])
        else:
            await tier.delete(key_of(2).namespace)
        if (kind, operation) == ("no_space", "store") and isinstance(inner, DiskTier):
            assert await ask(tier, operation) == [False]  # a full disk is capacity reached
        else:
            with pytest.raises(Unavailable, match="injected"):
                await ask(tier, operation)
        await ask(tier, operation)
        assert tier.statistics()[f"injected_{kind}"] == 1


@pytest.mark.parametrize("operation", CALLS)
async def test_a_hang_ends_with_its_release_and_can_be_cancelled(inner: Tier, operation: str) -> None:
    tier = FaultyTier.around(inner, [Fault("hang", on=operation, rate=1)])
    async with tier.open():
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, tier, operation)
                with trio.fail_after(5):
                    await tier.wait_hanging(1)
                scope.cancel()
        assert tier.hanging == 0
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, tier, operation)
                await tier.wait_hanging(1)
                tier.release()
            await ask(tier, operation)


@pytest.mark.parametrize("operation", CALLS)
async def test_a_hang_in_the_thread_ends_with_its_release_only(inner: Tier, operation: str) -> None:
    tier = FaultyTier.around(inner, [])
    async with tier.open():
        await tier.store([record_of(key_of(1))])
        tier.faults.append(Fault("hang_thread", on=operation, rate=1))
        scope = trio.CancelScope()
        ended = trio.Event()

        async def hang() -> None:
            with scope:
                await ask(tier, operation)
            ended.set()

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hang)
                await tier.wait_hanging(1)
                scope.cancel()
                for _ in range(10):
                    await trio.lowlevel.checkpoint()
                assert not ended.is_set()  # its buffers are still the thread's
                if operation != "contains":
                    assert list(await tier.contains([key_of(1)])) == [True]
                tier.release()
                await ended.wait()
            assert tier.hanging == 0
            await ask(tier, operation)


async def test_a_named_pipe_releases_a_hang_from_another_process(tmp_path: Path) -> None:
    fifo = tmp_path / "release"
    tier = FaultyTier.around(disk(tmp_path / "kv"), [Fault("hang_thread", on="store", at=(1,))], fifo=str(fifo))
    async with tier.open():
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, tier, "store")
                await tier.wait_hanging(1)
                await trio.to_thread.run_sync(lambda: fifo.open("w").close())
        assert list(await tier.contains([key_of(2)])) == [True]


async def test_a_release_ends_the_hangs_at_a_named_pipe_too_and_those_to_come(tmp_path: Path) -> None:
    faults = [Fault("hang_thread", on=on, rate=1) for on in ("store", "contains", "delete")]
    tier = FaultyTier.around(disk(tmp_path / "kv"), faults, fifo=str(tmp_path / "release"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    async with tier.open():
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for operation in ("store", "contains", "contains", "delete"):
                    nursery.start_soon(ask, tier, operation)
                await tier.wait_hanging(4)
                tier.release()
                tier.release()  # as often as one likes
            assert tier.hanging == 0
            await ask(tier, "store")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


async def test_a_tier_that_was_closed_and_opened_again_hangs_again(inner: Tier) -> None:
    tier = FaultyTier.around(inner, [Fault("hang_thread", on="contains", rate=1)])

    async def ask_in_vain() -> None:
        with pytest.raises(Unavailable, match="not open"):
            await ask(tier, "contains")

    for _ in range(2):
        async with trio.open_nursery() as nursery:
            async with tier.open():
                nursery.start_soon(ask_in_vain)
                with trio.fail_after(5):
                    await tier.wait_hanging(1)
        assert tier.hanging == 0


async def test_calls_that_hang_in_threads_take_none_of_the_loops_own() -> None:
    tier = FaultyTier.around(DictTier(DictConfig()), [Fault("hang_thread", on="load", rate=1)])
    many = 64
    assert trio.to_thread.current_default_thread_limiter().total_tokens < many
    async with tier.open():
        async with trio.open_nursery() as nursery:
            for _ in range(many):
                nursery.start_soon(ask, tier, "load")
            with trio.fail_after(20):
                await tier.wait_hanging(many)
                await trio.to_thread.run_sync(lambda: None)
            assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
            assert tier.statistics()["hanging"] == many
            tier.release()


async def test_a_dropped_store_claims_to_be_done_and_a_dropped_load_is_a_miss(inner: Tier) -> None:
    faults = [
        Fault("drop", on="store", at=(1,)),
        Fault("drop", on="load", at=(1,)),
        Fault("drop", on="contains", at=(2,)),
    ]
    tier = FaultyTier.around(inner, faults)
    async with tier.open():
        assert await ask(tier, "store") == [True]
        assert list(await tier.contains([key_of(2)])) == [False]
        await tier.store([record_of(key_of(1))])
        assert await ask(tier, "load") == [False]
        assert await ask(tier, "load") == [True]
        assert await ask(tier, "contains") == [False]
        assert await ask(tier, "contains") == [True]


async def test_a_delay_comes_to_its_end(autojump_clock: trio.testing.MockClock) -> None:
    tier = FaultyTier.around(DictTier(DictConfig()), [Fault("delay", on="load", rate=1, seconds=60)])
    async with tier.open():
        before = trio.current_time()
        await ask(tier, "load")
        assert trio.current_time() - before == 60


@pytest.mark.parametrize(("kind", "on"), [("bit_flip", "load"), ("bit_flip", "store"), ("torn_write", "store")])
async def test_wrong_bytes_come_out_of_a_tier_that_checks_nothing_and_not_out_of_the_disk(
    inner: Tier, kind: str, on: str
) -> None:
    tier = FaultyTier.around(inner, [Fault(kind, on=on, at=(1,))])
    async with tier.open():
        assert list(await tier.store([record_of(key_of(1))])) == [True]
        load = load_of(key_of(1))
        hits = list(await tier.load([load]))
        assert not is_right(load)
        if isinstance(inner, DiskTier):
            assert hits == [False]
            assert tier.statistics()["corrupt"] == 1
        else:
            assert hits == [True]


async def test_a_short_read_is_a_miss(inner: Tier) -> None:
    tier = FaultyTier.around(inner, [Fault("short_read", on="load", at=(1,))])
    async with tier.open():
        await tier.store([record_of(key_of(1))])
        load = load_of(key_of(1))
        assert list(await tier.load([load])) == [False]
        assert not is_right(load)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on", OPERATIONS)
def test_a_fault_that_a_call_cannot_have_is_refused_by_name(kind: str, on: str) -> None:
    senseless = {
        "drop": {"open"},
        "short_read": {"open", "contains", "store", "delete"},
        "torn_write": {"open", "contains", "load", "delete"},
        "bit_flip": {"open", "contains", "delete"},
    }
    if on in senseless.get(kind, ()):
        with pytest.raises(ConfigError, match=f"no {kind} in '{on}'") as caught:
            Fault(kind, on=on, rate=1)
        assert caught.value.key == "on"
    else:
        Fault(kind, on=on, rate=1)


async def test_what_goes_wrong_depends_on_the_seed_alone() -> None:
    async def run(seed: int) -> list[bool]:
        tier = FaultyTier.around(DictTier(DictConfig()), [Fault("drop", on="contains", rate=0.5)], seed=seed)
        async with tier.open():
            await tier.store([record_of(key_of(1))])
            return [(await ask(tier, "contains"))[0] for _ in range(40)]

    assert await run(1) == await run(1) != await run(2)


@pytest.mark.parametrize("seed", range(3))
async def test_no_wrong_byte_is_served_from_a_disk_where_everything_goes_wrong(tmp_path: Path, seed: int) -> None:
    inner = disk(tmp_path, 12 * MIB)
    counts: Counter[bool] = Counter()

    async def use(tier: Tier, random: Random) -> None:
        for _ in range(40):
            keys = [key_of(random.randrange(40), namespace=random.randrange(2)) for _ in range(3)]
            lengths = (400_000, 4097)
            try:
                what = random.random()
                if what < 0.5:
                    await tier.store([record_of(key, lengths) for key in dict.fromkeys(keys)])
                elif what < 0.6:
                    await tier.delete(keys[0].namespace)
                elif what < 0.7:
                    await tier.contains(keys)
                else:
                    with trio.move_on_after(0.05 if random.random() < 0.1 else 5):
                        loads = [load_of(key, lengths) for key in keys]
                        for load, hit in zip(loads, await tier.load(loads), strict=True):
                            assert not hit or is_right(load)
                            counts[hit] += 1
            except Unavailable as exc:
                assert "injected" in str(exc)  # noqa: PT017 - most calls raise nothing

    for hang in ("hang", "hang_thread"):
        tier = FaultyTier.around(inner, everything(hang), seed=seed)
        async with tier.open():
            async with trio.open_nursery() as users:
                for user in range(4):
                    users.start_soon(use, tier, Random(100 * seed + user))
                await tier.wait_hanging(1)
                await trio.testing.wait_all_tasks_blocked(0.01)  # others may go on meanwhile, or hang too
                tier.release()
            assert set(tier.injected) == kinds_with(hang)
    async with inner.open():
        assert int(inner.statistics()["corrupt"]) > 0
        assert counts[True] > 0, "nothing came back that could have been wrong"
        for namespace in (0, 1):
            await inner.delete(key_of(0, namespace).namespace)
        assert (inner.statistics()["chunks"], inner.statistics()["bytes_used"]) == (0, 0)


def everything(hang: str) -> list[Fault]:
    """Each fault in each call that it is meant for, but of hangs this one kind: once for certain, others at random."""
    return [
        Fault(kind, on=on, at=(i,), rate=0.0 if kind == hang else 0.05, seconds=0.001)
        for on in CALLS
        for i, kind in enumerate((kind for kind in KINDS if on in MEANT_FOR[kind] and kind in kinds_with(hang)), 1)
    ]


def kinds_with(hang: str) -> set[str]:
    return {kind for kind in KINDS if kind == hang or not kind.startswith("hang")}


async def test_a_disk_that_failed_at_its_opening_opens_later(tmp_path: Path) -> None:
    tier = FaultyTier.around(disk(tmp_path), [Fault("error", on="open", at=(1,))])
    with pytest.raises(Unavailable):
        async with tier.open():
            pass
    async with tier.open():
        assert await ask(tier, "store") == [True]


async def test_it_is_made_from_a_servers_configuration_by_its_entry_point(tmp_path: Path) -> None:
    table = {
        "backend": "faulty",
        "inner": {"backend": "disk", "path": str(tmp_path), "size": "8MiB"},
        "faults": [{"kind": "drop", "on": "load", "at": [1]}, {"kind": "delay", "at": [9]}],
        "seed": 3,
    }
    tier = make_backend("tiers", "tiers.0", table, Tier)  # type: ignore[type-abstract]
    async with tier.open():
        await tier.store([record_of(key_of(1))])
        assert await ask(tier, "load") == [False]
        assert await ask(tier, "load") == [True]


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"inner": {}}, "tiers.0.inner.backend"),
        ({"inner": {"backend": "dusk"}}, "tiers.0.inner.backend"),
        ({"inner": {"backend": "disk", "size": "1KiB", "path": "/x"}}, "tiers.0.inner.size"),
        ({"faults": [{"kind": "flood"}]}, "tiers.0.faults.0.kind"),
        ({"faults": [{"kind": "drop", "rate": 1}, {"kind": "drop", "on": "close"}]}, "tiers.0.faults.1.on"),
        ({"faults": [{"kind": "drop", "rate": 1.5}]}, "tiers.0.faults.0.rate"),
        ({"faults": [{"kind": "drop", "rate": float("nan")}]}, "tiers.0.faults.0.rate"),
        ({"faults": [{"kind": "drop"}]}, "tiers.0.faults.0.rate"),
        ({"faults": [{"kind": "drop", "at": [0]}]}, "tiers.0.faults.0.at"),
        ({"faults": [{"kind": "delay", "rate": 1.0, "seconds": -1.0}]}, "tiers.0.faults.0.seconds"),
        ({"faults": [{"kind": "torn_write", "on": "load", "rate": 1.0}]}, "tiers.0.faults.0.on"),
        ({"faults": [{"kind": "drop", "rat": 1.0}]}, "tiers.0.faults.0.rat"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(table: dict[str, Any], key: str, tmp_path: Path) -> None:
    table = {"backend": "faulty", "inner": {"backend": "disk", "path": str(tmp_path), "size": "8MiB"}} | table
    with pytest.raises(ConfigError) as caught:
        make_backend("tiers", "tiers.0", table, Tier)  # type: ignore[type-abstract]
    assert caught.value.key == key
