"""What a scheduler's side knows of its requests' tokens, without any server: digests, sessions and chunk arithmetic.

Digests are hashed once and extended. It decides nothing about lookups, and sends nothing.
"""

import secrets
from collections.abc import Callable, Sequence

from lmcache_trio._core.keys import chain_digests, identity_of, seed_of
from lmcache_trio.adapters.request import Request
from lmcache_trio.adapters.specs import check_whole
from lmcache_trio.errors import Misuse
from lmcache_trio.threads import Latch

__all__ = ["Extras", "Prompts"]

Extras = Callable[[int, int], bytes]
_LEAST_CHUNK_TOKENS = 256
"""Of a chunk before a server says how many it has: the server's own default, where it is whole blocks."""


class Prompts:
    """The requests of one scheduler, by id and by session. The latch guards both tables and every lookup's state."""

    def __init__(self, identity: Sequence[str | bytes], block_tokens: int, chunk_tokens: int | None) -> None:
        check_whole("block_tokens", block_tokens, 1)
        if chunk_tokens is not None:
            check_whole("chunk_tokens", chunk_tokens, 1)
        self.block_tokens = block_tokens
        least = -(-_LEAST_CHUNK_TOKENS // block_tokens) * block_tokens
        self.chunk_tokens = least if chunk_tokens is None else chunk_tokens
        self._chunk_tokens_fixed = chunk_tokens is not None
        if self._chunk_tokens_fixed:
            self._check_chunk_tokens(self.chunk_tokens)
        self._identity = _checked_identity(identity)
        self._weights: tuple[str | bytes, ...] = ()
        """What tells the weights from those that the identity names."""
        self._model = identity_of(*self._identity)
        """What the server is told of the model: its chunks have a namespace of their own."""
        self._seed = seed_of(*self._identity, str(self.chunk_tokens))
        self._latch = Latch()
        self._requests: dict[str, Request] = {}
        self._sessions: dict[int, Request] = {}
        self._next_session = secrets.randbits(62)

    def session_spec(self, request_id: str) -> int:
        """The number of the request's session; a request that is new gets one."""
        return self._request(request_id).session

    def num_blocks_per_chunk(self) -> int:
        """The engine's blocks in one chunk."""
        return self.chunk_tokens // self.block_tokens

    def _rename(self, weights: tuple[str | bytes, ...], namespace: tuple[str | bytes, ...]) -> None:
        """The model has other *weights* from now on: chunks get other names, in the namespace of *namespace*.

        What is known of living requests was computed with the former ones: they are outdated. Under the latch.
        """
        self._weights = weights
        self._model = identity_of(*self._identity, *namespace)
        self._seed = seed_of(*self._identity, *weights, str(self.chunk_tokens))
        for request in self._requests.values():
            request.outdated = True

    def _request(self, request_id: str) -> Request:
        if not isinstance(request_id, str):
            raise Misuse(f"request_id is {request_id!r:.80}: it must be a str")
        request = self._requests.get(request_id)
        if request is None:
            self._next_session = (self._next_session + 1) % (1 << 62)
            request = Request(self._next_session)
            with self._latch:
                self._requests[request_id] = request
                self._sessions[request.session] = request
        return request

    def _goes_on(self, request: Request, token_ids: Sequence[int], extras: Extras | None) -> bool:
        """Is one of *token_ids* (with *extras*) and what was hashed for *request* the beginning of the other?

        It looks at every token, because a list may have changed. Of a list that has only grown since, 100,000 tokens
        take 0.2 to 0.5 ms here; packing them to be hashed takes 5 to 10.
        """
        with self._latch:  # under which the first server's chunk_tokens are taken over
            known, hashed, width = request.tokens, request.extras, self.chunk_tokens
        count = min(len(known), len(token_ids)) // width
        head = token_ids if len(token_ids) == count * width else token_ids[: count * width]
        if len(known) > count * width:
            known = known[: count * width]
        if (head if type(head) is list else list(head)) != known:
            return False
        if extras is None:
            return not any(hashed[:count])
        return all(extras(i * width, (i + 1) * width) == hashed[i] for i in range(count))

    def _extend(self, request: Request, token_ids: Sequence[int], extras: Extras | None) -> None:
        """Hash the full chunks of *token_ids* that were not yet. They go on where the known ones end: `_goes_on`."""
        with self._latch:  # under which the first server's chunk_tokens are taken over
            width, done = self.chunk_tokens, len(request.digests)
            parent = request.digests[-1] if done else self._seed
        count = len(token_ids) // width
        if count <= done:
            return
        mixed = [b"" if extras is None else extras(i * width, (i + 1) * width) for i in range(done, count)]
        if not all(isinstance(extra, bytes) for extra in mixed):
            raise Misuse("extras must return bytes for each chunk, empty where the token ids say it all")
        whole = not done and len(token_ids) == count * width
        # a slice of a long prompt costs as much as hashing a chunk
        tokens = token_ids if whole else token_ids[done * width : count * width]
        found = chain_digests(parent, tokens, width, mixed)
        with self._latch:
            if self.chunk_tokens == width:  # else the first server came meanwhile, and all is hashed anew
                request.digests += found
                request.tokens.extend(tokens)
                request.extras += mixed

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
                self._seed = seed_of(*self._identity, *self._weights, str(chunk_tokens))
                for request in self._requests.values():
                    request.forget_prompt()

    def _check_chunk_tokens(self, chunk_tokens: int) -> None:
        if chunk_tokens < 1 or chunk_tokens % self.block_tokens:
            raise Misuse(
                f"chunk_tokens ({chunk_tokens}) is no multiple of the engine's block_tokens ({self.block_tokens}):"
                " set the server's chunk_tokens to one that is"
            )

    def _check_span(self, external_tokens: int, local_tokens: int, block_ids: Sequence[int]) -> int:
        """The number of chunks that the span touches."""
        for name, value in (("external_tokens", external_tokens), ("local_tokens", local_tokens)):
            check_whole(name, value)
            if value % self.block_tokens:
                raise Misuse(f"{name} is {value}: it must be a multiple of block_tokens ({self.block_tokens})")
        if len(block_ids) * self.block_tokens != external_tokens:
            raise Misuse(f"block_ids has {len(block_ids)} blocks for {external_tokens} external_tokens")
        end = local_tokens + external_tokens
        return -(-end // self.chunk_tokens) - local_tokens // self.chunk_tokens


def _checked_identity(identity: Sequence[str | bytes]) -> tuple[str | bytes, ...]:
    """*identity* as a tuple; `Misuse` if it would name no model, or one part of a name after the other."""
    if isinstance(identity, str | bytes) or not isinstance(identity, Sequence):
        raise Misuse(f"identity is {identity!r}: give a list of its parts, each a str or bytes, as [{identity!r}]")
    if not identity or not all(isinstance(part, str | bytes) and part for part in identity):
        raise Misuse(
            f"identity is {list(identity)!r}: give one part or more, each a str or bytes and not empty; two models with"
            " equal identities share their KV"
        )
    return tuple(identity)
