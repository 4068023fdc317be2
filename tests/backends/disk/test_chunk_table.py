"""The disk tier's decisions against a model too simple to be wrong, killed at any point.

The model's index file is a dict, its disk a list of byte ranges with an owner each. What must hold whatever happens: no
byte has two owners, no row of the index file names bytes that are another's, and after a kill usage is exact.
"""

from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lmcache_trio_backends.disk.chunk_table import ChunkTable, Refusal
from lmcache_trio_backends.disk.records import Doomed, Read, Row, Write, extent_of, index_cost

from lmcache_trio._core.index.arena import Arena
from lmcache_trio.abc import ChunkKey

PAGE = 4096
TAKEN = 24 * PAGE
ROWS = 12
NAMESPACES = [b"a" * 32, b"b" * 32]
DIGESTS = [bytes([i]) * 32 for i in range(8)]
LENGTHS = [(1,), (PAGE,), (PAGE + 1,), (100, 3 * PAGE), (9 * PAGE,)]

keys = st.builds(ChunkKey, st.sampled_from(NAMESPACES), st.sampled_from(DIGESTS))


class DiskMachine(RuleBasedStateMachine):
    """Everything that the shell does, in any order, and a kill at any moment."""

    @initialize()
    def begin(self) -> None:
        self.file: dict[bytes, Row] = {}  # outlives a kill, as does
        self.tombs: dict[bytes, int] = {}  # namespace -> generation; the rest does not
        self.boot()

    def boot(self) -> None:
        self.table = ChunkTable(Arena(), capacity=TAKEN, index_room=ROWS * index_cost(1))
        for namespace, generation in self.tombs.items():
            self.table.bury(namespace, generation)
        self.table.restore(self.file[key] for key in sorted(self.file))
        for _ in self.table.rebuild(TAKEN, self.table.order()):
            pass
        for namespace in self.table.take_erased():
            del self.tombs[namespace]
        self.due: list[tuple[bytes, int]] = []
        self.writes: list[Write] = []
        self.written: list[Write] = []  # bytes and row stand, the table does not know it yet
        self.reads: list[Read] = []
        self.erasing: list[Doomed] = []
        self.erased: list[Doomed] = []
        alive = self._alive()
        self.published: dict[ChunkKey, Write | None] = {ChunkKey(row.name[:32], row.name[32:]): None for row in alive}
        self.forgotten: set[int] = set()  # generations of writes
        assert self.table.statistics()["bytes_used"] == sum(self._range(row)[1] for row in alive)
        assert self.table.statistics()["chunks"] == len(alive)

    def _alive(self) -> list[Row]:
        return [row for row in self.file.values() if row.generation > self.tombs.get(row.name[:32], -1)]

    @staticmethod
    def _range(row: Row) -> tuple[int, int]:
        return row.offset, sum(-(-length // PAGE) * PAGE for length in row.lengths)

    @rule(key=keys, parent=st.sampled_from([b"", *DIGESTS]), lengths=st.sampled_from(LENGTHS))
    def reserve(self, key: ChunkKey, parent: bytes, lengths: tuple[int, ...]) -> None:
        write = self.table.reserve(key, parent, lengths)
        alive = [w.row.name for w in self._writing() if w.row.generation not in self.forgotten]
        being_written = key.namespace + key.digest in alive
        if key in self.published or being_written:
            assert write is (Refusal.PUBLISHED if key in self.published else Refusal.WRITING)
            return
        if not isinstance(write, Write):
            assert write in (Refusal.NO_HOLE, Refusal.NO_INDEX_ROOM)
            return
        taken = (write.row.offset, extent_of(lengths))
        for row in self._alive():
            assert not _overlap(taken, self._range(row)), "bytes were given away that a row still names"
        for other in self._writing():
            assert not _overlap(taken, self._range(other.row))
        self.writes.append(write)

    def _writing(self) -> list[Write]:
        return [*self.writes, *self.written]

    @precondition(lambda self: self.writes)
    @rule(data=st.data())
    def write_the_row(self, data: st.DataObject) -> None:
        write = self.writes.pop(data.draw(st.integers(0, len(self.writes) - 1)))
        self.file[write.row.name] = write.row._replace(sums=(7,) * len(write.row.lengths))
        self.written.append(write)

    @precondition(lambda self: self.written)
    @rule()
    def publish(self) -> None:
        write = self.written.pop(0)
        alive = self.table.publish(write, [7] * len(write.row.lengths))
        assert alive == (write.row.generation not in self.forgotten)
        key = ChunkKey(write.row.name[:32], write.row.name[32:])
        assert self.table.contains(key) == alive or write.row.generation in self.forgotten
        if alive:
            self.published[key] = write

    @precondition(lambda self: self.writes)
    @rule()
    def abort(self) -> None:
        write = self.writes.pop()
        self.table.abort(write)
        if write.row.generation not in self.forgotten:
            assert self.table._find(write.row.name[:32], write.row.name[32:]) < 0

    @rule(key=keys, lengths=st.sampled_from(LENGTHS))
    def begin_read(self, key: ChunkKey, lengths: tuple[int, ...]) -> None:
        read = self.table.begin_read(key, lengths)
        if read is not None:
            assert key in self.published
            assert self.file[key.namespace + key.digest].offset == read.offset
            self.reads.append(read)

    @precondition(lambda self: self.reads)
    @rule(data=st.data(), wrong=st.booleans())
    def end_read(self, data: st.DataObject, wrong: bool) -> None:
        read = self.reads.pop(data.draw(st.integers(0, len(self.reads) - 1)))
        alive = self.table.end_read(read)
        row = self.file.get(read.key.namespace + read.key.digest)
        assert not alive or (row is not None and row.generation == read.generation)
        if alive and wrong:
            assert self.table.quarantine(read)
            assert not self.table.quarantine(read)
            del self.published[read.key]
        elif alive:
            self.table.touch(read.key)

    @rule(length=st.sampled_from([1, PAGE, 5 * PAGE]))
    def evict(self, length: int) -> None:
        held = {read.key for read in self.reads}
        count = self.table.evict(length)
        gone = [key for key in self.published if not self.table.contains(key)]
        assert len(gone) == count
        for key in gone:
            children = [k for k in self.published if k.namespace == key.namespace and self._parent(k) == key.digest]
            assert all(child in gone or child == key for child in children), "a parent went before its child"
            assert key not in held or all(read.key != key for read in self.reads if self.table.contains(read.key))
            del self.published[key]
        assert count or not self._leaves(held)

    def _parent(self, key: ChunkKey) -> bytes:
        return self.file[key.namespace + key.digest].parent

    def _leaves(self, held: set[ChunkKey]) -> list[ChunkKey]:
        parents = {(key.namespace, self._parent(key)) for key in self.published}
        return [key for key in self.published if (key.namespace, key.digest) not in parents and key not in held]

    @rule(namespace=st.sampled_from(NAMESPACES))
    def forget(self, namespace: bytes) -> None:
        self.due.append((namespace, self.table.forget(namespace)))
        self.published = {key: write for key, write in self.published.items() if key.namespace != namespace}
        for write in self._writing():
            if write.row.name[:32] == namespace:
                self.forgotten.add(write.row.generation)

    @precondition(lambda self: self.due)
    @rule()
    def write_the_tombstone(self) -> None:
        namespace, generation = self.due.pop(0)
        self.tombs[namespace] = generation

    @rule(limit=st.integers(1, 5))
    def take_doomed(self, limit: int) -> None:
        self.erasing += self.table.take_doomed(limit)

    @precondition(lambda self: self.erasing)
    @rule()
    def erase_the_row(self) -> None:
        one = self.erasing.pop(0)
        row = self.file.get(one.name)
        if row is not None and row.generation == one.generation:
            del self.file[one.name]
        self.erased.append(one)

    @precondition(lambda self: self.erased)
    @rule()
    def free_its_bytes(self) -> None:
        self.table.erased([self.erased.pop(0)])

    @rule(limit=st.integers(1, 5))
    def write_recency(self, limit: int) -> None:
        for recency, name, generation in self.table.take_touched(limit):
            row = self.file.get(name)
            if row is not None and row.generation == generation:
                self.file[name] = row._replace(recency=recency)

    @rule()
    def kill(self) -> None:
        self.boot()

    @rule()
    def finish_everything_and_begin_from_nothing(self) -> None:
        while self.reads:
            self.table.end_read(self.reads.pop())
        while self.writes:
            self.abort()
        while self.written:
            self.publish()
        for namespace in NAMESPACES:
            self.forget(namespace)
        self.take_doomed(1000)
        while self.erasing:
            self.erase_the_row()
        while self.erased:
            self.free_its_bytes()
        assert not self.file
        assert self.table.statistics() == {"chunks": 0, "bytes_used": 0, "bytes_index_planned": 0}

    @invariant()
    def no_two_rows_share_a_byte(self) -> None:
        ranges = sorted(self._range(row) for row in (self._alive() if hasattr(self, "file") else ()))
        for (start, length), (following, _) in pairwise(ranges):
            assert start + length <= following

    @invariant()
    def what_is_published_is_found(self) -> None:
        if hasattr(self, "published"):
            for namespace in NAMESPACES:
                for digest in DIGESTS:
                    key = ChunkKey(namespace, digest)
                    assert self.table.contains(key) == (key in self.published)
            assert self.table.statistics()["chunks"] == len(self.published)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


DiskMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestDiskMachine = DiskMachine.TestCase


def _key(number: int) -> ChunkKey:
    return ChunkKey(NAMESPACES[0], DIGESTS[number])


def _store(table: ChunkTable, number: int, parent: int | None = None) -> Row:
    write = table.reserve(_key(number), b"" if parent is None else DIGESTS[parent], (PAGE,))
    assert isinstance(write, Write)
    assert table.publish(write, [0])
    return write.row


def _table() -> ChunkTable:
    table = ChunkTable(Arena(), capacity=TAKEN, index_room=1 << 20)
    for _ in table.rebuild(TAKEN, table.order()):
        pass
    return table


def _evict(table: ChunkTable) -> int:
    before = [n for n in range(8) if table.contains(_key(n))]
    assert table.evict(1) == 1
    (gone,) = [n for n in before if not table.contains(_key(n))]
    return gone


def test_the_least_recently_used_leaf_goes_first_and_its_parent_inherits_its_recency() -> None:
    table = _table()
    _store(table, 0)
    _store(table, 1, parent=0)
    _store(table, 2)
    _store(table, 3)
    table.touch(_key(1))
    assert [_evict(table) for _ in range(4)] == [2, 3, 1, 0]


def test_a_parent_that_comes_after_its_child_is_no_leaf() -> None:
    table = _table()
    _store(table, 1, parent=0)
    _store(table, 0)
    table.touch(_key(1))
    assert [_evict(table) for _ in range(2)] == [1, 0]


def test_what_is_being_read_is_not_evicted() -> None:
    table = _table()
    _store(table, 0)
    read = table.begin_read(_key(0), (PAGE,))
    assert read is not None
    assert table.evict(1) == 0
    assert table.end_read(read)
    assert _evict(table) == 0


def test_rows_that_lie_over_each_other_or_outside_are_dropped_and_their_bytes_given_once() -> None:
    rows = [_store(_table(), n) for n in range(3)]
    rows[1] = rows[1]._replace(offset=0, generation=99)  # over the first
    rows[2] = rows[2]._replace(offset=TAKEN)  # behind the end
    table = ChunkTable(Arena(), capacity=TAKEN, index_room=1 << 20)
    table.restore(rows)
    for _ in table.rebuild(TAKEN, table.order()):
        pass
    assert table.statistics()["chunks"] == 1
    table.erased(table.take_doomed(10))
    assert table.statistics()["bytes_used"] == PAGE
    table.forget(NAMESPACES[0])
    table.erased(table.take_doomed(10))
    assert table.statistics() == {"chunks": 0, "bytes_used": 0, "bytes_index_planned": 0}
