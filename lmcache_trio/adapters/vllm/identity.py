"""Who a model is, by its content: so that two nodes with the same files share chunks, and no others do.

No path and no modification time goes into an identity; both differ between nodes that hold the same files. Reading
whole weights would take minutes: names, sizes and the first and last MiB of each weight file tell two trainings of one
architecture apart, since their headers list the tensors' offsets and their bytes differ everywhere.

Nothing here imports vLLM: configuration objects are read by attribute, so that all of it is tested without an engine.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lmcache_trio.errors import ConfigError, Misuse

__all__ = ["LoraIdentities", "encode_keys", "file_identity", "model_identity"]

EDGE = 1 << 20
"""Bytes hashed at either end of a weight file."""

WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".msgpack", ".tensors"})
CONFIGS = frozenset({".json", ".py"})
NOT_THE_MODEL = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "generation_config", "chat_template")
"""Files that change which tokens are asked for, but not the KV of given tokens."""


def file_identity(path: str | os.PathLike[str]) -> bytes:
    """32 bytes that name the weight and config files at *path*, a directory or one file. Misuse when there are none."""
    root = Path(path)
    digest = hashlib.sha256(b"lmcache-trio files 1")
    files = [root] if root.is_file() else _model_files(root)
    if not any(file.suffix in WEIGHTS for file in files):
        raise Misuse(f"{root} holds no weight file: give a directory that holds one of {', '.join(sorted(WEIGHTS))}")
    for file in files:
        size = file.stat().st_size
        _add(digest, ("" if file == root else file.name).encode(), size.to_bytes(8, "little"))
        with file.open("rb") as opened:
            if file.suffix in CONFIGS or size <= 2 * EDGE:
                _add(digest, opened.read())
            else:
                _add(digest, opened.read(EDGE))
                opened.seek(-EDGE, os.SEEK_END)
                _add(digest, opened.read())
    return digest.digest()


def _model_files(root: Path) -> list[Path]:
    """In an order that is the same everywhere. A symbolic link (the hub's cache) counts as its target."""
    if not root.is_dir():
        raise Misuse(f"{root} is neither a file nor a directory")
    return sorted(
        (
            entry
            for entry in root.iterdir()
            if entry.is_file() and entry.suffix in WEIGHTS | CONFIGS and not entry.name.startswith(NOT_THE_MODEL)
        ),
        key=lambda entry: entry.name,
    )


def model_identity(vllm_config: Any, namespace: str = "") -> list[bytes]:
    """What seeds the digests of an engine: its model and everything that changes the KV it computes for given tokens.

    Raises ConfigError where that cannot be told; a *namespace* of the user's is taken as his word for it.
    """
    model = vllm_config.model_config
    load = vllm_config.load_config
    overrides = getattr(model, "hf_overrides", None) or {}
    if callable(overrides):
        if not namespace:
            raise ConfigError(
                "hf_overrides", "is a function, whose effect has no name; set kv_connector_extra_config.namespace"
            )
        overrides = {}
    parts = [
        _model_files_identity(model, namespace),
        _canonical(
            {
                "load_format": str(load.load_format),
                "seed": model.seed if str(load.load_format) == "dummy" else None,
                "hf_overrides": overrides,
                "quantization": model.quantization,
                "quantization_config": getattr(model, "quantization_config", None),
                "dtype": str(model.dtype),
                "kv_dtype": str(vllm_config.cache_config.cache_dtype),
                "code_revision": getattr(model, "code_revision", None),
            }
        ),
        namespace.encode(),
    ]
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None:  # a drafter's layers lie in the same blocks
        parts.append(_model_files_identity(draft, namespace))
    return parts


def _model_files_identity(model: Any, namespace: str) -> bytes:
    config_path = getattr(model, "hf_config_path", None)
    revision = getattr(getattr(model, "hf_config", None), "_commit_hash", None)
    if revision and not config_path:
        return b"revision:" + str(revision).encode()
    try:
        identity = b"files:" + file_identity(model.model)
        return identity + file_identity_of_config(config_path) if config_path else identity
    except (Misuse, OSError) as exc:
        if namespace:
            return b"named"
        raise ConfigError(
            "model",
            f"{model.model!r} has no revision and its files cannot be read ({exc}); give a local directory, or name "
            "the model yourself in kv_connector_extra_config.namespace",
        ) from exc


def file_identity_of_config(path: str) -> bytes:
    """sha256 of the config file that `hf_config_path` names."""
    file = Path(path)
    return hashlib.sha256((file / "config.json" if file.is_dir() else file).read_bytes()).digest()


class LoraIdentities:
    """File identities of LoRA adapters, each taken when the adapter is first seen.

    An adapter whose files changed since, without `load_inplace`, has none: nobody can tell whether the engine computes
    with the old bytes or with the new ones.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[bytes, bytes]] = {}  # path -> what stat said, identity

    def identity(self, path: str, *, reloaded: bool = False) -> bytes | None:
        """32 bytes for the adapter at *path*, None when it cannot be told: its requests then go without the cache."""
        where = Path(path).expanduser()
        try:
            seen = _stat_signature(where)
            known = self._known.get(path)
            if known is None or reloaded:
                known = self._known[path] = (seen, file_identity(where))
        except (Misuse, OSError):
            return None
        return known[1] if known[0] == seen else None


def _stat_signature(root: Path) -> bytes:
    files = [root] if root.is_file() else _model_files(root)
    found = ((file.name, file.stat()) for file in files)
    return _canonical([(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found])


def encode_keys(keys: Iterable[Any]) -> bytes:
    """Bytes of nested tuples of str, bytes, int and None; different keys give different bytes. Misuse for others."""
    out = bytearray()
    for key in keys:
        match key:
            case None:
                kind, raw = b"n", b""
            case bytes():
                kind, raw = b"b", key
            case str():
                kind, raw = b"s", key.encode()
            case int():
                kind, raw = b"i", str(int(key)).encode()
            case tuple() | list():
                kind, raw = b"t", encode_keys(key)
            case _:
                raise Misuse(f"{type(key).__name__} cannot identify a chunk: use str, bytes, int, None or tuples")
        out += kind + len(raw).to_bytes(8, "little") + raw
    return bytes(out)


def _canonical(value: Any) -> bytes:
    def plain(other: Any) -> Any:
        if isinstance(other, Mapping):
            return dict(other)
        if isinstance(other, set | frozenset):
            return sorted(other, key=str)
        if hasattr(other, "__dict__"):
            return {name: item for name, item in vars(other).items() if not name.startswith("_")}
        return str(other)

    return json.dumps(value, sort_keys=True, default=plain).encode()


def _add(digest: "hashlib._Hash", *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
