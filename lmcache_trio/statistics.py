"""The figures of a server: what it holds now, what it has counted since it started, and a table per tier.

Each figure is `Annotated` with its unit and its meaning. The reference of the keys is made from these classes, and a
test refuses a figure without them. `table` makes the plain table that goes over the wire and that `lmcache-trio status
--json` prints.
"""

from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_type_hints

import attrs

__all__ = [
    "FIGURES",
    "ChunksHeld",
    "EngineHeld",
    "Events",
    "IndexCounted",
    "IndexHeld",
    "IndexStatistics",
    "LayoutHeld",
    "MemoryHeld",
    "NotReady",
    "QueueHeld",
    "ServerCounted",
    "ServerFacts",
    "ServerHeld",
    "ServerRates",
    "ServerStatistics",
    "TierStatistics",
    "TransfersHeld",
    "figures_of",
    "table",
]


@attrs.frozen
class ChunksHeld:
    """Chunks by state. A chunk has one slot per shard, and takes their bytes, each rounded up to 4 KiB."""

    chunks_ready: Annotated[int, "chunks", "Chunks that can be read."]
    slots_ready: Annotated[int, "slots", "Slots of these chunks."]
    bytes_ready: Annotated[int, "bytes", "Bytes of these chunks."]
    chunks_writing: Annotated[int, "chunks", "Chunks with a shard that is not committed yet."]
    slots_writing: Annotated[int, "slots", "Slots of these chunks."]
    bytes_writing: Annotated[int, "bytes", "Bytes of these chunks."]
    chunks_quarantined: Annotated[int, "chunks", "Dropped chunks, of which a copy or a read has not ended."]
    slots_quarantined: Annotated[int, "slots", "Slots of these chunks."]
    bytes_quarantined: Annotated[int, "bytes", "Bytes of these chunks."]
    chunks_stale: Annotated[int, "chunks", "Chunks that a reset dropped, and that are not swept yet."]
    slots_stale: Annotated[int, "slots", "Slots of these chunks."]
    bytes_stale: Annotated[int, "bytes", "Bytes of these chunks."]
    bytes_retained: Annotated[int, "bytes", "Bytes of ready chunks that a lease, a pin or a hold keeps from eviction."]


@attrs.frozen
class IndexHeld:
    """What the index of chunks in memory holds."""

    leases: Annotated[int, "leases", "Leases: answers whose chunks are kept for the engine that asked."]
    leases_offered: Annotated[int, "leases", "Leases for which the engine has not allocated blocks yet."]
    pins: Annotated[int, "reads", "Reads by workers that are under way."]
    holds: Annotated[int, "reads", "Reads by the server itself, for tiers."]
    reservations: Annotated[int, "stores", "Stores that may still commit."]
    reservations_ending: Annotated[int, "stores", "Aborted stores whose copies have not ended."]
    chunks: ChunksHeld
    bytes_offered: Annotated[int, "bytes", "Bytes of the chunks of offered leases, which `lease_share` bounds."]
    namespaces: Annotated[int, "namespaces", "Layouts of a model that hold chunks or that an engine uses."]
    bytes_taken: Annotated[int, "bytes", "Bytes of the arena that the system has given so far."]
    bytes_free: Annotated[int, "bytes", "Bytes of `bytes_taken` that no chunk takes."]
    largest_hole: Annotated[int, "bytes", "Bytes of the longest free range."]


@attrs.frozen
class LayoutHeld:
    """What memory holds of one layout of a model."""

    namespace: Annotated[str, "name", "Name of all that is cached of it. Its first characters name it, too."]
    model: Annotated[str, "name", "Name of the model, as the engine that came first said it; may be empty."]
    engines: Annotated[int, "engines", "Engines that use it now."]
    chunk_tokens: Annotated[int, "tokens", "Tokens of a chunk."]
    chunk_bytes: Annotated[int, "bytes", "Bytes of a chunk, with all its KV groups and shards."]
    chunks: Annotated[int, "chunks", "Chunks that can be read; of several KV groups, those of the group with most."]
    tokens: Annotated[int, "tokens", "Tokens of these chunks."]
    bytes: Annotated[int, "bytes", "Bytes of all its chunks, in all groups."]
    bytes_retained: Annotated[int, "bytes", "Those of them that a lease, a pin or a hold keeps from eviction."]


@attrs.frozen
class EngineHeld:
    """An engine, and what it needs of the memory."""

    name: Annotated[str, "name", "The engine's id."]
    model: Annotated[str, "name", "Name of its model, as its scheduler said it; may be empty."]
    namespace: Annotated[str, "name", "The layout that it uses; empty while it has no cache."]
    no_cache: Annotated[str, "text", "Why it has no cache; empty if it has one."]
    workers: Annotated[int, "workers", "Workers that are connected."]
    sessions: Annotated[int, "requests", "Open requests."]
    chunk_tokens: Annotated[int, "tokens", "Tokens of a chunk."]
    chunk_bytes: Annotated[int, "bytes", "Bytes of a chunk; 0 while it has no cache."]
    tokens_in_memory: Annotated[int, "tokens", "Tokens that the memory can hold if it holds nothing else."]


@attrs.frozen
class IndexCounted:
    """What the index of chunks in memory has counted."""

    stored_chunks: Annotated[int, "chunks", "Chunks that engines stored, with all their shards."]
    loaded_chunks: Annotated[int, "chunks", "Chunks that were loaded from tiers into memory."]
    reset_chunks: Annotated[int, "chunks", "Chunks that resets dropped."]
    cleared_chunks: Annotated[int, "chunks", "Chunks that `lmcache-trio clear` dropped from memory."]
    leases_expired: Annotated[int, "leases", "Leases that `lease_timeout` ended."]
    reservations_expired: Annotated[int, "stores", "Stores that `reservation_timeout` aborted."]
    aborted_chunks: Annotated[int, "chunks", "Chunks that were begun, and given up before all shards were committed."]
    evictions: Annotated[int, "chunks", "Chunks that were evicted from memory."]


@attrs.frozen
class IndexStatistics:
    """The index's own word. A server counts hits, misses, limits and drops more widely, so it tells its own."""

    held: IndexHeld
    counted: IndexCounted
    evicted_idle: float
    chunks_hit: int
    chunks_missed: int
    namespaces_dropped: int
    """By the limit `namespaces`."""
    dropped: Mapping[str, int]
    """Chunks of stores that got no slots, by reason."""


@attrs.frozen
class QueueHeld:
    """The queue of copies that the server makes itself, between engines' KV and the arena."""

    transfers_queued: Annotated[int, "transfers", "Transfers that wait for the device."]
    copies_running: Annotated[int, "copies", "Batches of copies that the device makes now."]
    copy_bytes_running: Annotated[int, "bytes", "Bytes of these batches."]


@attrs.frozen
class TransfersHeld:
    """What the server has to do with engines' KV."""

    queue: QueueHeld
    attached: Annotated[int, "workers", "Workers whose KV the server has opened."]
    attaching: Annotated[int, "requests", "Requests to open a worker's KV that have no answer yet."]


@attrs.frozen
class MemoryHeld:
    """What the memory backend says."""

    bytes_taken: Annotated[int, "bytes", "Bytes of the arena that the system has given so far."]
    bytes_size: Annotated[int, "bytes", "Bytes of the whole arena."]


@attrs.frozen
class ServerHeld:
    """What a server holds now. These figures go up and down."""

    connections: Annotated[int, "clients", "Clients that are connected."]
    welcomes: Annotated[int, "clients", "Clients that were let in, and have not taken up their connection yet."]
    engines: Annotated[int, "engines", "Engines that have a connected client."]
    sessions: Annotated[int, "requests", "Open requests of engines."]
    tasks: Annotated[int, "tasks", "Running tasks of the server."]
    lost_writers: Annotated[int, "workers", "Workers that were lost in a store, and whose copies may still run."]
    prefetches: Annotated[int, "lookups", "Lookups that wait for tiers."]
    queued_messages: Annotated[int, "messages", "Messages that wait for clients that do not read."]
    transfers: TransfersHeld | None
    index: IndexHeld
    memory: MemoryHeld


@attrs.frozen
class ServerRates:
    """How far the cache reaches: lookups of the last minute, and what other sizes would do. Nothing of it is held."""

    recent_requested_tokens: Annotated[int, "tokens", "Tokens of all chunks that lookups asked for in the last minute."]
    recent_hit_tokens: Annotated[int, "tokens", "Those of them that lookups were offered."]
    evicted_idle: Annotated[
        float, "seconds", "How long the chunk that was evicted last had not been used, at the least: memory's reach."
    ]
    expected_hit_ratio_memory: Annotated[
        Mapping[str, float],
        "share of tokens",
        "What would hit in memory of 0.5, 1, 2, 4 and 8 times its size. Empty before the first lookup.",
    ]
    expected_hit_ratio_tiers: Annotated[
        Mapping[str, float],
        "share of tokens",
        "What would hit with tiers of these multiples of the largest tier's size. Empty without tiers.",
    ]


@attrs.frozen
class Events:
    """What a server counts itself. The names are those of `Counts.events`."""

    lookups: Annotated[int, "lookups", "Lookups of at least one chunk that were answered."]
    hits: Annotated[int, "chunks", "Chunks that were offered to lookups."]
    misses: Annotated[int, "chunks", "Chunks that lookups asked for, and that were not offered."]
    resets: Annotated[int, "resets", "Resets that were carried out in memory."]
    refused: Annotated[int, "clients", "Clients that were refused. The log says why."]
    withdrawn: Annotated[int, "clients", "Clients that were let in, and did not take up their connection in time."]
    turned_away: Annotated[int, "clients", "Clients that were dropped before they introduced themselves."]
    exits_seen: Annotated[int, "workers", "Workers that were lost in a store, and whose process then exited."]
    rebound: Annotated[int, "times", "Times that the server listened anew, because the file of its socket was gone."]
    protocol_errors: Annotated[int, "clients", "Clients whose connection ended because of what they sent."]
    handler_bugs: Annotated[int, "requests", "Requests that failed by a bug of the server. The log has it."]
    connection_bugs: Annotated[int, "connections", "Connections that a bug of the server ended. The log has it."]
    device_bugs: Annotated[int, "failures", "Failures of the device by a bug. The log has it."]
    attaches_refused: Annotated[int, "requests", "Requests to open a worker's KV that the device refused."]
    layouts_too_large: Annotated[int, "layouts", "Layouts whose chunk is longer than the memory."]
    readers_turned_away: Annotated[int, "readers", "Readers by HTTP that came when `http.connections` were there."]
    records_written: Annotated[int, "lookups", "Lookups whose record was written to `records.path`."]
    records_dropped: Annotated[int, "lookups", "Lookups whose record was not written: the disk is slow or full."]
    readers_refused: Annotated[int, "requests", "Requests by HTTP without a key, where one is wanted."]


@attrs.frozen
class ServerCounted:
    """What a server has counted since it started. These figures only go up."""

    index: IndexCounted
    limits: Annotated[Mapping[str, int], "requests", "Requests that a limit refused, by its name in `[limits]`."]
    events: Events
    requested_tokens: Annotated[int, "tokens", "Tokens of all chunks that lookups asked for."]
    hit_tokens: Annotated[
        Mapping[str, int],
        "tokens",
        "Tokens that lookups were offered, by source: `memory`, or `tier` if one brought them.",
    ]
    missed_tokens: Annotated[
        Mapping[str, int], "tokens", "Tokens that lookups asked for and that were not offered, by reason."
    ]
    drops: Annotated[Mapping[str, int], "chunks", "Chunks of stores that were dropped, by reason."]


@attrs.frozen
class TierStatistics:
    """One tier. `loads`, `stores`, `failures`, `bugs`, `dropped` and bytes loaded and stored are counted."""

    name: Annotated[str, "name", "Name of the tier, as in the log."]
    state: Annotated[str, "word", "`open`, `fenced` (out of use), or `probing` (opening, or about to be used again)."]
    fenced: Annotated[bool, "yes or no", "Whether the tier is out of use."]
    reason: Annotated[str, "text", "Why the tier is fenced, or was last."]
    failures: Annotated[int, "calls", "Calls into the tier that failed or were overdue."]
    bugs: Annotated[int, "calls", "Calls into the tier that failed by a bug of it."]
    calls: Annotated[int, "calls", "Calls into the tier that are under way."]
    questions: Annotated[int, "lookups", "Lookups that wait for the tier's answer."]
    loads_held: Annotated[int, "loads", "Loads that are wanted, under way, or landed for an unanswered lookup."]
    loads_in_flight: Annotated[int, "loads", "Loads that are under way."]
    bytes_in_flight: Annotated[int, "bytes", "Bytes of these loads."]
    loads: Annotated[int, "chunks", "Chunks that were loaded."]
    loads_missed: Annotated[int, "chunks", "Chunks that the tier could not load."]
    loads_without_room: Annotated[int, "chunks", "Chunks that were not loaded, because memory had no room."]
    bytes_loaded: Annotated[int, "bytes", "Bytes of the loaded chunks."]
    stores: Annotated[int, "chunks", "Chunks that were written."]
    stores_refused: Annotated[int, "chunks", "Chunks that the tier did not take."]
    bytes_stored: Annotated[int, "bytes", "Bytes of the written chunks."]
    bytes_queued: Annotated[int, "bytes", "Bytes that wait to be written, or are being written."]
    dropped: Annotated[int, "chunks", "Chunks that were not written, because the tier was too slow or fenced."]
    deletions_owed: Annotated[int, "namespaces", "Namespaces that were reset, and that the tier has not deleted yet."]
    backend: Annotated[Mapping[str, int | str], "of the backend", "The backend's own figures."]


@attrs.frozen
class ServerFacts:
    """Which server it is."""

    version: Annotated[str, "version", "Release of lmcache-trio."]
    address: Annotated[str, "address", "Where clients find it."]
    uptime: Annotated[float, "seconds", "Since its start."]


@attrs.frozen
class NotReady:
    """What keeps engines from being cached now. A server without faults serves as it was set up."""

    reason: Annotated[str, "word", "One of a fixed list; [Watch a server](../howto/operate.md) has it."]
    detail: Annotated[str, "text", "Which tier or engine, and what to do."]


FIGURES: Mapping[str, type[Any]] = {
    "server": ServerFacts,
    "faults": NotReady,
    "held": ServerHeld,
    "counted": ServerCounted,
    "rates": ServerRates,
    "tiers": TierStatistics,
}
"""The parts of what `status --json` prints. `faults` and `tiers` are lists."""


@attrs.frozen
class ServerStatistics:
    """All figures of a server."""

    held: ServerHeld
    counted: ServerCounted
    rates: ServerRates
    tiers: tuple[TierStatistics, ...]

    def table(self) -> dict[str, Any]:
        """By part, as `status --json` prints them."""
        whole = {"held": table(self.held), "counted": table(self.counted), "rates": table(self.rates)}
        return {**whole, "tiers": [table(tier) for tier in self.tiers]}


def table(figures: Any) -> dict[str, Any]:
    """*figures* by name. Those of a part stand among those of the whole; a part that is None has none."""
    found: dict[str, Any] = {}
    for field in attrs.fields(type(figures)):
        value = getattr(figures, field.name)
        if attrs.has(type(value)):
            found |= table(value)
        elif value is not None:
            found[field.name] = value
    return found


def figures_of(cls: type[Any]) -> dict[str, tuple[str, str]]:
    """Unit and meaning of each figure of *cls* and of its parts, by key."""
    found: dict[str, tuple[str, str]] = {}
    for key, hint in get_type_hints(cls, include_extras=True).items():
        parts = [part for part in (hint, *get_args(hint)) if isinstance(part, type) and attrs.has(part)]
        if parts:
            found |= figures_of(parts[0])
        else:
            found[key] = getattr(hint, "__metadata__", ("", ""))
    return found
