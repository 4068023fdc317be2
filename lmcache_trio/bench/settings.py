"""What to measure: the KV's shape, how many clients, how often. Values only; `ConfigError` names the flag at fault."""

import json
from typing import Any

import attrs

from lmcache_trio.config import parse_size
from lmcache_trio.errors import ConfigError

__all__ = [
    "COPIES",
    "DEVICE",
    "DISK",
    "LOOKUPS",
    "NAMED_KV",
    "PROMPT_TOKENS",
    "ROTATION",
    "ROWS",
    "BenchSettings",
    "KVShape",
    "size_of",
]

DEVICE = ("store_device", "retrieve_device")
COPIES = ("memcpy", "memcpy_shm", "store", "retrieve", *DEVICE)
LOOKUPS = (
    *("bare_round_trip", "ping", "lookup_8k_hit", "lookup_8k_miss"),
    *("sync_lookup_8k_hit", "lookup_8k_extend", "end_session_8k"),
)
DISK = ("writeback_disk", "load_disk_warm", "load_disk_cold", "direct_read", "direct_write")
_BESIDE = {"load_disk_cold": "direct_read", "writeback_disk": "direct_write"}
"""Rows that are related to a limit of their own, and that limit."""
ROWS = (*COPIES[:2], *LOOKUPS, *COPIES[2:], *DISK)
"""In the order in which a round measures them: a load finds what the writeback before it left."""

PROMPT_TOKENS = 8192
ROTATION = 4
"""Operations' worth of private memory that copies rotate over: 512 MiB on either side with operations of 128 MiB."""

_DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4, "uint8": 1, "bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}
_TORCH = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "uint8"}


@attrs.frozen
class KVShape:
    """The KV of one worker."""

    layers: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    block_tokens: int = 16
    chunk_tokens: int = 256

    def __attrs_post_init__(self) -> None:
        if min(self.layers, self.kv_heads, self.head_dim, self.block_tokens, self.chunk_tokens) < 1:
            raise ConfigError("--kv", "every number must be 1 or more")
        if self.dtype not in _DTYPES:
            raise ConfigError("--kv", f"{self.dtype!r} is no dtype here; give one of {', '.join(_DTYPES)}")
        if self.chunk_tokens % self.block_tokens:
            raise ConfigError(
                "--kv", f"chunk_tokens ({self.chunk_tokens}) is no multiple of block_tokens ({self.block_tokens})"
            )

    @property
    def torch_dtype(self) -> str:
        return _TORCH.get(self.dtype, self.dtype)

    @property
    def token_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * _DTYPES[self.dtype]

    @property
    def chunk_bytes(self) -> int:
        return self.token_bytes * self.chunk_tokens

    @classmethod
    def parse(cls, text: str) -> "KVShape":
        """A name of `NAMED_KV`, or numbers: "layers=32,kv_heads=8,head_dim=128". What is left out is llama3-8b's."""
        if text in NAMED_KV:
            return NAMED_KV[text]
        given: dict[str, Any] = {}
        fields = attrs.fields_dict(cls)
        for item in text.split(","):
            name, _, value = (part.strip() for part in item.partition("="))
            if name not in fields:
                raise ConfigError(
                    "--kv",
                    f"{item.strip()!r} is neither one of {', '.join(NAMED_KV)} nor NAME=VALUE with a name of"
                    f" {', '.join(fields)}",
                )
            if name != "dtype" and not value.isdecimal():
                raise ConfigError("--kv", f"{name} is {value!r}; give a whole number")
            given[name] = value if name == "dtype" else int(value)
        return cls(**given)


NAMED_KV = {
    "llama3-8b": KVShape(),
    "llama3-70b": KVShape(layers=80),
    "qwen2.5-7b": KVShape(layers=28, kv_heads=4),
    "qwen2.5-0.5b": KVShape(layers=24, kv_heads=2, head_dim=64),
}


@attrs.frozen
class BenchSettings:
    """One run. *operation* is the bytes of a store or retrieve, rounded up to whole chunks; counts are a client's.

    *rows* are those to be measured; memcpy and the bare round trip always are, and a cold load's limit with it.
    """

    kv: KVShape = KVShape()
    clients: int = 1
    rounds: int = 7
    operation: int = 128 << 20
    lookups: int = 200
    disk_copies: int = 6
    rows: tuple[str, ...] = ROWS
    prompt_tokens: int = PROMPT_TOKENS

    def __attrs_post_init__(self) -> None:
        for name in ("clients", "rounds", "operation", "lookups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}", f"{getattr(self, name)} is too few; give 1 or more")
        if self.clients > 64:
            raise ConfigError("--clients", f"{self.clients} is too many; give 64 at most")
        for row in self.rows:
            if row not in ROWS:
                raise ConfigError("--rows", f"there is no row {row!r}; there are {', '.join(ROWS)}")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The rows to measure, in order."""
        limits = {"memcpy", "bare_round_trip", *(_BESIDE[row] for row in self.rows if row in _BESIDE)}
        return tuple(name for name in ROWS if name in self.rows or name in limits)

    @property
    def copies(self) -> int:
        """Of one client in one round; more where several copy at once: a core idles when the first have ended."""
        return ROTATION if self.clients == 1 else 2 * ROTATION

    @property
    def operation_chunks(self) -> int:
        return -(-self.operation // self.kv.chunk_bytes)

    @property
    def operation_tokens(self) -> int:
        return self.operation_chunks * self.kv.chunk_tokens

    @property
    def operation_bytes(self) -> int:
        return self.operation_chunks * self.kv.chunk_bytes

    @property
    def prompt_chunks(self) -> int:
        return max(1, self.prompt_tokens // self.kv.chunk_tokens)

    @property
    def slot_bytes(self) -> int:
        """Arena that one chunk takes."""
        return -(-self.kv.chunk_bytes // 4096) * 4096

    @property
    def arena_bytes(self) -> int:
        """The hot prompt, and a little more than all clients store in a round: the stores of the next one evict."""
        hot = self.prompt_chunks * self.slot_bytes
        stored = self.clients * self.copies * self.operation_chunks * self.slot_bytes
        return max(5 * hot // 2, hot + 5 * stored // 4) + (64 << 20)

    @property
    def disk_arena_bytes(self) -> int:
        """Half of what all clients write in a round, so that in a second pass nothing is in memory any more."""
        half = max(2, self.disk_copies // 2)
        return self.clients * half * self.operation_chunks * self.slot_bytes + (1 << 20)

    @property
    def disk_bytes(self) -> int:
        """Room for the writes of two rounds, and the tier's own needs."""
        written = self.clients * self.disk_copies * self.operation_bytes
        return max(256 << 20, 3 * written)

    def as_json(self) -> str:
        return json.dumps(attrs.asdict(self))

    @classmethod
    def of_json(cls, text: str) -> "BenchSettings":
        given = json.loads(text)
        kv = KVShape(**given.pop("kv"))
        return cls(kv=kv, rows=tuple(given.pop("rows")), **given)


def size_of(flag: str, text: str) -> int:
    """Bytes of "128MiB"; `ConfigError` names *flag*."""
    try:
        return parse_size(text)
    except ValueError as exc:
        raise ConfigError(flag, str(exc)) from exc
