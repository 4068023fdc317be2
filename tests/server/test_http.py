"""HTTP for operators: what each page says, who may read it, and that no reader costs an engine anything."""

import json
import os
import socket
import ssl
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from support.server import HeapConfig, Opener, Rig, digests
from support.tiers import LoopTier

from lmcache_trio import ConfigError
from lmcache_trio._server import http as http_module
from lmcache_trio._server import page as page_module
from lmcache_trio._server.page import LivePage, page_and_policy
from lmcache_trio._server.report import report
from lmcache_trio.config import Http, load_config
from lmcache_trio.statistics import ServerCounted, ServerHeld, ServerRates, TierStatistics, figures_of

HERE = "http://127.0.0.1:0"
KEY, NEXT_KEY = "k" * 32, "n" * 16


def reader(rig: Rig, **more: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=rig.server.http_address, trust_env=False, timeout=60, **more)


async def get(rig: Rig, path: str, **more: Any) -> httpx.Response:
    async with reader(rig) as client:
        return await client.get(path, **more)


def samples(text: str) -> dict[str, float]:
    """By name and labels, as they are written."""
    found = {}
    for family in parse(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n{NEXT_KEY}\n")
    path.chmod(0o600)
    return path


# --- pages ------------------------------------------------------------------------------------------------------------


async def test_it_is_off_unless_an_address_is_set(rig: Rig) -> None:
    assert rig.server.http_address == ""


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/", 200, "<title>lmcache-trio</title>"),
        ("/healthz", 200, "alive"),
        ("/readyz", 200, '"ready": true'),
        ("/metrics", 200, "lmcache_trio_connections 0.0"),
        ("/api/status", 200, '"held"'),
        ("/api/history", 200, '"seconds": 10.0'),
        ("/api/inventory", 200, '"engines": []'),
        ("/api/requests", 200, '{"requests": []}'),
        ("/nothing", 404, "there is no /nothing; there are /, /healthz"),
        ("/metrics/", 404, "there is no"),
        ("/%2e%2e/etc/passwd", 404, "there is no"),
    ],
)
async def test_each_page_says_its_own(rigs: Opener, path: str, status: int, words: str) -> None:
    async with rigs(http=Http(HERE)) as rig:
        found = await get(rig, path)
    assert (found.status_code, words in found.text) == (status, True), found.text


async def test_pages_are_read_and_never_written(rigs: Opener) -> None:
    async with rigs(http=Http(HERE)) as rig, reader(rig) as client:
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "BREW"):
            found = await client.request(method, "/metrics")
            assert (found.status_code, found.headers["allow"]) == (405, "GET, HEAD")
        head = await client.head("/metrics")
        assert (head.status_code, head.content, int(head.headers["content-length"]) > 1000) == (200, b"", True)


async def test_a_body_is_not_read(rigs: Opener) -> None:
    async with rigs(http=Http(HERE)) as rig, await connect(rig) as stream:
        with suppress(trio.BrokenResourceError), trio.fail_after(60):  # its end may come while we send
            await stream.send_all(b"POST /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n")
            while True:
                await stream.send_all(b"x" * 65536)
        assert (await get(rig, "/healthz")).text == "alive\n"


async def test_the_status_is_what_the_command_line_prints(rigs: Opener) -> None:
    async with rigs(http=Http(HERE)) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(3))
        found = (await get(rig, "/api/status")).json()
        told = json.loads(json.dumps(rig.server.statistics()))
    assert found["held"]["chunks_ready"] == 3
    assert {**found["held"], "tasks": 0} == {**told["held"], "tasks": 0}
    assert found["counted"] == told["counted"]


# --- metrics ----------------------------------------------------------------------------------------------------------


async def test_metrics_tell_what_the_statistics_tell(rigs: Opener) -> None:
    async with rigs(http=Http(HERE), tiers=[LoopTier()]) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(3))
        await scheduler.lookup(2, digests(5))
        found = samples((await get(rig, "/metrics")).text)
        held, counted = rig.held(), rig.counted()
        (tier,) = rig.server.statistics()["tiers"]
    name = tier["name"]
    for metric, value in {
        "connections": held["connections"],
        "chunks{state=ready}": 3,
        "chunk_bytes{state=ready}": held["bytes_ready"],
        "size_bytes": held["bytes_size"],
        "lookups_total": counted["lookups"],
        "hit_chunks_total": 3,
        "missed_chunks_total": counted["misses"],
        "stored_chunks_total": 3,
        "requested_tokens_total": counted["requested_tokens"],
        "hit_tokens_total{source=memory}": counted["hit_tokens"]["memory"],
        "hit_tokens_total{source=tier}": 0,
        "limited_requests_total{limit=clients}": 0,
        f"tier_open{{tier={name}}}": 1,
        f"tier_stored_chunks_total{{tier={name}}}": tier["stores"],
    }.items():
        assert found[f"lmcache_trio_{metric}"] == value, metric
    assert found["process_open_fds"] > 0


async def test_every_figure_is_a_metric_with_a_meaning(rigs: Opener) -> None:
    from lmcache_trio._server.metrics import COUNTED, HELD, OF_TIERS, RATES

    words = {"name", "state", "fenced", "reason", "backend"}
    for cls, told in ((ServerHeld, HELD), (ServerCounted, COUNTED), (ServerRates, RATES), (TierStatistics, OF_TIERS)):
        assert {figure.key for figure in told} == figures_of(cls).keys() - words
    async with rigs(http=Http(HERE), tiers=[LoopTier()]) as rig:
        families = list(parse((await get(rig, "/metrics")).text))
    names = [family.name for family in families]
    assert len(set(names)) == len(names)
    assert all(family.documentation for family in families)
    for figure in (*HELD, *COUNTED, *RATES, *OF_TIERS):
        if "transfers" not in figure.name:
            assert figure.name in names


async def test_prometheus_may_ask_for_openmetrics(rigs: Opener) -> None:
    async with rigs(http=Http(HERE)) as rig:
        found = await get(rig, "/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    assert found.headers["content-type"].startswith("application/openmetrics-text")
    of: Any = openmetrics.text_string_to_metric_families
    assert {family.name for family in of(found.text)} >= {"lmcache_trio_lookups", "lmcache_trio_build"}


async def test_ten_thousand_metrics_pages_hold_nothing(rigs: Opener) -> None:
    import gc

    from lmcache_trio._server.metrics import ServerMetrics

    async with rigs(tiers=[LoopTier()]) as rig:
        metrics = ServerMetrics(rig.server._parts)
        sizes = []
        for _ in range(3):
            for _ in range(300):
                metrics.exposition("")
            gc.collect()
            sizes.append(len(gc.get_objects()))
    assert sizes[2] - sizes[1] < 100


# --- readiness --------------------------------------------------------------------------------------------------------


async def reasons(rig: Rig) -> dict[str, str]:
    found = await get(rig, "/readyz")
    assert found.status_code == (503 if found.json()["reasons"] else 200)
    assert found.json()["ready"] is (not found.json()["reasons"])
    return {each["reason"]: each["detail"] for each in found.json()["reasons"]}


async def test_it_is_not_ready_while_memory_grows(rigs: Opener) -> None:
    async with rigs(HeapConfig(pieces=2), http=Http(HERE)) as rig:
        assert (await reasons(rig))["memory_growing"].startswith("2 MiB of 4 MiB are taken")
        rig.memory.go_on.release()
        await rig.until(bytes_taken=4 << 20)
        assert await reasons(rig) == {}


async def test_it_is_not_ready_while_a_tier_is_out_of_use(rigs: Opener) -> None:
    tier = LoopTier()
    tier.failing["open"] = OSError("the disk is gone")
    async with rigs(http=Http(HERE), tiers=[tier]) as rig:
        found = await reasons(rig)
        (name,) = found
        assert name in ("tier_fenced", "tier_probing")
        assert "the disk is gone" in found[name]


async def test_it_is_not_ready_for_an_engine_whose_chunk_is_larger_than_the_memory(rigs: Opener) -> None:
    async with rigs(http=Http(HERE)) as rig:
        worker = await rig.worker("giant")
        await worker.register(shard_bytes=8 << 20)
        assert (await reasons(rig))["chunk_too_large"].startswith(
            "a chunk of engine 'giant' takes 8 MiB, and the memory 4 MiB: raise memory.size"
        )


async def test_it_is_not_ready_when_no_client_is_let_in(rigs: Opener) -> None:
    from lmcache_trio.config import Limits

    async with rigs(http=Http(HERE), limits=Limits(clients=1)) as rig:
        assert await reasons(rig) == {}
        await rig.observer()
        assert (await reasons(rig))["clients_at_limit"].startswith("1 clients are connected")


# --- who may read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_key", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        (f"Bearer {KEY}x", 401),
        (f"Basic {KEY}", 401),
        (f"Bearer {KEY}", 200),
        (f"bearer {NEXT_KEY}", 200),
    ],
)
async def test_with_a_key_file_a_reader_sends_one_of_its_keys(
    rigs: Opener, key_file: Path, given_key: str | None, status: int
) -> None:
    headers = {} if given_key is None else {"authorization": given_key}
    async with rigs(http=Http(HERE, key_file=str(key_file))) as rig, reader(rig) as client:
        for path in ("/events", "/readyz", "/metrics", "/api/status", "/api/inventory"):
            if path == "/events" and status == 200:
                continue  # it does not end
            found = await client.get(path, headers=headers)
            assert found.status_code == status
            assert KEY not in found.text
        unknown = await client.get("/nothing", headers=headers)
        assert unknown.status_code == (404 if status == 200 else 401)  # which pages there are is told to nobody else
        assert (await client.get("/healthz")).text == "alive\n"  # a probe of the node needs none
        assert "<title>" in (await client.get("/")).text  # and the page asks for one, since it has no figures itself
        assert rig.counted()["readers_refused"] == (0 if status == 200 else 6)


async def test_over_tls_it_is_read_by_who_trusts_the_certificate(rigs: Opener, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    (tmp_path / "chain.pem").write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    files: dict[str, Any] = {"certificate": str(tmp_path / "chain.pem"), "private_key": str(tmp_path / "key.pem")}
    async with rigs(http=Http("https://127.0.0.1:0", **files)) as rig:
        assert rig.server.http_address.startswith("https://127.0.0.1:")
        async with reader(rig, verify=trusting) as client:
            assert (await client.get("/healthz")).text == "alive\n"
        with pytest.raises(httpx.ConnectError):
            await get(rig, "/healthz")
        with pytest.raises(httpx.TransportError):
            async with httpx.AsyncClient(trust_env=False) as client:
                await client.get(rig.server.http_address.replace("https", "http") + "/healthz")
        async with reader(rig, verify=trusting) as client:  # and goes on
            assert (await client.get("/healthz")).text == "alive\n"


async def test_a_socket_file_is_the_servers_own_and_goes_with_it(rigs: Opener, tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with rigs(http=Http(f"unix://{path}")) as rig:
        assert path.stat().st_mode & 0o777 == 0o600
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            assert (await client.get("/healthz")).text == "alive\n"
        with pytest.raises(ConfigError, match=r"http\.address.*Address already in use"):
            async with rigs(address="memory://another", http=Http(f"unix://{path}")):
                pass
        assert rig.server.http_address == f"unix://{path}"
    assert not path.exists()


async def test_a_file_that_is_no_socket_is_left_alone(rigs: Opener, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"http\.address.*Address already in use"):
        async with rigs(http=Http(f"unix://{path}")):
            pass
    assert path.read_text() == "mine"


async def test_a_port_that_is_taken_is_named(rigs: Opener) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"http\.address.*cannot listen at {address}: Address already in use"):
            async with rigs(http=Http(address)):
                pass


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["http.address=http://0.0.0.0:9464"], "http.address: 0.0.0.0 is not loopback: give https:// with"),
        (["http.address=http://[::]:9464"], "http.address: :: is not loopback"),
        (["http.address=https://0.0.0.0:9464"], "http.address: is https://: give http.certificate and"),
        (["http.address=https://10.0.0.1:1", "http.certificate=/c", "http.private_key=/k"], "is not loopback"),
        (["http.address=127.0.0.1:9464"], "http.address: '127.0.0.1:9464' is not an address for HTTP; use http://"),
        (["http.address=http://127.0.0.1"], "http.address: 'http://127.0.0.1' names no host and port; use http://"),
        (["http.address=http://node:9464"], "http.address: 'node' is not an IP address of this machine; use http"),
        (["http.address=http://127.0.0.1:9464/metrics"], "names no host and port"),
        (["http.address=unix://http.sock"], "http.address: 'unix://http.sock' does not name a file"),
        (["http.connections=0"], "http.connections: 0 is out of range"),
        (["http.adress=x"], "http.adress: is not a setting; did you mean 'address'?"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(sets: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, sets, {})
    assert words in str(refused.value)


def loopback(**more: Any) -> Http:
    return Http("https://127.0.0.1:0", **more)


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (f"{KEY}\n", 0o640, "others can read"),
        ("short\n", 0o600, "a key of 16 characters or more"),
        ("", 0o600, "one or 2 lines"),
        (f"{KEY}\n{KEY}\n{KEY}\n", 0o600, "one or 2 lines"),
    ],
)
def test_a_key_file_that_protects_nothing_is_refused(tmp_path: Path, content: str, mode: int, words: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=r"http\.key_file") as refused:
        http_module.listen(Http(HERE, key_file=str(path)), 0o600)
    assert words in str(refused.value)
    assert KEY not in str(refused.value)


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"http\.key_file: cannot read /nowhere: No such file"):
        http_module.listen(Http(HERE, key_file="/nowhere"), 0o600)
    with pytest.raises(ConfigError, match=r"http\.certificate: cannot use /nowhere"):
        http_module.listen(loopback(certificate="/nowhere", private_key="/nowhere"), 0o600)


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs hypercorn and prometheus_client: pip install 'lmcache-trio\[http\]'"):
        http_module.listen(Http(HERE), 0o600)


# --- the page ---------------------------------------------------------------------------------------------------------


async def read_events(stream: trio.SocketStream, count: int) -> list[dict[str, Any]]:
    """Ask for the events, and read the first *count*. Their bytes come in HTTP's chunks, one each."""
    await stream.send_all(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n")
    said, found = b"", list[dict[str, Any]]()
    with trio.fail_after(60):
        async for piece in stream:
            said += piece
            *whole, said = said.split(b"\n\n")
            found += [json.loads(event.partition(b"data: ")[2]) for event in whole]
            if len(found) >= count:
                break
    return found[:count]


async def test_events_tell_what_changes(rigs: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "TELL", 0.01)
    async with rigs(http=Http(HERE)) as rig:
        async with await connect(rig) as stream:
            (first,) = await read_events(stream, 1)
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(3))
        assert (await scheduler.lookup(2, digests(3))).chunks == 3
        async with await connect(rig) as stream:
            *_, last = await read_events(stream, 3)
        engines = (await get(rig, "/api/inventory")).json()["engines"]
        history = (await get(rig, "/api/history")).json()
    assert (first["held"]["chunks_ready"], last["held"]["chunks_ready"]) == (0, 3)
    assert first["boot"] == last["boot"] == rig.server.boot.hex()
    length = engines[0]["chunk_tokens"]
    assert (last["point"]["requested"], last["point"]["hit"]) == (6 * length, {"memory": 3 * length, "tier": 0})
    assert history["points"][-1]["hit"] == last["point"]["hit"]
    assert [(engine["name"], engine["sessions"], engine["no_cache"]) for engine in engines] == [("engine", 1, "")]


async def test_nothing_is_made_while_nobody_reads(rigs: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = 0, LivePage.event

    def count(page: LivePage) -> bytes:
        nonlocal made
        made += 1
        return make(page)

    monkeypatch.setattr(page_module, "TELL", 0.001)
    monkeypatch.setattr(LivePage, "event", count)
    async with rigs(http=Http(HERE)) as rig:
        async with await connect(rig) as stream:
            await read_events(stream, 3)
        before = -1
        with trio.fail_after(60):
            while made != before:  # until the server has seen that the reader left
                before = made
                await trio.sleep(0.05)
        await get(rig, "/healthz")
        await trio.sleep(0.05)
    assert made == before >= 3


async def test_a_reader_of_events_that_does_not_read_is_cut_off(rigs: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "PATIENCE", 0.05)
    monkeypatch.setattr(page_module, "TELL", 0.0001)
    async with rigs(http=Http(HERE)) as rig, await connect(rig) as stream:
        await stream.send_all(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n")
        await looked_up(rig)
        with trio.fail_after(60), pytest.raises(trio.BrokenResourceError):
            while True:  # what it sends is not read any more once it is cut off
                await stream.send_all(b"x")
                await trio.sleep(0.01)


async def test_a_bug_in_the_figures_costs_the_readers_alone(
    rigs: Opener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(page_module, "TELL", 0.001)
    broken = False

    def fail(parts: Any) -> dict[str, Any]:
        assert not broken, "a bug"
        return report(parts)

    monkeypatch.setattr("lmcache_trio._server.page.report", fail)
    async with rigs(http=Http(HERE)) as rig, await connect(rig) as stream:
        await read_events(stream, 1)
        broken = True
        with trio.fail_after(60):
            while not rig.counted()["handler_bugs"]:
                await trio.lowlevel.checkpoint()
        await looked_up(rig)
        broken = False
        with trio.fail_after(60):
            while b"data: " not in await stream.receive_some():
                pass
    assert "bug in the figures of the page" in caplog.text


def test_the_browser_is_told_to_run_this_script_and_load_nothing() -> None:
    page, policy = page_and_policy()
    assert policy.startswith(b"default-src 'none'; connect-src 'self'")
    assert policy.count(b"'sha256-") == 2
    assert b"http://" not in page.replace(b"http://127", b"")
    assert b"https://" not in page
    assert b'style="' not in page  # which the policy forbids


# --- readers that behave badly ----------------------------------------------------------------------------------------


async def connect(rig: Rig) -> trio.SocketStream:
    host, port = rig.server.http_address.removeprefix("http://").split(":")
    return await trio.open_tcp_stream(host, int(port))


async def looked_up(rig: Rig) -> None:
    scheduler, worker = await rig.engine("beside")
    await rig.stored(scheduler, worker, 1, digests(1))
    assert (await scheduler.lookup(2, digests(1))).chunks == 1


async def test_a_reader_beyond_the_limit_is_turned_away_and_counted(rigs: Opener) -> None:
    async with rigs(http=Http(HERE, connections=2)) as rig, await connect(rig), await connect(rig):
        async with await connect(rig) as third:
            with trio.fail_after(5):
                assert await third.receive_some() == b""
        assert rig.counted()["readers_turned_away"] == 1
        await looked_up(rig)


async def test_a_place_is_free_again_when_its_reader_has_left(rigs: Opener) -> None:
    async with rigs(http=Http(HERE, connections=1)) as rig:
        for _ in range(5):
            async with await connect(rig) as stream:
                await stream.send_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                said = b""
                with trio.fail_after(5):
                    async for piece in stream:
                        said += piece
                assert said.endswith(b"alive\n")


@pytest.mark.parametrize(
    "begun",
    [b"", b"GET /metrics HT", b"GET /metrics HTTP/1.1\r\nhost: x\r\nslow: ", b"POST /metrics HTTP/1.1\r\nhost: x\r\n"],
)
async def test_a_reader_that_never_ends_its_request_is_cut_off(
    rigs: Opener, begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_module, "PATIENCE", 0.05)
    async with rigs(http=Http(HERE)) as rig, await connect(rig) as stream:
        await stream.send_all(begun)
        with trio.fail_after(5):
            while await stream.receive_some():
                pass


async def fill(stream: trio.SocketStream) -> None:
    """Ask and never read, until the server's answers and our questions fill all buffers."""
    asked = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 100
    with trio.move_on_after(0.5):
        while True:
            await stream.send_all(asked)


async def test_a_reader_that_does_not_read_delays_no_lookup_and_no_end(
    rigs: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_module, "PATIENCE", 600)
    async with AsyncExitStack() as streams:
        with trio.fail_after(60):
            async with rigs(http=Http(HERE)) as rig:
                for _ in range(3):
                    await fill(await streams.enter_async_context(await connect(rig)))
                await looked_up(rig)


async def test_a_reader_that_does_not_read_is_cut_off(rigs: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "PATIENCE", 0.05)
    async with rigs(http=Http(HERE)) as rig, await connect(rig) as stream:
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            while True:
                await fill(stream)


@given(st.lists(st.one_of(st.binary(max_size=200), st.sampled_from(
    [b"GET ", b"/metrics", b" HTTP/1.1\r\n", b"host: x\r\n", b"\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
     b"upgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AAAA\r\n", b"content-length: 9999999\r\n",
     b"transfer-encoding: chunked\r\n", b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n"]
)), max_size=12))  # fmt: skip
@settings(max_examples=60)
def test_whatever_comes_in_costs_that_reader_alone(pieces: list[bytes]) -> None:
    async def main() -> None:
        from support.server import open_rig

        async with open_rig(http=Http(HERE)) as rig:
            with suppress(trio.BrokenResourceError), trio.fail_after(60):
                async with await connect(rig) as stream:
                    await stream.send_all(b"".join(pieces))
                    await stream.send_eof()
                    while await stream.receive_some():
                        pass
            assert (await get(rig, "/healthz")).text == "alive\n"
            assert rig.counted()["handler_bugs"] == 0

    trio.run(main)


async def test_a_bug_of_a_page_costs_that_request_alone(
    rigs: Opener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(parts: Any) -> list[Any]:
        raise AssertionError("a bug")

    monkeypatch.setattr(http_module, "find_faults", fail)
    async with rigs(http=Http(HERE)) as rig:
        found = await get(rig, "/readyz")
        assert (found.status_code, found.text) == (500, "a bug of the server; its log has it\n")
        assert rig.counted()["handler_bugs"] == 1
        assert (await get(rig, "/healthz")).text == "alive\n"
    assert "AssertionError: a bug" in caplog.text


def test_a_server_process_tells_where_it_answers(tmp_path: Path) -> None:
    import signal
    import subprocess
    import sys

    command = [sys.executable, "-m", "lmcache_trio", "serve", "--address", f"unix://{tmp_path}/s/server.sock"]
    command += ["--set", "memory.size=1MiB", "--set", "http.address=http://127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "ready" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 0
    assert "HTTP is answered at http://127.0.0.1:" in said
    assert os.path.isdir(tmp_path)
