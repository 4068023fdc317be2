"""The scheduler's side against a real server: one question, one answer, and nothing left behind."""

import math
import random
from collections.abc import Callable

import attrs
import pytest

from lmcache_trio._transport.conversation import Reply
from lmcache_trio._wire.messages import Lookup
from lmcache_trio.adapters import PollingSchedulerAdapter, SchedulerAdapter
from lmcache_trio.adapters.scheduler.lookup_machine import LookupStage
from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv, wait_until

MakeSide = Callable[..., Side]
TOKENS = list(range(4 * CHUNK))
BLOCKS = list(range(16))


@pytest.fixture
def one(live_server: ServerProcess, sides: MakeSide) -> Side:
    side = sides(live_server.address, make_kv(1))
    side.store("stored", TOKENS, BLOCKS)
    side.scheduler.end_session("stored")
    return side


def settled(live_server: ServerProcess) -> dict[str, object]:
    """What the server holds of clients' doings."""
    held = live_server.held
    return {key: held[key] for key in ("sessions", "leases", "pins", "reservations")}


@pytest.mark.parametrize("adapter", [SchedulerAdapter, PollingSchedulerAdapter])
def test_both_adapters_find_what_is_stored_and_no_more(
    live_server: ServerProcess, sides: MakeSide, one: Side, adapter: type[SchedulerAdapter]
) -> None:
    other = sides(live_server.address, make_kv(), scheduler=adapter)
    assert other.lookup("r", TOKENS[: 3 * CHUNK + 5]) == 3 * CHUNK
    assert other.lookup("other", [1, *TOKENS]) == 0
    assert other.scheduler.check_lookup_result("never asked") == 0


def test_an_answer_stays_the_same_until_it_is_used_up(live_server: ServerProcess, one: Side) -> None:
    for _ in range(3):
        assert one.lookup("r", TOKENS) == 4 * CHUNK
    assert settled(live_server)["leases"] == 1
    assert one.scheduler.update_after_alloc("r", 0) is None
    assert one.scheduler.check_lookup_result("r") == 0
    assert settled(live_server) == {"sessions": 1, "leases": 0, "pins": 0, "reservations": 0}
    assert one.lookup("r", TOKENS) == 4 * CHUNK


def test_a_lookup_from_memory_is_one_message_each_way(
    live_server: ServerProcess, sides: MakeSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sides(live_server.address, make_kv(1), lookup_timeout=60.0, poll_interval=30.0)  # however slow all of it is
    one.store("stored", TOKENS, BLOCKS)
    sent: list[bytes] = []
    client = one.scheduler._link.client
    assert client is not None
    send, heard = client._connection.send_nowait, client.heard

    def counted(frame: bytes) -> None:
        sent.append(frame)
        send(frame)

    monkeypatch.setattr(client._connection, "send_nowait", counted)
    assert one.lookup("r", TOKENS) == 4 * CHUNK
    assert (len(sent), client.heard - heard) == (1, 1)
    assert one.lookup("r", TOKENS) == 4 * CHUNK
    assert (len(sent), client.heard - heard) == (1, 1)
    assert len(sent[0]) > 4 * 32
    one.scheduler.free_lookup_locks("r")
    assert one.lookup("r", TOKENS) == 4 * CHUNK
    assert len(sent[-1]) <= len(sent[0]) - 4 * 32  # digests are sent once


def test_a_request_whose_lookup_could_not_be_sent_is_asked_anew(
    one: Side, monkeypatch: pytest.MonkeyPatch, live_server: ServerProcess
) -> None:
    client = one.scheduler._link.client
    assert client is not None
    refused: list[object] = []

    def full(message: object, on_reply: object) -> None:
        refused.append(message)
        raise Unavailable("the server does not read what it is sent")

    with monkeypatch.context() as patched:
        patched.setattr(client, "request_nowait", full)
        assert one.lookup("r", TOKENS[:CHUNK]) == 0
        one.store("s", TOKENS[:CHUNK], BLOCKS[:4])
    assert len(refused) == 2
    assert one.lookup("r", TOKENS) == 4 * CHUNK
    longer = [*TOKENS, *range(9000, 9000 + CHUNK)]
    one.scheduler.extend("s", longer)
    one.worker.store_now([one.scheduler.store_spec("s", 4, BLOCKS[:4])])
    assert one.worker.statistics()["dropped_no_session"] == 1  # it came while the session could not be opened
    assert one.lookup("s", longer) == 5 * CHUNK


@pytest.mark.parametrize("taken", [False, True])
def test_a_lease_that_a_load_holds_stays_its_own_when_the_next_lookup_could_not_be_sent(
    one: Side, monkeypatch: pytest.MonkeyPatch, live_server: ServerProcess, taken: bool
) -> None:
    assert one.lookup("r", TOKENS) == 4 * CHUNK
    if taken:
        assert one.scheduler.update_after_alloc("r", CHUNK, block_ids=BLOCKS[:4]) is not None
    client = one.scheduler._link.client
    assert client is not None

    def full(message: object, on_reply: object) -> None:
        raise Unavailable("the server does not read what it is sent")

    with monkeypatch.context() as patched:
        patched.setattr(client, "request_nowait", full)
        assert one.lookup("r", TOKENS) == (0 if taken else 4 * CHUNK)
    assert settled(live_server)["leases"] == 1
    one.scheduler.free_lookup_locks("r")
    assert settled(live_server)["leases"] == 0


def test_after_an_error_of_the_servers_a_request_is_told_anew(one: Side) -> None:
    assert one.lookup("r", TOKENS[:CHUNK]) == CHUNK
    one.scheduler.free_lookup_locks("r")
    one.scheduler._lookups.requests["r"].lookup.sent = 3  # the server has one chunk: it answers Misuse
    assert one.lookup("r", TOKENS) == 0
    assert one.lookup("r", TOKENS) == 4 * CHUNK


def test_a_session_that_the_server_refused_to_open_is_opened_again(one: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    client = one.scheduler._link.client
    assert client is not None
    ask = client.request_nowait

    def wrong(message: Lookup, on_reply: Callable[[Reply], None]) -> None:
        ask(attrs.evolve(message, start=1), on_reply)  # the server knows no chunk of it: Misuse

    longer = list(range(9000, 9000 + CHUNK))
    with monkeypatch.context() as patched:
        patched.setattr(client, "request_nowait", wrong)
        one.store("s", longer, BLOCKS[:4])
    assert one.worker.statistics()["dropped_no_session"] == 1
    one.store("s", longer, BLOCKS[:4])
    assert one.lookup("q", longer) == CHUNK


def test_no_more_is_offered_than_the_caller_lets(one: Side) -> None:
    one.scheduler.maybe_submit_lookup_request("r", TOKENS, max_tokens=len(TOKENS) - 1)
    assert one.scheduler.check_lookup_result("r") == 3 * CHUNK


def test_a_failed_chunk_and_all_behind_it_are_never_offered_again(one: Side) -> None:
    assert one.lookup("r", TOKENS) == 4 * CHUNK
    assert one.scheduler.update_after_alloc("r", 4 * CHUNK, block_ids=BLOCKS) is not None
    one.scheduler.mark_failed("r", 2 * CHUNK + 3)
    assert one.lookup("r", TOKENS) == 2 * CHUNK
    one.scheduler.free_lookup_locks("r")
    one.scheduler.mark_failed("r", 0)
    assert one.lookup("r", TOKENS) == 0
    assert one.lookup("another", TOKENS) == 4 * CHUNK


def test_an_id_used_again_for_another_prompt_is_another_session(one: Side) -> None:
    assert one.lookup("r", TOKENS) == 4 * CHUNK
    first = one.scheduler.session_spec("r")
    one.scheduler.free_lookup_locks("r")
    assert one.lookup("r", [7, *TOKENS]) == 0
    assert one.scheduler.session_spec("r") != first
    one.scheduler.end_session("r")
    assert one.lookup("r", TOKENS) == 4 * CHUNK


def test_extra_identity_makes_another_chunk_and_all_behind_it_another(one: Side) -> None:
    def extras(first: int, end: int) -> bytes:
        return b"an image" if first <= 2 * CHUNK + 1 < end else b""

    one.scheduler.maybe_submit_lookup_request("r", TOKENS, extras=extras)
    assert one.scheduler.check_lookup_result("r") == 2 * CHUNK


def test_an_answer_is_not_offered_past_its_lease(one: Side, live_server: ServerProcess) -> None:
    assert one.lookup("r", TOKENS) == 4 * CHUNK
    clock = one.scheduler._lookups.clock
    one.scheduler._lookups.clock = lambda: clock() + 29.0
    assert one.scheduler.check_lookup_result("r") == 0
    spec = one.scheduler.update_after_alloc("r", CHUNK, block_ids=BLOCKS[:4])
    assert spec is not None
    assert spec.lease == b""
    assert settled(live_server)["leases"] == 0
    assert one.lookup("r", TOKENS) == 4 * CHUNK


def test_a_silent_server_gives_zero_in_time_and_nothing_is_left_behind(
    live_server: ServerProcess, sides: MakeSide, one: Side, caplog: pytest.LogCaptureFixture
) -> None:
    other = sides(live_server.address, make_kv(), lookup_timeout=0.1, poll_interval=0.01)
    live_server.pause()
    assert other.lookup("r", TOKENS) == 0  # it would say nothing for ever
    assert not other.scheduler.is_healthy()
    other.scheduler.maybe_submit_lookup_request("next", TOKENS)
    following = other.scheduler._lookups.requests["next"].lookup
    assert following.state is LookupStage.IDLE  # not asked, so not waited for: not a word since
    assert other.scheduler.check_lookup_result("next") == 0
    wait_until(lambda: any("not answered within" in line for line in caplog.messages))
    live_server.go_on()
    wait_until(lambda: other.scheduler.is_healthy())
    assert sum("not answered within" in line for line in caplog.messages) == 1
    other.scheduler._lookups.lookup_timeout = 60.0  # a server that answers may be as slow as this machine is
    assert other.lookup("then", TOKENS) == 4 * CHUNK
    for request in ("r", "next", "then"):
        other.scheduler.end_session(request)
    wait_until(lambda: settled(live_server) == {"sessions": 0, "leases": 0, "pins": 0, "reservations": 0})


@pytest.mark.parametrize("adapter", [SchedulerAdapter, PollingSchedulerAdapter])
def test_a_server_that_dies_during_the_wait_gives_zero_by_notification(
    live_server: ServerProcess, sides: MakeSide, adapter: type[SchedulerAdapter]
) -> None:
    one = sides(live_server.address, make_kv(), lookup_timeout=600.0, scheduler=adapter)
    live_server.pause()
    one.scheduler.maybe_submit_lookup_request("r", TOKENS)
    assert one.scheduler._link.post(live_server.kill)
    wait_until(lambda: one.scheduler.check_lookup_result("r") is not None)
    assert one.scheduler.check_lookup_result("r") == 0


def test_a_thousand_lookups_aborted_at_random_points_leave_nothing(live_server: ServerProcess, one: Side) -> None:
    before = settled(live_server)
    rng = random.Random(5)
    scheduler = one.scheduler
    for i in range(1000):
        request = f"r{rng.randrange(20)}"
        scheduler.maybe_submit_lookup_request(request, TOKENS[: rng.randrange(len(TOKENS) + 1)])
        step = rng.randrange(5)
        client = scheduler._link.client
        if rng.random() < 0.01 and client is not None:  # with whatever is under way
            scheduler._link.post(client._connection.close)
        if step == 0:
            scheduler.cleanup_lookup_result(request)
        elif step == 1:
            scheduler.free_lookup_locks(request)
        elif step == 2 and scheduler.check_lookup_result(request):
            scheduler.update_after_alloc(request, CHUNK, block_ids=BLOCKS[:4])
        elif step == 3:
            scheduler.update_after_alloc(request, 0)
        if i % 3 == 0:
            scheduler.end_session(request)
    for i in range(20):
        scheduler.end_session(f"r{i}")
    wait_until(lambda: scheduler._link.client is not None)
    wait_until(lambda: settled(live_server) == before)
    assert not scheduler._lookups.requests
    client = scheduler._link.client
    assert client is not None
    wait_until(lambda: not client._due)
    assert not client._waiters
    assert not client._answers


def test_with_no_server_an_engine_goes_on_and_finds_one_that_comes(
    live_server: ServerProcess, sides: MakeSide, caplog: pytest.LogCaptureFixture
) -> None:
    live_server.kill()
    adapter = PollingSchedulerAdapter(
        live_server.address, engine_id="alone", identity=["a model"], block_tokens=16, connect_timeout=0.05
    )
    try:
        adapter.maybe_submit_lookup_request("r", TOKENS)
        assert adapter.check_lookup_result("r") == 0
        assert sum("going on without" in line for line in caplog.messages) == 1
        live_server.start()
        wait_until(lambda: adapter._link.client is not None)
        assert adapter.chunk_tokens == CHUNK
    finally:
        adapter.shutdown()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lookup_timeout": -1.0}, "lookup_timeout"),
        ({"lookup_timeout": math.nan}, "lookup_timeout"),
        ({"poll_interval": 0.0}, "poll_interval"),
        ({"poll_interval": math.nan}, "poll_interval"),
        ({"poll_interval": 2.0, "lookup_timeout": 1.0}, "poll_interval"),
        ({"lease_timeout": math.inf}, "lease_timeout"),
        ({"chunk_tokens": 24}, "chunk_tokens"),
        ({"block_tokens": 0}, "block_tokens"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: dict[str, float], named: str) -> None:
    with pytest.raises(Misuse, match=named):
        PollingSchedulerAdapter(
            "unix:///nowhere",
            engine_id="e",
            identity=["a model"],
            **{"block_tokens": 16, **settings},  # type: ignore[arg-type]
        )


def test_the_subclass_overrides_one_method_and_adds_private_ones() -> None:
    changed = {name for name in vars(PollingSchedulerAdapter) if not name.startswith("__")}
    assert {name for name in changed if hasattr(SchedulerAdapter, name)} == {"check_lookup_result"}
