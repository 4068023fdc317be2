"""The `device` path of a worker: it names blocks, and the server's transfer worker moves them.

Blocks that were named belong to the server until it says that their copy has ended. Giving up a wait does not end a
copy: a late request is withdrawn, and its reply still waited for. When the connection is lost under it, the blocks are
held until the server says over another connection that it moves nothing any more, or its process has ended.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import attrs
import trio

from lmcache_trio._transport import wait_listening
from lmcache_trio._transport.conversation import Reply, expect
from lmcache_trio._wire.codec import pack_positions
from lmcache_trio._wire.handles import encode_export
from lmcache_trio._wire.messages import (
    Ack,
    Attach,
    Hello,
    LayersDone,
    LetGo,
    Message,
    RetrieveBlocks,
    Retrieved,
    Role,
    StoreBlocks,
    Stored,
    Withdraw,
)
from lmcache_trio.adapters.jobs import Job
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.client import Client, connect
from lmcache_trio.errors import LMCacheTrioError, Misuse, Unavailable

if TYPE_CHECKING:
    import torch

__all__ = ["ATTACH_TIMEOUT", "DevicePath", "Path"]

logger = logging.getLogger("lmcache_trio")
Path = Literal["auto", "device", "shm"]
_M = TypeVar("_M", bound=Message)

ATTACH_TIMEOUT = 60.0
"""Seconds that a server may take to open the KV: it enters 10 GB/s into its page table."""


class DevicePath:
    """Which path a worker takes, and the device's."""

    def __init__(self, wanted: Path, address: str, hello: Hello, reply_timeout: float) -> None:
        if wanted not in get_args(Path):
            raise Misuse(f"path is {wanted!r}: it must be one of {', '.join(get_args(Path))}")
        self.wanted = wanted
        self.taken: Literal["device", "shm"] = "shm"
        self.reason = "no KV is registered yet"
        self._address = address
        self._hello = hello
        self._reply_timeout = reply_timeout
        self._pidfd = -1
        self._on_layers: dict[int, Callable[[int], None]] = {}

    @property
    def usable(self) -> bool:
        """Can anything be moved? Not when the device was asked for and is not to be had."""
        return self.taken == "device" or self.wanted != "device"

    # --- choosing ---------------------------------------------------------------------------------------------------

    async def settle(self, client: Client, kv_caches: "Mapping[str, torch.Tensor]", num_blocks: int) -> None:
        """Choose for this connection, whose layout is registered."""
        if self.wanted == "shm":
            self._take("shm", "it was asked for")
            return
        from lmcache_trio.adapters.shared_kv import export_of

        try:
            packed = encode_export(export_of(kv_caches, num_blocks))
            with trio.fail_after(ATTACH_TIMEOUT):
                await client.request(Attach(client.new_id(), packed), Ack)
        except (Unavailable, Misuse, trio.TooSlowError) as exc:
            if client.lost:
                raise
            self._take("shm", str(exc) or "the server took too long to open the KV")
        else:
            self._watch(client)
            self._take("device", "the server has opened this engine's KV")

    def _take(self, path: Literal["device", "shm"], reason: str) -> None:
        if (path, reason) != (self.taken, self.reason):
            self.taken, self.reason = path, reason
            if self.usable:
                logger.info("KV takes the path %r: %s", path, reason)
            else:
                logger.warning("working without a cache: the path 'device' was asked for, but %s", reason)

    def _watch(self, client: Client) -> None:
        client.on_push = self._said
        self.close()
        if client.peer_pid is not None:
            try:
                self._pidfd = os.pidfd_open(client.peer_pid)
            except OSError as exc:  # dead since it replied; its connection is about to be lost
                raise Unavailable(f"the server's process cannot be watched: {exc.strerror}") from exc

    def close(self) -> None:
        """Let go of the server's process. Idempotent."""
        fd, self._pidfd = self._pidfd, -1
        if fd >= 0:
            os.close(fd)

    # --- moving -----------------------------------------------------------------------------------------------------

    async def store(self, client: Client, job: Job) -> Stored:
        """Store what *job* says; returns when its blocks are the engine's own again."""
        spec = job.spec
        assert isinstance(spec, StoreSpec)
        if job.before is not None:  # tasks begin in any order; a chunk's parent must be reserved before it
            await job.before.asked.wait()
            job.before = None
        blocks = pack_positions(spec.block_ids)
        event: bytes = job.fence.ipc_handle() if job.fence is not None else b""
        ask = StoreBlocks(client.new_id(), spec.session, spec.parent, spec.digests, blocks, event)
        return await self._moved(client, ask, Stored, job.asked.set)

    async def retrieve(self, client: Client, spec: LoadSpec, on_layers: Callable[[int], None] | None = None) -> bool:
        """Fill *spec*'s blocks; False: they hold anything. *on_layers* hears how many leading layers are there."""
        number = client.new_id()
        blocks = pack_positions(spec.block_ids)
        layered = on_layers is not None
        ask = RetrieveBlocks(number, spec.lease, spec.start, spec.count, spec.skip_blocks, blocks, layered)
        if on_layers is not None:
            self._on_layers[number] = on_layers
        try:
            return (await self._moved(client, ask, Retrieved)).valid
        finally:
            self._on_layers.pop(number, None)

    async def _moved(
        self,
        client: Client,
        ask: StoreBlocks | RetrieveBlocks,
        kind: type[_M],
        sent: Callable[[], None] = lambda: None,
    ) -> _M:
        """Shielded: the blocks are not the engine's before this returns or raises."""
        reply: list[Reply] = []
        come = trio.Event()

        def on_reply(message: Reply) -> None:
            reply.append(message)
            come.set()

        with trio.CancelScope(shield=True):
            client.request_nowait(ask, on_reply)
            sent()
            with trio.move_on_after(self._reply_timeout):
                await come.wait()
            if not come.is_set():
                client.notice_nowait(Withdraw(ask.id))
                await come.wait()
            if client.lost:
                await self._let_go(client)
        return expect(reply[0], kind)

    async def _let_go(self, client: Client) -> None:
        """Return when the server of *client* moves nothing for it any more."""
        async with trio.open_nursery() as first:
            first.start_soon(self._wait_exit, first.cancel_scope)
            first.start_soon(self._ask, client.boot, first.cancel_scope)

    async def _wait_exit(self, done: trio.CancelScope) -> None:
        if self._pidfd >= 0:
            await trio.lowlevel.wait_readable(self._pidfd)
            done.cancel()

    async def _ask(self, boot: bytes, done: trio.CancelScope) -> None:
        hello = attrs.evolve(self._hello, role=Role.OBSERVER, token=os.urandom(16), engine="", shard=0, shards=1)
        while True:
            try:
                async with connect(self._address, hello) as asker:
                    if asker.boot != boot:
                        return  # another server: only the old one's exit can tell
                    try:
                        await asker.request(LetGo(asker.new_id(), self._hello.token), Ack)
                        done.cancel()
                    except Unavailable:
                        if not asker.lost:
                            raise Misuse("it refused to say") from None
                        raise
            except Unavailable:
                await wait_listening(self._address)
            except LMCacheTrioError as exc:
                logger.info("the server does not say what it still moves (%s): waiting for its end", exc)
                return

    def _said(self, message: Message) -> None:
        if isinstance(message, LayersDone) and message.request in self._on_layers:
            self._on_layers[message.request](message.layers)
