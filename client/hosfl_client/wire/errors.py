"""What goes wrong with a message from outside: one base class to catch, and one kind each."""

from __future__ import annotations


class WireError(ValueError):
    """A message that cannot be sent, or bytes that are not a message."""


class FrameError(WireError):
    """The bytes are no frame of ours: another magic, trailing bytes, or a payload that is malformed."""


class VersionError(WireError):
    """The frame is of another version of the protocol."""


class TruncatedError(WireError):
    """The frame is shorter than it says it is."""


class TooLargeError(WireError):
    """The frame, or the message it would unpack to, is larger than the receiver's limit."""


class ChecksumError(WireError):
    """The frame's SHA-256 is not that of its bytes: something changed on the way."""


class KindError(WireError):
    """The frame is sound, but carries a kind of message that is unknown or was not expected here."""


class AddressError(WireError):
    """The message belongs to another run, round or client."""


class DuplicateKeyError(WireError):
    """A name occurs twice, so that two readers could read two messages."""


class FieldError(WireError):
    """A field of a message is missing, unexpected, or of the wrong type or value."""


class ShapeError(FieldError):
    """A tensor has a shape that does not fit."""


class DtypeError(FieldError):
    """A tensor has a dtype that does not belong there or does not travel."""


class NonFiniteError(WireError):
    """A number is NaN or infinite."""
