"""Turns messages into frames and back: one opcode byte, then the message as a msgpack map.

Any bytes either decode to a valid message or raise `ProtocolError`. `protocol` knows which message may follow which.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import attrs
import msgspec

from lmcache_trio._wire import messages
from lmcache_trio._wire.messages import MAX_DIGESTS, Message
from lmcache_trio.errors import ProtocolError

__all__ = [
    "ECHO",
    "OFFSETS",
    "POSITIONS",
    "Packing",
    "decode",
    "decode_expected",
    "encode",
    "peek_id",
]

ECHO = b"\x00"
"""A frame that begins with this is not a message. The server sends it back as it is, undecoded: to measure what a
round trip costs by itself."""

_M = TypeVar("_M", bound=Message)
_N = TypeVar("_N", bound=Message)


class _IdOnly(msgspec.Struct):
    id: int = 0


def _messages() -> list[type[Message]]:
    named = [getattr(messages, name) for name in messages.__all__]
    return [c for c in named if isinstance(c, type) and issubclass(c, Message) and c is not Message]


_CLASSES: dict[int, type[Message]] = {}
for _class in _messages():
    if _class.opcode in _CLASSES:
        raise ImportError(f"{_class.__name__} and {_CLASSES[_class.opcode].__name__} share opcode {_class.opcode}")
    _CLASSES[_class.opcode] = _class

_DECODERS: dict[int, Callable[[Any], Any]] = {code: msgspec.msgpack.Decoder(c).decode for code, c in _CLASSES.items()}
_PREFIXES: dict[type[Message], bytes] = {c: bytes([code]) for code, c in _CLASSES.items()}
_encode_body = msgspec.msgpack.Encoder().encode
_decode_id = msgspec.msgpack.Decoder(_IdOnly).decode


def encode(message: Message) -> bytes:
    """The frame that says *message*."""
    return _PREFIXES[type(message)] + _encode_body(message)


def decode(frame: bytes) -> Message:
    """The message in *frame*. `ProtocolError` names the message, and what is wrong with it."""
    try:
        decoder = _DECODERS[frame[0]]
    except IndexError:
        raise ProtocolError("an empty frame is not a message") from None
    except KeyError:
        raise ProtocolError(f"opcode {frame[0]} is not a message of this protocol") from None
    try:
        message: Message = decoder(memoryview(frame)[1:])
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise ProtocolError(f"{_CLASSES[frame[0]].__name__}: {exc}") from exc
    return message


@overload
def decode_expected(frame: bytes, kind: type[_M], /) -> _M: ...
@overload
def decode_expected(frame: bytes, kind: type[_M], other: type[_N], /) -> _M | _N: ...
def decode_expected(frame: bytes, /, *classes: type[Message]) -> Message:
    """As `decode`. `ProtocolError`: the message is not one of *classes*."""
    message = decode(frame)
    if not isinstance(message, classes):
        names = " or ".join(c.__name__ for c in classes)
        raise ProtocolError(f"{type(message).__name__} came where {names} was expected")
    return message


def peek_id(frame: bytes) -> int:
    """The request id of a frame that did not decode, if it can still be read; else 0. Never raises."""
    try:
        found = _decode_id(memoryview(frame)[1:]).id
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError):
        return 0
    return found if 0 <= found <= messages.MAX_NUMBER else 0


@attrs.frozen
class Packing:
    """How the numbers of one kind travel: little-endian, *width* bytes each, by the letter *code* of `struct`."""

    kind: str
    code: str
    width: int

    def pack(self, numbers: Sequence[int]) -> bytes:
        return struct.pack(f"<{len(numbers)}{self.code}", *numbers)

    def unpack(self, packed: bytes) -> tuple[int, ...]:
        """The inverse of `pack`. `ProtocolError`: *packed* has a part of a number, or too many numbers."""
        count, rest = divmod(len(packed), self.width)
        if rest or count > MAX_DIGESTS:
            raise ProtocolError(
                f"{len(packed)} bytes are not packed {self.kind}: {self.width} bytes each, {MAX_DIGESTS} at most"
            )
        return struct.unpack(f"<{count}{self.code}", packed)


OFFSETS = Packing("offsets", "Q", 8)
"""Offsets of slots: bytes from the beginning of the arena."""

POSITIONS = Packing("positions", "I", 4)
"""Positions of chunks in a request, and the numbers of blocks."""
