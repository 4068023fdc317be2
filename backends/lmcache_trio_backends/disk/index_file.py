"""The index file: SQLite in WAL mode, one row per chunk. Every method blocks, and all run in one thread of its own.

`chunk_table` decides, and the index file keeps the rows. By itself it only erases rows that are damaged. It has one
exclusive connection. So it needs no shared memory file, every checkpoint completes, and the log (the WAL) keeps within
its room: SQLite writes the log back once half of the room is filled, and no transaction takes more than a quarter.
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
"""All rows as one text; of a row with values of wrong types, only the key. sqlite3 releases the GIL at each row. If the
loop is busy it may wait 5 ms for it each time: 400 rows would take 2 s, and the next query waits behind them. For the
same reason a change is few statements."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS chunks (
    key BLOB PRIMARY KEY, parent BLOB NOT NULL, place INTEGER NOT NULL, generation INTEGER NOT NULL,
    recency INTEGER NOT NULL, shards BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS forgotten (namespace BLOB PRIMARY KEY, generation INTEGER NOT NULL) WITHOUT ROWID;
"""
_MARK = "-mark"
_AHEAD = 64
"""Pages of the index file that are set aside before they are needed, 256 KiB: each time costs a transaction."""
_ROW = struct.Struct("<QQ")
_SHARD_BYTES = 16
"""Of a packed shard: length and checksum."""
_SUM = struct.Struct("<Q")
_NOTE = struct.Struct("<QQ")
"""The number of the last change, and of the log that has it."""
_LOG_NUMBERS = 1 << 32
_MAX_ROWS = 400
"""Rows that one statement names: SQLite takes 32,766 variables."""
_LIMIT = 1 << 61
"""Generations, recencies and places are smaller. A flipped bit below it leaves room to count on from there."""


class Damaged(sqlite3.DatabaseError):
    """The file is a database, but not one that this tier wrote."""


class Full(Exception):
    """The disk has no space for the pages that the rows may take."""


def is_corrupt(exc: BaseException) -> bool:
    """Whether the database is damaged; else it could not be read or written."""
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    return isinstance(exc, Damaged) or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _pack(row: Row) -> bytes:
    """The shards of *row* as the file has them: length and checksum of each, and behind them a checksum of the row.

    The latter leaves out the recency, which changes by itself.
    """
    numbers = itertools.chain.from_iterable(zip(row.lengths, row.sums, strict=True))
    shards = struct.pack(f"<{2 * len(row.lengths)}Q", *numbers)
    return shards + _sum(row.name, row.parent, row.offset, row.generation, shards)


def _unpack(fields: Sequence[str]) -> Row | None:
    """The row of *fields*, which `_AS_TEXT` gave; None if it is damaged.

    `SlabScanner` checks its place beside other rows and the end of the slabs. A server unpacks a million rows when it
    starts, so this is written for speed.
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
        """A longer log means that a checkpoint failed: it is due at half, and a transaction takes a quarter."""
        self._flush = flush
        self._db: sqlite3.Connection | None = None
        self._mark = -1  # a file beside the index, with the number of the last change
        self._changes = self._noted = 0
        self.behind = 0
        """Changes that the file and its log do not have any more. Known after `open`."""
        self.spare = room
        """Bytes of *room* that are not set aside yet. May be read in any thread."""
        self.damaged = 0
        """Damaged rows that were erased."""
        self.batch = min(_MAX_ROWS, max(1, wal_room // 4 // (2 * (PAGE + 24)) - 2))
        """Rows that one transaction may change. Each dirties about two pages, and all together a quarter of *wal_room*.

        With very many shards a row dirties three pages, and all more than a quarter; half of the room is free for them.
        """

    def open(self) -> str:
        """Open the file or make it. If it is corrupt, or larger than its room, make it anew and return why, else "".

        It is larger if the tier had a larger size before, and many small chunks. Free pages are then removed. To remove
        more SQLite would need as much space again, and most of its rows name slabs that were cut off.
        """
        try:
            self._connect()
            (pages,) = self._do("PRAGMA page_count").fetchone()
            if pages * PAGE > self._room and self.size() <= min(self._room, self._wal_room // 2):
                self._do("VACUUM")  # the surplus is free pages, and the log has room for the others
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
        """Delete the file and its log."""
        self._noted = self.behind = 0
        for suffix in ("", "-wal", "-shm", "-journal", _MARK):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _connect(self) -> None:
        for suffix in ("", "-wal", "-shm", "-journal"):  # SQLite follows links, and lets others read
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
        # fails if the file cannot be written
        db.execute("INSERT INTO facts VALUES ('opened', 1) ON CONFLICT DO UPDATE SET value = value + 1")
        # keys of a wrong type, which `page` would never reach
        self.damaged += db.execute("DELETE FROM chunks WHERE key <= x''").rowcount
        # SQLite takes a log that is cut, damaged or gone for a shorter one: the changes tell how much is missing
        db.execute("INSERT OR IGNORE INTO facts VALUES ('changes', 0)")
        self._changes = self.fact("changes") or 0
        self.behind += max(0, self._noted - self._changes)
        self._noted = 0
        self._note(self._changes, self._log_number())
        if self._wal.stat().st_size > self._log_limit:  # a former server may have had more room for it
            self._shorten_log()
        set_aside(self._wal, self._wal_room)
        self._take_pages(0)

    def _read_mark(self) -> None:
        """Remove an older copy of the log before SQLite reads it: SQLite would lay it over the file's newer pages."""
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
        self._note(self._noted, 0)  # the next log begins with any number

    def _log_number(self) -> int:
        """The log's number; the next log has one more ("WAL Header" in SQLite's file format: salt-1). 0: no log."""
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self._wal, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                return int.from_bytes(os.pread(fd, 4, 16), "big")
            finally:
                os.close(fd)
        return 0

    def _note(self, changes: int, log_number: int) -> None:
        with contextlib.suppress(OSError):  # the mark is a witness: a change must not fail for it
            os.pwrite(self._mark, 2 * _NOTE.pack(changes, log_number), 0)

    def _take_pages(self, rows: int) -> bool:
        """Set free pages aside in the file for *rows* more. False: the disk has no more now.

        Without them SQLite would find a full disk when it writes its log back, and could not even erase. The pages must
        lie within the file, because each checkpoint gives back the space behind its end.
        """
        (pages,), (free,) = (self._do(f"PRAGMA {count}").fetchone() for count in ("page_count", "freelist_count"))
        need, most = 2 * rows + 2, self._room // PAGE
        self.spare = max(0, most - pages) * PAGE
        if free >= need or pages >= most - 2:
            return True
        for more in dict.fromkeys(min(count, most - pages) for count in (need - free + _AHEAD, need - free)):
            if set_aside(self.path, (pages + more) * PAGE):
                with self._transaction() as db:  # the pages of a long value are free once it is deleted
                    db.execute("INSERT OR REPLACE INTO facts VALUES ('ahead', zeroblob(?))", ((more - 2) * (PAGE - 4),))
                    db.execute("DELETE FROM facts WHERE name = 'ahead'")
                return True
        return False

    def fact(self, name: str, value: int | None = None) -> int | None:
        """The number kept under *name*; *value*, if given, replaces it first."""
        if value is not None:
            self._do("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))
        found = self._do("SELECT value FROM facts WHERE name = ? AND typeof(value) = 'integer'", (name,)).fetchone()
        return None if found is None else int(found[0])

    def size(self) -> int:
        """Bytes of the file that are in use. Quick, however many rows it has."""
        (pages,), (free,) = (self._do(f"PRAGMA {count}").fetchone() for count in ("page_count", "freelist_count"))
        return int(pages - free) * PAGE

    def page(self, after: bytes, limit: int) -> list[Row]:
        """Up to *limit* rows whose keys follow *after*, in order; [] at the end."""
        some = f"(SELECT {_COLUMNS} FROM chunks WHERE key > ? ORDER BY key LIMIT ?)"
        while True:
            before = self.damaged
            rows = sorted(self._rows(some, (after, limit)))
            if rows or self.damaged == before:
                return rows

    def find(self, keys: Sequence[bytes]) -> list[Row]:
        """The rows of those *keys* that the file has, in any order."""
        found: list[Row] = []
        for i in range(0, len(keys), _MAX_ROWS):
            some = keys[i : i + _MAX_ROWS]
            marks = ",".join("?" * len(some))
            found += self._rows(f"chunks WHERE key IN ({marks})", some)
        return found

    def _rows(self, source: str, parameters: Sequence[object]) -> list[Row]:
        """The rows of *source*. Damaged ones are erased, and counted."""
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
        """Keep *rows*, at most `batch`: all or none. Full: none, because the disk has no space."""
        if not self._take_pages(len(rows)):
            raise Full
        if not rows:
            return
        with self._transaction() as db:
            values = ",".join(["(?, ?, ?, ?, ?, ?)"] * len(rows))
            fields = [field for row in sorted(rows) for field in (*row[:5], _pack(row))]
            db.execute(f"INSERT OR REPLACE INTO chunks VALUES {values}", fields)

    def erase(self, doomed: Sequence[Doomed]) -> None:
        """Remove the rows of *doomed*, at most `batch`: all or none. A newer generation under the same key stays."""
        with self._transaction() as db:
            marks = ",".join("?" * len(doomed))  # no two records share a generation
            sql = f"DELETE FROM chunks WHERE key IN ({marks}) AND +generation IN ({marks})"
            db.execute(sql, [*sorted(one.name for one in doomed), *(one.generation for one in doomed)])

    def touch(self, touched: Sequence[tuple[int, bytes, int]]) -> None:
        """Keep the recency of (recency, key, generation), at most `batch`."""
        with self._transaction() as db:
            db.executemany("UPDATE chunks SET recency = ? WHERE key = ? AND generation = ?", touched)

    def forget(self, namespace: bytes, generation: int) -> None:
        """Rows of *namespace* up to *generation* are dead from now on, and may be erased later."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO forgotten VALUES (?, ?)", (namespace, generation))

    def forgotten(self) -> list[tuple[bytes, int]]:
        """The (namespace, generation) of each `forget`. Damaged: dead rows can't be told from others any more."""
        found = self._do("SELECT namespace, generation FROM forgotten").fetchall()
        for namespace, generation in found:
            if not isinstance(namespace, bytes) or len(namespace) != 32 or not isinstance(generation, int):
                raise Damaged(f"the note of a deletion is damaged in {self.path}")
        return found

    def all_erased(self, namespace: bytes) -> None:
        """Remove the note of `forget`: all dead rows of *namespace* are erased."""
        with self._transaction() as db:
            db.execute("DELETE FROM forgotten WHERE namespace = ?", (namespace,))

    def check(self) -> None:
        """Damaged if its pages do not hold together: SQLite may then miss rows without an error."""
        (found,) = self._do("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise Damaged(f"{self.path} is malformed: {found}")

    def checkpoint(self, mode: str = "FULL") -> None:
        """Bring all published rows to the disk itself; with mode TRUNCATE, empty the log too."""
        (busy, _, _) = self._do(f"PRAGMA wal_checkpoint({mode})").fetchone()
        if busy:
            raise sqlite3.OperationalError("the log could not be written back: the index file is in use")

    def close(self) -> bool:
        """Make the last checkpoint, remove the log, close. Idempotent. Returns whether the file was open."""
        db, self._db = self._db, None
        try:
            if db is not None:
                db.close()
                self._note(max(self._changes, self._noted), 0)  # the next log begins with any number
        finally:
            if self._mark >= 0:
                os.close(self._mark)
            self._mark = -1
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
                with contextlib.suppress(sqlite3.Error):  # the first error is raised
                    self._db.execute("ROLLBACK")
            raise

    def _shorten_log(self) -> None:
        """SQLite hides a checkpoint of its own that fails, and the log grows on: make one that raises."""
        self.checkpoint("TRUNCATE")
        set_aside(self._wal, self._wal_room)
