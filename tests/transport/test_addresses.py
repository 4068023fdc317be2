"""What an address may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio import _transport
from lmcache_trio._transport import socket_files
from lmcache_trio.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("", "is no address"),
        ("s", "is no address"),
        ("http://127.0.0.1:1", "is no address"),
        ("abstract://s", "is no address"),
        ("ipc://relative/s", "absolute path"),
        ("ipc://", "absolute path"),
        ("ipc:///tmp/", "absolute path"),
        ("ipc:///tmp/a\0b", "absolute path"),
        ("ipc:///tmp/" + "x" * 100, "shorten it"),
        ("ipc:///tmp/" + "é" * 45, "shorten it"),
        ("unix://relative/s", "absolute path"),
        ("unix://", "absolute path"),
        ("unix:///tmp/", "absolute path"),
        ("unix:///tmp/" + "x" * 100, "shorten it"),
        ("unix:///does/not/exist", "No such file|make that directory"),
        ("ipc:///does/not/exist", "No such file|make that directory"),
        ("tcp://", "host and port"),
        ("tcp://127.0.0.1", "host and port"),
        ("tcp://127.0.0.1:99999", "range|host and port"),
        ("tcp://127.0.0.1:x", "host and port|cast"),
        ("tcp://127.0.0.1:1/path", "host and port"),
        ("tcp://0.0.0.0:5555", "until there is authentication"),
        ("tcp://10.0.0.1:5555", "until there is authentication"),
        ("tcp://[::]:5555", "until there is authentication"),
        ("tcp://example.org:5555", "until there is authentication"),
    ],
)
async def test_an_address_that_cannot_be_is_refused_by_name(address: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        _transport.listen(address)
    assert caught.value.key == "address"


TEXT = st.text(max_size=40)


@given(TEXT | TEXT.map(lambda text: "tcp://" + text) | TEXT.map(lambda text: "unix:///" + text))
def test_any_text_is_an_address_or_a_config_error(text: str) -> None:
    try:
        parsed = socket_files.parse(text)
    except ConfigError:
        return
    assert socket_files.parse(str(parsed)) == parsed


async def test_localhost_is_loopback() -> None:
    rendezvous = _transport.listen("tcp://localhost:0")
    assert rendezvous.address.startswith("tcp://127.0.0.1:")
    rendezvous.close()
