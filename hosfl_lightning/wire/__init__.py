"""What crosses the cut: four messages, their bytes, and the errors of a bad one."""

from hosfl_lightning.wire.encoding import decode, encode, encoded_size
from hosfl_lightning.wire.errors import FieldError, FrameError, KindError, WireError
from hosfl_lightning.wire.messages import MESSAGES, Message, Multiplier, ProjectedGradients, SmashedData, Update

__all__ = [
    "MESSAGES",
    "FieldError",
    "FrameError",
    "KindError",
    "Message",
    "Multiplier",
    "ProjectedGradients",
    "SmashedData",
    "Update",
    "WireError",
    "decode",
    "encode",
    "encoded_size",
]
