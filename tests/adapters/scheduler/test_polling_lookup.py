"""`PollingSchedulerAdapter.check_lookup_result` while a disk hangs that has what memory does not: each promise.

The prompt lies on a disk whose reads hang in their threads until the test lets them go; nothing here is a fake.
"""

import ast
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from lmcache_trio._transport.conversation import Reply
from lmcache_trio._wire.messages import AnswerState, Lookup, Message
from lmcache_trio.adapters import SchedulerAdapter
from lmcache_trio.adapters.scheduler import lookup_table
from lmcache_trio.adapters.scheduler import polling as polling_module
from lmcache_trio.adapters.scheduler.lookup_machine import LookupStage
from lmcache_trio.adapters.specs import LoadSpec
from lmcache_trio.testing.forks import engines
from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv, same_blocks, wait_until

MakeSide = Callable[..., Side]
TOKENS = list(range(4 * CHUNK))
FEW = [5, *range(2 * CHUNK)]  # covered by memory
AT = list(range(16))
THERE = list(range(32, 48))


@attrs.frozen
class Stalled:
    """A server whose disk hangs, with TOKENS on the disk and FEW in memory; and what they were stored from."""

    server: ServerProcess
    fifo: Path
    side: Side
    before: dict[str, object]

    def held(self) -> dict[str, object]:
        return held(self.server)

    def tier(self) -> dict[str, int]:
        (found,) = self.server.statistics()["tiers"]
        return dict(found)

    def submitted(self, side: Side, request: str, tokens: list[int] = TOKENS) -> None:
        side.scheduler.maybe_submit_lookup_request(request, tokens)

    def stuck(self) -> None:
        """Wait until reads hang."""
        wait_until(lambda: self.tier()["loads_in_flight"] > 0)

    def let_go(self) -> None:
        """Every read that hangs goes on, and those that follow."""

        def opened() -> bool:
            with contextlib.suppress(OSError):  # no thread waits at this moment
                os.close(os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK))
            return not self.tier()["loads_in_flight"]

        wait_until(opened)


def held(server: ServerProcess) -> dict[str, object]:
    names = (
        "sessions",
        "prefetches",
        "leases",
        "pins",
        "holds",
        "reservations",
        "chunks_writing",
        "chunks_quarantined",
    )
    found = server.statistics()
    return {name: found["held"][name] for name in names} | {
        name: found["tiers"][0][name] for name in ("loads_held", "loads_in_flight", "questions")
    }


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk that has TOKENS, of a server that has ended."""
    folder = tmp_path_factory.mktemp("stored")
    settings = ("tiers.0.backend=disk", f"tiers.0.path={folder}/disk", "tiers.0.size=16MiB", "grace=20.0")
    server = ServerProcess(f"unix://{folder}/s.sock", *settings)
    server.start()
    try:
        server.wait_tier()
        side = Side(server.address, make_kv(3))
        side.store("fill", TOKENS, AT)
        side.close()
        server.end()
    finally:
        server.kill()
    return folder / "disk"


@pytest.fixture
def stalled(tmp_path: Path, stored: Path, sides: MakeSide) -> Iterator[Stalled]:
    address, disk, fifo = f"unix://{tmp_path}/s.sock", f"{tmp_path}/disk", tmp_path / "fifo"
    shutil.copytree(stored, disk)
    inner = ("backend=disk", f"path={disk}", "size=16MiB")
    server = ServerProcess(
        address,
        "tiers.0.backend=faulty",
        *(f"tiers.0.inner.{setting}" for setting in inner),
        f"tiers.0.fifo={fifo}",
        "tiers.0.faults.0.kind=hang_thread",
        "tiers.0.faults.0.on=load",
        "tiers.0.faults.0.rate=1.0",
        "tier_timeout=60.0",
        "prefetch_budget=30.0",
        "grace=0.2",
    )
    server.start()
    try:
        server.wait_tier()
        side = sides(address, make_kv(3))
        side.store("few", FEW, AT[:8])
        side.scheduler.end_session("few")
        wait_until(lambda: server.statistics()["tiers"][0]["stores"] == 2)
        yield Stalled(server, fifo, side, held(server))
    finally:
        server.kill()


def polling(sides: MakeSide, stalled: Stalled, lookup_timeout: float = 20.0) -> Side:
    return sides(stalled.server.address, make_kv(), lookup_timeout=lookup_timeout, poll_interval=0.01)


def test_a_lookup_covered_by_memory_does_not_wait_behind_the_disk(stalled: Stalled, sides: MakeSide) -> None:
    one = polling(sides, stalled)
    stalled.submitted(one, "parked")
    stalled.stuck()
    assert one.lookup("few", FEW) == 2 * CHUNK
    assert stalled.tier()["loads_in_flight"] > 0  # the disk has not given an answer yet


def test_a_host_that_waits_for_several_lookups_is_woken_by_the_first_answer(stalled: Stalled, sides: MakeSide) -> None:
    """Not after the first one asked: that one hangs on the disk, for as long as it likes."""
    one = sides(stalled.server.address, make_kv(), scheduler=SchedulerAdapter, lookup_timeout=60.0)
    scheduler = one.scheduler
    stalled.submitted(one, "slow")
    stalled.stuck()
    stalled.submitted(one, "quick", FEW)
    began = time.monotonic()
    scheduler.wait_lookups(["slow", "quick"], 60)
    assert time.monotonic() - began < 30
    assert scheduler.check_lookup_result("quick") == 2 * CHUNK
    assert scheduler.check_lookup_result("slow") is None
    scheduler.wait_lookups(["slow"], 0.01)
    assert scheduler.check_lookup_result("slow") is None
    stalled.let_go()
    scheduler.wait_lookups(["slow"], 60)
    assert scheduler.check_lookup_result("slow") == 4 * CHUNK


def test_asked_again_while_answered_it_is_the_same_count(stalled: Stalled, sides: MakeSide) -> None:
    one = polling(sides, stalled)
    stalled.submitted(one, "r")
    stalled.stuck()
    stalled.let_go()
    for _ in range(3):
        assert one.scheduler.check_lookup_result("r") == 4 * CHUNK
    assert one.load("r", 4 * CHUNK, THERE) == set()
    assert same_blocks(make_kv(3), AT, one.kv, THERE)


@pytest.mark.parametrize("lost", ["the push", "the reply", "the reply and the push"])
def test_a_lost_message_does_not_lose_the_answer(
    stalled: Stalled, sides: MakeSide, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    one = polling(sides, stalled)
    client = one.scheduler._link.client
    assert client is not None
    if "push" in lost:
        client.on_push = lambda message: None
    if "reply" in lost:
        ask = client.request_nowait

        def unheard(message: Message, on_reply: Callable[[Reply], None]) -> None:
            ask(message, (lambda reply: None) if isinstance(message, Lookup) else on_reply)

        monkeypatch.setattr(client, "request_nowait", unheard)
    stalled.submitted(one, "r")
    stalled.stuck()
    stalled.let_go()
    for _ in range(3):
        assert one.scheduler.check_lookup_result("r") == 4 * CHUNK


def test_an_unknown_or_ended_request_is_told_apart_from_a_pending_one(stalled: Stalled, sides: MakeSide) -> None:
    one = polling(sides, stalled)
    stalled.submitted(one, "r")
    stalled.stuck()
    client, session = one.scheduler._link.client, one.scheduler.session_spec("r")
    assert client is not None

    def status() -> AnswerState:
        return one.scheduler._link.call(client.lookup_status, session, timeout=5).state

    assert [status(), status()] == [AnswerState.PENDING] * 2
    one.scheduler.end_session("r")
    assert [status(), status()] == [AnswerState.UNKNOWN] * 2
    assert one.scheduler.check_lookup_result("r") == 0


def test_a_timed_out_lookup_leaves_nothing_in_the_adapter_and_nothing_on_the_server(
    stalled: Stalled, sides: MakeSide, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lookup_table, "_BUDGET_SHARE", 100)  # else the server would answer in time
    one = polling(sides, stalled, lookup_timeout=0.3)
    began = time.monotonic()
    stalled.submitted(one, "r")
    assert one.scheduler.check_lookup_result("r") == 0
    assert time.monotonic() - began > 0.29
    assert "not answered within 0.3 s" in caplog.text  # it did not wait for the server to give up
    client = one.scheduler._link.client
    assert client is not None
    wait_until(lambda: not client._waiters)
    one.scheduler.end_session("r")
    assert not one.scheduler._lookups.requests
    wait_until(lambda: stalled.held()["prefetches"] == 0)
    stalled.let_go()  # the reads that hang keep their slots until they have returned
    wait_until(lambda: stalled.held() == stalled.before)


def test_a_server_that_dies_during_the_wait_gives_0_by_notification(stalled: Stalled, sides: MakeSide) -> None:
    one = polling(sides, stalled, lookup_timeout=600.0)  # longer than any test may take
    stalled.submitted(one, "r")
    stalled.stuck()
    assert one.scheduler._link.post(stalled.server.kill)
    assert one.scheduler.check_lookup_result("r") == 0


def test_a_lease_cannot_be_guessed_nor_used_by_another_engine(stalled: Stalled, sides: MakeSide) -> None:
    one, other = polling(sides, stalled), polling(sides, stalled)
    assert one.lookup("few", FEW) == 2 * CHUNK
    spec = one.scheduler.update_after_alloc("few", 2 * CHUNK, block_ids=THERE[:8])
    assert spec is not None
    assert len(spec.lease) == 16
    other.worker.retrieve_now([spec])
    assert other.worker.take_failed_blocks() == set(THERE[:8])
    one.worker.retrieve_now([attrs.evolve(spec, lease=bytes(16))])
    assert one.worker.take_failed_blocks() == set(THERE[:8])
    one.worker.retrieve_now([spec])
    assert one.worker.take_failed_blocks() == set()


def test_a_request_id_used_again_is_a_fresh_session_and_never_the_other_prompts_kv(
    stalled: Stalled, sides: MakeSide
) -> None:
    one = polling(sides, stalled)
    stalled.submitted(one, "r")
    stalled.stuck()
    first = one.scheduler.session_spec("r")
    one.scheduler.end_session("r")
    assert one.lookup("r", FEW) == 2 * CHUNK
    assert one.scheduler.session_spec("r") != first
    stalled.let_go()  # the first one's loads land, or not: it is nobody's answer
    assert one.scheduler.check_lookup_result("r") == 2 * CHUNK
    assert one.load("r", 2 * CHUNK, THERE[:8]) == set()
    assert same_blocks(make_kv(3), AT[:8], one.kv, THERE[:8])


def test_the_subclass_touches_only_public_and_protected_names_of_the_base() -> None:
    """Protected is what the base's own documentation opens to subclasses."""
    documented = set(re.findall(r"`(_\w+)`", str(SchedulerAdapter.__doc__)))
    tree = ast.parse(Path(polling_module.__file__).read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    touched: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert isinstance(node.ctx, ast.Load), f"{ast.unparse(node)} is changed"
            if ast.unparse(node.value) in ("self", "super()"):
                touched.add(node.attr)
            else:
                assert not node.attr.startswith("_"), f"{ast.unparse(node)} is private to another"
    hidden = {name for name in touched if name.startswith("_")} - own
    assert hidden <= documented
    assert documented <= hidden  # and no more is opened than is used
    assert own & set(dir(SchedulerAdapter)) == {"check_lookup_result"}


def test_importing_the_subclass_leaves_the_base_as_it_is() -> None:
    before = [(cls, dict(vars(cls))) for cls in SchedulerAdapter.__mro__]
    spec = importlib.util.spec_from_file_location("polling_again", polling_module.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert issubclass(again.PollingSchedulerAdapter, SchedulerAdapter)
    assert [(cls, dict(vars(cls))) for cls in SchedulerAdapter.__mro__] == before


def test_timing_is_monotonic_whatever_the_wall_clock_does(
    stalled: Stalled, sides: MakeSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = polling(sides, stalled)
    assert one.scheduler._lookups.clock is time.monotonic
    monkeypatch.setattr(time, "time", lambda: 0.0)
    stalled.submitted(one, "r")
    stalled.stuck()
    monkeypatch.setattr(time, "time", lambda: 4e9)
    stalled.let_go()
    assert one.scheduler.check_lookup_result("r") == 4 * CHUNK


def test_preempted_after_a_hit_it_is_looked_up_again_and_nothing_is_left(stalled: Stalled, sides: MakeSide) -> None:
    one = polling(sides, stalled)
    assert one.lookup("r", FEW) == 2 * CHUNK
    assert one.load("r", 2 * CHUNK, THERE[:8]) == set()
    one.scheduler.free_lookup_locks("r")  # preempted: its blocks are taken away
    assert one.lookup("r", FEW) == 2 * CHUNK
    assert one.load("r", 2 * CHUNK, AT[:8]) == set()
    assert same_blocks(make_kv(3), AT[:8], one.kv, AT[:8])
    one.scheduler.end_session("r")
    wait_until(lambda: stalled.held() == stalled.before)


def test_a_first_block_that_fails_to_load_is_tried_once_and_then_computed(stalled: Stalled, sides: MakeSide) -> None:
    one = polling(sides, stalled)
    assert one.lookup("r", FEW) == 2 * CHUNK
    spec = one.scheduler.update_after_alloc("r", 2 * CHUNK, block_ids=THERE[:8])
    assert spec is not None
    one.worker.retrieve_now([attrs.evolve(spec, lease=bytes(16))])
    assert THERE[0] in one.worker.take_failed_blocks()
    one.scheduler.mark_failed("r", 0)
    assert one.lookup("r", FEW) == 0
    one.scheduler.end_session("r")
    wait_until(lambda: stalled.held() == stalled.before)


def test_a_request_that_waits_longer_than_its_lease_is_recomputed(stalled: Stalled, sides: MakeSide) -> None:
    one = sides(stalled.server.address, make_kv(), lookup_timeout=20.0, poll_interval=0.01, lease_timeout=0.05)
    assert one.lookup("r", FEW) == 2 * CHUNK
    wait_until(lambda: one.scheduler.check_lookup_result("r") == 0)
    spec = one.scheduler.update_after_alloc("r", 2 * CHUNK, block_ids=THERE[:8])
    assert isinstance(spec, LoadSpec)
    one.worker.retrieve_now([spec])
    assert one.worker.take_failed_blocks() == set(THERE[:8])
    one.scheduler.end_session("r")
    wait_until(lambda: stalled.held() == stalled.before)


def test_a_reset_while_answered_fails_the_load_and_serves_nothing(stalled: Stalled, sides: MakeSide) -> None:
    one, other = polling(sides, stalled), polling(sides, stalled)
    assert one.lookup("r", FEW) == 2 * CHUNK
    assert other.scheduler.reset_cache()
    spec = one.scheduler.update_after_alloc("r", 2 * CHUNK, block_ids=THERE[:8])
    assert spec is not None
    one.worker.retrieve_now([spec])
    assert one.worker.take_failed_blocks() == set(THERE[:8])
    assert other.lookup("tokens", TOKENS) == 0
    assert other.lookup("few", FEW) == 0


@pytest.mark.parametrize("what", ["aborted pending", "aborted answered", "aborted allocated", "duplicate", "overtaken"])
def test_however_a_lookup_ends_held_is_as_before(stalled: Stalled, sides: MakeSide, what: str) -> None:
    one = polling(sides, stalled)
    if what == "aborted pending":
        stalled.submitted(one, "r")
        stalled.stuck()
    elif what == "aborted answered":
        assert one.lookup("r", FEW) == 2 * CHUNK
    elif what == "aborted allocated":
        assert one.lookup("r", FEW) == 2 * CHUNK
        assert one.scheduler.update_after_alloc("r", 2 * CHUNK, block_ids=THERE[:8]) is not None
    elif what == "duplicate":
        for _ in range(3):
            stalled.submitted(one, "r")
        assert stalled.held()["sessions"] == 1
    else:
        stalled.submitted(one, "r")  # and ended in the same breath
    one.scheduler.end_session("r")
    wait_until(lambda: (stalled.held()["sessions"], stalled.held()["prefetches"]) == (0, 0))
    stalled.let_go()
    wait_until(lambda: stalled.held() == stalled.before)


ASKER = """
import sys, torch
from lmcache_trio.testing.sides import CHUNK, Side, make_kv
side = Side(sys.argv[1], make_kv(), lookup_timeout=60.0)
side.scheduler.maybe_submit_lookup_request("r", list(range(4 * CHUNK)))
print("asked", flush=True)
side.scheduler.check_lookup_result("r")
"""


def test_when_the_first_asker_is_killed_the_second_gets_its_hit_from_the_same_loads(
    stalled: Stalled, sides: MakeSide
) -> None:
    first = engines.start(["-c", ASKER, stalled.server.address])
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "asked\n"
        stalled.stuck()
        one = polling(sides, stalled)
        stalled.submitted(one, "r")
        wait_until(lambda: stalled.held()["prefetches"] == 2)
        connections = stalled.server.held["connections"]
        first.send_signal(signal.SIGKILL)
        wait_until(lambda: stalled.server.held["connections"] <= connections - 2)
        stalled.let_go()
        assert one.scheduler.check_lookup_result("r") == 4 * CHUNK
        assert stalled.tier()["loads"] == 4
        assert one.load("r", 4 * CHUNK, THERE) == set()
        assert same_blocks(make_kv(3), AT, one.kv, THERE)
    finally:
        first.kill()
        first.close()


def test_a_slow_disk_gives_a_smaller_hit_and_not_a_timeout(
    stalled: Stalled, sides: MakeSide, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert 0 < lookup_table._BUDGET_SHARE < 1  # what tiers may take ends before the lookup does, and here long before
    monkeypatch.setattr(lookup_table, "_BUDGET_SHARE", 0.005)
    stalled.side.store("begun", TOKENS[:CHUNK], AT[:4])
    one = polling(sides, stalled, lookup_timeout=60.0)
    assert one.lookup("r", TOKENS) == CHUNK  # the first chunk is in memory, and the disk hangs on
    assert one.scheduler._lookups.requests["r"].lookup.state is LookupStage.ANSWERED
    assert not any("not answered within" in line for line in caplog.messages)
