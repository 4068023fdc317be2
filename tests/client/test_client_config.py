"""An engine's own settings: where they come from, what wins, and that each wrong one is named with who set it."""

from pathlib import Path

import pytest

from lmcache_trio import ConfigError, load_config
from lmcache_trio.adapters import SchedulerAdapter
from lmcache_trio.config import ClientConfig, load_client_config

FILE = 'chunk_tokens = 64\n[client]\nlookup_timeout = 2\npoll_interval = 0.5\n[memory]\nsize = "no size"\n'


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "node.toml"
    path.write_text(FILE)
    return str(path)


def test_defaults_lose_to_the_file_and_the_file_to_the_environment(file: str) -> None:
    assert load_client_config({}) == ClientConfig(5.0, 0.005)
    environ = {"LMCACHE_TRIO_CONFIG": file}
    assert load_client_config(environ) == ClientConfig(2.0, 0.5)  # and the server's wrong size is not its affair
    environ["LMCACHE_TRIO_CLIENT__LOOKUP_TIMEOUT"] = "3"
    assert load_client_config(environ) == ClientConfig(3.0, 0.5)


def test_the_file_is_named_as_a_path_is_in_a_shell(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, name = file.rsplit("/", 1)
    monkeypatch.setenv("HOME", folder)
    for path in (f"~/{name}", f"$HOME/{name}", f"${{HOME}}/{name}"):
        assert load_client_config({"LMCACHE_TRIO_CONFIG": path}) == ClientConfig(2.0, 0.5)
    with pytest.raises(ConfigError, match="NOWHERE, which is not set") as caught:
        load_client_config({"LMCACHE_TRIO_CONFIG": f"$NOWHERE/{name}"})
    assert caught.value.key == "LMCACHE_TRIO_CONFIG"


def test_what_an_adapter_is_given_wins_over_all_of_them(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_TRIO_CONFIG", file)
    monkeypatch.setenv("LMCACHE_TRIO_CLIENT__POLL_INTERVAL", "0.25")
    adapter = SchedulerAdapter(
        "unix:///nowhere",
        engine_id="e",
        identity=["a model"],
        block_tokens=16,
        lookup_timeout=1.0,
        connect_timeout=0.01,
    )
    try:
        assert (adapter.lookup_timeout, adapter.poll_interval) == (1.0, 0.25)
    finally:
        adapter.shutdown()


def test_an_adapter_refuses_what_is_given_beside_what_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_TRIO_CLIENT__POLL_INTERVAL", "0.25")
    with pytest.raises(ConfigError, match=r"poll_interval: 0.25 s is longer than lookup_timeout \(0.1 s\)"):
        SchedulerAdapter("unix:///nowhere", engine_id="e", identity=["a model"], block_tokens=16, lookup_timeout=0.1)


@pytest.mark.parametrize(
    ("name", "value", "key", "words"),
    [
        ("LMCACHE_TRIO_CLIENT__LOOKUP_TIMEOUT", "-1", "client.lookup_timeout", "more than 0"),
        ("LMCACHE_TRIO_CLIENT__LOOKUP_TIMEOUT", "nan", "client.lookup_timeout", "more than 0"),
        ("LMCACHE_TRIO_CLIENT__POLL_INTERVAL", "inf", "client.poll_interval", "more than 0"),
        ("LMCACHE_TRIO_CLIENT__POLL_INTERVAL", "0", "client.poll_interval", "more than 0"),
        ("LMCACHE_TRIO_CLIENT__POLL_INTERVAL", "often", "client.poll_interval", "give a number"),
        ("LMCACHE_TRIO_CLIENT__POLL_INTERVAL", "9", "client.poll_interval", "longer than lookup_timeout (5 s)"),
        ("LMCACHE_TRIO_CLIENT__LOKUP_TIMEOUT", "1", "client.lokup_timeout", "did you mean 'lookup_timeout'"),
        ("LMCACHE_TRIO_CLIENT_POLL_INTERVAL", "1", "LMCACHE_TRIO_CLIENT_POLL_INTERVAL", "TRIO_CLIENT__POLL_INTERVAL"),
        ("LMCACHE_TRIO_CONFIG", "/none.toml", "LMCACHE_TRIO_CONFIG", "No such file"),
    ],
)
def test_a_wrong_one_is_named_with_who_set_it(name: str, value: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_client_config({name: value})
    assert caught.value.key == key
    assert words in caught.value.problem
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_variables_of_ours_are_not_an_engines() -> None:
    assert load_client_config({"LMCACHE_TRIO_LOG": "debug", "LMCACHE_TRIO_GRACE": "long"}) == ClientConfig()


@pytest.mark.parametrize("name", ["LMCACHE_TRIO_CLIENT_IMAGE", "LMCACHE_TRIO_CLIENT_VERSION", "LMCACHE_TRIO_CLIENTS"])
def test_a_variable_of_somebody_else_stops_no_engine(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert load_client_config({name: "registry/image:1"}) == ClientConfig()
    told = [record.getMessage() for record in caplog.records]
    assert told == ([] if name.endswith("S") else [f"{name} is not a setting of lmcache-trio, and is ignored"])


def test_a_server_takes_the_same_file_and_names_what_is_wrong_in_the_engines_table(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text("chunk_tokens = 64\n[client]\npoll_interval = 0.5\n")
    assert load_config(path, (), {}).chunk_tokens == 64
    path.write_text("[client]\npol_interval = 0.5\n")
    with pytest.raises(ConfigError, match=r"client\.pol_interval: .*did you mean 'poll_interval'"):
        load_config(path, (), {})
