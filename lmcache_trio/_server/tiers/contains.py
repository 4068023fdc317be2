"""Asks one tier which chunks it has. One `contains` at a time answers all questions that came meanwhile.

So a slow tier gets fewer and larger calls, and a tier that hangs holds up a single call.
"""

from collections.abc import Callable, Iterator, Sequence

import attrs
import trio

from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._server.tiers.calls import GuardedCalls
from lmcache_trio.abc import Tier
from lmcache_trio.errors import Unavailable

__all__ = ["ContainsBatcher", "Question"]

MOST_KEYS = 16_384
"""Keys in one call. A question with more gets a call alone."""


@attrs.define(eq=False)
class Question:
    """One lookup's question. *found* is None until the answer, which calls *wake*."""

    keys: Sequence[ChunkKey]
    wake: Callable[[], None]
    found: Sequence[bool] | None = None

    def answer(self, found: Sequence[bool]) -> None:
        if self.found is None:
            self.found = found
            self.wake()


class ContainsBatcher:
    """The questions to one tier, batched into its `contains`."""

    def __init__(self, calls: GuardedCalls, tier: Tier) -> None:
        self._calls = calls
        self._tier = tier
        self._pending: dict[Question, None] = {}  # in order; a dict, because any may be withdrawn
        self._under_way: dict[Question, None] = {}
        self._asked = trio.Event()
        calls.when_fenced.append(self.give_up)

    def __len__(self) -> int:
        return len(self._pending) + len(self._under_way)

    def ask(self, question: Question) -> None:
        """Queue *question* for the next call. A tier that is fenced answers it with no, at once."""
        if not self._calls.open:
            question.answer([False] * len(question.keys))
            return
        self._pending[question] = None
        self._asked.set()

    def withdraw(self, question: Question) -> None:
        """No lookup waits for *question* any more. Idempotent."""
        self._pending.pop(question, None)
        self._under_way.pop(question, None)

    def give_up(self, namespace: bytes | None = None) -> None:
        """Answer all questions, or those with a key of *namespace*, with no."""
        for question in [*self._pending, *self._under_way]:
            if namespace is None or any(key.namespace == namespace for key in question.keys):
                self.withdraw(question)
                question.answer([False] * len(question.keys))

    async def run(self) -> None:
        """Ask the tier, until it is fenced."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            try:
                while self._pending:
                    await self._ask_some()
            except Unavailable:
                return

    async def _ask_some(self) -> None:
        self._under_way = dict.fromkeys(self._next_batch())
        keys = dict.fromkeys(key for question in self._under_way for key in question.keys)
        said = await self._calls.make(self._contains, list(keys))
        found = dict(zip(keys, said, strict=True))
        answered, self._under_way = self._under_way, {}
        for question in answered:
            question.answer([found[key] for key in question.keys])

    def _next_batch(self) -> Iterator[Question]:
        room = MOST_KEYS
        while self._pending:
            question = next(iter(self._pending))
            if len(question.keys) > room and room < MOST_KEYS:
                return
            room -= len(question.keys)
            del self._pending[question]
            yield question

    async def _contains(self, keys: Sequence[ChunkKey]) -> Sequence[bool]:
        said = await self._tier.contains(keys)
        if len(said) != len(keys):
            raise ValueError(f"contains answered {len(said)} times for {len(keys)} keys")
        return said
