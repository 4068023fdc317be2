"""A scheduler that is itself a Trio program: the cache is a client in its tree of tasks, with no thread beside it."""

from collections.abc import Awaitable, Callable, Sequence
from itertools import count

import trio

from lmcache_trio import Client, Gone, chain_digests

Compute = Callable[[Sequence[int], list[bytes]], Awaitable[list[bytes]]]
"""The model: a prompt's tokens and the KV of its leading chunks -> the KV of its remaining chunks."""


class Scheduler:
    """Serves prompts, any number at a time: what the cache has is read, the rest is computed and stored."""

    def __init__(self, scheduler: Client, worker: Client, seed: bytes, compute: Compute) -> None:
        self._scheduler, self._worker, self._seed, self._compute = scheduler, worker, seed, compute
        self._sessions = count(1)

    async def serve(self, tokens: Sequence[int], patience: float = 0.5) -> tuple[list[bytes], int]:
        """The KV of the full chunks of *tokens*, and how many of them came from the cache."""
        session = next(self._sessions)
        digests = chain_digests(self._seed, tokens, self._scheduler.chunk_tokens)
        try:
            kv: list[bytes] = []
            with trio.move_on_after(patience):  # late is a miss
                kv = await self._load(session, digests)
            reused = len(kv)
            kv += await self._compute(tokens, kv)
            parent = digests[reused - 1] if reused else b""
            async with self._worker.storing(session, parent, digests[reused:]) as storing:
                for position, slot in storing.slots.items():  # what gets no slot is not stored
                    slot[:] = kv[reused + position]
            return kv, reused
        finally:
            self._scheduler.end(session)  # a notice: nothing here can be interrupted

    async def _load(self, session: int, digests: Sequence[bytes]) -> list[bytes]:
        answer = await self._scheduler.lookup(session, digests)
        if not answer.chunks:
            return []
        self._scheduler.taken_notice(session, answer.lease)
        try:
            async with self._worker.retrieving(answer.lease, 0, answer.chunks) as slots:
                read = [bytes(slot) for slot in slots]
        except Gone:  # not valid any more when we had read it
            return []
        return read
