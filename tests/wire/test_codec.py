"""Any bytes decode to a sentence or raise ProtocolError; every sentence comes back as it was said."""

from enum import IntEnum
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio._core.groups import Group, Need
from lmcache_trio._wire import codec, messages
from lmcache_trio._wire.codec import decode, decode_expected, encode, peek_id
from lmcache_trio._wire.messages import (
    MAX_NUMBER,
    Answer,
    Lookup,
    LookupStatus,
    Message,
    NamespaceKnown,
    Ping,
    Pong,
    Reserve,
    Reserved,
    Reset,
)
from lmcache_trio.errors import ProtocolError

SENTENCES: list[type[Message]] = [
    c
    for c in (getattr(messages, name) for name in messages.__all__)
    if isinstance(c, type) and issubclass(c, Message) and c is not Message
]
PACKED = {
    "digests": 32,
    "offsets": 8,
    "positions": 4,
    "blocks": 4,
    "requests": 8,
    "layouts": 32,
    "came": 32,
    "left": 32,
}


def values(name: str, kind: Any, least: int) -> st.SearchStrategy[Any]:
    """Values that the field *name* of type *kind* must take, drawn without asking the code under test."""
    if get_origin(kind) is Annotated:
        return st.text(max_size=512) if get_args(kind)[0] is str else st.integers(least, MAX_NUMBER)
    if name in ("block_tokens", "chunk_tokens"):
        return st.integers(1, 1 << 16)
    bounded = {"shards": 4096, "replicas": 4096, "group": 15, "tier": 16}
    if name in bounded:
        return st.integers(1, bounded[name])
    if name == "groups":
        made = st.builds(Group, st.sampled_from(Need), st.integers(0, 1 << 30), st.integers(0, 1 << 16))
        return st.lists(made, max_size=16).map(tuple)
    if name == "part_bytes":
        return st.lists(st.integers(1, MAX_NUMBER), max_size=16).map(tuple)
    if name == "layout":
        return st.sampled_from([b"", b"l" * 32])
    if name in PACKED and kind is bytes:
        return st.integers(0, 5).flatmap(lambda n: st.binary(min_size=n * PACKED[name], max_size=n * PACKED[name]))
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        return st.sampled_from(kind)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(1, 2**63 - 1),
        str: st.text(max_size={"level": 16, "namespace": 64}.get(name, 100)),
        bytes: st.binary(max_size=32),
        dict[str, int]: st.dictionaries(st.text(max_size=20), st.integers(0, 2**40), max_size=8),
    }
    return simple[kind]


def sentences() -> st.SearchStrategy[Message]:
    """Any valid sentence."""

    def of(kind: type[Message]) -> st.SearchStrategy[Message]:
        hints = get_type_hints(kind, include_extras=True)
        names = [f.name for f in kind.__attrs_attrs__]  # type: ignore[attr-defined]
        asks = ("id", "request") if 16 <= kind.opcode < 40 else ("request",)
        return st.builds(kind, **{name: values(name, hints[name], int(name in asks)) for name in names})

    return st.sampled_from(SENTENCES).flatmap(of)


def raw(kind: type[Message], **fields: Any) -> bytes:
    """A frame with *fields* as they are, unchecked."""
    return bytes([kind.opcode]) + msgspec.msgpack.encode(fields)


@given(sentences())
def test_every_sentence_comes_back_as_it_was_said(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_raise_protocol_error(frame: bytes) -> None:
    try:
        message = decode(frame)
    except ProtocolError:
        return
    assert decode(encode(message)) == message


@given(st.sampled_from(SENTENCES), st.binary(max_size=100))
def test_any_bytes_behind_a_known_opcode_decode_or_raise_protocol_error(kind: type[Message], body: bytes) -> None:
    try:
        message = decode(bytes([kind.opcode]) + body)
    except ProtocolError as exc:
        said = str(exc)
    else:
        said = type(message).__name__
    assert said.startswith(kind.__name__)


@given(sentences(), st.data())
def test_a_sentence_with_a_byte_changed_or_cut_decodes_or_raises_protocol_error(
    message: Message, data: st.DataObject
) -> None:
    frame = bytearray(encode(message))
    at = data.draw(st.integers(0, len(frame) - 1))
    if data.draw(st.booleans()):
        frame[at] = data.draw(st.integers(0, 255))
    else:
        del frame[at:]
    try:
        decode(bytes(frame))
    except ProtocolError:
        assert 0 <= peek_id(bytes(frame)) <= MAX_NUMBER


def test_opcodes_are_one_byte_and_told_apart() -> None:
    codes = [c.opcode for c in SENTENCES]
    assert len(set(codes)) == len(codes)
    assert all(0 < code < 256 for code in codes)
    assert set(codec._CLASSES.values()) == set(SENTENCES)


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (b"", "empty frame"),
        (b"\xff", "opcode 255"),
        (bytes([Ping.opcode]), "Ping: .*truncated"),
        (raw(Ping), "Ping: .*`id`"),
        (raw(Ping, id=-1), "Ping: .*>= 1"),
        (raw(Ping, id=0), "Ping: .*>= 1"),
        (raw(Pong, id=-1, boot=b""), "Pong: .*>= 0"),
        (raw(Ping, id=2**63), "Ping: .*<= 9223372036854775807"),
        (raw(Ping, id=True), "Ping: .*got `bool`"),
        (raw(Ping, id=1.0), "Ping: .*got `float`"),
        (raw(Ping, id="1"), "Ping: .*got `str`"),
        (raw(LookupStatus, id=1, session=2**64 - 1), "LookupStatus: .*session"),
        (raw(Lookup, id=1, session=1, start=0, digests=b"123", upto=0), "Lookup: digests: 3 bytes"),
        (raw(Lookup, id=1, session=1, start=0, digests=bytes(32 * 65_537), upto=0), "Lookup: .*digests"),
        (raw(Reserve, id=1, session=1, parent=b"", digests=bytes(32 * 257)), "Reserve: .*digests"),
        (raw(Reset, id=1, layouts=bytes(32 * 17)), "Reset: .*layouts"),
        (raw(Reset, id=1, layouts=bytes(33)), "Reset: layouts: 33 bytes"),
        (raw(NamespaceKnown, id=0, namespace=b"", layout=b"5 byt"), "NamespaceKnown: layout: 5 bytes"),
        (raw(Lookup, id=1, session=1, start=-1, digests=b"", upto=0), "Lookup: 'start'"),
        (raw(Reserved, id=1, reservation=b"", positions=b"123", offsets=b""), "Reserved: positions"),
        (raw(Reserved, id=1, reservation=b"x" * 33, positions=b"", offsets=b""), "Reserved: .*reservation"),
        (raw(Answer, id=1, session=1, asked=1, state=9), "Answer: .*9"),
        (encode(Ping(id=1)) + b"\0", "Ping: .*trailing"),
        (bytes([Ping.opcode]) + b"\x81\xa1x" + b"\x91" * 100_000, "Ping: .*recursion"),
        (bytes([Reserved.opcode]) + b"\x81\xa7dropped\xdf\xff\xff\xff\xff", "Reserved: .*truncated"),
    ],
)
def test_a_refused_frame_is_named_with_what_is_wrong(frame: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        decode(frame)


def test_a_sentence_out_of_place_is_refused_by_name() -> None:
    assert decode_expected(encode(Pong(id=1, boot=b"b")), Pong) == Pong(id=1, boot=b"b")
    with pytest.raises(ProtocolError, match="Ping came where Pong or Answer was expected"):
        decode_expected(encode(Ping(id=1)), Pong, Answer)


def test_the_id_of_a_malformed_request_can_still_be_read() -> None:
    assert peek_id(raw(Lookup, id=7, session="none")) == 7


@given(st.binary(max_size=60))
def test_looking_for_an_id_never_raises(frame: bytes) -> None:
    assert 0 <= peek_id(frame) <= MAX_NUMBER


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_packed_offsets_come_back(offsets: list[int]) -> None:
    packed = codec.OFFSETS.pack(offsets)
    assert len(packed) == 8 * len(offsets)
    assert list(codec.OFFSETS.unpack(packed)) == offsets


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_packed_positions_come_back(positions: list[int]) -> None:
    packed = codec.POSITIONS.pack(positions)
    assert len(packed) == 4 * len(positions)
    assert list(codec.POSITIONS.unpack(packed)) == positions


def test_packed_arrays_of_a_wrong_length_are_refused() -> None:
    with pytest.raises(ProtocolError, match="9 bytes are not packed offsets"):
        codec.OFFSETS.unpack(bytes(9))
    with pytest.raises(ProtocolError, match="5 bytes are not packed positions"):
        codec.POSITIONS.unpack(bytes(5))
    with pytest.raises(ProtocolError, match="65536 at most"):
        codec.POSITIONS.unpack(bytes(4 * 65_537))


def test_types_of_all_fields_are_ones_that_the_strategies_know() -> None:
    for kind in SENTENCES:
        for name, hint in get_type_hints(kind, include_extras=True).items():
            if name != "opcode":
                assert get_args(hint) or isinstance(hint, type)
