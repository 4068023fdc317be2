"""Namespaces as generations of chunks: a reset puts an empty generation in the place of the former one.

A generation has a number, which stands in each of its rows, and counts of its rows by state. So the chunks of a whole
server are a sum over generations, and a reset changes no row. A number is used again once its generation is over.

This file finds and counts generations. `Index` and `Chunks` decide about the chunks of a replaced generation.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from enum import IntEnum

import attrs

from lmcache_trio._core.groups import EVERY, Group, Need
from lmcache_trio._core.index.spread import spread
from lmcache_trio.errors import Misuse
from lmcache_trio.statistics import ChunksHeld, LayoutHeld

__all__ = ["ALONE", "DOOMED", "READY", "WRITING", "Generations", "Layout", "Namespace", "State", "Whole"]

_TABLE_OF = spread(256, 48)
_TABLES = _TABLE_OF[-1] + 1


class State(IntEnum):
    """The states of a row. A row that is FREE belongs to no chunk; an absent chunk has no row."""

    FREE = 0
    WRITING = 1
    READY = 2
    DOOMED = 3


WRITING, READY, DOOMED = int(State.WRITING), int(State.READY), int(State.DOOMED)
"""For loops that are run a million times."""

_STATES = {"ready": READY, "writing": WRITING, "quarantined": DOOMED, "stale": READY}
"""Words for users. A READY row of a replaced generation is stale."""


@attrs.frozen
class Whole:
    """What a namespace is a part of: the layout of an engine, with all KV groups, by its *name*; and its *model*."""

    name: bytes = b""
    model: str = ""


ALONE = Whole()
"""Of a namespace that stands for itself."""


@attrs.frozen
class Layout:
    """What all generations of a namespace have alike. Its chunks are the parts of *group* in an engine's chunks.

    *starts* says where each shard's slot, of *lengths*, begins in a chunk's *extent*.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    extent: int
    group: Group = EVERY
    chunk_tokens: int = 0
    whole: Whole = ALONE


class Namespace:
    """One generation of a namespace: its byte layout, its directory from digest to row, and counts of its rows.

    A reset puts a new generation in the place of this one, which is *replaced* from then on: no name leads to its rows
    any more. The directory is several dicts from bytes to int, which the garbage collector does not track. The digest's
    first byte chooses the dict: *table_of* has the dict of each byte, *tables* has each dict once.
    """

    __slots__ = (
        *("chain", "chained", "extent", "layout", "lengths", "name"),
        *("number", "shards", "starts", "table_of", "tables"),
        *("counts", "replaced", "retained", "users"),
    )

    def __init__(self, number: int, name: bytes, layout: Layout) -> None:
        self.number = number  # no other generation has it while a row of this one is left
        self.name = name
        self.layout = layout
        self.lengths, self.starts, self.extent = layout.lengths, layout.starts, layout.extent  # read at each chunk
        self.shards = len(layout.lengths)
        self.chained = layout.group.need is Need.EVERY  # else each chunk is a root: it needs none before it
        self.chain: Namespace | None = None  # of one that is not chained: a chained group beside it, as last looked up
        self.tables: list[dict[bytes, int]] = [{} for _ in range(_TABLES)]
        self.table_of = [self.tables[number] for number in _TABLE_OF]
        self.counts = [0, 0, 0, 0]  # rows, by state
        self.retained = 0  # READY rows with readers; not kept up once the generation is replaced
        self.replaced = False
        self.users = 0  # engines


class Generations:
    """All generations that are not over.

    An empty namespace costs 6 KB; one that no engine uses is forgotten with its last row.
    """

    def __init__(self) -> None:
        self.present: dict[bytes, Namespace] = {}
        """The generation that each namespace's name leads to."""
        self.numbered: dict[int, Namespace] = {}
        self.outdated: deque[Namespace] = deque()
        """Replaced generations; the first one is being swept."""
        self.unused: OrderedDict[bytes, Namespace] = OrderedDict()
        """Namespaces that hold chunks and that no engine uses. The one that was left longest ago comes first."""
        self._spare: list[int] = []
        self.together: dict[tuple[bytes, ...], tuple[Namespace, ...]] = {}
        """What `find_together` found since `present` changed."""

    def attach(
        self,
        name: bytes,
        shard_bytes: Sequence[int],
        rounded: Callable[[int], int],
        group: Group,
        chunk_tokens: int,
        whole: Whole,
    ) -> None:
        """One engine more uses *name*; each shard's slot has a *rounded* length. Misuse: another engine's lengths."""
        self.check_lengths(name, shard_bytes)
        lengths = tuple(shard_bytes)
        known = self.present.get(name)
        if known is not None:
            known.users += 1
            self.unused.pop(name, None)
            return
        starts, extent = [], 0
        for length in lengths:
            starts.append(extent)
            extent += rounded(length)
        layout = Layout(lengths, tuple(starts), extent, group, chunk_tokens, whole)
        self._enter(Namespace(self._number(), name, layout), users=1)

    def check_lengths(self, name: bytes, shard_bytes: Sequence[int]) -> None:
        """Misuse, exactly if `attach` would refuse the same."""
        lengths, known = tuple(shard_bytes), self.present.get(name)
        if known is not None and known.lengths != lengths:
            raise Misuse(
                f"shard_bytes is {lengths}: this namespace was attached with {known.lengths}; a fingerprint must tell "
                "layouts of other lengths apart"
            )
        if not lengths or min(lengths) < 1:
            raise Misuse(f"shard_bytes is {lengths}: give one length of 1 or more per shard")

    def find_together(self, names: tuple[bytes, ...]) -> tuple[Namespace, ...]:
        """The present generations of *names*, the groups of an engine; none if one is not attached.

        The chained ones come last. Leases share the tuple: each of its own would be more for a garbage collection.
        """
        if not all(name in self.present for name in names):
            return ()
        known = tuple(sorted([self.present[name] for name in names], key=lambda namespace: namespace.chained))
        for namespace in known:
            namespace.chain = known[-1] if known[-1].chained and not namespace.chained else None
        self.together[names] = known
        return known

    def detach(self, namespace: Namespace) -> None:
        """One engine less uses *namespace*."""
        namespace.users -= 1
        if not namespace.users:
            self.unused[namespace.name] = namespace
            self.leave(namespace)

    def replace(self, namespace: Namespace) -> None:
        """*namespace* is outdated from now on. If an engine uses it, an empty generation takes its place."""
        self.retire(namespace)
        if not namespace.users:
            return
        self._enter(Namespace(self._number(), namespace.name, namespace.layout), namespace.users)

    def retire(self, namespace: Namespace) -> None:
        """*namespace* is outdated from now on, and its name leads nowhere."""
        del self.present[namespace.name]
        self.together.clear()
        self.unused.pop(namespace.name, None)
        namespace.replaced = True
        namespace.table_of = []  # no digest is found any more; a sweep takes the tables apart
        self.outdated.append(namespace)

    def leave(self, namespace: Namespace) -> None:
        """A row of *namespace*, its directory or its last user is gone. Forget the namespace if that was all."""
        if any(namespace.counts) or (namespace.tables if namespace.replaced else namespace.users):
            return
        if not namespace.replaced:
            del self.present[namespace.name], self.unused[namespace.name]
            self.together.clear()
        del self.numbered[namespace.number]
        self._spare.append(namespace.number)

    def layouts(self) -> list[LayoutHeld]:
        """What is held of each layout."""
        parts: dict[bytes, list[Namespace]] = {}
        for namespace in self.present.values():
            parts.setdefault(namespace.layout.whole.name or namespace.name, []).append(namespace)
        return [_held(name, groups) for name, groups in parts.items()]

    def held(self) -> ChunksHeld:
        """Chunks, slots and bytes by state, and the bytes that readers retain."""
        held = {f"{what}_{state}": 0 for state in _STATES for what in ("chunks", "slots", "bytes")}
        retained = 0
        for namespace in self.numbered.values():
            for name, state in _STATES.items():
                if state == READY and namespace.replaced != (name == "stale"):
                    continue
                chunks = namespace.counts[state]
                held[f"chunks_{name}"] += chunks
                held[f"slots_{name}"] += chunks * namespace.shards
                held[f"bytes_{name}"] += chunks * namespace.extent
            if not namespace.replaced:
                retained += namespace.retained * namespace.extent
        return ChunksHeld(**held, bytes_retained=retained)

    def _number(self) -> int:
        return self._spare.pop() if self._spare else len(self.numbered)

    def _enter(self, namespace: Namespace, users: int) -> None:
        namespace.users = users
        self.present[namespace.name] = namespace
        self.together.clear()
        self.numbered[namespace.number] = namespace


def _held(name: bytes, groups: Sequence[Namespace]) -> LayoutHeld:
    """What is held of the layout *name*, whose parts are those of *groups*."""
    chunks, layout = max(namespace.counts[READY] for namespace in groups), groups[0].layout
    return LayoutHeld(
        namespace=name.hex(),
        model=layout.whole.model,
        engines=groups[0].users,
        chunk_tokens=layout.chunk_tokens,
        chunk_bytes=sum(namespace.extent for namespace in groups),
        chunks=chunks,
        tokens=chunks * layout.chunk_tokens,
        bytes=sum(sum(namespace.counts) * namespace.extent for namespace in groups),
        bytes_retained=sum(namespace.retained * namespace.extent for namespace in groups),
    )
