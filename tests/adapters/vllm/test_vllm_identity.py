"""Models and adapters are named by their content: the same files anywhere are one model, any other bytes another."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio import ConfigError, Misuse
from lmcache_trio.adapters.vllm.identity import (
    EDGE,
    SPREAD,
    WHOLE,
    WINDOW,
    LoraIdentities,
    encode_keys,
    file_identity,
    model_identity,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    where = tmp_path / "model"
    where.mkdir()
    (where / "config.json").write_text('{"model_type": "llama"}')
    (where / "model.safetensors").write_bytes(os.urandom(3 * EDGE))
    (where / "tokenizer.json").write_text("{}")
    return where


def test_the_same_files_elsewhere_at_another_time_are_the_same_model(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(model, copy)
    os.utime(copy / "model.safetensors", (1, 1))
    assert file_identity(copy) == file_identity(model)


def test_files_reached_by_links_are_the_same_model(model: Path, tmp_path: Path) -> None:
    """The hub's cache keeps blobs, and links to them under the names of a revision."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in model.iterdir():
        (linked / file.name).symlink_to(file)
    assert file_identity(linked) == file_identity(model)


@pytest.mark.parametrize("at", [0, EDGE - 1, 2 * EDGE, 3 * EDGE - 1])
def test_one_other_byte_at_either_end_of_the_weights_is_another_model(model: Path, at: int) -> None:
    before = file_identity(model)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[at] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert file_identity(model) != before


def write_safetensors(file: Path, tensors: Mapping[str, bytes]) -> None:
    """As the library of that name writes it: eight bytes of length, a JSON header, the tensors."""
    listed: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, content in tensors.items():
        listed[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [at, at + len(content)]}
        at += len(content)
    header = json.dumps(listed).encode()
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.writelines(tensors.values())


BIG, SMALL = WHOLE // 2, 3 * WINDOW
TENSORS = [f"layers.{i}.{name}" for i in range(3) for name in ("mlp", "norm")]


@pytest.fixture
def tensors() -> dict[str, bytes]:
    """More than a file that is hashed whole, so that a tensor is found by its own sample and nothing else."""
    return {name: os.urandom(BIG if name.endswith("mlp") else SMALL) for name in TENSORS}


@pytest.mark.parametrize("name", TENSORS)
def test_one_edited_tensor_of_a_file_is_another_model(model: Path, tensors: dict[str, bytes], name: str) -> None:
    write_safetensors(model / "model.safetensors", tensors)
    before = file_identity(model)
    tensors[name] = os.urandom(len(tensors[name]))
    write_safetensors(model / "model.safetensors", tensors)
    assert file_identity(model) != before


@pytest.mark.parametrize("at", [0, BIG // 2, BIG - 1])
def test_start_middle_and_end_of_a_big_tensor_count(model: Path, tensors: dict[str, bytes], at: int) -> None:
    write_safetensors(model / "model.safetensors", tensors)
    before = file_identity(model)
    edited = bytearray(tensors["layers.1.mlp"])
    edited[at] ^= 1
    write_safetensors(model / "model.safetensors", {**tensors, "layers.1.mlp": bytes(edited)})
    assert file_identity(model) != before


@pytest.mark.parametrize("at", [0, WINDOW + 1, SMALL - WINDOW - 1, SMALL - 1])
def test_every_byte_of_a_small_tensor_counts(model: Path, tensors: dict[str, bytes], at: int) -> None:
    write_safetensors(model / "model.safetensors", tensors)
    before = file_identity(model)
    edited = bytearray(tensors["layers.1.norm"])
    edited[at] ^= 1
    write_safetensors(model / "model.safetensors", {**tensors, "layers.1.norm": bytes(edited)})
    assert file_identity(model) != before


def test_a_tensor_under_another_name_is_another_model(model: Path, tensors: dict[str, bytes]) -> None:
    write_safetensors(model / "model.safetensors", tensors)
    before = file_identity(model)
    swapped = dict(zip(["layers.2.mlp", *TENSORS[1:4], "layers.0.mlp", TENSORS[5]], tensors.values(), strict=True))
    write_safetensors(model / "model.safetensors", swapped)
    assert file_identity(model) != before


def test_a_tensor_of_one_shard_counts(model: Path, tensors: dict[str, bytes]) -> None:
    write_safetensors(model / "model-00001-of-00002.safetensors", tensors)
    write_safetensors(model / "model-00002-of-00002.safetensors", tensors)
    before = file_identity(model)
    tensors["layers.2.mlp"] = os.urandom(BIG)
    write_safetensors(model / "model-00002-of-00002.safetensors", tensors)
    assert file_identity(model) != before


@pytest.mark.parametrize("new", [True, False], ids=["zip file", "pickle"])
def test_one_edited_tensor_of_a_file_of_torch_is_another_model(model: Path, new: bool) -> None:
    """`torch.save` writes a zip file of records today; before, a pickle and the tensors behind it."""
    content = {f"layer.{i}": torch.randint(0, 255, (BIG,), dtype=torch.uint8) for i in range(3)}
    seen = set()
    for name in (None, *content):
        if name is not None:
            content[name][BIG // 2 - WINDOW : BIG // 2 + EDGE] ^= 1
        torch.save(content, model / "model.bin", _use_new_zipfile_serialization=new)
        seen.add(file_identity(model))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("suffix", "head"),
    [
        ("gguf", b"GGUF"),
        ("bin", b"PK\x05\x06"),
        ("safetensors", b"\xff" * 8),
        ("safetensors", (40).to_bytes(8, "little") + b"{}" * 20),
        ("safetensors", (14).to_bytes(8, "little") + b'{"a": {"b": 0}}'),
    ],
)
def test_windows_are_spread_over_a_file_whose_tensors_nobody_lists(model: Path, suffix: str, head: bytes) -> None:
    size, piece = 2 * WHOLE, EDGE + WINDOW
    file = model / f"weights.{suffix}"
    file.write_bytes(head + os.urandom(size - len(head)))
    seen = {file_identity(model)}
    for at in range(0, size - piece, piece):
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(os.urandom(piece))
        seen.add(file_identity(model))
    assert len(seen) == 1 + (size - 1) // piece


def test_what_an_identity_reads(tmp_path: Path) -> None:
    """The bytes behind the times in docs: files full of holes, so that 40 GiB cost nothing to write."""
    with (tmp_path / "weights.gguf").open("wb") as file:
        file.truncate(40 << 30)
    assert bytes_read(tmp_path) <= 2 * EDGE + SPREAD * WINDOW + (1 << 18), "and the search for a zip file's directory"
    (tmp_path / "weights.gguf").unlink()
    count, each = 300, 128 << 20
    listed = {str(i): {"data_offsets": [i * each, (i + 1) * each]} for i in range(count)}
    header = json.dumps(listed).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count * each)
    assert bytes_read(tmp_path) <= 3 * WINDOW * count + 2 * len(header) + (1 << 18)


def bytes_read(model: Path) -> int:
    def told() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = told()
    file_identity(model)
    return told() - before


def test_an_encoder_in_a_folder_of_its_own_counts_and_what_a_training_left_does_not(model: Path) -> None:
    before = file_identity(model)
    for folder in ("checkpoint-500", "original", ".cache"):
        (model / folder).mkdir()
        (model / folder / "model.safetensors").write_bytes(b"another")
        assert file_identity(model) == before
    (model / "encoder").mkdir()
    (model / "encoder" / "model.safetensors").write_bytes(b"one")
    one = file_identity(model)
    (model / "encoder" / "model.safetensors").write_bytes(b"two")
    assert len({before, one, file_identity(model)}) == 3


def test_one_part_of_a_split_file_stands_for_all_of_them(tmp_path: Path) -> None:
    parts = [tmp_path / f"model-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(os.urandom(100))
    before = file_identity(parts[0])
    (tmp_path / "other-00001-of-00002.gguf").write_bytes(b"another model")
    assert file_identity(parts[0]) == before
    parts[1].write_bytes(os.urandom(100))
    assert file_identity(parts[0]) != before


def test_another_size_name_or_config_is_another_model(model: Path) -> None:
    seen = {file_identity(model)}
    with (model / "model.safetensors").open("r+b") as weights:
        weights.truncate(3 * EDGE - 1)
    seen.add(file_identity(model))
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    seen.add(file_identity(model))
    (model / "config.json").write_text('{"model_type": "llama", "rope_theta": 1}')
    seen.add(file_identity(model))
    assert len(seen) == 4


def test_a_tokenizer_is_no_part_of_the_model(model: Path) -> None:
    before = file_identity(model)
    (model / "tokenizer.json").write_text("[]")
    assert file_identity(model) == before


@pytest.mark.parametrize("name", ["vocab_parallel.safetensors", "tokenizer.bin", "merges.gguf"])
def test_a_weight_file_counts_whatever_its_name(model: Path, name: str) -> None:
    (model / name).write_bytes(b"one")
    before = file_identity(model)
    (model / name).write_bytes(b"two")
    assert file_identity(model) != before


def test_a_folder_that_is_a_link_counts_once(model: Path, tmp_path: Path) -> None:
    before = file_identity(model)
    encoder = tmp_path / "elsewhere"
    encoder.mkdir()
    (encoder / "model.safetensors").write_bytes(b"one")
    (encoder / "up").symlink_to(model)
    (model / "encoder").symlink_to(encoder)
    one = file_identity(model)
    (encoder / "model.safetensors").write_bytes(b"two")
    assert len({before, one, file_identity(model)}) == 3


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Misuse, match="no weight file"):
        file_identity(tmp_path)
    with pytest.raises(Misuse, match="neither a file nor a directory"):
        file_identity(tmp_path / "absent")


def engine(path: str, **changes: Any) -> SimpleNamespace:
    """As much of a VllmConfig as is read; *changes* by dotted path with __ for the dot."""
    made = SimpleNamespace(
        model_config=SimpleNamespace(
            model=path,
            hf_config=SimpleNamespace(_commit_hash=None),
            hf_config_path=None,
            hf_overrides={},
            quantization=None,
            quantization_config=None,
            dtype="torch.bfloat16",
            code_revision=None,
            seed=0,
        ),
        load_config=SimpleNamespace(load_format="auto"),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        speculative_config=None,
    )
    for name, value in changes.items():
        owner, _, attribute = name.partition("__")
        setattr(getattr(made, owner), attribute, value)
    return made


def test_a_revision_of_the_hub_names_a_model_without_its_files() -> None:
    hub = SimpleNamespace(_commit_hash="0123abcd")
    assert model_identity(engine("org/model", model_config__hf_config=hub)) == model_identity(
        engine("/cache/snapshots/0123abcd", model_config__hf_config=hub)
    )


@pytest.fixture
def snapshot(model: Path, tmp_path: Path) -> Path:
    """A revision in the hub's cache: links, whose targets are named by what they hold."""
    blobs, revision = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    revision.mkdir(parents=True)
    for i, file in enumerate(sorted(model.iterdir())):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (revision / file.name).symlink_to(blobs / str(i))
    return revision


def test_a_snapshot_in_the_hubs_cache_is_its_revision(snapshot: Path) -> None:
    hub = SimpleNamespace(_commit_hash="0123abcd")
    assert model_identity(engine(str(snapshot))) == model_identity(engine("org/model", model_config__hf_config=hub))


def test_a_file_that_was_edited_through_its_link_is_another_model(snapshot: Path) -> None:
    before = model_identity(engine(str(snapshot)))
    edited = snapshot / "model.safetensors"
    with edited.open("r+b") as weights:
        weights.write(b"edited")
    later = edited.lstat().st_mtime + 3600
    os.utime(edited, (later, later))
    assert model_identity(engine(str(snapshot))) != before


def test_a_link_to_a_blob_of_another_model_is_no_revision(snapshot: Path, tmp_path: Path) -> None:
    before = model_identity(engine(str(snapshot)))
    blobs = tmp_path / "another" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "0").write_bytes(os.urandom(100))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blobs / "0")
    assert model_identity(engine(str(snapshot))) != before


def test_an_edited_file_in_a_copy_of_a_revision_is_another_model(snapshot: Path, tmp_path: Path) -> None:
    """Its config may still name the revision that it was made from."""
    hub = {"model_config__hf_config": SimpleNamespace(_commit_hash="0123abcd")}
    seen = [model_identity(engine(str(snapshot), **hub))]
    for where in (tmp_path / "copy", tmp_path / "another" / "snapshots" / "0123abcd"):
        shutil.copytree(snapshot, where)  # of the files and not of the links
        (where / "model.safetensors").write_bytes(os.urandom(100))
        seen.append(model_identity(engine(str(where), **hub)))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").write_bytes(os.urandom(100))
    seen.append(model_identity(engine(str(snapshot), **hub)))
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i])


def test_weights_that_a_loader_takes_from_elsewhere_are_refused_until_the_user_names_them(model: Path) -> None:
    elsewhere = engine(str(model), load_config__load_format="tensorizer")
    with pytest.raises(ConfigError, match=r"tensorizer.*namespace"):
        model_identity(elsewhere)
    assert model_identity(elsewhere, "mine")


def test_a_long_rope_counts_with_the_length_that_switches_it(model: Path) -> None:
    def of(length: int, kind: str) -> list[bytes]:
        rope = SimpleNamespace(rope_parameters={"rope_type": kind})
        return model_identity(engine(str(model), model_config__hf_config=rope, model_config__max_model_len=length))

    assert of(4096, "longrope") != of(8192, "longrope")
    assert of(4096, "yarn") == of(8192, "yarn")


@pytest.mark.parametrize("changes", [{"dtype": "torch.float16"}, {"quantization": "fp8"}])
def test_a_drafter_of_another_kind_is_another_model(model: Path, changes: Mapping[str, Any]) -> None:
    def with_drafter(**more: Any) -> list[bytes]:
        draft = engine(str(model)).model_config
        vars(draft).update(more)
        made = engine(str(model))
        made.speculative_config = SimpleNamespace(draft_model_config=draft)
        return model_identity(made)

    assert with_drafter() == with_drafter()
    assert with_drafter(**changes) != with_drafter()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_config__multimodal_config": SimpleNamespace(mm_processor_kwargs={"max_pixels": 1})},
        {"model_config__model_class_overrides": {"LlamaForCausalLM": "mine:Llama"}},
        {"model_config__dtype": "torch.float16"},
        {"model_config__quantization": "fp8"},
        {"model_config__hf_overrides": {"rope_theta": 7}},
        {"cache_config__cache_dtype": "fp8"},
        {"load_config__load_format": "pt"},
        {"model_config__hf_config": SimpleNamespace(_commit_hash="ffff")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_changes_the_kv_changes_the_identity(model: Path, changes: Mapping[str, Any]) -> None:
    assert model_identity(engine(str(model), **changes)) != model_identity(engine(str(model)))


def test_the_seed_counts_where_it_makes_the_weights(model: Path) -> None:
    assert model_identity(engine(str(model), model_config__seed=1)) == model_identity(engine(str(model)))
    dummy = {"load_config__load_format": "dummy"}
    assert model_identity(engine(str(model), model_config__seed=1, **dummy)) != model_identity(
        engine(str(model), **dummy)
    )


def test_a_namespace_keeps_engines_apart(model: Path) -> None:
    assert model_identity(engine(str(model)), "a") != model_identity(engine(str(model)), "b")


def test_what_cannot_be_told_is_refused_until_the_user_names_it(tmp_path: Path, model: Path) -> None:
    absent = str(tmp_path / "absent")
    with pytest.raises(ConfigError, match="namespace"):
        model_identity(engine(absent))
    assert model_identity(engine(absent), "mine")
    function = engine(str(model), model_config__hf_overrides=lambda config: config)
    with pytest.raises(ConfigError, match="hf_overrides: is a function"):
        model_identity(function)
    assert model_identity(function, "mine")


def test_an_adapter_keeps_its_identity_until_its_files_change(model: Path) -> None:
    loras = LoraIdentities()
    first = loras.identity(str(model))
    assert first is not None
    assert loras.identity(str(model)) == first
    (model / "model.safetensors").write_bytes(os.urandom(3 * EDGE))
    assert loras.identity(str(model)) is None, "nobody knows which bytes the engine computes with"
    reloaded = loras.identity(str(model), reloaded=True)
    assert reloaded not in (None, first)
    assert loras.identity(str(model)) == reloaded


def test_an_adapter_that_is_not_there_has_no_identity(tmp_path: Path) -> None:
    assert LoraIdentities().identity(str(tmp_path / "absent")) is None


KEYS = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=8,
)


@given(st.lists(KEYS, max_size=4), st.lists(KEYS, max_size=4))
def test_keys_have_the_same_bytes_only_if_they_are_the_same(one: list[Any], other: list[Any]) -> None:
    assert (encode_keys(one) == encode_keys(other)) == (one == other)


def test_a_key_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(Misuse, match="float cannot identify a chunk"):
        encode_keys([("mm", 1.5)])
