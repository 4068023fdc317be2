"""What moves a worker's KV: one protocol with two implementations, and what both are given.

A mover is handed jobs whose containment its caller has (`Jobs.contained`): it ends a job that went well, and raises for
one that did not. Where it is handed several, each costs no other. It never gives a block back while a copy may run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import attrs
import trio

from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.adapters.worker.jobs import LoadJob, StoreJob
from lmcache_trio.adapters.worker.store_step import StoreStep
from lmcache_trio.client import Client
from lmcache_trio.errors import Gone, Unavailable

if TYPE_CHECKING:
    from lmcache_trio.adapters.worker.paged import PagedKV

__all__ = ["Mover", "Probe", "RegisteredKV", "reply_within"]

Probe = Callable[[str, StoreSpec | LoadSpec], None]
"""Where a test breaks or holds up a copy of this process: called in the copying thread with the point it has reached.

    slots known      the slots are named, nothing is copied yet
    half copied      half of the first chunk is copied
    before commit    all of a store is copied, and not yet committed
    before valid     all of a load is copied, and not yet known to be valid
    layer N          of a move by layers: layer N is copied, for all chunks
"""


class Mover(Protocol):
    """Moves the blocks of jobs: of one, all at once, or of all jobs of a step, layer by layer.

    The jobs of a step share the order of its layers: layer 0 of each is moved before layer 1 of any.
    """

    async def store(self, client: Client, jobs: Sequence[StoreJob], step: StoreStep | None = None) -> None:
        """Store *jobs*, each all at once; with *step* each layer once it is written, published after its end."""
        ...

    async def load(self, client: Client, jobs: Sequence[LoadJob]) -> None:
        """Fill the blocks of *jobs*, each all at once; layer by layer if they have gates."""
        ...


@attrs.define(eq=False)
class RegisteredKV:
    """Which KV the host registered, which one the server knows of, and the tokens of a chunk there."""

    latest: "PagedKV | None" = None
    """What the host registered last."""
    known: "PagedKV | None" = None
    """In the loop: the one whose layout the server of this connection was told last."""
    chunk_tokens: int = 0
    """0 before it is known."""

    def check(self, client: Client, job: StoreJob | LoadJob, *, alike: bool) -> None:
        """In the loop, as *job*'s request goes out: `Gone` if it was planned for another layout than the server's.

        *alike*: other KV will do, if it has the same layout.
        """
        spec, known = job.spec, self.known
        if spec.chunk_tokens != client.chunk_tokens:
            why = f"its chunks have {spec.chunk_tokens} tokens, and the server's {client.chunk_tokens}"
        elif known is None:
            raise Unavailable("the layout is not registered")
        elif job.kv is not known and not (alike and job.kv.layout == known.layout):
            why = "other KV caches were registered"
        else:
            return
        if isinstance(job, StoreJob):
            job.reason = "layout"
        raise Gone(f"the layout changed after it was planned: {why}")


@contextmanager
def reply_within(seconds: float) -> Iterator[None]:
    """`Unavailable` if what is awaited within takes longer than *seconds*."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise Unavailable(f"the server did not reply within {seconds} s")
