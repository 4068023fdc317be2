"""The mover of the path `device`: it names blocks, and the server's transfer worker moves them.

Named blocks belong to the server until it says that their copy has ended. A copy does not end because its wait does:
when no reply to any request has come for a while, the mover withdraws the late requests, and still waits for their
replies. If the connection is lost under a request, its blocks are held until the server says over another connection
that it moves nothing any more, or its process has ended. So a server whose process cannot be watched gets no blocks.
"""

import contextlib
import logging
import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import trio

from lmcache_trio._transport.conversation import Reply, expect
from lmcache_trio._wire.codec import POSITIONS
from lmcache_trio._wire.handles import descriptors_of, encode_export
from lmcache_trio._wire.messages import (
    Ack,
    Attach,
    Hello,
    LetGo,
    Message,
    RetrieveBlocks,
    Retrieved,
    Role,
    StoreBlocks,
    Stored,
    Withdraw,
)
from lmcache_trio.adapters.link import REFUSED_WAIT
from lmcache_trio.adapters.worker.jobs import LoadJob, Moved, RegisteredKV, StoreJob
from lmcache_trio.client import Client, connect, wait_server
from lmcache_trio.errors import LMCacheTrioError, Unavailable

if TYPE_CHECKING:
    from lmcache_trio.adapters.worker.paged import PagedKV

__all__ = ["ATTACH_TIMEOUT", "DeviceMover"]

logger = logging.getLogger("lmcache_trio")
_M = TypeVar("_M", bound=Message)

ATTACH_TIMEOUT = 60.0
"""Seconds that a server may take to open the KV, of which it enters 10 GB/s into its page table."""


class DeviceMover:
    """Asks the server at *address*, as the worker that *hello* names. *reply_timeout*: seconds without any progress
    after which a request is late. *server_uids*: as `connect` has them.
    """

    def __init__(
        self,
        address: str,
        hello: Hello,
        registered: RegisteredKV,
        reply_timeout: float,
        server_uids: Collection[int] | None = None,
    ) -> None:
        self._address = address
        self._server_uids = server_uids
        self._hello = hello
        self._registered = registered
        self._reply_timeout = reply_timeout
        self._progress = 0.0
        """When the server last replied to a request, or sent a push."""
        self._pidfd = -1
        self._watching = trio.Lock()
        """Its holder waits for `_pidfd`, because one descriptor takes one waiter."""

    async def attach(self, client: Client, kv: "PagedKV") -> None:
        """Have the server open the engine's KV. `Unavailable`, `Misuse` and `TooSlowError` say why it does not."""
        from lmcache_trio.adapters.shared_kv import export_of

        export = export_of(kv.tensors, kv.num_blocks, kv.group_of)
        client.on_push = self._said
        fd = client.open_pidfd()
        if fd is None:
            raise Unavailable("the server's process cannot be watched, so its end could not be told")
        self.close()
        self._pidfd = fd
        attach = Attach(client.new_id(), encode_export(export))
        with trio.fail_after(ATTACH_TIMEOUT):
            await client.request(attach, Ack, descriptors=descriptors_of(export))

    def close(self) -> None:
        """Let go of the server's process. Idempotent."""
        fd, self._pidfd = self._pidfd, -1
        if fd >= 0:
            with contextlib.suppress(RuntimeError):  # outside of the loop nobody waits
                trio.lowlevel.notify_closing(fd)
            os.close(fd)

    # --- moving -----------------------------------------------------------------------------------------------------

    async def store(self, client: Client, job: StoreJob) -> Moved:
        """See `Mover.store`."""
        if job.before is not None:
            await job.before.asked.wait()
        self._registered.check(client, job, alike=False)
        spec, blocks, event = job.spec, POSITIONS.pack(job.spec.block_ids), _event_of(job.fence)
        named = spec.session, spec.parent, spec.digests, blocks
        ask = StoreBlocks(client.new_id(), *named, event=event, group=spec.group)
        stored = await self._moved(client, job, ask, Stored)
        return Moved(stored.copied, stored.dropped)

    async def load(self, client: Client, job: LoadJob) -> Moved | None:
        """See `Mover.load`."""
        self._registered.check(client, job, alike=False)
        spec, blocks, event = job.spec, POSITIONS.pack(job.spec.block_ids), _event_of(job.fence)
        named = spec.lease, spec.start, spec.count, spec.skip_blocks, blocks
        ask = RetrieveBlocks(client.new_id(), *named, event=event, group=spec.group)
        loaded = await self._moved(client, job, ask, Retrieved)
        return Moved(spec.count) if loaded.valid and job.kv is self._registered.latest else None

    async def _moved(
        self, client: Client, job: StoreJob | LoadJob, ask: StoreBlocks | RetrieveBlocks, kind: type[_M]
    ) -> _M:
        """The server's reply to *ask*. Shielded: the blocks are not the engine's before this returns or raises."""
        reply: list[Reply] = []
        come = trio.Event()

        def on_reply(message: Reply) -> None:
            self._progress = trio.current_time()
            reply.append(message)
            come.set()

        with trio.CancelScope(shield=True):
            client.request_nowait(ask, on_reply)
            job.asked.set()
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
        """When a request that began at *begun* is late, unless a message comes before: behind others it takes longer.

        A late request is withdrawn, but its blocks stay the server's, for however long: its copy may still be running
        while the server's process lives. A load would write into blocks that another request has by then, and a store
        would publish what that request wrote. The reply ends the wait. So does the end of the connection, which comes
        when a server dies; `_let_go` then waits for the server's word, or for the exit of its process.
        """
        return max(begun, self._progress) + self._reply_timeout

    async def _let_go(self, client: Client) -> None:
        """Return when the server of *client* moves nothing for it any more."""
        async with trio.open_nursery() as first:
            first.start_soon(self._wait_exit, first.cancel_scope)
            first.start_soon(self._ask, client.boot, first.cancel_scope)

    async def _wait_exit(self, done: trio.CancelScope) -> None:
        async with self._watching:  # the next waiter goes on when this one has its answer
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
        await trio.sleep_forever()  # its end cannot be seen: only the server can say that it has let go

    async def _ask(self, boot: bytes, done: trio.CancelScope) -> None:
        hello = attrs.evolve(self._hello, role=Role.OBSERVER, token=os.urandom(16), engine="", shard=0, shards=1)
        pause, told = 0.0, ""
        while True:
            try:
                await wait_server(self._address)
                async with connect(self._address, hello, self._server_uids) as asker:
                    if asker.boot != boot:
                        return  # another server: only the exit of the old one can tell
                    await asker.request(LetGo(asker.new_id(), self._hello.token), Ack)
                    done.cancel()
            except LMCacheTrioError as exc:
                if str(exc) != told and pause:  # not at the first time: the server may be about to end
                    told = str(exc)
                    logger.warning("blocks are held until the server says that it has let go of them, or ends: %s", exc)
            except Exception:  # no descriptor left, or a bug: neither says that the copies have ended
                logger.exception("blocks are held: the server could not be asked whether it has let go of them")
            await trio.sleep(pause)
            pause = min(REFUSED_WAIT, 2 * pause or 0.02)

    def _said(self, message: Message) -> None:
        self._progress = trio.current_time()


def _event_of(fence: Any) -> bytes:
    """The event that the server must wait for. KV on a GPU has one, behind what the engine had submitted by *fence*."""
    event: bytes = fence.ipc_handle() if fence is not None else b""
    return event
