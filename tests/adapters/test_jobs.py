"""What a host with nothing else to do waits for."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from lmcache_trio.adapters.specs import LoadSpec
from lmcache_trio.adapters.worker.jobs import Jobs, LoadJob, Moved
from lmcache_trio.threads import Handoff


class NeverWaited(Handoff[bool]):
    def wait(self, timeout: float) -> bool | None:
        raise AssertionError("there was something to report")


class Meanwhile(Handoff[bool]):
    """While it is waited for, what the test says happens."""

    happens: ClassVar[list[Callable[[], None]]] = []

    def wait(self, timeout: float) -> bool | None:
        self.happens.pop()()
        assert self.done, "what happened woke nobody"
        return super().wait(timeout)


def load(jobs: Jobs, request_id: str) -> LoadJob:
    kv: Any = SimpleNamespace(groups=[SimpleNamespace(block_bytes=8)])
    job = LoadJob(LoadSpec(request_id, 1, b"a lease", 0, 1, 0, (0, 1)), np.arange(2), kv=kv, fence=None, reported=True)
    jobs.begin(job)
    return job


@pytest.fixture
def handoffs(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Any]], None]:
    return lambda kind: monkeypatch.setattr("lmcache_trio.adapters.worker.jobs.Handoff", kind)


def test_a_retrieve_that_ended_and_is_not_reported_yet_keeps_nobody_waiting(
    handoffs: Callable[[type[Any]], None],
) -> None:
    handoffs(NeverWaited)
    jobs = Jobs(None)
    a, _ = load(jobs, "a"), load(jobs, "b")
    jobs.end(a, Moved(1))
    jobs.wait_retrieve(60)
    assert jobs.take_finished() == (set(), {"a"})


@pytest.mark.parametrize("which", [0, 1, 2])
def test_whichever_retrieve_ends_first_ends_the_wait_each_time(
    handoffs: Callable[[type[Any]], None], which: int
) -> None:
    handoffs(Meanwhile)
    jobs = Jobs(None)
    under_way = [load(jobs, name) for name in "abc"]
    for number in (which, (which + 1) % 3):
        Meanwhile.happens.append(partial(jobs.end, under_way[number], Moved(1)))
        jobs.wait_retrieve(60)
        assert jobs.take_finished() == (set(), {"abc"[number]})


def test_with_no_retrieve_under_way_nobody_waits(handoffs: Callable[[type[Any]], None]) -> None:
    handoffs(NeverWaited)
    Jobs(None).wait_retrieve(60)


def test_a_request_with_a_failed_load_is_named_once_when_none_of_its_loads_is_under_way() -> None:
    jobs = Jobs(None)
    first, other, second = load(jobs, "a"), load(jobs, "b"), load(jobs, "a")
    jobs.end(first)
    jobs.end(other, Moved(1))
    assert jobs.take_failed_requests() == set()
    jobs.end(second, Moved(1))
    assert jobs.take_finished() == (set(), {"a", "b"})
    assert jobs.take_failed_requests() == {"a"}
    assert jobs.take_failed_requests() == set()
    assert jobs.take_failed_blocks() == {0, 1}


def test_a_host_that_asks_for_failed_blocks_alone_has_no_growing_list_of_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lmcache_trio.adapters.worker.jobs.MOST_FAILED", 3)
    jobs = Jobs(None)
    for number in range(10):
        jobs.end(load(jobs, f"{number}"))
    assert jobs.take_failed_requests() == {"7", "8", "9"}
