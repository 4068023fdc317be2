"""The index's model: each chunk as one object, and its readers and writers. Too simple to be wrong.

It does not foretell evictions, nor when chunks of a reset namespace are given back: it looks which ones are gone, and
checks that each of them was free to go. The rules are in `test_index_model`.
"""

from collections.abc import Sequence
from itertools import count
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from lmcache_trio._core.groups import EVERY, Group, Need
from lmcache_trio._core.index.arena import Arena
from lmcache_trio._core.index.index import Hold, Index
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio.statistics import table

PATHS = ["abcd", "abce", "afg", "hij"]
PAGES = 10
LEASE, WRITE = 10, 17
SHARE = 0.5
WRITE_SHARE = 0.6
CHUNK = 16
A, B, C = b"A" * 32, b"B" * 32, b"C" * 32
"""Namespaces. The chunks of C are not chained."""
BRANCHED = {b"a".ljust(32, b"."), b"ab".ljust(32, b"."), b"abc".ljust(32, b".")}
"""Where paths leave each other, or shortly before: such a part stays if both paths are there in a chained namespace."""
GROUPS = st.sampled_from([Group(Need.WINDOW, 33, 16), Group(Need.LOCAL, 48, 16), Group(Need.STATE)])


def name(chain: str) -> bytes:
    return chain.encode().ljust(32, b".")


class Chunk:
    def __init__(self, key: ChunkKey, base: int, length: int, parent: "Chunk | None") -> None:
        self.key, self.base, self.length, self.parent = key, base, length, parent
        self.state = "writing"
        self.engine, self.session = "", ("", 0)
        self.claimed: set[int] = set()
        self.committed: set[int] = set()
        self.users: set[object] = set()  # copies into it and readers of it that have not ended
        self.deadline = 0.0
        self.cold = False


class IndexModel(RuleBasedStateMachine):
    """The model, and the invariants between any two rules."""

    @initialize(
        shards=st.integers(1, 3),
        big=st.integers(1, 3),
        write_share=st.sampled_from([WRITE_SHARE, 1.0]),
        group=GROUPS,
    )
    def make(self, shards: int, big: int, write_share: float, group: Group) -> None:
        self.write_share = write_share
        ids = count(1)
        self.arena = Arena()
        self.arena.reserve_head(4096)
        self.index = Index(
            self.arena,
            new_id=lambda: next(ids).to_bytes(16, "big"),
            lease_share=SHARE,
            write_share=self.write_share,
            lease_timeout=LEASE,
            reservation_timeout=WRITE,
        )
        self.index.grow((PAGES + 1) * 4096)
        self.index.changes.watched = True
        self.told: set[ChunkKey] = set()
        self.pages = {A: [1] * shards, B: [big] + [1] * (shards - 1), C: [1] * shards}
        self.groups = {A: EVERY, B: EVERY, C: group}
        for namespace, pages in self.pages.items():
            self.index.attach(namespace, [4096 * n - 5 for n in pages], self.groups[namespace], CHUNK)
        self.shards = shards
        self.now = 0.0
        self.ended: set[tuple[str, int]] = set()  # sessions
        self.seen: dict[ChunkKey, Chunk] = {}  # in the directory
        self.alive: set[Chunk] = set()  # their bytes are in use
        self.leases: dict[bytes, dict[str, Any]] = {}
        self.pins: dict[bytes, dict[str, Any]] = {}
        self.writes: dict[bytes, dict[str, Any]] = {}
        self.holds: list[tuple[Hold, Chunk]] = []

    # the model's predictions

    def longest_hit(self, names: Sequence[bytes], digests: Sequence[bytes]) -> tuple[int, dict[bytes, list[Chunk]]]:
        """The longest hit within lease_share, and the chunks that each namespace's group needs for it."""
        offered = {c for lease in self.leases.values() if not lease["taken"] for c in lease["chunks"]}
        for boundary in range(len(digests), 0, -1):
            needed = {n: digests[self.groups[n].first(boundary, CHUNK) : boundary] for n in names}
            found = {n: [self.seen.get(ChunkKey(n, digest)) for digest in needed[n]] for n in names}
            ready = {n: [c for c in found[n] if c is not None and c.state == "ready"] for n in names}
            together = offered.union(*ready.values())
            room = SHARE * self.arena.taken
            if ready == found and (together == offered or sum(c.length for c in together) <= room):
                return boundary, ready
        return 0, {}

    def may_write(self, engine: str, length: int) -> bool:
        mine, all_engines = 0, 0
        for chunk in self.alive:
            if chunk.state in ("writing", "doomed"):
                all_engines += chunk.length
                mine += chunk.length if chunk.engine == engine else 0
        bound = self.write_share * (self.arena.taken - (all_engines - mine))
        return self.write_share == 1 or mine == 0 or mine + length <= bound

    def is_half(self, chunk: Chunk | None, session: tuple[str, int], shard: int) -> bool:
        """Another session of the engine of *session* has stored others than *shard*, has ended, and copies none."""
        return (
            chunk is not None
            and shard not in chunk.claimed
            and (chunk.state, chunk.engine, chunk.users) == ("writing", session[0], set())
            and chunk.session != session
            and chunk.session in self.ended
        )

    def settle(self, chunk: Chunk) -> None:
        if chunk.state in ("doomed", "stale") and not chunk.users:
            self.alive.discard(chunk)

    def doom(self, chunk: Chunk) -> None:
        del self.seen[chunk.key]
        chunk.state = "doomed"
        for other in self.alive:
            if other.parent is chunk:
                other.parent = None
        self.settle(chunk)

    def cleared(self, chunk: Chunk) -> None:
        del self.seen[chunk.key]
        chunk.state = "evicted"
        self.alive.discard(chunk)
        for other in self.alive:
            if other.parent is chunk:
                other.parent = None

    def leave(self, chunk: Chunk, user: object) -> None:
        chunk.users.discard(user)
        self.settle(chunk)

    def abort_write(self, write: dict[str, Any]) -> None:
        if write["live"]:
            write["live"] = False
            for chunk in write["chunks"]:
                if chunk.state == "writing":
                    self.doom(chunk)

    def end_write(self, ident: bytes) -> None:
        write = self.writes.pop(ident)
        for chunk in write["chunks"]:
            self.leave(chunk, ident)

    def end_lease(self, ident: bytes) -> None:
        for chunk in self.leases.pop(ident)["chunks"]:
            self.leave(chunk, ident)

    def end_pin(self, ident: bytes) -> None:
        for chunk in self.pins.pop(ident)["chunks"]:
            self.leave(chunk, ident)

    def find_gone(self) -> set[ChunkKey]:
        """Chunks that were evicted just now."""
        ready = [key for key, chunk in self.seen.items() if chunk.state == "ready"]
        return {key for key in ready if not self.index.match((key.namespace,), [key.digest])}

    def drop_gone(self, gone: set[ChunkKey]) -> None:
        for key in gone:
            chunk = self.seen.pop(key)
            assert chunk.state == "ready"
            assert not chunk.users, "evicted under a reader"
            chunk.state = "evicted"
            self.alive.discard(chunk)
        if gone:
            assert not self.stale_and_idle(), "evicted while there was something stale to give back"
        if any(key.namespace != C for key in gone):
            cold = [c for c in self.seen.values() if c.state == "ready" and c.cold and not c.users]
            cold = [c for c in cold if c.key.digest not in BRANCHED]
            assert not cold, "a chained chunk was evicted while there was a cold part"

    def replace(self, namespace: bytes) -> None:
        """A reset: READY chunks are stale. They miss from now on; their bytes come back some time later."""
        for key in [key for key in self.seen if key.namespace == namespace]:
            self.seen.pop(key).state = "stale"

    def stale_and_idle(self) -> list[Chunk]:
        return [chunk for chunk in self.alive if chunk.state == "stale" and not chunk.users]

    def drop_swept(self, *taken: tuple[int, int]) -> None:
        """Stale chunks whose bytes are free, or among those *taken* just now, have been given back."""
        free = [*self.arena.holes(), *taken]
        for chunk in self.stale_and_idle():
            end = chunk.base + chunk.length
            # a hole or a new chunk may cover a part: bytes of different stale chunks come back in any order
            if any(first < end and chunk.base < first + length for first, length in free):
                self.alive.discard(chunk)

    @invariant()
    def the_directory_is_as_the_model_says(self) -> None:
        for namespace in self.pages:
            for chain in {path[: i + 1] for path in PATHS for i in range(len(path))}:
                chunk = self.seen.get(ChunkKey(namespace, name(chain)))
                assert self.index.match((namespace,), [name(chain)]) == (chunk is not None and chunk.state == "ready")

    @invariant()
    def a_watcher_is_told_where_each_chunk_is(self) -> None:
        for namespace, change in self.index.changes.take().items():
            if change.cleared:
                self.told = {key for key in self.told if key.namespace != namespace}
            self.told |= {ChunkKey(namespace, digest) for digest in change.came}
            self.told -= {ChunkKey(namespace, digest) for digest in change.left}
        assert self.told == {key for key, chunk in self.seen.items() if chunk.state == "ready"}

    @invariant()
    def no_two_extents_overlap_and_every_other_byte_is_free(self) -> None:
        end = 4096
        for chunk in sorted(self.alive, key=lambda c: c.base):
            assert chunk.base >= end
            end = chunk.base + chunk.length
        assert end <= self.arena.taken
        assert self.arena.used == sum(c.length for c in self.alive)
        assert self.arena.free_bytes == PAGES * 4096 - self.arena.used

    @invariant()
    def held_is_as_the_model_says(self) -> None:
        held = table(self.index.statistics().held)
        assert held["leases"] == len(self.leases)
        assert held["leases_offered"] == sum(not lease["taken"] for lease in self.leases.values())
        assert held["pins"] == len(self.pins)
        assert held["holds"] == len(self.holds)
        assert held["reservations"] == sum(write["live"] for write in self.writes.values())
        assert held["reservations_ending"] == sum(not write["live"] for write in self.writes.values())
        last = [c for c in self.alive if c.state in ("doomed", "stale")]
        assert held["chunks_stale"] + held["chunks_quarantined"] == len(last)
        assert held["bytes_stale"] + held["bytes_quarantined"] == sum(c.length for c in last)
        assert held["chunks_stale"] >= len(self.stale_and_idle())
        for state, word in (("ready", "ready"), ("writing", "writing")):
            chunks = [c for c in self.alive if c.state == state]
            assert held[f"chunks_{word}"] == len(chunks)
            assert held[f"slots_{word}"] == len(chunks) * self.shards
            assert held[f"bytes_{word}"] == sum(c.length for c in chunks)
        offered = {c for lease in self.leases.values() if not lease["taken"] for c in lease["chunks"]}
        assert held["bytes_offered"] == sum(c.length for c in offered)
        assert held["bytes_retained"] == sum(c.length for c in self.alive if c.state == "ready" and c.users)
