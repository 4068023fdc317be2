"""Names of chunks, as a scheduler's side makes them: digests of prompts, hashed once and extended.

It knows no server, decides nothing about lookups, and sends nothing.
"""

from collections.abc import Callable, Sequence

from lmcache_trio._core.keys import chain_digests, check_chunk_tokens, chunk_tokens_for, identity_of, seed_of
from lmcache_trio.adapters.specs import check_whole, own_numbers
from lmcache_trio.errors import Misuse
from lmcache_trio.threads import Lock

__all__ = ["Extras", "Prompt", "Prompts"]

Extras = Callable[[int, int], bytes]


class Prompt:
    """The whole chunks of one request's prompt that were hashed."""

    __slots__ = ("digests", "extras", "tokens")

    def __init__(self) -> None:
        self.digests: list[bytes] = []
        self.tokens: list[int] = []
        """8 bytes each, for objects that the engine's own list holds too."""
        self.extras: list[bytes] = []
        """The identity that was hashed besides the tokens, one entry per chunk."""


class Prompts:
    """How one engine's prompts are named: the model's identity, the weights, and the tokens of a chunk.

    *lock* guards these and the content of every `Prompt`: the first server's chunk length comes in another thread.
    """

    def __init__(
        self, identity: Sequence[str | bytes], block_tokens: int, chunk_tokens: int | None, token_bytes: int, lock: Lock
    ) -> None:
        check_whole("block_tokens", block_tokens, 1)
        if chunk_tokens is not None:
            check_whole("chunk_tokens", chunk_tokens, 1)
        check_whole("token_bytes", token_bytes)
        self.block_tokens = block_tokens
        self.chunk_tokens = chunk_tokens or chunk_tokens_for("auto", block_tokens, token_bytes)
        check_chunk_tokens(self.chunk_tokens, block_tokens)
        self._identity = _checked_identity(identity)
        self.weights: tuple[str | bytes, ...] = ()
        """Parts that tell the weights from those that the identity names."""
        self.model = identity_of(*self._identity)
        """The model's identity, as the server is told: its chunks have a namespace of their own."""
        self.seed = self._seed()
        """The seed of every digest."""
        self._lock = lock

    def rename(self, weights: tuple[str | bytes, ...], namespace: tuple[str | bytes, ...]) -> None:
        """The model has other *weights* from now on: chunks get other names, in the namespace of *namespace*.

        Prompts that were hashed before keep the former names. Under the lock.
        """
        self.weights = weights
        self.model = identity_of(identity_of(*self._identity), *namespace)
        self.seed = self._seed()

    def adopt_chunk_tokens(self, chunk_tokens: int) -> bool:
        """Take the first server's *chunk_tokens*. True: they are others, so every prompt must be hashed anew.

        Later servers are told them. Under the lock.
        """
        check_chunk_tokens(chunk_tokens, self.block_tokens)
        differs = chunk_tokens != self.chunk_tokens
        self.chunk_tokens = chunk_tokens
        self.seed = self._seed()
        return differs

    def _seed(self) -> bytes:
        """A seed that no other identity has. Joined parts alone would not do: the last ones could read like weights."""
        named = (identity_of(*self._identity), *self.weights) if self.weights else self._identity
        return seed_of(*named, str(self.chunk_tokens))

    def continues(self, prompt: Prompt, token_ids: Sequence[int], extras: Extras | None) -> bool:
        """Is *token_ids* (with *extras*) the beginning of the hashed part of *prompt*, or the other way round?

        It looks at every token, because a list may have changed. 100,000 tokens of a list that has only grown take 0.2
        to 0.5 ms; packing them for a hash takes 5 to 10.
        """
        with self._lock:
            known, hashed, width = prompt.tokens, prompt.extras, self.chunk_tokens
        count = min(len(known), len(token_ids)) // width
        head = token_ids if len(token_ids) == count * width else token_ids[: count * width]
        if len(known) > count * width:
            known = known[: count * width]
        plain = own_numbers("token_ids", head)
        if (plain if type(plain) is list else list(plain)) != known:
            return False
        if extras is None:
            return not any(hashed[:count])
        return all(extras(i * width, (i + 1) * width) == hashed[i] for i in range(count))

    def extend(self, prompt: Prompt, token_ids: Sequence[int], extras: Extras | None) -> None:
        """Hash the full chunks of *token_ids* that are not in *prompt* yet, which must be their beginning."""
        with self._lock:
            width, done = self.chunk_tokens, len(prompt.digests)
            parent = prompt.digests[-1] if done else self.seed
        count = len(token_ids) // width
        if count <= done:
            return
        mixed = [b"" if extras is None else extras(i * width, (i + 1) * width) for i in range(done, count)]
        if not all(isinstance(extra, bytes) for extra in mixed):
            raise Misuse("extras must return bytes for each chunk, empty where the token ids say it all")
        whole = not done and len(token_ids) == count * width
        # a slice of a long prompt costs as much as hashing a chunk
        tokens = own_numbers("token_ids", token_ids if whole else token_ids[done * width : count * width])
        found = chain_digests(parent, tokens, width, mixed)
        with self._lock:
            if self.chunk_tokens == width:  # else the first server came meanwhile, and all is hashed anew
                prompt.digests += found
                prompt.tokens.extend(tokens)
                prompt.extras += mixed

    def check_span(self, external_tokens: int, local_tokens: int) -> None:
        """`Misuse`, unless both are whole blocks."""
        for name, value in (("external_tokens", external_tokens), ("local_tokens", local_tokens)):
            check_whole(name, value)
            if value % self.block_tokens:
                raise Misuse(f"{name} is {value}: it must be a multiple of block_tokens ({self.block_tokens})")


def _checked_identity(identity: Sequence[str | bytes]) -> tuple[str | bytes, ...]:
    """*identity* as a tuple. `Misuse`: it is empty, has an empty part, or is one str in place of a list."""
    if isinstance(identity, str | bytes) or not isinstance(identity, Sequence):
        raise Misuse(f"identity is {identity!r}: give a list of its parts, each a str or bytes, as [{identity!r}]")
    if not identity or not all(isinstance(part, str | bytes) and part for part in identity):
        raise Misuse(
            f"identity is {list(identity)!r}: give one part or more, each a str or bytes and not empty; two models with"
            " equal identities share their KV"
        )
    return tuple(identity)
