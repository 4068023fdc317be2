"""The `device` path of a worker: it names blocks, and the server's transfer worker moves them.

Blocks that were named belong to the server until it says that their copy has ended. Giving up a wait does not end a
copy: when nothing comes of any request for a while, the late ones are withdrawn, and their replies still waited for.
When the connection is lost under one, the blocks are held until the server says over another connection that it moves
nothing any more, or its process has ended; so a server whose process cannot be watched is not given any.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import attrs
import trio

from lmcache_trio._transport.conversation import Reply, expect
from lmcache_trio._wire.codec import pack_positions
from lmcache_trio._wire.handles import descriptors_of, encode_export
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
from lmcache_trio.adapters.layered_steps import StepStores, event_of
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.client import Client, connect, wait_server
from lmcache_trio.errors import LMCacheTrioError, Misuse, Unavailable

if TYPE_CHECKING:
    import torch

__all__ = ["ATTACH_TIMEOUT", "DevicePath", "Path"]

logger = logging.getLogger("lmcache_trio")
Path = Literal["auto", "device", "shm"]
_M = TypeVar("_M", bound=Message)

ATTACH_TIMEOUT = 60.0
"""Seconds that a server may take to open the KV: it enters 10 GB/s into its page table."""
_REFUSED_WAIT = 5.0
"""Longest pause before a server that is there, and does not say what it moves, is asked again: as `Link` has it."""


class DevicePath:
    """Which path a worker takes, and the device's."""

    def __init__(
        self,
        wanted: Path,
        address: str,
        hello: Hello,
        reply_timeout: float,
        check_layout: Callable[[Client, Job], None] = lambda client, job: None,
    ) -> None:
        if wanted not in get_args(Path):
            raise Misuse(f"path is {wanted!r}: it must be one of {', '.join(get_args(Path))}")
        self.wanted = wanted
        self.taken: Literal["device", "shm"] = "shm"
        self.reason = "no KV is registered yet"
        self._address = address
        self._hello = hello
        self._reply_timeout = reply_timeout
        self._check_layout = check_layout
        """Called as a job's question goes out; raises if the job does not fit what the server knows."""
        self._progress = 0.0
        """When the server last said that it had moved something."""
        self._settling = 0
        self._pidfd = -1
        self._watching = trio.Lock()
        """Whoever has it waits for `_pidfd`: one descriptor takes one waiter."""
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

        self._settling = mine = self._settling + 1
        try:
            export = export_of(kv_caches, num_blocks)
            self._watch(client)
            attach = Attach(client.new_id(), encode_export(export))
            with trio.fail_after(ATTACH_TIMEOUT):
                await client.request(attach, Ack, descriptors=descriptors_of(export))
        except (Unavailable, Misuse, trio.TooSlowError) as exc:
            if client.lost:
                raise
            if mine == self._settling:  # else the layout was registered anew meanwhile, and is being settled there
                self._take("shm", str(exc) or "the server took too long to open the KV")
        else:
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
        fd = client.open_pidfd()
        if fd is None:
            raise Unavailable("the server's process cannot be watched, so its end could not be told")
        self.close()
        self._pidfd = fd

    def close(self) -> None:
        """Let go of the server's process. Idempotent."""
        fd, self._pidfd = self._pidfd, -1
        if fd >= 0:
            with contextlib.suppress(RuntimeError):  # outside of the loop nobody waits
                trio.lowlevel.notify_closing(fd)
            os.close(fd)

    # --- moving -----------------------------------------------------------------------------------------------------

    async def store(self, client: Client, job: Job, step: StepStores | None = None) -> Stored:
        """Store what *job* says; returns when its blocks are the engine's own again.

        With *step* each layer is copied once that says that it is written.
        """
        spec = job.spec
        assert isinstance(spec, StoreSpec)
        await job.turn()
        if step is not None and step.dropped:
            raise Unavailable("its step was dropped before it began")
        self._check_layout(client, job)
        number, blocks, layered = client.new_id(), pack_positions(spec.block_ids), step is not None
        event = b"" if layered else event_of(job.fence)
        ask = StoreBlocks(number, spec.session, spec.parent, spec.digests, blocks, layered, event)

        def sent() -> None:
            job.asked.set()
            if step is not None:
                step.begun(number)

        try:
            return await self._moved(client, ask, Stored, sent, step)
        finally:
            if step is not None:
                step.over(number)

    async def retrieve(self, client: Client, job: Job, on_layers: Callable[[int], None] | None = None) -> bool:
        """Fill *job*'s blocks; False: they hold anything. *on_layers* hears how many leading layers are there."""
        spec = job.spec
        assert isinstance(spec, LoadSpec)
        self._check_layout(client, job)
        number = client.new_id()
        blocks = pack_positions(spec.block_ids)
        layered = on_layers is not None
        ask = RetrieveBlocks(
            number, spec.lease, spec.start, spec.count, spec.skip_blocks, blocks, layered, event_of(job.fence)
        )
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
        step: StepStores | None = None,
    ) -> _M:
        """Shielded: the blocks are not the engine's before this returns or raises.

        Until *step* has finished it is the engine that is waited for, and the server is not late.
        """
        reply: list[Reply] = []
        come = trio.Event()

        def on_reply(message: Reply) -> None:
            self._progress = trio.current_time()
            reply.append(message)
            come.set()

        with trio.CancelScope(shield=True):
            client.request_nowait(ask, on_reply)
            sent()
            if step is not None:
                await _first_of(step.finished, come)
            begun = trio.current_time()
            while not come.is_set() and trio.current_time() < (late := self._late(begun)):
                with trio.move_on_at(late):
                    await come.wait()
            if not come.is_set():
                client.notice_nowait(Withdraw(ask.id))
                await come.wait()
            if client.lost:
                await self._let_go(client)
        return expect(reply[0], kind)

    def _late(self, begun: float) -> float:
        """When a request that began at *begun* is late, as things are: behind others, it takes as long as they do.

        A late one is withdrawn, and waited for on: there is no later time at which its blocks would be given up. While
        the server's process lives a copy of its may run, however long it has said nothing: a load would write into what
        another request has been given by then, a store publish what that wrote. What ends the wait is the reply; or the
        connection's end, which a server that dies brings about, and then `_let_go`: its word, or its process' exit.
        """
        return max(begun, self._progress) + self._reply_timeout

    async def _let_go(self, client: Client) -> None:
        """Return when the server of *client* moves nothing for it any more."""
        async with trio.open_nursery() as first:
            first.start_soon(self._wait_exit, first.cancel_scope)
            first.start_soon(self._ask, client.boot, first.cancel_scope)

    async def _wait_exit(self, done: trio.CancelScope) -> None:
        async with self._watching:  # the next of those who wait goes on when this one has its answer
            while self._pidfd >= 0:
                try:
                    await trio.lowlevel.wait_readable(self._pidfd)
                except trio.ClosedResourceError:
                    continue  # replaced: the same process, watched anew
                except OSError:
                    logger.exception("blocks are held: the end of the server's process can't be waited for")
                    break
                done.cancel()
                return
        await trio.sleep_forever()  # nothing tells of its end: only the server can say that it has let go

    async def _ask(self, boot: bytes, done: trio.CancelScope) -> None:
        hello = attrs.evolve(self._hello, role=Role.OBSERVER, token=os.urandom(16), engine="", shard=0, shards=1)
        pause, told = 0.0, ""
        while True:
            try:
                await wait_server(self._address)
                async with connect(self._address, hello) as asker:
                    if asker.boot != boot:
                        return  # another server: only the old one's exit can tell
                    await asker.request(LetGo(asker.new_id(), self._hello.token), Ack)
                    done.cancel()
            except LMCacheTrioError as exc:
                if str(exc) != told and pause:  # once is nothing: it may be about to end
                    told = str(exc)
                    logger.warning("blocks are held until the server says that it has let go of them, or ends: %s", exc)
            except (
                Exception
            ):  # no descriptor left, or a bug: whatever it is, it does not say that the copies have ended
                logger.exception("blocks are held: the server could not be asked whether it has let go of them")
            await trio.sleep(pause)
            pause = min(_REFUSED_WAIT, 2 * pause or 0.02)

    def _said(self, message: Message) -> None:
        self._progress = trio.current_time()
        if isinstance(message, LayersDone) and message.request in self._on_layers:
            self._on_layers[message.request](message.layers)


async def _first_of(*events: trio.Event) -> None:
    async def wait(event: trio.Event, done: trio.CancelScope) -> None:
        await event.wait()
        done.cancel()

    async with trio.open_nursery() as first:
        for event in events:
            first.start_soon(wait, event, first.cancel_scope)
