"""Models and adapters are named by their content: the same files anywhere are one model, any other bytes another."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio import ConfigError, Misuse
from lmcache_trio.adapters.vllm.identity import EDGE, LoraIdentities, encode_keys, file_identity, model_identity


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


@pytest.mark.parametrize(
    "changes",
    [
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
