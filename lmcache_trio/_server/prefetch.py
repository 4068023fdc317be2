"""A lookup that memory does not cover: ask the tiers, load what they have, answer when that is known.

One task each, a child of the connection; it waits for what the tiers' own tasks tell it and never for a call into one,
so its budget is kept whatever hangs. When the budget is used up, the answer is what is resident by then. What it
wanted, held and leased goes with it at once, in synchronous code: at the answer, and when the lookup is released,
replaced or ended, or its connection lost.
"""

import logging
from collections.abc import Sequence
from math import inf

import trio

from lmcache_trio._core.index.index import Hold, Index, Lease
from lmcache_trio._core.index.session import Session
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._core.tiers.loads import LoadState, TierLoad
from lmcache_trio._core.tiers.plan import Plan
from lmcache_trio._server.answers import Answers, answer_of
from lmcache_trio._server.counts import Counts
from lmcache_trio._server.engine import Engine
from lmcache_trio._server.peer import Peer
from lmcache_trio._server.tiers.contains import Question
from lmcache_trio._server.tiers.runner import TierRunner
from lmcache_trio._server.tiers.tiers import Tiers
from lmcache_trio._wire.messages import Lookup

__all__ = ["Prefetches"]

log = logging.getLogger("lmcache_trio.server")

NEXT_TIER = 0.25
"""Share of the budget after which the next tier is asked too, although the one before it has not answered."""
HELD_AT_ONCE = 512
"""Chunks looked for in memory before others get their turn: about 1 ms."""


class Prefetches:
    """All prefetches that run, by session. Without tiers none ever begins."""

    def __init__(self, index: Index, tiers: Tiers, answers: Answers, budget: float, counts: Counts) -> None:
        self.index = index
        self.tiers = tiers
        self.answers = answers
        self._budget = budget
        self._counts = counts
        self._running: dict[Session, Prefetch] = {}

    def __len__(self) -> int:
        return len(self._running)

    def begin(
        self, peer: Peer, engine: Engine, session: Session, message: Lookup, wanted: list[bytes], lease: Lease | None
    ) -> bool:
        """Take on a lookup of which memory has no more than *lease*, if a tier may be asked and there is time for it.

        A chunk that is there and was not leased means that lease_share is used up: no more can be offered then.
        """
        leased = 0 if lease is None else lease.chunks
        if not self.tiers.runners or self.index.match(engine.namespace, wanted[leased : leased + 1]):
            return False
        budget = self._budget
        if message.budget_ms >= 0:
            budget = min(budget, message.budget_ms / 1000)
        if not budget or not self.tiers.any_open:
            return False
        made = Prefetch(self, peer, engine, session, lease)
        self._running[session] = made
        peer.start(self._run, made, message.id, wanted, trio.current_time() + budget)
        return True

    def cancel(self, session: Session) -> None:
        """The session's lookup is not wanted any more. Idempotent."""
        running = self._running.pop(session, None)
        if running is not None:
            running.close()

    async def _run(self, prefetch: "Prefetch", asked: int, wanted: list[bytes], deadline: float) -> None:
        try:
            await prefetch.run(asked, wanted, deadline)
        except Exception:  # a bug of ours: it costs this one lookup, which is answered
            self._counts.events["handler_bugs"] += 1
            log.exception("bug in a prefetch for %s", prefetch.peer)
            prefetch.answer(asked, wanted)
        finally:
            prefetch.close()
            if self._running.get(prefetch.session) is prefetch:
                del self._running[prefetch.session]


class Prefetch:
    """One of them. `close` may come at any time, and is the end of all that it holds."""

    def __init__(
        self, prefetches: Prefetches, peer: Peer, engine: Engine, session: Session, lease: Lease | None
    ) -> None:
        self.peer = peer
        self.session = session
        self._index = prefetches.index
        self._answers = prefetches.answers
        self._runners = prefetches.tiers.runners
        self._engine = engine
        self._namespace = engine.namespace
        self._scope = trio.CancelScope()
        self._changed = trio.Event()
        self._lease, self._leased = (b"", 0) if lease is None else (lease.id, lease.chunks)
        self._holds: list[Hold] = []
        self._questions: dict[int, Question] = {}
        self._coming: dict[int, tuple[TierRunner, TierLoad]] = {}
        self._landed: list[tuple[TierRunner, TierLoad]] = []
        self._closed = False

    def wake(self) -> None:
        """Something that it waits for is known."""
        self._changed.set()

    def close(self) -> None:
        """Let go of everything, and end the task. Idempotent."""
        self._closed = True
        self._scope.cancel()
        for tier, question in self._questions.items():
            self._runners[tier].contains.withdraw(question)
        for runner, load in (*self._coming.values(), *self._landed):
            runner.loader.unwant(load, self.wake)
        for hold in self._holds:
            self._index.unhold(hold)
        if self._lease:
            self._index.release(self._lease)
        self._questions.clear()
        self._coming.clear()
        self._landed.clear()
        self._holds.clear()
        self._lease = b""

    def answer(self, asked: int, wanted: Sequence[bytes]) -> None:
        """Lease what is there by now, and push it."""
        if not self._closed:
            usable = self._engine.namespace if self._engine.namespace == self._namespace else b""
            lease = self._answers.lease(self._engine.name, self.session, wanted, usable)
            if lease is not None:
                self._lease = b""  # the session's new lease took its place
            self._answers.give(self.session, asked, wanted, lease)
            self.close()
            self.peer.send(answer_of(self.session, 0))

    async def run(self, asked: int, wanted: Sequence[bytes], deadline: float) -> None:
        """Gather until it is known or *deadline* has come; then answer."""
        if self._closed:
            return  # before its first step: the session may have another lookup by now
        with self._scope:
            with trio.move_on_at(deadline):
                await self._gather(wanted, deadline)
            self.answer(asked, wanted)

    async def _gather(self, wanted: Sequence[bytes], deadline: float) -> None:
        plan = Plan(len(wanted), len(self._runners))
        for position in range(self._leased):
            plan.here(position)
        await self._hold_the_rest(plan, wanted)
        asked, ask_next = 0, -inf
        while True:
            self._changed = trio.Event()
            self._collect(plan)
            for position, tier in plan.to_want():
                runner = self._runners[tier]
                parent = wanted[position - 1] if position else b""
                key = ChunkKey(self._namespace, wanted[position])
                self._coming[position] = (runner, runner.loader.want(key, parent, deadline, self.wake))
            if any(load.settled for _, load in self._coming.values()):
                continue
            if plan.done:
                return
            now = trio.current_time()
            if asked < len(self._runners) and (not self._questions or now >= ask_next):
                self._ask(asked, plan, wanted)
                asked, ask_next = asked + 1, now + NEXT_TIER * (deadline - now)
                continue
            with trio.move_on_at(ask_next if asked < len(self._runners) else inf):
                await self._changed.wait()

    async def _hold_the_rest(self, plan: Plan, wanted: Sequence[bytes]) -> None:
        for position in range(plan.run, len(wanted)):
            hold = self._index.hold(ChunkKey(self._namespace, wanted[position]))
            if hold is not None:
                self._holds.append(hold)
                plan.here(position)
            if position % HELD_AT_ONCE == HELD_AT_ONCE - 1:
                await trio.lowlevel.checkpoint()

    def _ask(self, tier: int, plan: Plan, wanted: Sequence[bytes]) -> None:
        positions = plan.ask(tier)
        question = Question(self._namespace, [wanted[position] for position in positions], self.wake)
        runner = self._runners[tier]
        self._questions[tier] = question
        if not positions or runner.writer.is_deleting(self._namespace):
            question.answer([False] * len(positions))
        else:
            runner.contains.ask(question)

    def _collect(self, plan: Plan) -> None:
        """Take note of what is known by now, and let go of what is not needed for it."""
        for tier, question in list(self._questions.items()):
            if question.found is not None:
                del self._questions[tier]
                plan.answered(tier, question.found)
        for position, (runner, load) in list(self._coming.items()):
            if load.settled:
                del self._coming[position]
                if load.state is LoadState.LANDED:
                    plan.landed(position)
                    self._landed.append((runner, load))
                else:
                    plan.missed(position)
                    runner.loader.unwant(load, self.wake)
        for position in [position for position in self._coming if position >= plan.cut]:
            runner, load = self._coming.pop(position)
            runner.loader.unwant(load, self.wake)
