"""An engine, as a server knows it."""

from collections.abc import Iterator

import attrs

from lmcache_trio._core.index.session import Sessions
from lmcache_trio._core.keys import namespace_of
from lmcache_trio._server.peer import Peer
from lmcache_trio._wire.messages import Register

__all__ = ["Engine"]


@attrs.define(eq=False)
class Engine:
    """One scheduler and its workers, and the namespace that their layouts make."""

    name: str
    shards: int
    chunk_tokens: int
    """Tokens of one of its chunks. The engine's first client decides."""
    scheduler: Peer | None = None
    workers: dict[int, Peer] = attrs.field(factory=dict)
    layouts: dict[int, Register] = attrs.field(factory=dict)
    attaching: dict[int, Register] = attrs.field(factory=dict)
    """Layouts that count once the memory of their worker is attached. The worker moves nothing before."""
    identity: bytes = b""
    """The identity of its model, as its scheduler said last."""
    namespace: bytes = b""
    last_layout: tuple[bytes, ...] = ()
    """The latest complete set of fingerprints, by shard: all grants are of this layout."""
    is_told_of: bool = False
    """Whether the log says already that a shard's layout is missing."""
    sessions: Sessions = attrs.field(factory=Sessions)
    digests: int = 0  # of all sessions
    resets_due: set[bytes] = attrs.field(factory=set)
    """Identities whose chunks are to be dropped as soon as the layout is known."""

    def namespace_under(self, identity: bytes) -> bytes:
        """The namespace of its layout under *identity*; b"" while a shard's layout is missing."""
        if len(self.layouts) < self.shards:
            return b""
        layouts = [self.layouts[shard].fingerprint for shard in range(self.shards)]
        return namespace_of([*layouts, b"%d tokens" % self.chunk_tokens], identity)

    def peers(self) -> Iterator[Peer]:
        if self.scheduler is not None:
            yield self.scheduler
        yield from self.workers.values()
