"""What goes wrong with a message from outside: one base class to catch, and one kind each."""

from __future__ import annotations


class WireError(ValueError):
    """A message that cannot be sent, or bytes that are not a message."""


class FrameError(WireError):
    """The bytes are no safetensors frame with a message header: truncated, trailing or malformed."""


class KindError(WireError):
    """The frame is sound, but carries a kind of message that is unknown or was not expected here."""


class FieldError(WireError):
    """A field of a message is missing, unexpected, or of the wrong type, shape or dtype."""
