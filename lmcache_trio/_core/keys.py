"""The names of chunks: digests chained over tokens, and keys that join them to a namespace.

A digest says *which tokens after which prefix, for which model*; a namespace says *in which byte layout*. The two
together are a `ChunkKey`. No name is secret or depends on PYTHONHASHSEED, so any two processes on any two nodes that
see the same tokens and the same identity compute the same names.
"""

import functools
import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import attrs

from lmcache_trio._core.groups import EVERY, Group
from lmcache_trio.errors import Misuse

__all__ = [
    "DEFAULT_CHUNK_TOKENS",
    "DIGEST_BYTES",
    "ChunkKey",
    "ChunkWish",
    "chain_digests",
    "check_chunk_tokens",
    "chunk_tokens_for",
    "identity_of",
    "join_digests",
    "layout_of",
    "namespace_of",
    "namespaces_of",
    "seed_of",
    "split_digests",
]

DIGEST_BYTES = 32

DEFAULT_CHUNK_TOKENS = 128
"""Tokens of a chunk of an engine that does not say how many bytes a token has."""

_LEAST_TOKENS, _MOST_TOKENS, _CHUNK_BYTES = 64, 256, 2 << 20
"""The bounds of the rule for "auto", from docs/performance.md, "How long a chunk should be"."""

ChunkWish = int | Literal["auto"]
"""How long a server wants the chunks of engines that state no length."""


@attrs.frozen
class ChunkKey:
    """A chunk's full name: *namespace* and *digest*, 32 bytes each."""

    namespace: bytes
    digest: bytes


def seed_of(*identity: str | bytes) -> bytes:
    """The 32-byte seed of a digest chain, from the scheduler's knowledge (model identity, chunk tokens, salt).

    Each part is length-prefixed, so that ("ab", "c") and ("a", "bc") differ. `Misuse`: no part, or an empty one.
    """
    return _hash_parts(b"lmcache-trio seed 1", _checked(identity))


def identity_of(*identity: str | bytes) -> bytes:
    """The 32 bytes by which a scheduler names its model, from the same parts as `seed_of`. `Misuse` as there."""
    return _hash_parts(b"lmcache-trio identity 1", _checked(identity))


def layout_of(fingerprints: Sequence[bytes], chunk_tokens: int, groups: Sequence[Group] = (EVERY,)) -> bytes:
    """The 32 bytes that name an engine's layout: its shards' *fingerprints* in shard order, a chunk's tokens, and the
    KV *groups*, if a hit does not need all parts of an only one.
    """
    named = [b"%d %d %d" % attrs.astuple(group) for group in groups] if tuple(groups) != (EVERY,) else []
    return _hash_parts(b"lmcache-trio layout 1", [*fingerprints, b"%d tokens" % chunk_tokens, *named])


def namespace_of(layout: bytes, identity: bytes = b"") -> bytes:
    """The 32-byte namespace of an engine, from its *layout* and its *identity*.

    The identity is the name that its scheduler gives its model, if any: then two models of one layout have two
    namespaces.
    """
    return _hash_parts(b"lmcache-trio namespace 3", [layout, identity])


def namespaces_of(namespace: bytes, groups: int) -> tuple[bytes, ...]:
    """The namespace of the parts in each of *groups* KV groups, of an engine whose namespace is *namespace*."""
    if groups == 1:
        return (namespace,)
    return tuple(_hash_parts(b"lmcache-trio group 1", [namespace, b"%d" % group]) for group in range(groups))


def chain_digests(
    parent: bytes, token_ids: Sequence[int], chunk_tokens: int, extras: Sequence[bytes] | None = None
) -> list[bytes]:
    """Digests of the full chunks of *token_ids*, each chained to the one before; a partial tail gets none.

    *parent* is the seed, or the digest of the chunk before the first token, so extending a chain equals recomputing
    it. *extras*, if given, holds one entry per chunk: the identity that tokens do not carry (LoRA, multimodal input).
    An empty entry changes no digest. The cost is one sha256 over 4 bytes per token.
    """
    if chunk_tokens < 1:
        raise Misuse(f"chunk_tokens is {chunk_tokens}: it must be 1 or more")
    count = len(token_ids) // chunk_tokens
    if extras is not None and len(extras) < count:
        raise Misuse(f"extras has {len(extras)} entries for {count} chunks: give one per chunk")
    wanted = count * chunk_tokens
    try:
        packed = memoryview(_packer(wanted)(*(token_ids if len(token_ids) == wanted else token_ids[:wanted])))
    except struct.error as exc:
        raise Misuse(f"token_ids must be integers in the range of int32: {exc}") from exc
    width = 4 * chunk_tokens
    digests = []
    for i in range(count):
        link = hashlib.sha256(parent)
        link.update(packed[i * width : (i + 1) * width])
        if extras is not None and extras[i]:
            link.update(extras[i])
        parent = link.digest()
        digests.append(parent)
    return digests


def chunk_tokens_for(wish: ChunkWish, block_tokens: int, token_bytes: int = 0) -> int:
    """Tokens of a chunk of an engine whose blocks have *block_tokens*, and of whose tokens a rank keeps *token_bytes*.

    The fewest whole blocks that reach *wish* tokens. "auto": those that reach 2 MiB of one rank and 64 tokens, but no
    more than fit into 256 tokens, and one at least. If *token_bytes* is 0, which is not known, as a wish of 128.
    """
    if wish != "auto" or not token_bytes:
        tokens = DEFAULT_CHUNK_TOKENS if wish == "auto" else wish
        return -(-tokens // block_tokens) * block_tokens
    tokens = max(_LEAST_TOKENS, -(-_CHUNK_BYTES // token_bytes))
    return max(1, min(-(-tokens // block_tokens), _MOST_TOKENS // block_tokens)) * block_tokens


def check_chunk_tokens(chunk_tokens: int, block_tokens: int) -> None:
    """`Misuse`, unless a chunk of *chunk_tokens* is a whole number of the engine's blocks of *block_tokens*."""
    if chunk_tokens < 1 or chunk_tokens % block_tokens:
        raise Misuse(
            f"chunk_tokens ({chunk_tokens}) is not a multiple of the engine's block_tokens ({block_tokens}): give one"
            " that is; or give block_tokens alone, and the server chooses"
        )


@functools.lru_cache(maxsize=64)
def _packer(count: int) -> Callable[..., bytes]:
    """Making a Struct costs as much as a fifth of packing with it."""
    return struct.Struct(f"<{count}i").pack


def split_digests(packed: bytes) -> list[bytes]:
    """The digests that `join_digests` has packed."""
    return [packed[i : i + DIGEST_BYTES] for i in range(0, len(packed), DIGEST_BYTES)]


def join_digests(digests: Iterable[bytes]) -> bytes:
    """*digests* packed, as messages and sessions have them: one after the other."""
    return b"".join(digests)


def _checked(identity: Sequence[str | bytes]) -> Sequence[str | bytes]:
    if not identity or not all(isinstance(part, str | bytes) and part for part in identity):
        raise Misuse(f"identity is {list(identity)!r}: give one part or more, each a str or bytes and not empty")
    return identity


def _hash_parts(domain: bytes, parts: Iterable[str | bytes]) -> bytes:
    digest = hashlib.sha256(domain)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part  # a path may hold any bytes
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.digest()
