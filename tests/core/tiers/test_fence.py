"""The fence does what its picture says, under any order of events and any time."""

from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmcache_trio._core.tiers.fence import Fence, FenceState
from lmcache_trio.errors import Misuse


class FenceModel(RuleBasedStateMachine):
    """Against the picture's arrows."""

    arrows: ClassVar = {("probing", "works"): "open", ("fenced", "probe"): "probing"}

    def __init__(self) -> None:
        super().__init__()
        self.fence = Fence(first=1, most=8)
        self.state, self.now, self.until, self.wait, self.opened = "probing", 0.0, 0.0, 0.0, 0.0
        self.failures = 0

    def fail(self) -> bool:
        if self.state == "fenced":
            return False
        if self.state == "open" and self.now - self.opened > self.wait:
            self.wait = 0
        self.wait = {0: 1, 1: 2, 2: 4}.get(int(self.wait), 8)
        self.state, self.until = "fenced", self.now + self.wait
        self.failures += 1
        return True

    @rule(seconds=st.sampled_from([0.25, 0.5, 1, 3, 20]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(event=st.sampled_from(["works", "probe"]))
    def event(self, event: str) -> None:
        to = self.arrows.get((self.state, event))
        if event == "probe" and self.now < self.until:
            to = None
        act = getattr(self.fence, event)
        if to is None:
            before = vars(self.fence).copy()
            with pytest.raises(Misuse):
                act(self.now)
            assert vars(self.fence) == before
            return
        act(self.now)
        self.state = to
        if to == "open":
            self.opened = self.now

    @rule()
    def failed(self) -> None:
        assert self.fence.failed(f"failure {self.failures}", self.now) == self.fail()

    @invariant()
    def the_same(self) -> None:
        assert self.fence.state.value == self.state
        assert self.fence.failures == self.failures
        if self.state == "fenced":
            assert self.fence.until == self.until


TestFence = FenceModel.TestCase


def test_a_tier_that_works_for_a_moment_after_each_probe_is_tried_less_and_less_often() -> None:
    fence, now, waits = Fence(), 0.0, []
    for _ in range(8):
        fence.works(now)
        now += 0.5
        fence.failed("again", now)
        waits.append(fence.until - now)
        now = fence.until
        fence.probe(now)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    fence.works(now)
    fence.failed("after an hour", now + 3600)
    assert fence.until - (now + 3600) == 1


def test_a_second_failure_of_a_fenced_tier_changes_nothing() -> None:
    fence = Fence()
    assert fence.failed("first", 10)
    assert not fence.failed("second", 10.5)
    assert (fence.state, fence.reason, fence.until, fence.failures) == (FenceState.FENCED, "first", 11, 1)


@pytest.mark.parametrize("settings", [{"first": 0}, {"first": 9, "most": 8}])
def test_a_wrong_setting_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(Misuse):
        Fence(**settings)
