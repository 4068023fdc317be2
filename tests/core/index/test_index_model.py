"""The index against a model too simple to be wrong: any interleaving of engines, workers, sessions, resets and time."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from support.index_model import CHUNK, LEASE, PAGES, PATHS, WRITE, A, B, C, Chunk, IndexModel, name

from lmcache_trio._core.index.index import SERVER
from lmcache_trio._core.keys import ChunkKey, join_digests
from lmcache_trio.errors import Gone
from lmcache_trio.statistics import table


class IndexMachine(IndexModel):
    chain = st.tuples(st.sampled_from(PATHS), st.integers(1, 4), st.integers(0, 3))
    namespace = st.sampled_from([A, B, C, C])
    names = st.sampled_from([(A,), (B,), (C,), (A, C), (C, B), (A, B)])
    engine = st.sampled_from(["x", "y"])
    number = st.integers(1, 2)

    @rule(chain=chain, namespace=namespace, engine=engine, number=number, shard=st.integers(0, 2))
    def reserve(  # noqa: PLR0915 one walk over the digests, as the rule itself is
        self, chain: tuple[str, int, int], namespace: bytes, engine: str, number: int, shard: int
    ) -> None:
        path, upto, start = chain
        shard %= self.shards
        chains = [path[: i + 1] for i in range(min(upto, len(path)))]
        start = min(start, len(chains) - 1)
        keys = [ChunkKey(namespace, name(c)) for c in chains[start:]]
        chained = namespace != C
        parent_key = ChunkKey(namespace, name(chains[start - 1])) if start else None
        parent = self.seen.get(parent_key) if parent_key and chained else None
        orphaned = (parent_key is not None and chained) and (
            parent is None or (parent.state == "writing" and parent.engine != engine)
        )
        worker = self.worker(engine, shard)
        got = self.index.reserve(
            (engine, number),
            worker,
            shard,
            namespace,
            parent_key.digest if parent_key else b"",
            join_digests(k.digest for k in keys),
            self.now,
            live={n for n in (1, 2) if (engine, n) not in self.ended},
        )
        halves = {key for key in keys if self.is_half(self.seen.get(key), (engine, number), shard)}
        gone = self.find_gone() | {
            k for k, c in self.seen.items() if c.state == "ready" and k in {keys[s.position] for s in got.slots}
        }
        idle_before = not any(c.users or c.state not in ("ready", "stale") for c in self.alive)
        before = dict(self.seen)
        slots = {s.position: s.offset for s in got.slots}
        starts = [sum(self.pages[namespace][:i]) * 4096 for i in range(self.shards)]
        extent = 4096 * sum(self.pages[namespace])
        fresh = set(keys) - (set(before) - gone - halves)
        self.drop_swept(*[(at - starts[shard], extent) for p, at in slots.items() if keys[p] in fresh])
        self.drop_gone(gone)
        assert len(slots) + sum(got.dropped.values()) == len(keys)
        assert bool(got.id) == bool(slots)
        assert chained or "orphan" not in got.dropped
        stopped, above, chunks, beyond_share = orphaned, parent, [], False
        for position, key in enumerate(keys):
            offset, chunk = slots.get(position), self.seen.get(key)
            if chunk is not None and key in halves and not stopped:
                self.doom(chunk)
                chunk = None
            if chunk is not None:
                mine = chunk.state == "writing" and chunk.session == (engine, number) and shard not in chunk.claimed
                assert (offset is not None) == (mine and not stopped)
                if chunk.state == "writing" and chunk.engine != engine and chained:
                    stopped = True
                if offset is not None:
                    assert offset == chunk.base + starts[shard]
            elif offset is not None:
                assert not stopped
                assert self.may_write(engine, extent)
                chunk = Chunk(key, offset - starts[shard], extent, above)
                chunk.engine, chunk.session = engine, (engine, number)
                self.seen[key] = chunk
                self.alive.add(chunk)
            elif key not in gone:
                if not stopped and idle_before and above is None and position == 0:
                    raise AssertionError(f"nothing was in use, yet no slot: {got.dropped}")
                beyond_share = beyond_share or (not stopped and not self.may_write(engine, extent))
                stopped = True
            if offset is not None and chunk is not None:
                chunk.claimed.add(shard)
                chunk.users.add(got.id)
                chunk.deadline = self.now + WRITE
                chunks.append(chunk)
            above = (chunk if chunk is not None else before.get(key)) if chained else None
        if got.id:
            self.writes[got.id] = {
                "worker": worker,
                "session": (engine, number),
                "shards": {shard},
                "chunks": chunks,
                "live": True,
                "deadline": self.now + WRITE,
                "namespace": namespace,
            }
        assert "share" in got.dropped or not beyond_share
        assert "share" not in got.dropped or beyond_share or gone
        for key in gone:
            old = before[key]
            assert not any(c.parent is old for c in self.seen.values()), "evicted before its children"

    @rule(
        path=st.sampled_from(PATHS),
        upto=st.integers(1, 4),
        namespace=namespace,
        who=st.tuples(engine, number),
        shards=st.sampled_from([1, 3, 3]),
    )
    def store(self, path: str, upto: int, namespace: bytes, who: tuple[str, int], shards: int) -> None:
        """Shards reserve, then they commit: most rules need READY chunks, some need chunks that wait for a shard."""
        before, (engine, number) = set(self.writes), who
        for shard in range(min(shards, self.shards)):
            self.reserve((path, upto, 0), namespace, engine, number, shard)
        for ident in [ident for ident in self.writes if ident not in before]:
            self.finish_write(list(self.writes).index(ident), True)

    @rule(engine=engine, number=number)
    def open_session(self, engine: str, number: int) -> None:
        self.ended.discard((engine, number))

    def worker(self, engine: str, shard: int) -> int:
        return 1 + shard + (10 if engine == "y" else 0)

    @rule(path=st.sampled_from(PATHS), depth=st.integers(1, 4), namespace=namespace)
    def load(self, path: str, depth: int, namespace: bytes) -> None:
        depth = min(depth, len(path))
        key = ChunkKey(namespace, name(path[:depth]))
        parent_key = ChunkKey(namespace, name(path[: depth - 1])) if depth > 1 else None
        chained = namespace != C
        parent = self.seen.get(parent_key) if parent_key and chained else None
        got = self.index.reserve_load(namespace, parent_key.digest if parent_key else b"", key.digest, self.now)
        extent = 4096 * sum(self.pages[namespace])
        self.drop_swept(*[(got.slots[0].offset, extent)] if got else [])
        self.drop_gone(self.find_gone())
        if got is None:
            return
        assert key not in self.seen
        assert parent_key is None or not chained or (parent and (parent.state == "ready" or parent.engine == ""))
        assert [s.position for s in got.slots] == list(range(self.shards))
        chunk = Chunk(key, got.slots[0].offset, extent, parent)
        chunk.claimed = set(range(self.shards))
        chunk.users.add(got.id)
        chunk.deadline = self.now + WRITE
        self.seen[key] = chunk
        self.alive.add(chunk)
        self.writes[got.id] = {
            "worker": SERVER,
            "session": ("", 0),
            "shards": set(range(self.shards)),
            "chunks": [chunk],
            "live": True,
            "deadline": self.now + WRITE,
            "namespace": namespace,
        }

    @precondition(lambda self: self.writes)
    @rule(pick=st.integers(0, 99), well=st.booleans())
    def finish_write(self, pick: int, well: bool) -> None:
        ident = list(self.writes)[pick % len(self.writes)]
        write = self.writes[ident]
        kept = [chunk for chunk in write["chunks"] if chunk.state == "writing"] if write["live"] else []
        assert self.index.would_keep(ident) == len(kept)
        if not well:
            self.index.abort(ident, write["worker"])
            self.abort_write(write)
        elif write["live"]:
            expected, reach = [], self.groups[write["namespace"]].reach(CHUNK)
            for chunk in write["chunks"]:
                if chunk.state == "writing":
                    chunk.committed |= write["shards"]
                    if len(chunk.committed) == self.shards:
                        chunk.state = "ready"
                        chunk.cold = write["namespace"] == C and chunk not in write["chunks"][-reach:]
                        expected.append(chunk.key)
            assert list(self.index.commit(ident, write["worker"])) == expected
        else:
            try:
                self.index.commit(ident, write["worker"])
                raise AssertionError("an aborted reservation was committed")
            except Gone:
                pass
        self.end_write(ident)

    @rule(chain=chain, names=names, engine=engine, number=number)
    def lease(self, chain: tuple[str, int, int], names: tuple[bytes, ...], engine: str, number: int) -> None:
        path, upto, _ = chain
        for ident, lease in list(self.leases.items()):
            if lease["session"] == (engine, number):
                self.end_lease(ident)
        digests = [name(path[: i + 1]) for i in range(min(upto, len(path)))]
        boundary, parts = self.longest_hit(names, digests)
        got = self.index.lease((engine, number), names, digests, self.now)
        assert (got.chunks if got else 0) == boundary
        if got:
            assert (got.expires, got.namespaces) == (self.now + LEASE, names)
            chunks = [chunk for part in parts.values() for chunk in part]
            for chunk in chunks:
                chunk.users.add(got.id)
                chunk.cold = False
            self.leases[got.id] = {
                "session": (engine, number),
                "boundary": boundary,
                "parts": parts,
                "chunks": chunks,
                "taken": False,
                "expires": got.expires,
                "stale": set(),
            }

    @precondition(lambda self: self.leases)
    @rule(
        pick=st.integers(0, 99),
        how=st.sampled_from(["take", "release", "pin", "pin", "steal", "other layout"]),
        shard=st.integers(0, 2),
        start=st.integers(0, 3),
    )
    def use_lease(self, pick: int, how: str, shard: int, start: int) -> None:
        ident = list(self.leases)[pick % len(self.leases)]
        lease = self.leases[ident]
        engine, shard = lease["session"][0], shard % self.shards
        namespace, part = list(lease["parts"].items())[pick % len(lease["parts"])]
        if how == "take":
            self.index.take(ident)
            lease["taken"] = True
            return
        if how == "release":
            self.index.release(ident)
            self.end_lease(ident)
            return
        if not part:  # a hit at a multiple of a LOCAL group's chunks needs none of them
            return
        start %= len(part)
        chunks = part[start:]
        try:
            pin = self.index.pin(
                ident,
                "thief" if how == "steal" else engine,
                b"o" * 32 if how == "other layout" else namespace,
                self.worker(engine, shard),
                shard,
                lease["boundary"] - len(chunks),
                len(chunks),
            )
        except Gone:
            assert how in ("steal", "other layout") or namespace in lease["stale"]
            return
        assert how == "pin"
        assert namespace not in lease["stale"]
        first = 4096 * sum(self.pages[namespace][:shard])
        assert list(pin.offsets) == [c.base + first for c in chunks]
        for chunk in chunks:
            chunk.users.add(pin.id)
        self.pins[pin.id] = {
            "worker": self.worker(engine, shard),
            "chunks": chunks,
            "stale": False,
            "namespace": namespace,
        }

    @precondition(lambda self: self.leases)
    @rule(pick=st.integers(0, 99), early=st.booleans())
    def reset_what_is_read(self, pick: int, early: bool) -> None:
        lease = list(self.leases.values())[pick % len(self.leases)]
        if not early:
            self.use_lease(pick, "pin", 0, 0)
        self.reset(list(lease["parts"])[pick % len(lease["parts"])])
        if early:
            self.use_lease(pick, "pin", 0, 0)
        elif self.pins:
            self.unpin(len(self.pins) - 1)

    @precondition(lambda self: self.pins)
    @rule(pick=st.integers(0, 99))
    def unpin(self, pick: int) -> None:
        ident = list(self.pins)[pick % len(self.pins)]
        pin = self.pins[ident]
        assert self.index.unpin(ident, 777) is False
        assert self.index.unpin(ident, pin["worker"]) is not pin["stale"]
        self.end_pin(ident)

    @rule(path=st.sampled_from(PATHS), depth=st.integers(1, 4), namespace=namespace)
    def hold(self, path: str, depth: int, namespace: bytes) -> None:
        key = ChunkKey(namespace, name(path[:depth]))
        chunk = self.seen.get(key)
        hold = self.index.hold(key)
        assert (hold is not None) == (chunk is not None and chunk.state == "ready")
        if hold and chunk:
            assert hold.offsets[0] == chunk.base
            assert namespace != C or hold.parent == b""
            chunk.users.add(hold)
            self.holds.append((hold, chunk))

    @precondition(lambda self: self.holds)
    @rule(pick=st.integers(0, 99))
    def unhold(self, pick: int) -> None:
        hold, chunk = self.holds.pop(pick % len(self.holds))
        self.index.unhold(hold)
        self.index.unhold(hold)
        self.leave(chunk, hold)

    @rule(engine=engine, number=number)
    def end_session(self, engine: str, number: int) -> None:
        session = (engine, number)
        self.index.end_session(session)
        self.ended.add(session)
        for ident in [i for i, lease in self.leases.items() if lease["session"] == session]:
            self.end_lease(ident)

    @rule(engine=engine, shard=st.integers(0, 2))
    def lose_worker(self, engine: str, shard: int) -> None:
        worker = self.worker(engine, shard % self.shards)
        self.index.lose_worker(worker)
        for ident in [i for i, pin in self.pins.items() if pin["worker"] == worker]:
            self.end_pin(ident)
        for write in self.writes.values():
            if write["worker"] == worker:
                self.abort_write(write)

    @rule(engine=engine, shard=st.integers(0, 2))
    def copies_ended(self, engine: str, shard: int) -> None:
        worker = self.worker(engine, shard % self.shards)
        self.index.copies_ended(worker)
        for ident in [i for i, write in self.writes.items() if write["worker"] == worker]:
            self.abort_write(self.writes[ident])
            self.end_write(ident)

    @rule(namespace=namespace)
    def reset(self, namespace: bytes) -> None:
        self.index.reset(namespace)
        for write in self.writes.values():
            if write["namespace"] == namespace:
                self.abort_write(write)
        for chunk in [c for k, c in self.seen.items() if k.namespace == namespace and c.state == "writing"]:
            self.doom(chunk)
        self.replace(namespace)
        for lease in self.leases.values():
            lease["stale"].add(namespace)
        for pin in self.pins.values():
            pin["stale"] = pin["stale"] or pin["namespace"] == namespace

    @rule(namespace=namespace)
    def clear(self, namespace: bytes) -> None:
        ready = [chunk for key, chunk in self.seen.items() if key.namespace == namespace and chunk.state == "ready"]
        idle = [chunk for chunk in ready if not chunk.users]
        assert sum(self.index.clear(namespace)) == len(idle)
        for chunk in idle:
            self.cleared(chunk)

    @rule(limit=st.sampled_from([1, 10, 70, 1000]))
    def sweep(self, limit: int) -> None:
        more = self.index.sweep(limit)
        self.drop_swept()
        if not more:
            assert not self.stale_and_idle()
            assert self.index.statistics().held.chunks.chunks_stale == 0

    @rule(step=st.sampled_from([1, 4, 9]))
    def expire(self, step: int) -> None:
        self.now += step
        due = self.index.expire(self.now)
        for ident in [i for i, lease in self.leases.items() if lease["expires"] <= self.now]:
            self.end_lease(ident)
        for write in self.writes.values():
            if write["deadline"] <= self.now:
                self.abort_write(write)
        for chunk in [c for c in self.seen.values() if c.state == "writing" and c.deadline <= self.now]:
            self.doom(chunk)
        times = [lease["expires"] for lease in self.leases.values()]
        times += [write["deadline"] for write in self.writes.values() if write["live"]]
        times += [c.deadline for c in self.seen.values() if c.state == "writing"]
        assert due == min(times, default=float("inf"))

    # invariants

    def teardown(self) -> None:
        if not hasattr(self, "index"):
            return
        for engine in ("x", "y"):
            for number in (1, 2):
                self.end_session(engine, number)
            for shard in range(self.shards):
                self.lose_worker(engine, shard)
                self.copies_ended(engine, shard)
        self.expire(WRITE + 1)  # chunks that wait for a shard that does not come
        while self.holds:
            self.unhold(0)
        while self.writes:
            self.finish_write(0, False)
        while self.index.sweep(7):
            pass
        self.drop_swept()
        self.held_is_as_the_model_says()
        held = table(self.index.statistics().held)
        for what in ("leases", "pins", "holds", "reservations", "reservations_ending", "bytes_offered"):
            assert held[what] == 0
        for state in ("retained", "writing", "quarantined", "stale"):
            assert held[f"bytes_{state}"] == 0
        self.index.attach(b"D" * 32, [PAGES * 4096])  # the whole arena in one chunk: all others must go for it
        got = self.index.reserve(("z", 1), 99, 0, b"D" * 32, b"", name("z"), self.now)
        assert len(got.slots) == 1
        self.index.abort(got.id, 99)
        assert self.arena.largest_hole == PAGES * 4096
        assert self.arena.holes() == [(4096, PAGES * 4096)]


TestIndexAgainstItsModel = IndexMachine.TestCase
TestIndexAgainstItsModel.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
