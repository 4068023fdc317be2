"""The calls into a tier: any that is overdue fences it, at that very time, and no other does."""

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio._core.tiers.fence import Fence, FenceState
from lmcache_trio._server.tiers.calls import GuardedCalls
from lmcache_trio.errors import Unavailable

PATIENCE = 5.0


@attrs.frozen
class Call:
    """Times are such that no two events come at once: calls begin at hundredths and take half seconds."""

    begins: float
    takes: float
    patience: float | None

    @property
    def due(self) -> float:
        return self.begins + (PATIENCE if self.patience is None else self.patience)

    @property
    def ends(self) -> float:
        return self.begins + self.takes


calls_of_a_tier = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 9), st.sampled_from([None, 2.0, 8.0])), min_size=1, max_size=8
).map(lambda drawn: [Call(b + i / 100, t + 0.5, patience) for i, (b, t, patience) in enumerate(drawn)])


@given(calls=calls_of_a_tier)
def test_the_first_overdue_call_fences_the_tier_when_it_is_due(calls: list[Call]) -> None:
    overdue = min((call.due for call in calls if call.ends > call.due), default=float("inf"))
    outcomes: list[bool] = []
    fenced: list[float] = []

    async def main() -> None:
        guarded = GuardedCalls("0:tier", Fence(), PATIENCE)
        guarded.when_fenced.append(lambda: fenced.append(trio.current_time()))
        guarded.works()
        began = trio.current_time()

        async def run(call: Call) -> None:
            await trio.sleep_until(began + call.begins)
            if call.begins > overdue:
                with pytest.raises(Unavailable, match="is fenced: a call has not returned in time"):
                    await guarded.make(trio.sleep, call.takes)
            else:
                await guarded.make(trio.sleep, call.takes, patience=call.patience)
                outcomes.append(True)  # a call that is overdue runs on, and its value comes

        async def look() -> None:
            for second in range(24):
                await trio.sleep_until(began + second + 0.75)
                now = second + 0.75
                running = sum(call.begins < now < call.ends for call in calls) if now < overdue else 0
                assert len(guarded.under_way) == running

        with trio.move_on_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guarded.watch)
                nursery.start_soon(look)
                for call in calls:
                    nursery.start_soon(run, call)
        assert guarded.fence.state is (FenceState.OPEN if overdue == float("inf") else FenceState.FENCED)
        assert [round(when - began, 6) for when in fenced] == ([] if overdue == float("inf") else [round(overdue, 6)])

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert len(outcomes) == sum(call.begins < overdue for call in calls)


async def test_a_call_that_fails_fences_the_tier_whose_other_calls_are_not_watched_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    guarded = GuardedCalls("0:tier", Fence(), PATIENCE)
    guarded.works()
    told: list[int] = []
    guarded.when_fenced.append(lambda: told.append(len(guarded.under_way)))

    async def fail() -> None:
        await trio.sleep(1)
        raise Unavailable("gone")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guarded.make, trio.sleep, 60)
        with pytest.raises(Unavailable, match="gone"):
            await guarded.make(fail)
        assert (guarded.open, guarded.under_way, guarded.fence.reason, told) == (False, {}, "gone", [0])
        await guarded.watch()  # which has nothing to wait for
    assert guarded.fence.failures == 1
