"""The writeback queue against a list, and its rules one by one."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmcache_trio._core.index.grants import Hold, HoldNumber
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._core.tiers.writeback import Writeback
from lmcache_trio.errors import Misuse

NAMES = ["a", "ab", "abc", "abd", "ae", "f", "fg", "x"]


def key(name: str) -> ChunkKey:
    return ChunkKey((b"X" if name == "x" else b"N") * 32, name.encode().ljust(32, b"."))


class Holds:
    """Makes holds of chunks by name; one is 10 bytes, in two shards."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, name: str, size: int = 10) -> Hold:
        self.made += 1
        above = key(name[:-1]).digest if len(name) > 1 else b""
        return Hold(HoldNumber(self.made), key(name), above, (0, 0), (size - 4, 4))


def names(holds: list[Hold]) -> list[str]:
    return [hold.key.digest.decode().rstrip(".") for hold in holds]


class WritebackModel(RuleBasedStateMachine):
    """The model: a list of names in order of arrival, and the names being written."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Writeback()
        self.holds = Holds()
        self.waiting: list[str] = []
        self.writing: list[Hold] = []
        self.dropped = 0

    @rule(name=st.sampled_from(NAMES), limit=st.sampled_from([0, 20, 35, 60]))
    def offer(self, name: str, limit: int) -> None:
        hold = self.holds(name)
        dropped = self.queue.offer(hold, limit)
        if name in self.waiting:
            assert dropped == [hold]
            return
        self.waiting.append(name)
        expected = []
        while 10 * (len(self.waiting) + len(self.writing)) > limit and (
            len(self.waiting) > 1 or (self.waiting and self.writing)
        ):
            leaf = next(n for n in self.waiting if not any(other[:-1] == n for other in self.waiting))
            self.waiting.remove(leaf)
            expected.append(leaf)
        assert names(dropped) == expected
        self.dropped += len(expected)

    @rule(most=st.sampled_from([1, 10, 25, 100]))
    def take(self, most: int) -> None:
        count = min(len(self.waiting), max(1, most // 10))
        taken = self.queue.take(most)
        assert names(taken) == self.waiting[:count]
        del self.waiting[:count]
        self.writing += taken

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def written(self, data: st.DataObject) -> None:
        hold = data.draw(st.sampled_from(self.writing))
        self.queue.written(hold)
        self.writing.remove(hold)
        with pytest.raises(Misuse):
            self.queue.written(hold)

    @rule()
    def forget(self) -> None:
        gone = [name for name in self.waiting if name == "x"]
        assert names(self.queue.forget(b"X" * 32)) == gone
        self.waiting = [name for name in self.waiting if name != "x"]

    @rule()
    def clear(self) -> None:
        assert sorted(names(self.queue.clear())) == sorted(self.waiting)
        self.dropped += len(self.waiting)
        self.waiting.clear()

    @invariant()
    def the_same(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert (self.queue.bytes_queued, self.queue.bytes_writing) == (10 * len(self.waiting), 10 * len(self.writing))
        assert self.queue.idle == (not self.waiting and not self.writing)
        assert self.queue.dropped == self.dropped


TestWriteback = WritebackModel.TestCase


def test_the_oldest_prefix_leaf_is_dropped_first_and_a_prompts_beginning_last() -> None:
    queue, hold = Writeback(), Holds()
    for name in ("a", "ab", "f", "fg"):
        assert queue.offer(hold(name), 40) == []
    assert names(queue.offer(hold("abc"), 40)) == ["fg"]  # "ab" is older, but "abc" extends it
    assert names(queue.offer(hold("x"), 40)) == ["f"]
    assert names(queue.take(1000)) == ["a", "ab", "abc", "x"]


def test_a_chunk_larger_than_the_bound_is_written_when_nothing_else_is() -> None:
    queue, hold = Writeback(), Holds()
    assert queue.offer(hold("a", 100), 40) == []
    assert names(queue.offer(hold("f"), 40)) == ["a"]
    assert names(queue.take(1)) == ["f"]
    assert names(queue.offer(hold("x", 100), 40)) == ["x"]


def test_a_chunk_that_was_taken_or_dropped_costs_no_memory() -> None:
    queue, hold = Writeback(), Holds()
    for i in range(20_000):
        queue.offer(hold(f"{i:06}"), 40)
        if i % 3 == 0:
            for taken in queue.take(10):
                queue.written(taken)
    assert len(queue._order) + len(queue._leaves) < 500
    assert not queue._children or len(queue._children) <= 4
