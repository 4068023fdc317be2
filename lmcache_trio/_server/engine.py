"""An engine, as a server knows it."""

from collections.abc import Iterator

import attrs

from lmcache_trio._core.groups import EVERY, Group
from lmcache_trio._core.index.session import Sessions
from lmcache_trio._core.keys import layout_of, namespace_of
from lmcache_trio._server.peer import Peer
from lmcache_trio._wire.messages import Register
from lmcache_trio.errors import Misuse

__all__ = ["Engine"]


@attrs.define(eq=False)
class Engine:
    """One scheduler and its workers, and the namespace that their layouts make."""

    name: str
    shards: int
    replicas: int
    """Workers of each shard. They hold the same bytes: whichever comes first stores a chunk, and each loads it."""
    chunk_tokens: int
    """Tokens of one of its chunks. The engine's first client decides."""
    groups: tuple[Group, ...]
    """Its KV groups, of which its first client said what a hit needs."""
    scheduler: Peer | None = None
    model: str = ""
    """The name of its model, as its scheduler said it: for people."""
    workers: dict[int, Peer] = attrs.field(factory=dict)
    """By rank; so are the layouts."""
    layouts: dict[int, Register] = attrs.field(factory=dict)
    attaching: dict[int, Register] = attrs.field(factory=dict)
    """Layouts that count once the memory of their worker is attached. The worker moves nothing before."""
    identity: bytes = b""
    """The identity of its model, as its scheduler said last."""
    namespace: bytes = b""
    """The name of all that it caches; b"" while a layout is missing."""
    namespaces: tuple[bytes, ...] = ()
    """The namespace of each group's parts; empty while a layout is missing."""
    chunk_bytes: int = 0
    """What one of its chunks takes in the arena, over all groups and shards; 0 while a layout is missing."""
    last_layout: bytes = b""
    """The latest `layout` that was known: all grants are of it."""
    is_told_of: bool = False
    """Whether the log says already that a shard's layout is missing."""
    sessions: Sessions = attrs.field(factory=Sessions)
    digests: int = 0  # of all sessions
    refilled_at: int = 0
    """When `Index.filled` has come to this, the chunks that its latest reset dropped have been made up for."""
    resets_due: set[bytes] = attrs.field(factory=set)
    """Identities whose chunks are to be dropped as soon as the layout is known."""
    resets_of_any: dict[bytes, set[bytes]] = attrs.field(factory=dict)
    """Identities whose chunks are to be dropped in any layout, with the layouts in which they were."""

    @property
    def layout(self) -> bytes:
        """The name of what its shards have registered; b"" while a layout is missing, or replicas have several."""
        if len(self.layouts) < self.shards * self.replicas or not self.replicas_agree:
            return b""
        return layout_of([layout.fingerprint for layout in self.shard_layouts()], self.chunk_tokens, self.groups)

    def namespace_under(self, identity: bytes) -> bytes:
        """The namespace of its layout under *identity*; b"" while it has no layout."""
        layout = self.layout
        return layout and namespace_of(layout, identity)

    def namespace_of_group(self, group: int) -> bytes:
        """The namespace of the parts in *group*; b"" while it has no layout. Misuse: there is no such group."""
        if group >= len(self.groups):
            raise Misuse(f"group is {group}: engine {self.name!r} has {len(self.groups)}")
        return self.namespaces[group] if self.namespaces else b""

    def shard_layouts(self) -> list[Register]:
        """The layout of each shard, once no layout is missing."""
        return [self.layouts[shard * self.replicas] for shard in range(self.shards)]

    def part_bytes(self) -> list[list[int]]:
        """The bytes of a chunk's part by group and shard, once no layout is missing."""
        parts = [layout.part_bytes or (layout.shard_bytes,) for layout in self.shard_layouts()]
        return [list(of_group) for of_group in zip(*parts, strict=True)]

    def part_blocks(self, layout: Register) -> tuple[int, ...]:
        """Blocks of a chunk's part by group, for the worker of *layout*."""
        if self.groups == (EVERY,):
            return (self.chunk_tokens // layout.block_tokens,)
        return tuple(group.part_blocks(self.chunk_tokens) for group in self.groups)

    @property
    def lacks(self) -> str:
        """What must happen before it has a cache, while it has none."""
        ranks = set(range(self.shards * self.replicas)) - set(self.layouts)
        missing = sorted({rank // self.replicas for rank in ranks})
        return f"its shards {missing} are registered" if missing else "the replicas of each shard have one layout"

    @property
    def replicas_agree(self) -> bool:
        """Whether the replicas of each shard, as far as they have registered, have one layout."""
        seen = {
            (rank // self.replicas, layout.fingerprint, layout.part_bytes or (layout.shard_bytes,))
            for rank, layout in self.layouts.items()
        }
        return len(seen) == len({shard for shard, _, _ in seen})

    def peers(self) -> Iterator[Peer]:
        if self.scheduler is not None:
            yield self.scheduler
        yield from self.workers.values()
