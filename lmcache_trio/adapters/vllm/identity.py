"""The identity of a model, by its content: two nodes with the same files share chunks, and no others do.

No path and no modification time goes into an identity; both differ between nodes that hold the same files. Reading
whole weights would take minutes, so each tensor is sampled: an edit of one tensor makes another model. What is read is
the start, the middle and the end of every tensor that a file's own directory lists (safetensors, torch's zip files),
and windows spread over files of every other kind.

Measured with warm pages on two busy cores, per GiB: 3 ms for tensors of 128 MiB, 22 ms for 16 MiB, 430 ms for 1 MiB;
108 ms for a file of 4 GiB of another kind, 18 ms for one of 32. A cold disk adds three reads per tensor.

It does not import vLLM, and reads configuration objects by attribute. So all of it is tested without an engine.
"""

# huggingface_hub is not installed where this is type-checked: pyright: reportMissingImports=false

import glob
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from lmcache_trio.errors import ConfigError, Misuse

__all__ = ["LoraIdentities", "encode_keys", "file_identity", "model_identity"]

EDGE = 1 << 20
"""Bytes hashed at either end of a weight file."""
WHOLE = 8 << 20
"""A file up to this size is hashed whole: some 15 ms."""
WINDOW = 16 << 10
"""Bytes of one sample. A tensor of up to three samples (a norm, a bias, a block of scales) is hashed whole."""
SPREAD = 4096
"""Most windows in a file without a list of its tensors; one per MiB where that is fewer."""
LARGEST_HEADER = 100_000_000
"""The safetensors library refuses longer ones."""

WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".msgpack", ".tensors"})
CONFIGS = frozenset({".json", ".py"})
LINKED_WITHIN = 2.0
"""Seconds between a blob's last write and its link, at most, by the clocks of two file systems."""
NOT_THE_MODEL = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "generation_config", "chat_template")
"""Configs that change which tokens are asked for, but not the KV of given tokens."""
NOT_LOADED = (".", "original", "checkpoint-")
"""Folders of a model that vLLM does not load from: another format's copy, and what a training left behind."""
ELSEWHERE = frozenset({"tensorizer", "ipc_cache", "modelexpress"})
"""Load formats of vLLM whose weights do not come from the model's own files."""

MULTIMODAL = (
    "mm_processor_kwargs",
    "media_io_kwargs",
    "mm_encoder_attn_dtype",
    "video_pruning_rate",
    "video_pruning_method",
)
"""Settings of an engine that change what a multimodal input becomes."""

Range = tuple[int, int]
"""First byte and length."""


def file_identity(path: str | os.PathLike[str]) -> bytes:
    """32 bytes that name the weight and config files at *path*, a directory or one file. `Misuse`: it has none."""
    root = Path(path)
    digest = hashlib.sha256(b"lmcache-trio files 2")
    files = _model_files(root)
    if not any(file.suffix in WEIGHTS for _, file in files):
        raise Misuse(f"{root} holds no weight file: give a directory that holds one of {', '.join(sorted(WEIGHTS))}")
    for name, file in files:
        size = file.stat().st_size
        _add(digest, name.encode(), size.to_bytes(8, "little"))
        with file.open("rb", buffering=0) as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead behind each sample
            whole = file.suffix in CONFIGS or size <= WHOLE
            for first, length in [(0, size)] if whole else _samples(opened, file.suffix, size):
                _add(digest, os.pread(opened.fileno(), length, first))
    return digest.digest()


def _model_files(root: Path) -> list[tuple[str, Path]]:
    """Names below *root* and files, in an order that is the same everywhere. A link (the hub's cache) is its target.

    Of one file the name does not count. A part of a split GGUF file stands for all parts.
    """
    if root.is_file():
        split = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", root.name)
        if split is None:
            return [("", root)]
        parts = sorted(root.parent.glob(f"{glob.escape(split[1])}-*-of-{split[2]}.gguf"))
        return [(part.name.removeprefix(split[1]), part) for part in parts]
    if not root.is_dir():
        raise Misuse(f"{root} is neither a file nor a directory")
    found: list[tuple[str, Path]] = []
    seen = {os.path.realpath(root)}
    for where, folders, names in os.walk(root, followlinks=True):  # an encoder's weights may have their own folder
        wanted = [folder for folder in folders if not folder.startswith(NOT_LOADED)]
        targets = {folder: os.path.realpath(os.path.join(where, folder)) for folder in wanted}
        folders[:] = [folder for folder in wanted if targets[folder] not in seen]  # a link may lead upwards
        seen.update(targets.values())
        for name in names:
            file = Path(where, name)
            is_read = file.suffix in WEIGHTS or (file.suffix in CONFIGS and not name.startswith(NOT_THE_MODEL))
            if is_read and file.is_file():
                found.append((file.relative_to(root).as_posix(), file))
    return sorted(found)


def _samples(file: BinaryIO, suffix: str, size: int) -> list[Range]:
    """The ranges of a file of *size* bytes that are hashed: the list of its tensors, and a sample of each."""
    tensors = _safetensors(file, size) if suffix == ".safetensors" else _zip_records(file, size)
    if tensors is None:
        apart = max(EDGE, size // SPREAD)
        return [(0, EDGE), *((first, WINDOW) for first in range(EDGE, size - EDGE, apart)), (size - EDGE, EDGE)]
    return [sample for tensor in tensors for sample in _sample(tensor)]


def _sample(tensor: Range) -> list[Range]:
    first, length = tensor
    if length <= 3 * WINDOW:
        return [tensor]
    return [(first, WINDOW), (first + (length - WINDOW) // 2, WINDOW), (first + length - WINDOW, WINDOW)]


def _safetensors(file: BinaryIO, size: int) -> list[Range] | None:
    """The header (in pieces, each hashed whole) and every tensor that it lists. None: it is a file of another kind."""
    length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    if not 0 < length <= min(LARGEST_HEADER, size - 8):
        return None
    try:
        listed = json.loads(os.pread(file.fileno(), length, 8))
        spans = sorted(
            (int(entry["data_offsets"][0]), int(entry["data_offsets"][1]))
            for name, entry in listed.items()
            if name != "__metadata__"
        )
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    data = 8 + length
    if any(not 0 <= first <= end <= size - data for first, end in spans):
        return None
    return [*_pieces(0, data), *((data + first, end - first) for first, end in spans)]


def _zip_records(file: BinaryIO, size: int) -> list[Range] | None:
    """The records of a file of `torch.save`, and its directory at the end. None: it is a file of another kind."""
    try:
        with os.fdopen(os.dup(file.fileno()), "rb") as opened, zipfile.ZipFile(opened) as archive:
            starts = sorted(record.header_offset for record in archive.infolist())
            directory = archive.start_dir
    except (zipfile.BadZipFile, OSError, ValueError):
        return None
    if not starts:
        return None
    records = [(first, end - first) for first, end in pairwise([*starts, directory])]
    return [*records, *_pieces(directory, size - directory)]


def _pieces(first: int, length: int) -> Iterable[Range]:
    """A range in pieces so small that each is hashed whole."""
    end = first + length
    return ((at, min(WINDOW, end - at)) for at in range(first, end, WINDOW))


def model_identity(vllm_config: Any, namespace: str = "") -> list[bytes]:
    """The parts that seed an engine's digests: its model, and all else that changes the KV of given tokens.

    ConfigError: they cannot be told. A *namespace* that the user gives stands for them.
    """
    model = vllm_config.model_config
    load = vllm_config.load_config
    if callable(getattr(model, "hf_overrides", None)) and not namespace:
        raise ConfigError(
            "hf_overrides", "is a function, whose effect has no name; set kv_connector_extra_config.namespace"
        )
    parts = [
        _model_files_identity(model, load, namespace),
        _canonical({"load_format": str(load.load_format), "kv_dtype": str(vllm_config.cache_config.cache_dtype)}),
        _settings_of(model, load),
        b"namespace:" + namespace.encode(),
    ]
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None:  # a drafter's layers lie in the same blocks
        draft_load = getattr(speculative, "draft_load_config", None) or load
        parts += [_model_files_identity(draft, draft_load, namespace), _settings_of(draft, draft_load)]
    return parts


def _settings_of(model: Any, load: Any) -> bytes:
    """Everything beside a model's files that changes the KV of given tokens."""
    overrides = getattr(model, "hf_overrides", None) or {}
    multimodal = getattr(model, "multimodal_config", None)
    return _canonical(
        {
            "seed": model.seed if str(load.load_format) == "dummy" else None,
            "hf_overrides": {} if callable(overrides) else overrides,
            "quantization": model.quantization,
            "quantization_config": getattr(model, "quantization_config", None),
            "dtype": str(model.dtype),
            "code_revision": getattr(model, "code_revision", None),
            "code": [str(getattr(model, name, None)) for name in ("model_impl", "config_format", "runner", "convert")],
            "classes": getattr(model, "model_class_overrides", None) or {},
            "loader": getattr(load, "model_loader_extra_config", None) or {},
            # What an image becomes: vLLM's own hash of it does not cover what the engine was started with.
            "multimodal": [getattr(multimodal, name, None) for name in MULTIMODAL],
            # Such a model rotates all keys in another way once its engine takes longer prompts.
            "long_rope": model.max_model_len if _has_long_rope(getattr(model, "hf_config", None)) else None,
        }
    )


def _has_long_rope(hf_config: Any) -> bool:
    configs = (hf_config, getattr(hf_config, "text_config", None))
    scalings = [getattr(each, name, None) for each in configs for name in ("rope_parameters", "rope_scaling")]
    return any(kind in str(scalings) for kind in ("'longrope'", "'su'"))


def _model_files_identity(model: Any, load: Any, namespace: str) -> bytes:
    config_path = getattr(model, "hf_config_path", None)
    path = Path(model.model)
    revision = str(getattr(getattr(model, "hf_config", None), "_commit_hash", None) or "").encode()
    try:
        if str(load.load_format) in ELSEWHERE:
            raise Misuse(f"load format {load.load_format} takes the weights from elsewhere")
        if not path.exists():
            try:
                path = _cached_snapshot(model, load)
            except Misuse:
                if revision and not config_path:
                    return b"revision:" + revision
                raise
            if revision and (loaded := path.with_name(revision.decode())).is_dir():
                path = loaded
        if _is_a_snapshot(path) and not config_path:
            return b"revision:" + path.name.encode()
        identity = b"files:" + file_identity(path) + revision
        return identity + file_identity_of_config(config_path) if config_path else identity
    except (Misuse, OSError) as exc:
        if namespace:
            return b"named"
        raise ConfigError(
            "model",
            f"the weights of {model.model!r} cannot be told from others ({exc}); give a local directory, or name the "
            "model yourself in kv_connector_extra_config.namespace",
        ) from exc


def _cached_snapshot(model: Any, load: Any) -> Path:
    """The directory of the hub's cache with the files of a model that its repository names. It uses no network."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as exc:
        raise Misuse("it is neither a file nor a directory, and huggingface_hub is not installed") from exc
    cache, revision = getattr(load, "download_dir", None), getattr(model, "revision", None)
    try:
        return Path(snapshot_download(str(model.model), revision=revision, cache_dir=cache, local_files_only=True))
    except (OSError, ValueError) as exc:
        raise Misuse(f"it is neither a file nor a directory, and the hub's cache does not hold it: {exc}") from exc


def _is_a_snapshot(path: Path) -> bool:
    """Is it a revision in the hub's own cache, as it came: a folder of links to blobs, which are older than the links?

    A copy of one may have been edited; so may a blob, through its link.
    """
    if path.parent.name != "snapshots" or not path.is_dir():
        return False
    blobs = path.parent.parent.resolve() / "blobs"
    return all(
        file.is_symlink()
        and file.resolve().parent == blobs
        and file.stat().st_mtime <= file.lstat().st_mtime + LINKED_WITHIN
        for _, file in _model_files(path)
    )


def file_identity_of_config(path: str) -> bytes:
    """sha256 of the config file that `hf_config_path` names."""
    file = Path(path)
    return hashlib.sha256((file / "config.json" if file.is_dir() else file).read_bytes()).digest()


class LoraIdentities:
    """File identities of LoRA adapters, each taken when the adapter is first seen.

    An adapter whose files changed since, without `load_inplace`, has none: the engine may compute with the old bytes or
    with the new ones.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[bytes, bytes]] = {}  # path -> what stat said, identity

    def identity(self, path: str, *, reloaded: bool = False) -> bytes | None:
        """32 bytes for the adapter at *path*. None: they cannot be told, so its requests go without the cache."""
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
    found = ((name, file.stat()) for name, file in _model_files(root))
    return _canonical([(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in found])


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
