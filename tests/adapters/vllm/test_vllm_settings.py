"""What `kv_connector_extra_config` may say, and what is refused by name before an engine starts."""

import attrs
import pytest

from lmcache_trio import ConfigError
from lmcache_trio.adapters.vllm.settings import (
    ConnectorSettings,
    LoadMode,
    check_failure_policy,
    check_load_mode,
    parse_settings,
)


def test_every_setting_has_a_default() -> None:
    assert parse_settings({}) == ConnectorSettings()


def test_all_settings_are_taken_over() -> None:
    extra = {
        "address": "unix:///run/x.sock",
        "sync_lookup": True,
        "lookup_timeout": 2,
        "poll_interval": 0.01,
        "load": "sync",
        "namespace": "mine",
        "path": "device",
        "chunk_tokens": 1152,
        "weights_version": "step 7",
        "server_uids": [1000, 7],
    }
    found = ConnectorSettings(
        address="unix:///run/x.sock",
        sync_lookup=True,
        lookup_timeout=2.0,
        poll_interval=0.01,
        load=LoadMode.SYNC,
        namespace="mine",
        weights_version="step 7",
        server_uids=(1000, 7),
        path="device",
        chunk_tokens=1152,
    )
    assert parse_settings(extra) == found
    assert set(extra) == {field.name for field in attrs.fields(ConnectorSettings)}


def test_chunk_tokens_is_the_servers_business_unless_a_number_is_given() -> None:
    assert parse_settings({}).chunk_tokens == parse_settings({"chunk_tokens": "auto"}).chunk_tokens == "auto"
    assert parse_settings({"chunk_tokens": 100}).chunk_tokens == 100


@pytest.mark.parametrize("tokens", [0, -16, 65_537, "64", 1.5, True, "Auto"])
def test_chunk_tokens_is_a_number_of_tokens(tokens: object) -> None:
    with pytest.raises(ConfigError, match=r"kv_connector_extra_config\.chunk_tokens"):
        parse_settings({"chunk_tokens": tokens})


@pytest.mark.parametrize("version", ["", 7, None])
def test_a_weights_version_is_a_name(version: object) -> None:
    with pytest.raises(ConfigError, match="weights_version"):
        parse_settings({"weights_version": version})


def test_an_unknown_key_is_refused_by_name_with_the_one_that_was_meant() -> None:
    with pytest.raises(
        ConfigError, match=r"kv_connector_extra_config\.adress: is not a setting; did you mean 'address'"
    ):
        parse_settings({"adress": "unix:///run/x.sock"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("address", 7),
        ("address", "/run/x.sock"),
        ("sync_lookup", "yes"),
        ("lookup_timeout", 0),
        ("lookup_timeout", True),
        ("lookup_timeout", float("nan")),
        ("lookup_timeout", -1.0),
        ("lookup_timeout", float("inf")),
        ("poll_interval", 0),
        ("poll_interval", -1.0),
        ("poll_interval", float("nan")),
        ("load", "lazy"),
        ("namespace", None),
        ("path", "gpu"),
        ("path", ["shm"]),
        ("server_uids", 1000),
        ("server_uids", ["1000"]),
        ("server_uids", [-1]),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"kv_connector_extra_config\.{key}: "):
        parse_settings({key: value})


@pytest.mark.parametrize(
    "extra", [{"poll_interval": 2.0, "lookup_timeout": 1.0}, {"poll_interval": 6.0}, {"lookup_timeout": 0.001}]
)
def test_an_interval_that_is_longer_than_the_timeout_is_refused_by_name(extra: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"kv_connector_extra_config\.poll_interval: .* longer than lookup_timeout"):
        parse_settings(extra, {})
    assert parse_settings({"poll_interval": 1.0, "lookup_timeout": 1.0}, {}).poll_interval == 1.0


def test_what_is_not_said_here_is_taken_from_the_clients_configuration() -> None:
    uids = {"LMCACHE_TRIO_CLIENT__SERVER_UIDS": "[1000]"}
    assert parse_settings({}, uids) == ConnectorSettings(server_uids=(1000,))
    assert parse_settings({"server_uids": []}, uids) == ConnectorSettings()
    environ = {"LMCACHE_TRIO_CLIENT__LOOKUP_TIMEOUT": "2", "LMCACHE_TRIO_CLIENT__POLL_INTERVAL": "1"}
    assert parse_settings({}, environ) == ConnectorSettings(lookup_timeout=2.0, poll_interval=1.0)
    assert parse_settings({"lookup_timeout": 3}, environ) == ConnectorSettings(lookup_timeout=3.0, poll_interval=1.0)
    with pytest.raises(ConfigError, match=r"kv_connector_extra_config\.poll_interval: 1 s is longer"):
        parse_settings({"lookup_timeout": 0.5}, environ)
    with pytest.raises(ConfigError, match=r"client\.poll_interval.*LMCACHE_TRIO_CLIENT__POLL_INTERVAL"):
        parse_settings({}, {"LMCACHE_TRIO_CLIENT__POLL_INTERVAL": "-1"})


def test_a_failure_policy_that_ends_requests_is_refused_with_the_line_to_paste() -> None:
    check_failure_policy("recompute")
    with pytest.raises(ConfigError, match='"kv_load_failure_policy": "recompute"'):
        check_failure_policy("fail")


def test_synchronous_loads_are_refused_where_steps_overlap() -> None:
    check_load_mode(LoadMode.SYNC, 1)
    check_load_mode(LoadMode.ASYNC, 2)
    with pytest.raises(ConfigError, match="overlaps 2 steps"):
        check_load_mode(LoadMode.SYNC, 2)


def test_synchronous_loads_are_refused_where_one_rank_stores_for_others() -> None:
    check_load_mode(LoadMode.ASYNC, 1, replicas=2)
    with pytest.raises(ConfigError, match="2 ranks of this engine hold the same KV"):
        check_load_mode(LoadMode.SYNC, 1, replicas=2)
