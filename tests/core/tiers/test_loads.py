"""Loads against a model that knows each load as one small dict, and looks at all of them each time."""

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._core.tiers.loads import Loads, LoadState, TierLoad
from lmcache_trio.errors import Misuse

NAMES = ["a", "ab", "abc", "ad", "x"]
WISHERS = 4


def key(name: str) -> ChunkKey:
    return ChunkKey((b"X" if name == "x" else b"N") * 32, name.encode().ljust(32, b"."))


def parent(name: str) -> bytes:
    return key(name[:-1]).digest if name[:-1] else b""


def size(name: str) -> int:
    return {"a": 3, "ab": 1, "abc": 2, "ad": 7, "x": 1}[name]


class LoadsModel(RuleBasedStateMachine):
    """A load of the model: its name, its state, its wishers' deadlines, and whether its call still runs."""

    def __init__(self) -> None:
        super().__init__()
        self.loads = Loads(most_bytes=6, most=3)
        self.wishers = [lambda i=i: self.woken.append(i) for i in range(WISHERS)]
        self.woken: list[int] = []
        self.made: list[tuple[TierLoad, dict[str, Any]]] = []

    def current(self, name: str) -> dict[str, Any] | None:
        wanted = ("wanted", "loading", "landed")
        return next((m for _, m in self.made if m["name"] == name and m["state"] in wanted), None)

    def blocked(self, model: dict[str, Any]) -> bool:
        above = self.current(model["name"][:-1])
        ending = any(m["name"] == model["name"] and m["runs"] and m is not model for _, m in self.made)
        return ending or (above is not None and above["state"] == "wanted")

    @rule(name=st.sampled_from(NAMES), wisher=st.integers(0, WISHERS - 1), deadline=st.integers(1, 9))
    def want(self, name: str, wisher: int, deadline: int) -> None:
        load = self.loads.want(key(name), parent(name), size(name), deadline, self.wishers[wisher])
        model = self.current(name)
        if model is None:
            model = {"name": name, "state": "wanted", "wishers": {}, "runs": False, "number": len(self.made)}
            self.made.append((load, model))
        model["wishers"][wisher] = min(deadline, model["wishers"].get(wisher, deadline))
        assert [m for real, m in self.made if real is load] == [model]

    @precondition(lambda self: self.made)
    @rule(data=st.data(), wisher=st.integers(0, WISHERS - 1))
    def unwant(self, data: st.DataObject, wisher: int) -> None:
        load, model = data.draw(st.sampled_from(self.made))
        last = set(model["wishers"]) == {wisher}
        assert self.loads.unwant(load, self.wishers[wisher]) == last
        model["wishers"].pop(wisher, None)
        if last and model["state"] in ("wanted", "loading"):
            model["state"] = "unwanted"
        elif last and model["state"] == "landed":
            model["state"] = "gone"

    @rule()
    def begin(self) -> None:
        wanted = [m for _, m in self.made if m["state"] == "wanted" and not self.blocked(m)]
        running = [size(m["name"]) for _, m in self.made if m["runs"]]
        first = min(wanted, key=lambda m: (min(m["wishers"].values()), m["number"]), default=None)
        if first is not None and running and (len(running) >= 3 or sum(running) + size(first["name"]) > 6):
            first = None
        load = self.loads.next()
        assert [m for real, m in self.made if real is load] == ([first] if first else [])
        if first:
            first.update(state="loading", runs=True)

    @precondition(lambda self: any(m["runs"] for _, m in self.made))
    @rule(data=st.data(), well=st.booleans())
    def call_returned(self, data: st.DataObject, well: bool) -> None:
        load, model = data.draw(st.sampled_from([pair for pair in self.made if pair[1]["runs"]]))
        model["runs"] = False
        if model["state"] == "loading":
            model["state"] = "landed" if well else "missed"
            (self.loads.landed if well else self.loads.missed)(load)
        else:
            with pytest.raises(Misuse):
                self.loads.landed(load)
            self.loads.missed(load)

    @rule(namespace=st.sampled_from([None, b"X" * 32]))
    def give_up(self, namespace: bytes | None) -> None:
        there = [
            (load, m)
            for load, m in self.made
            if m["state"] in ("wanted", "loading") and (namespace is None or m["name"] == "x")
        ]
        assert set(map(id, self.loads.give_up(namespace))) == {id(load) for load, _ in there}
        for _, model in there:
            model["state"] = "unwanted" if model["state"] == "loading" else "missed"

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def what_a_state_does_not_know_changes_nothing(self, data: st.DataObject) -> None:
        load, model = data.draw(st.sampled_from(self.made))
        if not model["runs"]:
            for event in (self.loads.landed, self.loads.missed):
                with pytest.raises(Misuse):
                    event(load)

    @invariant()
    def the_same(self) -> None:
        for load, model in self.made:
            expected = {"gone": "landed"}.get(model["state"], model["state"])
            assert load.state.value == expected
            assert len(load.wishers) == len(model["wishers"])
        running = [size(m["name"]) for _, m in self.made if m["runs"]]
        landed = [size(m["name"]) for _, m in self.made if m["state"] == "landed"]
        assert (self.loads.in_flight, self.loads.bytes_in_flight) == (len(running), sum(running))
        assert self.loads.bytes_landed == sum(landed)
        there = [m for _, m in self.made if m["runs"] or m["state"] in ("wanted", "landed")]
        assert len(self.loads) == len(there)


TestLoads = LoadsModel.TestCase


def nobody() -> None:
    pass


def other() -> None:
    pass


def test_the_nearest_deadline_goes_first_and_equal_ones_in_order() -> None:
    loads = Loads(most_bytes=100, most=100)
    made = [loads.want(key(name), b"", 1, deadline, nobody) for name, deadline in [("ab", 5), ("abc", 3), ("ad", 5)]]
    assert [loads.next() for _ in range(4)] == [made[1], made[0], made[2], None]


def test_a_wisher_with_a_nearer_deadline_brings_a_shared_load_forward_and_takes_that_along_when_it_goes() -> None:
    loads = Loads(most_bytes=1, most=1)
    first = loads.want(key("a"), b"", 1, 5, nobody)
    shared = loads.want(key("x"), b"", 1, 9, nobody)
    assert loads.want(key("x"), b"", 1, 1, other) is shared
    loads.unwant(shared, other)
    assert loads.next() is first
    loads.landed(first)
    assert loads.next() is shared


def test_a_chunk_larger_than_the_bound_is_loaded_alone() -> None:
    loads = Loads(most_bytes=4, most=8)
    big = loads.want(key("a"), b"", 100, 1, nobody)
    small = loads.want(key("x"), b"", 1, 2, nobody)
    assert loads.next() is big
    assert loads.next() is None
    loads.landed(big)
    assert loads.next() is small


def test_a_load_that_is_wanted_anew_while_it_is_ending_waits_for_its_call() -> None:
    loads = Loads(most_bytes=100, most=8)
    old = loads.want(key("a"), b"", 1, 1, nobody)
    assert loads.next() is old
    assert loads.unwant(old, nobody)
    assert old.state is LoadState.UNWANTED
    new = loads.want(key("a"), b"", 1, 1, other)
    assert new is not old
    assert loads.next() is None
    loads.missed(old)
    assert loads.next() is new
