"""A client on another machine, as the server knows it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # its libraries are of the extra `remote`, which a run in one process has no need of
    from hosfl_lightning.link.reception import Stream


@dataclass
class Member:
    """Who is at the other end of a stream, and how far it has come.

    Attributes:
        stream: The connection.
        serial: Of its certificate; None: it has none.
        stage: ``new`` until it has said who it is, ``joining`` until it holds what the others hold, then ``in``.
        name: As in its certificate.
        number: Its number in the run.
        session: Which process it is.
        held_out: Batches of its own validation data.
        promised: Digest of the state that it holds once it has read what it was sent; every update since follows it.
        tries: How often it was brought up to date on this stream.
        bad: Frames of its that were no messages.
        since: When it connected.
    """

    stream: Stream
    serial: Any = None
    stage: Literal["new", "joining", "in"] = "new"
    name: str = ""
    number: int = -1
    session: str = ""
    held_out: int = 0
    promised: str | None = None
    tries: int = 0
    bad: int = 0
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Membership:
    """Who must be there, and how long is waited.

    Args:
        quorum: Clients that must be connected and up to date before a round begins; None: as many as a round asks.
        oversample: How many more clients a round asks than it needs; the first that answer count.
        deadline: Seconds within which each answer must come.
        bad_frames: Frames of a stream that may be no messages; then it ends.

    Raises:
        ValueError: A setting out of range.
    """

    quorum: int | None = None
    oversample: int = 0
    deadline: float = 60.0
    bad_frames: int = 16

    def __post_init__(self) -> None:
        if self.quorum is not None and self.quorum < 1:
            raise ValueError(f"--quorum must be >= 1, got {self.quorum}")
        if self.oversample < 0:
            raise ValueError(f"--oversample must be >= 0, got {self.oversample}")
        if not self.deadline > 0:
            raise ValueError(f"--deadline must be > 0 seconds, got {self.deadline}")


def listed(names: Sequence[str], most: int = 8) -> str:
    """Some names, in words."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
