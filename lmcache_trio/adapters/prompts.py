"""What a scheduler's side knows of its requests' tokens, without any server: digests, sessions and chunk arithmetic.

Digests are hashed once and extended. It decides nothing about lookups, and sends nothing.
"""

import secrets
from collections.abc import Callable, Sequence

from lmcache_trio._core.keys import chain_digests, seed_of
from lmcache_trio.adapters.request import Request
from lmcache_trio.errors import Misuse
from lmcache_trio.threads import Latch

__all__ = ["Extras", "Prompts"]

Extras = Callable[[int, int], bytes]
_DEFAULT_CHUNK_TOKENS = 256


class Prompts:
    """The requests of one scheduler, by id and by session. The latch guards both tables and every lookup's state."""

    def __init__(self, identity: Sequence[str | bytes], block_tokens: int, chunk_tokens: int | None) -> None:
        if block_tokens < 1:
            raise Misuse(f"block_tokens is {block_tokens}: it must be 1 or more")
        self.block_tokens = block_tokens
        self.chunk_tokens = _DEFAULT_CHUNK_TOKENS if chunk_tokens is None else chunk_tokens
        self._chunk_tokens_fixed = chunk_tokens is not None
        if self._chunk_tokens_fixed:
            self._check_chunk_tokens(self.chunk_tokens)
        self._identity = tuple(identity)
        self._seed = seed_of(*self._identity, str(self.chunk_tokens))
        self._latch = Latch()
        self._requests: dict[str, Request] = {}
        self._sessions: dict[int, Request] = {}
        self._next_session = secrets.randbits(62)

    def extend(self, request_id: str, token_ids: Sequence[int], *, extras: Extras | None = None) -> list[bytes]:
        """Digests of all full chunks of *token_ids*, whose leading tokens are those known before; hashed once."""
        request = self._request(request_id)
        self._extend(request, token_ids, extras)
        return request.digests[: len(token_ids) // self.chunk_tokens]

    def session_spec(self, request_id: str) -> int:
        """The number of the request's session; a request that is new gets one."""
        return self._request(request_id).session

    def num_blocks_per_chunk(self) -> int:
        """The engine's blocks in one chunk."""
        return self.chunk_tokens // self.block_tokens

    def _request(self, request_id: str) -> Request:
        request = self._requests.get(request_id)
        if request is None:
            self._next_session = (self._next_session + 1) % (1 << 62)
            request = Request(self._next_session)
            with self._latch:
                self._requests[request_id] = request
                self._sessions[request.session] = request
        return request

    def _extend(self, request: Request, token_ids: Sequence[int], extras: Extras | None) -> None:
        done, count = len(request.digests), len(token_ids) // self.chunk_tokens
        if count > done:
            parent = request.digests[-1] if done else self._seed
            request.digests += self._hash(parent, token_ids, done, count, extras)

    def _hash(
        self, parent: bytes, token_ids: Sequence[int], first: int, end: int, extras: Extras | None
    ) -> list[bytes]:
        width = self.chunk_tokens
        mixed = None if extras is None else [extras(i * width, (i + 1) * width) for i in range(first, end)]
        whole = (
            first == 0 and len(token_ids) == end * width
        )  # a slice of a long prompt costs as much as hashing a chunk
        return chain_digests(parent, token_ids if whole else token_ids[first * width : end * width], width, mixed)

    def _adopt_chunk_tokens(self, chunk_tokens: int) -> None:
        """The server's word. The first one is taken; a later one that differs is refused with `Misuse`."""
        if chunk_tokens != self.chunk_tokens and self._chunk_tokens_fixed:
            raise Misuse(
                f"the server's chunk_tokens is {chunk_tokens} and this engine's {self.chunk_tokens}:"
                " set them alike, or leave the engine's out"
            )
        self._check_chunk_tokens(chunk_tokens)
        self._chunk_tokens_fixed = True
        if chunk_tokens != self.chunk_tokens:
            with self._latch:
                self.chunk_tokens = chunk_tokens
                self._seed = seed_of(*self._identity, str(chunk_tokens))
                for request in self._requests.values():
                    request.digests.clear()

    def _check_chunk_tokens(self, chunk_tokens: int) -> None:
        if chunk_tokens < 1 or chunk_tokens % self.block_tokens:
            raise Misuse(
                f"chunk_tokens ({chunk_tokens}) is no multiple of the engine's block_tokens ({self.block_tokens}):"
                " set the server's chunk_tokens to one that is"
            )

    def _check_span(self, external_tokens: int, local_tokens: int, block_ids: Sequence[int]) -> int:
        """The number of chunks that the span touches."""
        for name, value in (("external_tokens", external_tokens), ("local_tokens", local_tokens)):
            if value < 0 or value % self.block_tokens:
                raise Misuse(f"{name} is {value}: it must be a multiple of block_tokens ({self.block_tokens})")
        if len(block_ids) * self.block_tokens != external_tokens:
            raise Misuse(f"block_ids has {len(block_ids)} blocks for {external_tokens} external_tokens")
        end = local_tokens + external_tokens
        return -(-end // self.chunk_tokens) - local_tokens // self.chunk_tokens
