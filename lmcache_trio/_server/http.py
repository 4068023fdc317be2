"""HTTP for operators: health, metrics and status, answered in the server's own loop.

hypercorn speaks the protocol. This module listens, bounds what a reader can take, and has the pages. A reader that does
not read, or sends half a request, is cut off after `PATIENCE` seconds. No page waits for anything: each is made from
figures that are in memory, and costs the same however much is cached.

hypercorn and prometheus_client come with `pip install lmcache-trio[http]`, and are imported only where HTTP is on.
"""

import hmac
import json
import logging
import os
import socket
import ssl
import stat
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import attrs
import trio

from lmcache_trio._server.metrics import ServerMetrics
from lmcache_trio._server.page import LivePage, page_and_policy
from lmcache_trio._server.parts import Parts
from lmcache_trio._server.readiness import find_faults
from lmcache_trio._server.report import inventory, report
from lmcache_trio._transport.socket_files import is_listening, withdraw
from lmcache_trio.config import Http
from lmcache_trio.config.addresses import UnixAddress, WebAddress, parse_web_address
from lmcache_trio.errors import ConfigError

__all__ = ["PATIENCE", "check_packages", "listen", "serve_http"]

log = logging.getLogger("lmcache_trio.http")

NEEDED = ("hypercorn", "prometheus_client")
PATIENCE = 5.0
"""Seconds that a reader has for each of these: a TLS handshake, a request's headers, and taking a response."""
LEAST_KEY = 16
"""Characters of the shortest key that is accepted."""
EVENTS = "/events"
OPEN = ("/healthz", "/")
"""What is read without a key. The page has no figures: its script asks for a key, and for them."""
MOST_KEYS = 2
"""Keys at a time: the one in use, and the next one while readers change over."""


@attrs.frozen
class Listening:
    """The socket, and how to speak there. *address* is where a reader finds it."""

    sock: socket.socket
    address: str
    tls: ssl.SSLContext | None
    keys: tuple[bytes, ...]
    path: str = ""
    """Of the socket file, if it is one."""

    def close(self) -> None:
        self.sock.close()
        if self.path:
            withdraw(self.path)


def check_packages() -> None:
    """ConfigError: a package that HTTP needs is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ConfigError("http.address", f"needs {' and '.join(missing)}: pip install 'lmcache-trio[http]'")


def listen(http: Http, mode: int) -> Listening | None:
    """Listen as *http* says; None if it names no address. *mode* is of a socket file. `ConfigError` names the key."""
    if not http.address:
        return None
    where = parse_web_address(http.address)
    check_packages()
    keys = _read_keys(http.key_file) if http.key_file else ()
    tls = _tls(http) if isinstance(where, WebAddress) and where.encrypted else None
    path = where.path if isinstance(where, UnixAddress) else ""
    try:
        sock = _bind(where, mode)
    except OSError as exc:
        raise ConfigError("http.address", f"cannot listen at {http.address}: {exc.strerror}; give another") from exc
    if isinstance(where, WebAddress):
        where = attrs.evolve(where, port=sock.getsockname()[1])
    return Listening(sock, str(where), tls, keys, path)


def _read_keys(path: str) -> tuple[bytes, ...]:
    try:
        with open(path, "rb") as file:
            mode, content = stat.S_IMODE(os.fstat(file.fileno()).st_mode), file.read(1 << 16)
    except OSError as exc:
        raise ConfigError("http.key_file", f"cannot read {path}: {exc.strerror}") from exc
    if mode & 0o077:
        raise ConfigError("http.key_file", f"others can read {path} (mode {mode:04o}): chmod 600 {path}")
    keys = tuple(line.strip() for line in content.splitlines() if line.strip())
    if not 1 <= len(keys) <= MOST_KEYS or any(len(key) < LEAST_KEY for key in keys):
        problem = f"{path} must have one or {MOST_KEYS} lines with a key of {LEAST_KEY} characters or more"
        raise ConfigError("http.key_file", f"{problem}, such as `openssl rand -hex 32` makes")
    return keys


def _tls(http: Http) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(http.certificate, http.private_key)
    except (OSError, ssl.SSLError) as exc:
        why = f"cannot use {http.certificate} with http.private_key {http.private_key}: {exc}"
        raise ConfigError("http.certificate", why) from exc
    return context


def _bind(where: WebAddress | UnixAddress, mode: int) -> socket.socket:
    place: str | tuple[str, int]
    if isinstance(where, UnixAddress):
        family, place = socket.AF_UNIX, where.path
        _remove_dead(where.path)
    else:
        family, place = (socket.AF_INET6 if ":" in where.host else socket.AF_INET), (where.host, where.port)
    with ExitStack() as undo:
        sock = undo.enter_context(closing(socket.socket(family, socket.SOCK_STREAM)))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        before = os.umask(0o777 & ~mode)  # a file is never there with more rights than it shall have
        try:
            sock.bind(place)
        finally:
            os.umask(before)
        sock.listen(128)
        sock.setblocking(False)
        undo.pop_all()
    return sock


def _remove_dead(path: str) -> None:
    """Remove the socket file *path* if a server that has ended left it behind."""
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode) and not is_listening(path):
            withdraw(path)


class BoundedStream(trio.abc.HalfCloseableStream):
    """A reader's connection, whose other end has `PATIENCE` seconds to take what is sent.

    hypercorn sends under a shield, so without this bound a reader that does not read would keep a server from ending.
    """

    def __init__(self, inner: trio.SocketStream) -> None:
        self.socket = inner.socket  # hypercorn asks it for both addresses
        self._inner = inner

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with trio.move_on_after(PATIENCE) as patience:
            await self._inner.send_all(data)
        if patience.cancelled_caught:
            self.cut()
            raise trio.BrokenResourceError("the reader does not read")

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._inner.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._inner.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._inner.aclose()

    def cut(self) -> None:
        """Close it at once: who sends or receives is woken with an error."""
        self.socket.close()


async def serve_http(parts: Parts, listening: Listening) -> None:
    """Answer at *listening* until cancelled. It stays the caller's to close."""
    from hypercorn.config import Config as Settings
    from hypercorn.trio.tcp_server import TCPServer
    from hypercorn.trio.worker_context import WorkerContext
    from hypercorn.typing import ConnectionState
    from hypercorn.utils import wrap_app

    settings = Settings()
    settings.errorlog, settings.accesslog = log, None
    settings.include_server_header = False
    settings.keep_alive_timeout = settings.ssl_handshake_timeout = PATIENCE
    pages = Pages(parts, listening.keys)
    app = wrap_app(partial(_answer, pages), settings.wsgi_max_body_size, "asgi")
    context = WorkerContext(None)
    open_streams: set[BoundedStream] = set()

    async def serve_reader(inner: trio.SocketStream) -> None:
        stream = BoundedStream(inner)
        if len(open_streams) >= parts.config.http.connections:
            parts.counts.events["readers_turned_away"] += 1
            stream.cut()
            return
        open_streams.add(stream)
        spoken = (
            trio.SSLStream(stream, listening.tls, server_side=True, https_compatible=True) if listening.tls else stream
        )
        try:
            await TCPServer(app, settings, context, ConnectionState({}), cast(Any, spoken))
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # the reader is gone
        finally:
            open_streams.discard(stream)
            stream.cut()

    log.info("HTTP is answered at %s", listening.address)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pages.live.run, name="page")
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening.sock))
        nursery.start_soon(trio.serve_listeners, serve_reader, [listener], name="readers")
        try:
            await trio.sleep_forever()
        finally:
            for stream in open_streams:
                stream.cut()


@attrs.frozen
class Response:
    status: int
    body: bytes
    kind: str = "text/plain; charset=utf-8"
    more: tuple[tuple[bytes, bytes], ...] = ()


class Pages:
    """The pages, by path. Each is made at once, from *parts*."""

    def __init__(self, parts: Parts, keys: tuple[bytes, ...]) -> None:
        self._parts = parts
        self._keys = keys
        self._metrics = ServerMetrics(parts)
        self._page, self._policy = page_and_policy()
        self.live = LivePage(parts)
        self._pages: Mapping[str, Callable[[bytes], Response]] = {
            "/": self._html,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._exposition,
            "/api/status": self._status,
            "/api/inventory": lambda accept: _json(inventory(self._parts)),
            "/api/history": lambda accept: _json(self.live.history()),
            EVENTS: lambda accept: Response(200, b"", "text/event-stream"),
            "/api/requests": lambda accept: _json({"requests": self._parts.requests.find("")}),
        }

    def answer(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> Response:
        page = self._pages.get(path)
        if path not in OPEN and not self._may_read(headers.get(b"authorization", b"")):
            self._parts.counts.events["readers_refused"] += 1
            why = b"this server wants a key of its http.key_file, as in `Authorization: Bearer KEY`\n"
            return Response(401, why, more=((b"www-authenticate", b"Bearer"),))
        if page is None:
            return Response(404, f"there is no {path}; there are {', '.join(self._pages)}\n".encode())
        if method not in ("GET", "HEAD"):
            return Response(405, b"read it with GET\n", more=((b"allow", b"GET, HEAD"),))
        try:
            return page(headers.get(b"accept", b""))
        except Exception:
            self._parts.counts.events["handler_bugs"] += 1
            log.exception("bug in the page %s", path)
            return Response(500, b"a bug of the server; its log has it\n")

    def _may_read(self, authorization: bytes) -> bool:
        """Whether *authorization* has one of the keys. Each is compared, in a time that does not tell how much fits."""
        scheme, _, key = authorization.partition(b" ")
        fits = [hmac.compare_digest(key.strip(), each) for each in self._keys]
        return not self._keys or (scheme.lower() == b"bearer" and any(fits))

    def _html(self, accept: bytes) -> Response:
        return Response(200, self._page, "text/html; charset=utf-8", ((b"content-security-policy", self._policy),))

    def _healthz(self, accept: bytes) -> Response:
        return Response(200, b"alive\n")

    def _readyz(self, accept: bytes) -> Response:
        faults = find_faults(self._parts)
        table = {"ready": not faults, "reasons": [attrs.asdict(fault) for fault in faults]}
        return _json(table, 503 if faults else 200)

    def _exposition(self, accept: bytes) -> Response:
        body, kind = self._metrics.exposition(accept.decode("latin-1"))
        return Response(200, body, kind)

    def _status(self, accept: bytes) -> Response:
        return _json(report(self._parts))


def _json(table: object, status: int = 200) -> Response:
    return Response(status, json.dumps(table).encode() + b"\n", "application/json")


async def _answer(pages: Pages, scope: Any, receive: Any, send: Any) -> None:
    """The ASGI application. A body that comes with the request is not read."""
    if scope["type"] != "http":
        await send({"type": "websocket.close", "code": 1008, "reason": "there are no web sockets here"})
        return
    response = pages.answer(scope["method"], scope["path"], dict(scope["headers"]))
    streams = response.kind == "text/event-stream" and scope["method"] != "HEAD"
    headers = [(b"content-type", response.kind.encode()), (b"cache-control", b"no-store")]
    headers += [(b"x-content-type-options", b"nosniff"), *response.more]
    if not streams:
        headers.append((b"content-length", b"%d" % len(response.body)))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    if streams:
        await _send_events(pages.live, receive, send)
        return
    body = b"" if scope["method"] == "HEAD" else response.body
    await send({"type": "http.response.body", "body": body})


async def _send_events(live: LivePage, receive: Any, send: Any) -> None:
    """Send events until the reader is gone."""

    async def wait_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass  # a body, which nobody asked for
        nursery.cancel_scope.cancel()

    with live.reading():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_gone, name="reader of events")
            event = live.event()
            while True:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                event = await live.next_event()
