"""Settings: where they come from, what wins, and that each wrong one ends in one line that names it and the fix."""

import math
import os
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio import Config, ConfigError, load_config
from lmcache_trio.config import ClientConfig, default_address, describe, load_client_config, parse_size, structure


def test_every_setting_has_a_default_and_one_line_of_help() -> None:
    assert [name for name, _, help in describe() if not help or "\n" in help] == []
    assert {name for name, _, _ in describe()} == {
        *("address", "chunk_tokens", "lease_timeout", "lease_share", "write_share", "grace"),
        *("access", "memory", "tiers", "device", "reservation_timeout"),
        *("tier_timeout", "prefetch_budget", "prefetch_bytes", "writeback_bytes", "limits", "http", "records"),
    }


def test_defaults_lose_to_the_file_the_file_to_the_environment_and_that_to_flags(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('chunk_tokens = 64\nlease_timeout = 1\ngrace = 1\n[memory]\nbackend = "cpu"\nsize = "1GiB"\n')
    environ = {"LMCACHE_TRIO_LEASE_TIMEOUT": "2", "LMCACHE_TRIO_GRACE": "2", "LMCACHE_TRIO_MEMORY__SIZE": "2GiB"}
    config = load_config(file, ["grace=3", "memory.directory=/dev/shm"], environ)
    assert (config.lease_share, config.chunk_tokens, config.lease_timeout, config.grace) == (0.5, 64, 2.0, 3.0)
    assert dict(config.memory) == {"backend": "cpu", "size": "2GiB", "directory": "/dev/shm"}


def test_tiers_are_a_list_of_tables_and_can_be_set_by_index(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('[[tiers]]\nbackend = "disk"\npath = "/a"\n')
    config = load_config(file, ["tiers.0.path=/b", "tiers.1.backend=disk"], {})
    assert [dict(tier) for tier in config.tiers] == [{"backend": "disk", "path": "/b"}, {"backend": "disk"}]


def test_a_size_in_an_inner_table_takes_a_unit_too() -> None:
    assert load_config(None, ["limits.unfinished_bytes=64MiB"], {}).limits.unfinished_bytes == 64 << 20
    with pytest.raises(ConfigError, match=r"limits\.unfinished_bytes: .* is not a size"):
        load_config(None, ["limits.unfinished_bytes=much"], {})


def test_two_tiers_of_one_directory_are_refused_whatever_they_call_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    paths = [str(tmp_path / "disk"), "/elsewhere", f"{tmp_path}/./link/"]
    tiers = [f'{{ backend = "disk", path = "{path}", size = "1GiB" }}' for path in paths]
    assert len(load_config(None, [f"tiers=[{', '.join(tiers[:2])}]"], {}).tiers) == 2
    with pytest.raises(ConfigError, match=r"tiers\.2\.path: .*/disk' is the path of tiers\.0, too"):
        load_config(None, [f"tiers=[{', '.join(tiers)}]"], {})


def test_a_chunk_has_a_number_of_tokens_or_follows_the_rule() -> None:
    assert load_config(None, (), {}).chunk_tokens == "auto"
    assert load_config(None, ["chunk_tokens=256", "chunk_tokens=auto"], {}).chunk_tokens == "auto"
    assert load_config(None, (), {"LMCACHE_TRIO_CHUNK_TOKENS": "64"}).chunk_tokens == 64


def test_a_value_that_is_no_toml_is_the_string_that_it_is() -> None:
    assert load_config(None, ["address=tcp://127.0.0.1:5555"], {}).address == "tcp://127.0.0.1:5555"
    assert load_config(None, ['device={backend="host"}'], {}).device == {"backend": "host"}
    assert load_config(None, ["memory.note=1\ngrace = 9"], {}).memory["note"] == "1\ngrace = 9"


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("chunk_token=4", "chunk_token", "did you mean 'chunk_tokens'"),
        ("nonsense=4", "nonsense", "known here: address"),
        ("chunk_tokens=x", "chunk_tokens", "give an integer"),
        ("chunk_tokens=4.0", "chunk_tokens", "give an integer"),
        ("chunk_tokens=true", "chunk_tokens", "give an integer"),
        ("chunk_tokens=x", "chunk_tokens", 'or "auto"'),
        ("chunk_tokens=0", "chunk_tokens", "out of range"),
        ("chunk_tokens=65537", "chunk_tokens", "out of range"),
        ("grace=true", "grace", "give a number"),
        ("grace=-1", "grace", "0 or more"),
        ("grace=nan", "grace", "out of range"),
        ("lease_timeout=inf", "lease_timeout", "out of range"),
        ("lease_timeout=0", "lease_timeout", "more than 0"),
        ("lease_share=1.5", "lease_share", "at most 1"),
        ("lease_share=0", "lease_share", "more than 0"),
        ("write_share=0", "write_share", "more than 0"),
        ("memory=3", "memory", "give a table"),
        ("memory.backend=3", "memory.backend", "not a string"),
        ("tiers=3", "tiers", "list of tables"),
        ("tiers.0.path=/x", "tiers.0.backend", "is missing"),
        ("tiers.1.path=/x", "tiers.1.path", "not an index"),
        ("grace.x=1", "grace", "give a number"),
        ("device=4", "device", "give a table"),
        ("device.path=4", "device.backend", "missing"),
        ("address=5", "address", "give a string"),
        ("address=here", "address", "is not an address"),
        ("address=udp://x", "address", "is not an address"),
        ("address=unix://relative", "address", "absolute"),
        ("address=unix:///" + "x" * 100, "address", "shorter"),
        ("address=tcp://127.0.0.1", "address", "names no host and port"),
        ("address=tcp://127.0.0.1:70000", "address", "names no host and port"),
        ("address=tcp://0.0.0.0:5", "address", "not loopback"),
        ("address=tcp://example.org:5", "address", "not loopback"),
        ("grace", "--set", "--set key=value"),
    ],
)
def test_a_wrong_setting_is_named_with_the_fix(text: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [text], {})
    assert caught.value.key == key
    assert words in caught.value.problem
    assert "\n" not in str(caught.value)


def test_where_a_wrong_value_came_from_is_said() -> None:
    with pytest.raises(ConfigError, match="environment variable LMCACHE_TRIO_GRACE"):
        load_config(None, [], {"LMCACHE_TRIO_GRACE": "long"})
    with pytest.raises(ConfigError, match=r"did you mean 'grace'.*LMCACHE_TRIO_GRAACE"):
        load_config(None, [], {"LMCACHE_TRIO_GRAACE": "1"})


def test_variables_of_the_command_line_and_of_clients_are_not_settings_of_the_server() -> None:
    environ = {"LMCACHE_TRIO_CONFIG": "x", "LMCACHE_TRIO_LOG": "debug", "LMCACHE_TRIO_CLIENT_X": "1", "PATH": "/"}
    assert load_config(None, [], environ).grace == 5.0


def _service_links(name: str) -> dict[str, str]:
    """What Kubernetes sets in every container of a namespace with a Service of this name (kubelet's envvars.go)."""
    prefix = name.upper().replace("-", "_")
    return {
        f"{prefix}_SERVICE_HOST": "10.0.0.11",
        f"{prefix}_SERVICE_PORT": "5555",
        f"{prefix}_SERVICE_PORT_METRICS": "9090",
        f"{prefix}_SERVICE_PORT_HTTP_API": "80",
        f"{prefix}_PORT": "tcp://10.0.0.11:5555",
        **{
            f"{prefix}_PORT_{port}_{protocol.upper()}{rest}": value
            for port, protocol in ((5555, "tcp"), (9090, "udp"), (7, "sctp"))
            for rest, value in (
                ("", f"{protocol}://10.0.0.11:{port}"),
                ("_PROTO", protocol),
                ("_PORT", str(port)),
                ("_ADDR", "10.0.0.11"),
            )
        },
    }


@pytest.mark.parametrize(
    "service",
    [
        *("lmcache-trio", "lmcache-trio-client", "lmcache-trio-memory", "lmcache-trio-log", "lmcache-trio-config"),
        *("lmcache-trio-client-lookup-timeout", "lmcache-trio-client--poll-interval", "lmcache-trio--a-port-80-tcp"),
    ],
)
def test_the_variables_of_a_kubernetes_service_are_no_settings(service: str) -> None:
    links = _service_links(service)
    assert load_config(None, [], {**links, "LMCACHE_TRIO_GRACE": "2"}).grace == 2.0
    assert load_client_config({**links, "LMCACHE_TRIO_CLIENT__LOOKUP_TIMEOUT": "2"}) == ClientConfig(lookup_timeout=2.0)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("LMCACHE_TRIO_PORT", "5555", "port: is not a setting"),
        ("LMCACHE_TRIO_ADRESS", "tcp://10.0.0.11:5555", "did you mean 'address'"),
        ("LMCACHE_TRIO_MEMORY_SIZE", "4Gi", "LMCACHE_TRIO_MEMORY_SIZE"),
        ("LMCACHE_TRIO_SERVICE_HOSTS", "10.0.0.11", "is not a setting"),
    ],
)
def test_a_variable_that_only_resembles_those_is_still_refused_by_a_server(name: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(None, [], {name: value})
    assert name in str(caught.value)


def test_a_file_that_is_not_there_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.toml", [], {})
    (tmp_path / "bad.toml").write_text("grace = = 3")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(tmp_path / "bad.toml", [], {})
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(tmp_path / "bad.toml", [], {})


def test_the_default_address_is_private_to_the_user() -> None:
    assert default_address({"XDG_RUNTIME_DIR": "/run/user/7"}) == "unix:///run/user/7/lmcache-trio/server.sock"
    for environ in ({}, {"XDG_RUNTIME_DIR": ""}, {"XDG_RUNTIME_DIR": "relative"}):
        assert default_address(environ) == f"unix:///tmp/lmcache-trio-{os.getuid()}/server.sock"


def test_a_config_is_checked_when_it_is_made_in_code_too() -> None:
    with pytest.raises(ConfigError, match="lease_timeout"):
        Config(lease_timeout=math.nan)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4Gi", 4 << 30),
        ("512 Mi", 512 << 20),
        ("1ki", 1024),
        ("2TI", 2 << 40),
        ("4GiB", 4 << 30),
        ("4 gib", 4 << 30),
        ("1.5G", 3 << 29),
        ("2MB", 2_000_000),
        ("17", 17),
        ("0", 0),
        ("3k", 3072),
    ],
)
def test_sizes_are_bytes_or_bytes_with_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4XB", "4 G B", "1e9", "nan"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@attrs.frozen
class _Backend:
    """A backend's settings, as a plugin declares them."""

    size: int = attrs.field(default=1, metadata={"unit": "bytes"})
    path: Path | None = None
    ratio: float = attrs.field(default=0.5, validator=attrs.validators.le(1.0))
    names: tuple[str, ...] = ()
    needed: str = attrs.field(kw_only=True)


def test_a_backends_own_table_is_structured_strictly_into_its_own_class() -> None:
    made = structure(_Backend, {"size": "1MiB", "path": "/x", "names": ["a"], "needed": "n"}, "tiers.0")
    assert made == _Backend(1 << 20, Path("/x"), 0.5, ("a",), needed="n")


@pytest.mark.parametrize(
    ("table", "key", "words"),
    [
        ({"needed": "n", "sise": 4}, "tiers.0.sise", "did you mean 'size'"),
        ({"needed": "n", "size": "big"}, "tiers.0.size", "is not a size"),
        ({"needed": "n", "size": 1.5}, "tiers.0.size", "give an integer"),
        ({"needed": "n", "ratio": 2.0}, "tiers.0", "ratio"),
        ({"needed": "n", "names": [1]}, "tiers.0.names.0", "give a string"),
        ({}, "tiers.0.needed", "is missing"),
    ],
)
def test_a_wrong_setting_of_a_backend_is_named_by_its_dotted_key(table: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        structure(_Backend, table, "tiers.0")
    assert caught.value.key == key
    assert words in caught.value.problem


_toml = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


_names = st.sampled_from([f.name for f in attrs.fields(Config)]) | st.text(max_size=4)


@given(st.dictionaries(_names, _toml, max_size=4))
def test_any_table_makes_a_config_or_one_config_error(table: dict[str, Any]) -> None:
    problem = None
    try:
        structure(Config, table)
    except ConfigError as exc:
        problem = exc
    named = [name or '""' for name in table]  # a name may have dots of its own
    assert problem is None or any(f"{problem.key}.".startswith(f"{name}.") for name in named)


# ---- paths


@attrs.frozen
class Kept:
    path: str = attrs.field(default="", metadata={"unit": "path"})


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/var/cache/kv", "/var/cache/kv"),
        ("~/kv", "/home/me/kv"),
        ("~", "/home/me"),
        ("$HOME/kv", "/home/me/kv"),
        ("${HOME}/kv", "/home/me/kv"),
        ("/data/$NODE/kv", "/data/7/kv"),
        ("/a $ b", "/a $ b"),
        ("~root/kv", os.path.expanduser("~root/kv")),
    ],
)
def test_a_path_is_expanded_as_a_shell_does_it(text: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("NODE", "7")
    assert structure(Kept, {"path": text}).path == path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("d1", r"relative path; write the absolute one, such as '/.*/d1'"),
        ("./d1", "relative"),
        ("$NODE/kv", "relative"),
        ("../d1", "relative"),
        ("~nobody-of-this-name/kv", "relative"),
        ("$NOT_SET/kv", "NOT_SET, which is not set"),
        ("/data/${NOT_SET}/kv", "NOT_SET, which is not set"),
        ("/data/\0kv", "zero byte"),
    ],
)
def test_a_path_that_leads_nowhere_certain_is_refused(text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE", "7")
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ConfigError, match=words) as caught:
        structure(Kept, {"path": text}, "tiers.0")
    assert caught.value.key == "tiers.0.path"
