"""What crosses the cut, for any engine: the messages, their bytes, and the errors of a bad one."""

from hosfl_client.wire.acknowledgement import Acknowledgement
from hosfl_client.wire.arrays import Arrays, Form
from hosfl_client.wire.catch_up import CatchUpRequest, Snapshot
from hosfl_client.wire.envelope import LIMIT, PROTOCOL, Envelope, checksum, peek
from hosfl_client.wire.errors import (
    AddressError,
    ChecksumError,
    DtypeError,
    DuplicateKeyError,
    FieldError,
    FrameError,
    KindError,
    NonFiniteError,
    ShapeError,
    TooLargeError,
    TruncatedError,
    VersionError,
    WireError,
)
from hosfl_client.wire.frames import Frames
from hosfl_client.wire.joining import Bye, Hello
from hosfl_client.wire.kinds import KINDS
from hosfl_client.wire.projected import ProjectedGradients, Update
from hosfl_client.wire.requests import HELD_OUT, HeldOutRequest, ProbeRequest, RoundEnd, StepRequest
from hosfl_client.wire.secure import MaskedGradients, SecureKeys, SecurePeers, SecureShares, UnmaskRequest
from hosfl_client.wire.terms import RULES, Terms, difference
from hosfl_client.wire.weights import Weights
from hosfl_client.wire.words import printable

__all__ = [
    "HELD_OUT",
    "KINDS",
    "LIMIT",
    "PROTOCOL",
    "RULES",
    "Acknowledgement",
    "AddressError",
    "Arrays",
    "Bye",
    "CatchUpRequest",
    "ChecksumError",
    "DtypeError",
    "DuplicateKeyError",
    "Envelope",
    "FieldError",
    "Form",
    "FrameError",
    "Frames",
    "HeldOutRequest",
    "Hello",
    "KindError",
    "MaskedGradients",
    "NonFiniteError",
    "ProbeRequest",
    "ProjectedGradients",
    "RoundEnd",
    "SecureKeys",
    "SecurePeers",
    "SecureShares",
    "ShapeError",
    "Snapshot",
    "StepRequest",
    "Terms",
    "TooLargeError",
    "TruncatedError",
    "UnmaskRequest",
    "Update",
    "VersionError",
    "Weights",
    "WireError",
    "checksum",
    "difference",
    "peek",
    "printable",
]
