"""What crosses the cut: the messages, their bytes, and the errors of a bad one."""

from hosfl_client.wire.acknowledgement import Acknowledgement
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
from hosfl_client.wire.joining import Bye, Hello
from hosfl_client.wire.projected import ProjectedGradients, Update
from hosfl_client.wire.requests import HELD_OUT, HeldOutRequest, ProbeRequest, RoundEnd, StepRequest
from hosfl_client.wire.secure import MaskedGradients, SecureKeys, SecurePeers, SecureShares, UnmaskRequest
from hosfl_client.wire.terms import RULES, Terms
from hosfl_client.wire.weights import Weights
from hosfl_client.wire.words import printable
from hosfl_lightning.wire.arrays import manifest
from hosfl_lightning.wire.codec import Codec
from hosfl_lightning.wire.codecs import CODECS, TOKEN_CODECS, Codecs, Coded
from hosfl_lightning.wire.coded_gradient import CodedGradient
from hosfl_lightning.wire.encoding import check_finite, decode, encode, encoded_size
from hosfl_lightning.wire.messages import MESSAGES, Message, Multiplier, SmashedData
from hosfl_lightning.wire.probed_data import ProbedData
from hosfl_lightning.wire.u_shape import MiddleOutput, OutputMultiplier, UnlabelledData

__all__ = [
    "CODECS",
    "HELD_OUT",
    "LIMIT",
    "MESSAGES",
    "PROTOCOL",
    "RULES",
    "TOKEN_CODECS",
    "Acknowledgement",
    "AddressError",
    "Bye",
    "CatchUpRequest",
    "ChecksumError",
    "Codec",
    "Codecs",
    "Coded",
    "CodedGradient",
    "DtypeError",
    "DuplicateKeyError",
    "Envelope",
    "FieldError",
    "FrameError",
    "HeldOutRequest",
    "Hello",
    "KindError",
    "MaskedGradients",
    "Message",
    "MiddleOutput",
    "Multiplier",
    "NonFiniteError",
    "OutputMultiplier",
    "ProbeRequest",
    "ProbedData",
    "ProjectedGradients",
    "RoundEnd",
    "SecureKeys",
    "SecurePeers",
    "SecureShares",
    "ShapeError",
    "SmashedData",
    "Snapshot",
    "StepRequest",
    "Terms",
    "TooLargeError",
    "TruncatedError",
    "UnlabelledData",
    "UnmaskRequest",
    "Update",
    "VersionError",
    "Weights",
    "WireError",
    "check_finite",
    "checksum",
    "decode",
    "encode",
    "encoded_size",
    "manifest",
    "peek",
    "printable",
]
