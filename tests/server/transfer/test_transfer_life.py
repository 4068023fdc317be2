"""Everything that could happen to device transfers, in any order, over a fake device."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.server import digests
from support.transfer.loop import Loop
from support.transfer.rig import SHARD_BYTES, Open
from support.transfer.world import CHUNKS, LENT, World

from lmcache_trio._wire.messages import Ack, Reset

CHAINS = 6
TIMEOUT = 10.0
QUIET = 3
some = st.integers(0, 5)
"""Which of those that there are."""


class TransferLife(RuleBasedStateMachine):
    """Rules are an engine's messages, a device's events, and time that passes. `World` knows the consequences."""

    def opened(self) -> AbstractAsyncContextManager[World]:
        raise NotImplementedError("a test's own subclass has what it was given by fixtures")

    def __init__(self) -> None:
        super().__init__()
        self.loop = Loop(self.opened())
        self.world = self.loop.value
        self.room = 0
        self.quiet = 0
        """Steps since the last trouble."""
        self.failed = False

    def do(self, async_fn: Callable[..., Any], *args: Any) -> None:
        """And take the replies."""
        self.quiet += 1
        try:
            self.loop.call(async_fn, *args)
            self.world.hear()
        except BaseException:
            self.failed = True
            raise

    def now(self, fn: Callable[..., object], *args: Any) -> None:
        async def soon() -> None:
            fn(*args)

        self.do(soon)

    @initialize(room=st.sampled_from([1, SHARD_BYTES, 3 * SHARD_BYTES, 1 << 20]))
    def begin(self, room: int) -> None:
        """With one chain to be loaded."""
        self.do(self.world.store, 0, False)
        self.now(self.world.rig.end_copies)
        assert self.world.there == {0}
        self.room = room
        self.world.rig.room(room)

    # --- the engine ---------------------------------------------------------------------------------------------------

    def lends(self) -> bool:
        return len(self.world.free) >= LENT

    @precondition(lends)
    @rule(choice=some, follows=st.booleans())
    def store(self, choice: int, follows: bool) -> None:
        known = [*self.world.there, *(each.which for each in self.world.lent.values() if not each.loads)]
        which = pick([which for which in range(CHAINS) if which not in known] or range(CHAINS), choice)
        self.do(self.world.store, which, follows)

    @precondition(lambda self: self.lends() and self.world.there)
    @rule(choice=some, follows=st.booleans())
    def load(self, choice: int, follows: bool) -> None:
        self.do(self.world.load, pick(sorted(self.world.there), choice), follows)

    @precondition(lambda self: self.world.pending)
    @rule(choice=some)
    def an_event_happens(self, choice: int) -> None:
        self.now(self.world.happen, pick(self.world.pending, choice))

    @precondition(lambda self: self.world.lent)
    @rule(choice=some, how=st.sampled_from(["withdraw", "end_session"]))
    def give_up(self, choice: int, how: str) -> None:
        self.do(getattr(self.world, how), pick(list(self.world.lent.values()), choice))

    @precondition(lambda self: self.world.lent and self.quiet > QUIET)
    @rule(what=st.sampled_from(["reset", "lose_worker", "lose_scheduler", "attach_anew", "time_passes"]))
    def trouble(self, what: str) -> None:
        """Trouble that ends all requests: rarely, or no transfer would ever succeed."""
        if what == "time_passes":
            self.world.spoil(lambda request: not request.loads)
            self.now(self.loop.clock.jump, TIMEOUT + 1)
        else:
            self.do(getattr(self.world, what))
        self.quiet = 0

    # --- the device, which begins copies as there is room for them ----------------------------------------------------

    def running(self) -> list[Any]:
        return self.world.rig.device.running

    @precondition(lambda self: self.running())
    @rule(choice=some, units=st.integers(1, 5))
    def move(self, choice: int, units: int) -> None:
        pick(self.running(), choice).move(units)

    @precondition(lambda self: self.running())
    @rule(choice=some)
    def end(self, choice: int) -> None:
        self.now(pick(self.running(), choice).end)

    @precondition(lambda self: self.running())
    @rule()
    def end_all(self) -> None:
        self.now(self.world.rig.end_copies)

    @precondition(lambda self: self.running() and self.quiet > QUIET)
    @rule(choice=some)
    def fail(self, choice: int) -> None:
        copy = pick(self.running(), choice)
        for request in self.world.of(copy):
            request.spoilt = True
        self.now(copy.fail)
        self.quiet = 0

    # --- the invariants -----------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_written_to_that_is_not_lent(self) -> None:
        assert self.world.rig.device.broken_rules == []
        self.world.check_memory()

    @invariant()
    def slots_and_blocks_are_owned_until_the_device_says_that_the_copy_has_ended(self) -> None:
        self.world.check_owned()

    @invariant()
    def no_more_is_with_the_device_than_may_be(self) -> None:
        self.world.check_bounds(self.room)

    def teardown(self) -> None:
        try:
            if not self.failed:
                self.go_on()
        finally:
            self.loop.stop()

    def go_on(self) -> None:
        """Whatever happened, all is answered once engine and device go on; nothing is held then that was not before."""
        world, rig = self.world, self.world.rig
        while world.pending:
            self.now(world.happen, world.pending[0])
        while rig.device.running:
            self.now(rig.device.running[0].end)
            world.check_memory()
        assert world.requests() == [], "a request was never answered"
        self.do(self.leave_nothing)
        held = rig.held
        held["bytes_free"] += held["bytes_stale"]  # stale chunks are given back when a reserve needs room
        lazily = {"chunks_stale", "slots_stale", "bytes_stale", "largest_hole"}
        assert {name: held[name] for name in held if held[name] != rig.before[name] and name not in lazily} == {}

    async def leave_nothing(self) -> None:
        for session in range(11, self.world.session + 1):
            await self.world.rig.scheduler.end(session)
        await self.world.rig.scheduler.get(Ack, Reset)


def pick(those: Any, choice: int) -> Any:
    return those[choice % len(those)]


def test_no_byte_moves_that_is_not_the_devices_and_nothing_half_copied_is_served(open_rig: Open) -> None:
    class Life(TransferLife):
        @asynccontextmanager
        async def opened(self) -> AsyncIterator[World]:
            async with open_rig(gpu=True, reservation_timeout=TIMEOUT) as rig:
                yield World(rig, [digests(CHUNKS, f"chain {i}") for i in range(CHAINS)])

    run_state_machine_as_test(Life, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
