"""Frames on pipes and sockets, read as they come, and messages that may be unpickled.

A frame is a mark, a kind, a length and that many bytes. Whoever writes nonsense is found out by the mark,
and a frame that never ends blocks nobody: the reader keeps what has come and goes on with other things.
"""

from __future__ import annotations

import dataclasses
import enum
import io
import pickle
import struct
from typing import Any

__all__ = ["BrokenStream", "Frames", "Kind", "dump_message", "frame", "load_message"]

_HEADER = struct.Struct("<4sBQ")
_MARK = b"HNS\x02"
_LONGEST = 1 << 30  # bytes: far more than all items of the largest task


class Kind(enum.IntEnum):
    """What a frame holds."""

    SETUP = 1  # parent to keeper: JSON, how to set the worker up
    JOB = 2  # parent to keeper to worker: the pickled job
    STARTED = 3  # keeper to parent: JSON, the process ids
    LOG = 4  # keeper to parent: what was printed, shortened
    MESSAGE = 5  # worker to keeper to parent: a pickled message
    ENDED = 6  # keeper to parent: JSON, how the worker ended


class BrokenStream(Exception):
    """What came is no frame or no message; the text says what is wrong with it."""


def frame(kind: Kind, payload: bytes) -> bytes:
    """The bytes of a frame."""
    return _HEADER.pack(_MARK, kind, len(payload)) + payload


class Frames:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def has_part(self) -> bool:
        """Whether the bytes so far end within a frame."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[tuple[Kind, bytes]]:
        """The frames that these bytes complete.

        Raises:
            BrokenStream: what came is no frame, or one that is too long.
        """
        self._buffer += data
        found = []
        while len(self._buffer) >= _HEADER.size:
            mark, kind, length = _HEADER.unpack_from(self._buffer)
            if mark != _MARK or kind not in list(Kind):
                raise BrokenStream("something that is no message")
            if length > _LONGEST:
                raise BrokenStream(f"a message of {length:,} bytes")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                break
            found.append((Kind(kind), bytes(self._buffer[_HEADER.size : end])))
            del self._buffer[:end]
        return found


def dump_message(message: Any) -> bytes:
    """A message as bytes. Raises what pickling raises."""
    return pickle.dumps(message, protocol=5)


def load_message(payload: bytes) -> Any:
    """A message from bytes that a worker sent; only the harness's own values are ever built.

    Raises:
        BrokenStream: it cannot be unpickled, or holds something else.
    """
    try:
        return _Unpickler(io.BytesIO(payload)).load()
    except BrokenStream:
        raise
    except Exception as error:  # the border to a process that runs methods' code
        raise BrokenStream(f"a message that cannot be read ({type(error).__name__})") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "harness":
            found = super().find_class(module, name)
            if dataclasses.is_dataclass(found) or (isinstance(found, type) and issubclass(found, enum.Enum)):
                return found
        raise BrokenStream(f"a message with a {module}.{name}")
