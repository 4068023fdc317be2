"""How a lookup is answered: at once from memory, or by a push after a prefetch from the tiers.

A prefetch is one task, a child of the connection. It waits for events that the tiers' own tasks set, and never for a
call into a tier, so it keeps its budget even if a tier hangs. When the budget is used up, the answer is the chunks that
are in memory by then. All that the prefetch wanted, held and leased ends with it at once, in synchronous code: at the
answer, and when the lookup is released, replaced or ended, or its connection is lost.
"""

import logging
from collections import deque
from collections.abc import Sequence
from math import floor, inf

import attrs
import trio

from lmcache_trio._core.groups import EVERY, Need
from lmcache_trio._core.index.index import Hold, Index, Lease
from lmcache_trio._core.index.session import LookupState, Session
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._core.misses import InTiers
from lmcache_trio._core.tiers.loads import LoadState, TierLoad
from lmcache_trio._core.tiers.plan import Plan
from lmcache_trio._server.clock import Clock
from lmcache_trio._server.counts import Counts
from lmcache_trio._server.drain import Drain
from lmcache_trio._server.engine import Engine
from lmcache_trio._server.misses import Search
from lmcache_trio._server.peer import Peer
from lmcache_trio._server.requests import Requests
from lmcache_trio._server.tiers.contains import Question
from lmcache_trio._server.tiers.runner import TierRunner
from lmcache_trio._server.tiers.tiers import Tiers
from lmcache_trio._wire.messages import Answer, AnswerState, Lookup

__all__ = ["Answers", "LastMinute", "answer_of"]

log = logging.getLogger("lmcache_trio.server")

NEXT_TIER = 0.25
"""Share of the budget after which the next tier is asked too, even if the one before it has not answered."""
NAMED_AT_ONCE = 2048
"""Parts that are named to a tier in one go, which takes about 2 ms."""
HELD_AT_ONCE = 512
"""Chunks that are looked for in memory in one go, which takes about 1 ms. Then the other tasks of the loop run."""
_STATES = {
    LookupState.UNKNOWN: AnswerState.UNKNOWN,
    LookupState.PENDING: AnswerState.PENDING,
    LookupState.ANSWERED: AnswerState.ANSWERED,
}


def answer_of(session: Session, reply_to: int) -> Answer:
    """The Answer that tells a scheduler the state of *session*'s lookup. *reply_to* is 0 in a push."""
    status = session.status(trio.current_time())
    ttl_ms = floor(status.ttl * 1000)
    said = status.asked, _STATES[status.state], status.chunks, status.lease
    return Answer(reply_to, session.number, *said, ttl_ms, status.loaded)


PIECE, PIECES = 5.0, 12
"""Seconds of a piece of the last minute, and how many there are."""


@attrs.define(eq=False)
class LastMinute:
    """Tokens that lookups asked for and were offered, in pieces of `PIECE` seconds."""

    _pieces: deque[list[int]] = attrs.field(factory=lambda: deque(maxlen=PIECES))
    """Each with its number, counted from the clock's zero, and both sums."""

    def add(self, requested: int, hit: int, now: float) -> None:
        number = int(now / PIECE)
        if not self._pieces or self._pieces[-1][0] != number:
            self._pieces.append([number, 0, 0])
        piece = self._pieces[-1]
        piece[1] += requested
        piece[2] += hit

    def sums(self, now: float) -> tuple[int, int]:
        """Requested and hit tokens, of the last 55 to 60 s."""
        oldest = int(now / PIECE) - PIECES + 1
        recent = [piece for piece in self._pieces if piece[0] >= oldest]
        return sum(piece[1] for piece in recent), sum(piece[2] for piece in recent)


class Answers:
    """Answers lookups, runs their prefetches, and counts hits and misses. Without tiers no prefetch ever begins.

    *budget* is the seconds that a prefetch may take. A lookup may give it less.
    """

    def __init__(  # noqa: PLR0913 each is a part that it works with
        self,
        index: Index,
        clock: Clock,
        tiers: Tiers,
        requests: Requests,
        drain: Drain,
        counts: Counts,
        budget: float,
    ) -> None:
        self.index = index
        self.tiers = tiers
        self.prefetches: dict[Session, Prefetch] = {}
        """The prefetches that run, by the session of their lookup."""
        self.last_minute = LastMinute()
        self._clock = clock
        self._requests = requests
        self._drain = drain
        self._counts = counts
        self._events = counts.events
        self._budget = budget

    def look_up(self, peer: Peer, engine: Engine, session: Session, message: Lookup, wanted: list[bytes]) -> None:
        """Answer *message*, which asks for *wanted*; or begin a prefetch, if tiers may have more than memory.

        If memory has the next chunk and does not lease it, lease_share is used up, so no prefetch could offer more.
        """
        lease = self._lease(engine, session, wanted, engine.namespaces)
        leased = 0 if lease is None else lease.chunks
        budget = self._budget if message.budget_ms < 0 else min(self._budget, message.budget_ms / 1000)
        if (
            leased == len(wanted)
            or not (engine.namespaces and budget and self.tiers.any_open)
            or self._drain.stopping
            or self._is_cut(engine, wanted, leased)
        ):
            self._give(engine, session, message.id, wanted, lease, None)
            return
        made = Prefetch(self, peer, engine, session, lease)
        self.prefetches[session] = made
        peer.start(self._run, made, message.id, wanted, trio.current_time() + budget)

    def _is_cut(self, engine: Engine, wanted: Sequence[bytes], leased: int) -> bool:
        """Whether memory has a longer hit for *engine* than the *leased* chunks."""
        if engine.groups == (EVERY,):  # the next chunk tells
            return self.index.match(engine.namespaces, wanted[leased : leased + 1]) > 0
        return self.index.match(engine.namespaces, wanted) > leased

    def cancel(self, session: Session) -> None:
        """The session's lookup is not wanted any more. Idempotent."""
        running = self.prefetches.pop(session, None)
        if running is not None:
            running.close()

    def push(self, prefetch: "Prefetch", asked: int, wanted: Sequence[bytes]) -> None:
        """End *prefetch*, and answer *asked* with the chunks in memory; with none if the layout has changed."""
        if prefetch.closed:
            return
        engine, session = prefetch.engine, prefetch.session
        usable = engine.namespaces if engine.namespaces == prefetch.namespaces else ()
        lease = self._lease(engine, session, wanted, usable)
        if lease is not None:
            prefetch.lease = b""  # the session's new lease took its place
        self._give(engine, session, asked, wanted, lease, prefetch)
        prefetch.close()
        prefetch.peer.send(answer_of(session, 0))

    def _lease(
        self, engine: Engine, session: Session, wanted: Sequence[bytes], namespaces: tuple[bytes, ...]
    ) -> Lease | None:
        """Lease the longest hit of *wanted* that memory serves, in place of the session's former lease."""
        if not wanted or not namespaces or self._drain.stopping:
            return None
        lease = self.index.lease((engine.name, session.number), namespaces, wanted, trio.current_time())
        if lease is not None:
            self._clock.not_later_than(lease.expires)
        return lease

    def _give(
        self,
        engine: Engine,
        session: Session,
        asked: int,
        wanted: Sequence[bytes],
        lease: Lease | None,
        prefetch: "Prefetch | None",
    ) -> None:
        """Make *lease*, for which *prefetch* brought chunks, the session's answer to *asked*."""
        if lease is None:
            session.answer(asked, 0)
        else:
            loaded = 0 if prefetch is None else prefetch.loaded(lease.chunks)
            session.answer(asked, lease.chunks, lease.id, lease.expires, loaded)
            for writer in self.tiers.writers:
                if writer.unwritten:  # a part that it has not taken is offered again, since an engine uses it
                    for namespace, group in zip(lease.namespaces, engine.groups, strict=True):
                        first = group.first(lease.chunks, engine.chunk_tokens)
                        writer.used(namespace, wanted[first : lease.chunks])
        if engine.namespaces:
            self._counts.curve.looked_up(wanted, engine.chunk_bytes, engine.chunk_tokens)
        self._events["lookups"] += bool(wanted)
        self._events["hits"] += session.chunks
        self._events["misses"] += len(wanted) - session.chunks
        self._counts.requested_tokens += len(wanted) * engine.chunk_tokens
        self._counts.hit_tokens["memory"] += (session.chunks - session.loaded) * engine.chunk_tokens
        self._counts.hit_tokens["tier"] += session.loaded * engine.chunk_tokens
        if session.chunks < len(wanted) or self._requests.are_all_noted:
            self._requests.note(engine, session, wanted, None if prefetch is None else prefetch.search)
        tokens = engine.chunk_tokens
        self.last_minute.add(len(wanted) * tokens, session.chunks * tokens, trio.current_time())

    async def _run(self, prefetch: "Prefetch", asked: int, wanted: list[bytes], deadline: float) -> None:
        try:
            await prefetch.run(wanted, deadline)
            self.push(prefetch, asked, wanted)
        except Exception:  # a bug of ours: it costs this one lookup, which is answered
            self._events["handler_bugs"] += 1
            log.exception("bug in a prefetch for %s", prefetch.peer)
            self.push(prefetch, asked, wanted)
        finally:
            prefetch.close()
            if self.prefetches.get(prefetch.session) is prefetch:
                del self.prefetches[prefetch.session]


class Prefetch:
    """The parts that one lookup's hit needs, gathered into memory. `close` may come at any time."""

    def __init__(self, answers: Answers, peer: Peer, engine: Engine, session: Session, lease: Lease | None) -> None:
        self.peer = peer
        self.engine = engine
        self.session = session
        self.namespaces = engine.namespaces
        self.closed = False
        self.search = Search(trio.current_time())
        self._index = answers.index
        self._runners = answers.tiers.runners
        self._scope = trio.CancelScope()
        self._changed = trio.Event()
        self.lease, self._leased = (b"", 0) if lease is None else (lease.id, lease.chunks)
        self._holds: list[Hold] = []
        self._questions: dict[int, Question] = {}
        self._coming: dict[tuple[int, int], tuple[TierRunner, TierLoad]] = {}  # by group and position
        self._brought: list[tuple[int, int]] = []  # by group and position: what tiers brought
        self._landed: list[tuple[TierRunner, TierLoad]] = []

    def wake(self) -> None:
        """A question was answered, or a load is over."""
        self._changed.set()

    def loaded(self, boundary: int) -> int:
        """Chunks of a hit of *boundary* chunks of which tiers brought parts. A state stands for the whole hit."""
        chunks = set[int]()
        for number, position in self._brought:
            group = self.engine.groups[number]
            if group.first(boundary, self.engine.chunk_tokens) <= position < boundary:
                if group.need is Need.STATE:
                    return boundary
                chunks.add(position)
        return len(chunks)

    def close(self) -> None:
        """End the task, and all that it holds and waits for. Idempotent."""
        self.closed = True
        self._scope.cancel()
        for tier, question in self._questions.items():
            self._runners[tier].contains.withdraw(question)
        for runner, load in (*self._coming.values(), *self._landed):
            runner.loader.unwant(load, self.wake)
        for hold in self._holds:
            self._index.unhold(hold)
        if self.lease:
            self._index.release(self.lease)
        self._questions.clear()
        self._coming.clear()
        self._landed.clear()
        self._holds.clear()
        self.lease = b""

    async def run(self, wanted: Sequence[bytes], deadline: float) -> None:
        """Gather until the leading run can't grow any more, or *deadline* has come."""
        if self.closed:
            return  # before the task's first step: the session may have another lookup by now
        plan = Plan(len(wanted), len(self._runners), self.engine.groups, self.engine.chunk_tokens)
        self.search.plan = plan
        with self._scope, trio.move_on_at(deadline) as budget:
            await self._gather(plan, wanted, deadline)
        if budget.cancelled_caught:
            self.search.reach = plan.boundary

    async def _gather(self, plan: Plan, wanted: Sequence[bytes], deadline: float) -> None:
        groups, chunk_tokens = self.engine.groups, self.engine.chunk_tokens
        for number, of_group in enumerate(groups):
            for position in range(of_group.first(self._leased, chunk_tokens), self._leased):
                plan.here(number, position)
        await self._hold_the_rest(plan, wanted)
        asked, ask_next = 0, -inf
        while True:
            self._changed = trio.Event()
            self._collect(plan)
            for group, position, tier in plan.to_want():
                runner = self._runners[tier]
                parent = wanted[position - 1] if position and groups[group].need is Need.EVERY else b""
                key = ChunkKey(self.namespaces[group], wanted[position])
                self._coming[group, position] = (runner, runner.loader.want(key, parent, deadline, self.wake))
            if any(load.settled for _, load in self._coming.values()):
                continue
            if plan.done:
                return
            now = trio.current_time()
            if asked < len(self._runners) and (not self._questions or now >= ask_next):
                await self._ask(asked, plan, wanted)
                asked, ask_next = asked + 1, now + NEXT_TIER * (deadline - now)
                continue
            with trio.move_on_at(ask_next if asked < len(self._runners) else inf):
                await self._changed.wait()

    async def _hold_the_rest(self, plan: Plan, wanted: Sequence[bytes]) -> None:
        for number, (group, position) in enumerate(plan.unknown(), 1):
            hold = self._index.hold(ChunkKey(self.namespaces[group], wanted[position]))
            if hold is not None:
                self._holds.append(hold)
                plan.here(group, position)
            if number % HELD_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()

    async def _ask(self, tier: int, plan: Plan, wanted: Sequence[bytes]) -> None:
        keys: list[ChunkKey] = []
        for number, (group, position) in enumerate(plan.ask(tier), 1):
            keys.append(ChunkKey(self.namespaces[group], wanted[position]))
            if number % NAMED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        question = Question(keys, self.wake)
        runner = self._runners[tier]
        self._questions[tier] = question
        if not keys or any(runner.writer.is_deleting(namespace) for namespace in self.namespaces):
            question.answer([False] * len(keys))
        else:
            runner.contains.ask(question)

    def _collect(self, plan: Plan) -> None:
        """Tell *plan* of the questions and loads that have ended, and end the loads that it does not need any more."""
        for tier, question in list(self._questions.items()):
            if question.found is not None:
                del self._questions[tier]
                plan.answered(tier, question.found)
        for part, (runner, load) in list(self._coming.items()):
            if load.settled:
                del self._coming[part]
                if load.state is LoadState.LANDED:
                    plan.landed(*part)
                    self._brought.append(part)
                    self._landed.append((runner, load))
                else:
                    plan.missed(*part)
                    if load.refused is not InTiers.NONE:
                        self.search.refused[load.key] = load.refused
                    runner.loader.unwant(load, self.wake)
        for part in [part for part in self._coming if not plan.needs(*part)]:
            runner, load = self._coming.pop(part)
            runner.loader.unwant(load, self.wake)
