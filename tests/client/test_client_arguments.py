"""What cannot be sent is `Misuse` where it is said, before anything is sent; the connection goes on."""

import math
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from lmcache_trio import Client, Config, Role, open_client, open_server
from lmcache_trio.adapters import Group, LoadSpec, SchedulerAdapter, StoreSpec, WorkerAdapter
from lmcache_trio.errors import Misuse

DIGEST, HUGE = b"d" * 32, 2**70
WRONG_NUMBERS: list[Any] = [-1, HUGE, "7", 1.5, None, b"1", True]
WRONG_IDS: list[Any] = [b"x" * 33, "a str", 7, None]
Say = Callable[[Client], Any]


async def storing(client: Client, *args: Any) -> None:
    async with client.storing(*args):
        pass


async def retrieving(client: Client, *args: Any) -> None:
    async with client.retrieving(*args):
        pass


def given(call: Callable[[Client, Any], Any], value: Any, client: Client) -> Any:
    return call(client, value)


def by_name(name: str, client: Client, value: Any) -> Any:
    return getattr(client, name)(value)


def asked(call: Callable[..., Any], at: int, client: Client, value: Any) -> Any:
    """A store, with *value* in the place *at* of what it says."""
    words: list[Any] = [1, b"", [DIGEST]]
    words[at] = value
    return call(client, *words)


def wrong() -> list[tuple[str, Say]]:
    said: list[tuple[str, Say]] = []

    def add(name: str, call: Callable[[Client, Any], Any], values: list[Any]) -> None:
        said.extend((f"{name} {value!r:.20}", partial(given, call, value)) for value in values)

    add("lookup session", lambda c, v: c.lookup(v, [DIGEST]), WRONG_NUMBERS)
    add("lookup start", lambda c, v: c.lookup(1, [DIGEST], start=v), WRONG_NUMBERS)
    add("lookup upto", lambda c, v: c.lookup(1, [DIGEST], upto=v), [v for v in WRONG_NUMBERS if v is not None])
    add("lookup budget", lambda c, v: c.lookup(1, [DIGEST], budget=v), [-1, -0.0001, math.nan, math.inf, "1", 1e300])
    digests: list[Any] = [[b"d" * 31], [b"d" * 31, b"d" * 33], [b""], ["d" * 32], DIGEST, "d" * 32, None, [7], {DIGEST}]
    add("lookup digests", lambda c, v: c.lookup(1, v), digests)
    add("lookup many", lambda c, v: c.lookup(1, v), [[DIGEST] * 65_537])
    for name in ("lookup_status", "release", "end"):
        add(name, partial(by_name, name), WRONG_NUMBERS)
    add("taken session", lambda c, v: c.taken_notice(v, b""), WRONG_NUMBERS)
    add("taken lease", lambda c, v: c.taken_notice(1, v), WRONG_IDS)
    add("identify", lambda c, v: c.identify(v), WRONG_IDS)
    add("register fingerprint", lambda c, v: c.register(v, 16, 16), WRONG_IDS)
    add("register bytes", lambda c, v: c.register(DIGEST, v, 16), [*WRONG_NUMBERS, 0])
    add("register block_tokens", lambda c, v: c.register(DIGEST, 16, v), [*WRONG_NUMBERS, 0])
    parts: list[Any] = [(0,), (-1,), ("7",), 7, "7", (16,) * 17]
    add("register parts", lambda c, v: c.register(DIGEST, 16, 16, part_bytes=v), parts)
    groups = [16, *WRONG_NUMBERS]
    add("retrieve group", lambda c, v: c.retrieve(b"l", 0, 1, group=v), groups)
    add("reserve group", lambda c, v: c.reserve(1, b"", [DIGEST], group=v), groups)
    add("retrieve lease", lambda c, v: c.retrieve(v, 0, 1), WRONG_IDS)
    add("retrieve start", lambda c, v: c.retrieve(b"l", v, 1), WRONG_NUMBERS)
    add("retrieve count", lambda c, v: c.retrieve(b"l", 0, v), [*WRONG_NUMBERS, 0])
    add("retrieving", lambda c, v: retrieving(c, b"l", v, 1), WRONG_NUMBERS)
    for name in ("done", "done_nowait", "commit", "abort", "abort_nowait", "copies_ended"):
        values = [v for v in WRONG_IDS if v or name != "abort_nowait"]
        add(name, partial(by_name, name), values)
    stores: dict[str, Callable[..., Any]] = {"reserve": Client.reserve, "storing": storing}
    for name, call in stores.items():
        parents = [b"p" * 31, b"p" * 33, "p" * 32, 7]
        add(f"{name} session", partial(asked, call, 0), WRONG_NUMBERS)
        add(f"{name} parent", partial(asked, call, 1), parents)
        add(f"{name} digests", partial(asked, call, 2), digests)
    return said


async def test_what_cannot_be_sent_is_misuse_and_the_connection_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = wrong()
    assert len(said) > 150
    config = Config(address=f"unix://{tmp_path}/s.sock", memory={"backend": "cpu", "size": 1 << 20})
    sent: list[bytes] = []
    async with (
        open_server(config) as server,
        open_client(server.address, role=Role.SCHEDULER, engine="e") as scheduler,
        open_client(server.address, role=Role.WORKER, engine="e") as worker,
    ):
        await worker.register(DIGEST, 4096, 16)
        with monkeypatch.context() as patched:
            for client in (scheduler, worker):
                patched.setattr(client._connection, "send_nowait", sent.append)
            for name, say in said:
                for client in (worker,) if name.startswith(("storing", "retrieving")) else (scheduler, worker):
                    with pytest.raises(Misuse), trio.fail_after(5):
                        result = say(client)
                        if isinstance(result, Awaitable):
                            await result
                        pytest.fail(f"{name} was said")
        assert sent == []
        assert await worker.ping() == await scheduler.ping() == server.boot
        assert worker.shard_bytes == 4096
        assert scheduler.identity == b""


@pytest.mark.parametrize(
    "wrong",
    [
        {"address": 7},
        {"address": None},
        {"role": 9},
        {"role": "worker"},
        {"engine": 7},
        {"engine": "e" * 513},
        {"engine": "\ud800"},
        {"shard": -1},
        {"shards": 0},
        {"shard": "0"},
        {"shards": HUGE},
        {"name": "n" * 513},
        {"identity": b"i" * 33},
        {"identity": "a model"},
        {"groups": 7},
        {"groups": (7,)},
        {"groups": (Group(),) * 17},
    ],
)
async def test_a_client_that_cannot_be_introduced_is_misuse_before_a_server_is_asked(wrong: dict[str, Any]) -> None:
    with pytest.raises(Misuse):
        async with open_client(**{"address": "unix:///nowhere/s.sock", "engine": "e", **wrong}):
            pass


@pytest.mark.parametrize("adapter", [SchedulerAdapter, WorkerAdapter])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("block_tokens", value) for value in (0, *WRONG_NUMBERS)),
        *(("shards", value) for value in (0, *WRONG_NUMBERS)),
        *(("chunk_tokens", value) for value in (0, -16, HUGE, "256", 1.5)),
        *(("connect_timeout", value) for value in (0, -1.0, math.nan, math.inf, "5", None)),
        *(("engine_id", value) for value in (7, None, "e" * 513, b"e")),
    ],
)
def test_a_setting_of_an_adapter_that_is_no_such_thing_is_misuse(adapter: Any, setting: str, value: Any) -> None:
    settings = {"engine_id": "e", "block_tokens": 16, setting: value}
    if adapter is SchedulerAdapter:
        settings["identity"] = ["m"]
    with pytest.raises(Misuse):
        adapter("unix:///nowhere/s.sock", **settings)


STORE = {"request_id": "r", "session": 1, "parent": b"", "digests": DIGEST, "block_ids": (1,)}
LOAD = {"request_id": "r", "session": 1, "lease": b"", "start": 0, "count": 1, "skip_blocks": 0, "block_ids": (1,)}


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        *((StoreSpec, STORE, {"session": value}) for value in (-1, HUGE, "1", None)),
        *((StoreSpec, STORE, {"parent": value}) for value in (b"p" * 31, "p" * 32, None)),
        *((StoreSpec, STORE, {"digests": value}) for value in (b"d" * 31, b"", "d" * 32, None)),
        *((StoreSpec, STORE, {"block_ids": value}) for value in ((-1,), (HUGE,), ("1",), (None,), None, ())),
        (StoreSpec, STORE, {"request_id": 7}),
        *((LoadSpec, LOAD, {"session": value}) for value in (-1, HUGE, "1", None)),
        *((LoadSpec, LOAD, {"lease": value}) for value in (b"l" * 33, "l", None)),
        *((LoadSpec, LOAD, {name: value}) for name in ("start", "count", "skip_blocks") for value in WRONG_NUMBERS),
        *((LoadSpec, LOAD, {"block_ids": value}) for value in ((-1,), (HUGE,), ("1",), None)),
    ],
)
def test_a_spec_that_cannot_be_sent_is_misuse(kind: Any, right: dict[str, Any], wrong: dict[str, Any]) -> None:
    kind(**right)
    with pytest.raises(Misuse):
        kind(**{**right, **wrong})


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.maybe_submit_lookup_request(7, [1]),
        lambda s: s.maybe_submit_lookup_request("r", None),
        lambda s: s.maybe_submit_lookup_request("r", ["a"] * 256),
        lambda s: s.maybe_submit_lookup_request("r", [HUGE] * 256),
        lambda s: s.maybe_submit_lookup_request("r", [1], max_tokens=1.5),
        lambda s: s.maybe_submit_lookup_request("r", [1] * 256, extras=lambda first, end: "a str"),
        lambda s: s.extend("r", [1.5] * 256),
        lambda s: s.extend("r", 7),
        lambda s: s.store_spec("r", -1, [1]),
        lambda s: s.store_spec("r", "0", [1]),
        lambda s: s.mark_failed("r", -1),
        lambda s: s.mark_failed("r", None),
        lambda s: s.update_after_alloc("r", -16),
        lambda s: s.update_after_alloc("r", 16, block_ids=[-1]),
        lambda s: s.update_after_alloc("r", 16, block_ids=["1"]),
        lambda s: s.update_after_alloc("r", HUGE * 16),
        lambda s: s.update_after_alloc("r", "16"),
        lambda s: s.session_spec(7),
    ],
)
def test_a_call_of_a_scheduler_with_what_is_no_such_thing_is_misuse(tmp_path: Path, call: Any) -> None:
    scheduler = SchedulerAdapter(
        f"unix://{tmp_path}/s.sock", engine_id="e", identity=["m"], block_tokens=16, connect_timeout=0.01
    )
    try:
        with pytest.raises(Misuse):
            call(scheduler)
    finally:
        scheduler.shutdown()
