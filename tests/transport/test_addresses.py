"""What an address may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio import _transport
from lmcache_trio.config.addresses import parse_address
from lmcache_trio.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("", "is not an address"),
        ("s", "is not an address"),
        ("http://127.0.0.1:1", "is not an address"),
        ("abstract://s", "is not an address"),
        ("ipc:///tmp/s", "is not an address; use unix:///absolute/path"),
        ("unix:///tmp/a\0b", "absolute path"),
        ("unix:///tmp/" + "é" * 45, "shorter"),
        ("unix://relative/s", "absolute path"),
        ("unix://", "absolute path"),
        ("unix:///tmp/", "absolute path"),
        ("unix:///tmp/" + "x" * 100, "shorter"),
        ("unix:///does/not/exist", "No such file|make that directory"),
        ("tcp://", "host and port"),
        ("tcp://127.0.0.1", "host and port"),
        ("tcp://127.0.0.1:99999", "range|host and port"),
        ("tcp://127.0.0.1:x", "host and port|cast"),
        ("tcp://127.0.0.1:1/path", "host and port"),
        ("tcp://0.0.0.0:5555", "no authentication yet"),
        ("tcp://10.0.0.1:5555", "no authentication yet"),
        ("tcp://[::]:5555", "no authentication yet"),
        ("tcp://example.org:5555", "no authentication yet"),
    ],
)
async def test_an_address_that_cannot_be_is_refused_by_name(address: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        _transport.listen(address)
    assert caught.value.key == "address"


TEXT = st.text(max_size=40)


@given(
    TEXT
    | TEXT.map(lambda text: "tcp://" + text)
    | TEXT.map(lambda text: "unix:///" + text)
    | TEXT.map(lambda text: "memory://" + text)
)
def test_any_text_is_an_address_or_a_config_error(text: str) -> None:
    try:
        parsed = parse_address(text)
    except ConfigError:
        return
    assert parse_address(str(parsed)) == parsed


async def test_localhost_is_loopback() -> None:
    rendezvous = _transport.listen("tcp://localhost:0")
    assert rendezvous.address.startswith("tcp://127.0.0.1:")
    rendezvous.close()
