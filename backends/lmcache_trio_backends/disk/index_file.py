"""The index file: SQLite in WAL mode, one row per chunk. Every method blocks, and all run in one thread of its own.

It keeps what `chunk_table` decided and decides nothing itself, but it erases what cannot be a row of ours. It has one
connection, opened exclusively. So there is no shared memory file beside it, every checkpoint completes, and the WAL
keeps within its room: it is written back into the file whenever half of the room is filled, and no transaction takes
more than a quarter.
"""

import contextlib
import itertools
import logging
import os
import sqlite3
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from lmcache_trio_backends.disk.home import FORMAT, open_own
from lmcache_trio_backends.disk.records import ALIGNMENT, MAX_SHARDS, NAME, Doomed, Row
from lmcache_trio_backends.disk.slabs import set_aside

__all__ = ["PAGE", "Damaged", "Full", "IndexFile", "is_corrupt"]

log = logging.getLogger("lmcache_trio.disk")

PAGE = 4096
_COLUMNS = "key, parent, place, generation, recency, shards"
_TYPES = {"key": "blob", "parent": "blob", "place": "integer", "generation": "integer", "recency": "integer"}
_TYPED = " AND ".join(f"typeof({name}) = '{kind}'" for name, kind in {**_TYPES, "shards": "blob"}.items())
_AS_TEXT = (
    f"SELECT group_concat(hex(key) || CASE WHEN {_TYPED} THEN ' ' || hex(parent) || ' ' || place || ' ' || generation"
    " || ' ' || recency || ' ' || hex(shards) ELSE '' END) FROM"
)
"""All rows as one text; of a row with values of wrong types, only the key. sqlite3 gives the interpreter lock away at
each row and may wait 5 ms for it each time when the loop is busy: 400 rows would then take 2 s, and whoever asks next
waits behind them. Changes are few statements likewise."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS chunks (
    key BLOB PRIMARY KEY, parent BLOB NOT NULL, place INTEGER NOT NULL, generation INTEGER NOT NULL,
    recency INTEGER NOT NULL, shards BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS forgotten (namespace BLOB PRIMARY KEY, generation INTEGER NOT NULL) WITHOUT ROWID;
"""
_MARK = "-mark"
_AHEAD = 64
"""Pages of the index file that the disk gives before they are needed, 256 KiB: each time costs a transaction."""
_ROW = struct.Struct("<QQ")
_SHARD_BYTES = 16
"""Of a packed shard: its length and its checksum."""
_SUM = struct.Struct("<Q")
_NOTE = struct.Struct("<QQ")
"""The number of the last change, and of the log that it went into."""
_LOG_NUMBERS = 1 << 32
_MAX_ROWS = 400
"""Rows that one statement names: SQLite takes 32,766 variables."""
_LIMIT = 1 << 61
"""No generation, recency or place is as large. A flipped bit below it leaves room to count on from there."""


class Damaged(sqlite3.DatabaseError):
    """The file is a database, but not one that we wrote."""


class Full(Exception):
    """The disk has no space for the pages that more rows may take."""


def is_corrupt(exc: BaseException) -> bool:
    """Whether the file is no sound database, rather than that it could not be read or written."""
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    return isinstance(exc, Damaged) or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _pack(row: Row) -> bytes:
    """The shards of *row* as the file has them: each one's length and checksum, and a checksum of the row behind them.

    That one covers all but the recency, which is changed by itself.
    """
    numbers = itertools.chain.from_iterable(zip(row.lengths, row.sums, strict=True))
    shards = struct.pack(f"<{2 * len(row.lengths)}Q", *numbers)
    return shards + _sum(row.name, row.parent, row.offset, row.generation, shards)


def _unpack(fields: Sequence[str]) -> Row | None:
    """The row that *fields* are, as `_AS_TEXT` gives them; None unless we may have written it.

    Where other rows lie, and where the slabs end, this can't tell. A server looks at a million rows when it starts, so
    this is written for speed.
    """
    name, parent, packed = bytes.fromhex(fields[0]), bytes.fromhex(fields[1]), bytes.fromhex(fields[5])
    offset, generation, recency = int(fields[2]), int(fields[3]), int(fields[4])
    shards = packed[: -_SUM.size]
    if len(name) != 2 * NAME or len(parent) not in (0, NAME):
        return None
    if not 0 < len(shards) <= MAX_SHARDS * _SHARD_BYTES or len(shards) % _SHARD_BYTES:
        return None
    if not (0 <= offset < _LIMIT and 0 < generation < _LIMIT and 0 <= recency < _LIMIT) or offset % ALIGNMENT:
        return None
    if any(shards[6::_SHARD_BYTES]) or any(shards[7::_SHARD_BYTES]):  # a shard of 2**48 bytes or more
        return None
    if _sum(name, parent, offset, generation, shards) != packed[-_SUM.size :]:
        return None
    numbers = struct.unpack(f"<{len(shards) // 8}Q", shards)
    lengths = numbers[::2]
    return Row(name, parent, offset, generation, recency, lengths, numbers[1::2]) if any(lengths) else None


def _sum(name: bytes, parent: bytes, offset: int, generation: int, shards: bytes) -> bytes:
    return _SUM.pack(xxhash.xxh3_64_intdigest(b"".join((name, parent, _ROW.pack(offset, generation), shards))))


class IndexFile:
    """*room* and *wal_room* are in bytes; *flush*: each transaction reaches the disk before it returns."""

    def __init__(self, path: Path, *, room: int, wal_room: int, flush: bool) -> None:
        self.path = path
        self._wal = path.with_name(path.name + "-wal")
        self._room = room
        self._wal_room = wal_room
        self._log_limit = wal_room * 3 // 4
        """Bytes of the log past which a checkpoint has failed: it is due at half, and a transaction takes a quarter."""
        self._flush = flush
        self._db: sqlite3.Connection | None = None
        self._mark = -1  # a file beside it, with the number of the last change
        self._changes = self._noted = 0
        self.behind = 0
        """Changes that were made, and that the file and its log do not have any more. Known after `open`."""
        self.spare = room
        """Bytes of *room* that the disk has not given yet. May be read in any thread."""
        self.damaged = 0
        """Rows that were damaged, and are erased."""
        self.batch = min(_MAX_ROWS, max(1, wal_room // 4 // (2 * (PAGE + 24)) - 2))
        """Rows that one transaction may change: each dirties about two pages, all a quarter of the WAL's room.

        With very many shards they are three, and more than a quarter; half of the room is still free for them.
        """

    def open(self) -> str:
        """Open or make it. One that is corrupt, or larger than its room, is made anew: it all can be computed again.

        Returns why it was, or nothing.

        It is larger when the tier had a larger size before, and many small chunks. To make it smaller SQLite would need
        as much space again, and most of its rows name slabs that have been cut off. Free pages are removed.
        """
        try:
            self._connect()
            (pages,) = self._do("PRAGMA page_count").fetchone()
            if pages * PAGE > self._room and self.size() <= min(self._room, self._wal_room // 2):
                self._do("VACUUM")  # what it has too much are free pages, and the log holds the others
                self.close()
                self._connect()
                (pages,) = self._do("PRAGMA page_count").fetchone()
            if pages * PAGE <= self._room:
                return ""
            why = f"it has {pages * PAGE} bytes where {self._room} may be"
            self.close()
        except sqlite3.DatabaseError as exc:
            self.close()
            if not is_corrupt(exc):
                raise
            why = str(exc)
        self.remove()
        self._connect()
        return why

    def remove(self) -> None:
        """Delete it and its WAL."""
        self._noted = self.behind = 0
        for suffix in ("", "-wal", "-shm", "-journal", _MARK):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _connect(self) -> None:
        for suffix in ("", "-wal", "-shm", "-journal"):  # SQLite would follow a link, and let others read
            with contextlib.suppress(FileNotFoundError):
                path = self.path.with_name(self.path.name + suffix)
                os.close(open_own(path, os.O_RDWR | (0 if suffix else os.O_CREAT)))
        self._read_mark()
        self._db = db = sqlite3.connect(self.path, isolation_level=None, timeout=0)
        db.execute(f"PRAGMA page_size = {PAGE}")
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA temp_store = MEMORY")
        db.execute("PRAGMA cache_size = -8192")
        db.execute(f"PRAGMA synchronous = {'FULL' if self._flush else 'NORMAL'}")
        db.execute(f"PRAGMA wal_autocheckpoint = {max(1, self._wal_room // 2 // (PAGE + 24))}")
        db.execute(f"PRAGMA journal_size_limit = {self._wal_room}")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, FORMAT):
            raise Damaged(f"it has format {version} where {FORMAT} should be")
        db.executescript(_SCHEMA)
        db.execute(f"PRAGMA user_version = {FORMAT}")
        db.execute(f"PRAGMA max_page_count = {max(8, self._room // PAGE)}")
        # can it be written?
        db.execute("INSERT INTO facts VALUES ('opened', 1) ON CONFLICT DO UPDATE SET value = value + 1")
        db.execute("DELETE FROM chunks WHERE key <= x''")  # keys that are no bytes: `page` would never come to them
        self.damaged += db.execute("SELECT changes()").fetchone()[0]
        self._count_changes(db)
        if self._wal.stat().st_size > self._log_limit:  # a former server may have had more room for it
            self._shorten_log()
        set_aside(self._wal, self._wal_room)
        self._take_pages(0)

    def _count_changes(self, db: sqlite3.Connection) -> None:
        """See how many changes are missing: a log that is cut, damaged or gone is no error to SQLite, only shorter."""
        db.execute("INSERT OR IGNORE INTO facts VALUES ('changes', 0)")
        self._changes = self.fact("changes") or 0
        self.behind += max(0, self._noted - self._changes)
        self._noted = 0
        self._note(self._changes, self._log_number())

    def _read_mark(self) -> None:
        """Before SQLite reads: it would lay an older copy of the log over the file, whose pages are newer."""
        if self._mark >= 0:
            return
        self._mark = open_own(self.path.with_name(self.path.name + _MARK), os.O_RDWR | os.O_CREAT)
        noted = os.pread(self._mark, 2 * _NOTE.size, 0)
        if len(noted) < 2 * _NOTE.size or noted[: _NOTE.size] != noted[_NOTE.size :]:
            return
        self._noted, log_number = _NOTE.unpack_from(noted)
        there = self._log_number()
        if there and log_number and (there - log_number) % _LOG_NUMBERS > _LOG_NUMBERS // 2:
            log.warning("%s is an older copy, and is not read", self._wal)
            self._wal.unlink()
        self._note(self._noted, 0)  # the next log may begin with any number

    def _log_number(self) -> int:
        """Which log it is: the next begins with one more ("WAL Header" in SQLite's file format: salt-1). 0: none."""
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self._wal, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                return int.from_bytes(os.pread(fd, 4, 16), "big")
            finally:
                os.close(fd)
        return 0

    def _note(self, changes: int, log_number: int) -> None:
        with contextlib.suppress(OSError):  # it is a witness: a change must not fail for it
            os.pwrite(self._mark, 2 * _NOTE.pack(changes, log_number), 0)

    def _take_pages(self, rows: int) -> bool:
        """See that *rows* more find free pages in the file, which the disk has given. False: it has no more now.

        Else SQLite meets a full disk in the middle, when it writes its log back, and then can't even erase. Pages that
        it may use must be within the file: it gives back what lies behind, at each checkpoint.
        """
        (pages,), (free,) = (self._do(f"PRAGMA {count}").fetchone() for count in ("page_count", "freelist_count"))
        need, most = 2 * rows + 2, self._room // PAGE
        self.spare = max(0, most - pages) * PAGE
        if free >= need or pages >= most - 2:
            return True
        for more in dict.fromkeys(min(count, most - pages) for count in (need - free + _AHEAD, need - free)):
            if set_aside(self.path, (pages + more) * PAGE):
                with self._transaction() as db:  # a long value comes and goes, and its pages are free
                    db.execute("INSERT OR REPLACE INTO facts VALUES ('ahead', zeroblob(?))", ((more - 2) * (PAGE - 4),))
                    db.execute("DELETE FROM facts WHERE name = 'ahead'")
                return True
        return False

    def fact(self, name: str, value: int | None = None) -> int | None:
        """The number kept under *name*; *value*, where given, is kept first."""
        if value is not None:
            self._do("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))
        found = self._do("SELECT value FROM facts WHERE name = ? AND typeof(value) = 'integer'", (name,)).fetchone()
        return None if found is None else int(found[0])

    def size(self) -> int:
        """Bytes of it that are in use. It is told at once, however many rows there are."""
        (pages,), (free,) = (self._do(f"PRAGMA {count}").fetchone() for count in ("page_count", "freelist_count"))
        return int(pages - free) * PAGE

    def page(self, after: bytes, limit: int) -> list[Row]:
        """Up to *limit* rows whose keys follow *after*, in order; none when there are none."""
        some = f"(SELECT {_COLUMNS} FROM chunks WHERE key > ? ORDER BY key LIMIT ?)"
        while True:
            before = self.damaged
            rows = sorted(self._rows(some, (after, limit)))
            if rows or self.damaged == before:
                return rows

    def find(self, keys: Sequence[bytes]) -> list[Row]:
        """The rows of those *keys* that are there, in any order."""
        found: list[Row] = []
        for i in range(0, len(keys), _MAX_ROWS):
            some = keys[i : i + _MAX_ROWS]
            marks = ",".join("?" * len(some))
            found += self._rows(f"chunks WHERE key IN ({marks})", some)
        return found

    def _rows(self, source: str, parameters: Sequence[object]) -> list[Row]:
        """The rows of *source*. What cannot be one is erased, and counted as damaged."""
        (text,) = self._do(f"{_AS_TEXT} {source}", parameters).fetchone()
        sound: list[Row] = []
        damaged: list[bytes] = []
        for line in () if text is None else text.split(","):
            fields = line.split(" ")
            if len(fields) == 6 and (row := _unpack(fields)) is not None:
                sound.append(row)
            else:
                damaged.append(bytes.fromhex(fields[0]))
        self.damaged += len(damaged)
        for i in range(0, len(damaged), self.batch):
            with self._transaction() as db:
                db.executemany("DELETE FROM chunks WHERE key = ?", [(key,) for key in damaged[i : i + self.batch]])
        return sound

    def publish(self, rows: Sequence[Row]) -> None:
        """Keep *rows*, all or none, at most `batch`. Full: none, for want of space on the disk."""
        if not self._take_pages(len(rows)):
            raise Full
        if not rows:
            return
        with self._transaction() as db:
            values = ",".join(["(?, ?, ?, ?, ?, ?)"] * len(rows))
            fields = [field for row in sorted(rows) for field in (*row[:5], _pack(row))]
            db.execute(f"INSERT OR REPLACE INTO chunks VALUES {values}", fields)

    def erase(self, doomed: Sequence[Doomed]) -> None:
        """Remove their rows, all or none, at most `batch`; a newer generation under the same key stays."""
        with self._transaction() as db:
            marks = ",".join("?" * len(doomed))  # a generation is one record's: if both are among ours, it is ours
            sql = f"DELETE FROM chunks WHERE key IN ({marks}) AND +generation IN ({marks})"
            db.execute(sql, [*sorted(one.name for one in doomed), *(one.generation for one in doomed)])

    def touch(self, touched: Sequence[tuple[int, bytes, int]]) -> None:
        """Keep the recency of (recency, key, generation), at most `batch`."""
        with self._transaction() as db:
            db.executemany("UPDATE chunks SET recency = ? WHERE key = ? AND generation = ?", touched)

    def forget(self, namespace: bytes, generation: int) -> None:
        """Rows of *namespace* up to *generation* are dead from now on, whenever they are erased."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO forgotten VALUES (?, ?)", (namespace, generation))

    def forgotten(self) -> list[tuple[bytes, int]]:
        """What `forget` was told. Damaged: it can't be told any more what is dead."""
        found = self._do("SELECT namespace, generation FROM forgotten").fetchall()
        for namespace, generation in found:
            if not isinstance(namespace, bytes) or len(namespace) != 32 or not isinstance(generation, int):
                raise Damaged(f"a note of what was deleted is damaged in {self.path}")
        return found

    def all_erased(self, namespace: bytes) -> None:
        """No row of *namespace* is dead any more."""
        with self._transaction() as db:
            db.execute("DELETE FROM forgotten WHERE namespace = ?", (namespace,))

    def check(self) -> None:
        """Damaged, when its pages do not hold together: rows may be missing without a word of SQLite's."""
        (found,) = self._do("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise Damaged(f"{self.path} is malformed: {found}")

    def checkpoint(self) -> None:
        """Bring all that was published to the disk itself."""
        self._checkpoint("FULL")

    def close(self) -> bool:
        """Idempotent. The last checkpoint is made here, and the WAL is gone. Whether it was open."""
        db, self._db = self._db, None
        mark, self._mark = self._mark, -1
        try:
            if db is not None:
                db.close()
                with contextlib.suppress(OSError):  # the log is gone, and the next begins with any number
                    os.pwrite(mark, 2 * _NOTE.pack(max(self._changes, self._noted), 0), 0)
        finally:
            if mark >= 0:
                os.close(mark)
        return db is not None

    def _do(self, sql: str, parameters: Sequence[object] = ()) -> sqlite3.Cursor:
        if self._db is None:
            raise sqlite3.OperationalError("the index file is closed")
        return self._db.execute(sql, parameters)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        if self._db is None:
            raise sqlite3.OperationalError("the index file is closed")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("UPDATE facts SET value = value + 1 WHERE name = 'changes'")
            self._db.execute("COMMIT")
            self._changes += 1
            self._note(self._changes, self._log_number())
            if self._wal.stat().st_size > self._log_limit:
                self._shorten_log()
        except BaseException:
            if self._db.in_transaction:
                with contextlib.suppress(sqlite3.Error):  # the first error is the one to tell
                    self._db.execute("ROLLBACK")
            raise

    def _shorten_log(self) -> None:
        """SQLite says nothing when a checkpoint of its own fails, and the log grows on: make one that says so."""
        self._checkpoint("TRUNCATE")
        set_aside(self._wal, self._wal_room)

    def _checkpoint(self, mode: str) -> None:
        (busy, _, _) = self._do(f"PRAGMA wal_checkpoint({mode})").fetchone()
        if busy:
            raise sqlite3.OperationalError("the log could not be written back: the index file is in use")
