"""The append-only log of all updates: from it and the base model the client half can be rebuilt at any round.

    entry i = u32 length of the body | u8 type | u32 round | u32 CRC-32 of these nine bytes | body | h_i
    h_i     = SHA-256(h_{i-1} ‖ header ‖ body),   h_{-1} = SHA-256("hosfl replay log 1")

Integers are little-endian, h_i has 32 bytes.

| type | body | round |
|---|---|---|
| 1 START | canonical JSON: run, incarnation, manifest, whatever a replay has to know | the first it speaks for |
| 2 UPDATE | the frame that was broadcast, opaque here | its own |

A file begins with a START of round 0. A server that comes back with other bits (other hardware) appends a START of
round c: it voids all records of rounds >= c before it, which stay in the file.

The header has a checksum of its own so that a flipped bit in a length is not taken for a record that a kill cut short.
The chain finds accidents, and changes of what came before a chain value that a checkpoint holds; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hosfl_lightning.files import append, truncate, write_whole

_HEADER = struct.Struct("<IBII")
_DIGEST = 32
_BLANK = 8  # at the end of a digest: bytes that never came; no hash ends so, and no flipped byte makes one
_START, _UPDATE = 1, 2
BEFORE_RULES = "the rules before hosfl-rules/1"
"""Those of a log whose START names none."""
_GENESIS = hashlib.sha256(b"hosfl replay log 1").digest()


class ReplayLogError(ValueError):
    """A replay log cannot be used as asked; base of all errors here."""


class CorruptLogError(ReplayLogError):
    """Bytes of the log were changed, moved or lost since they were written."""


class MissingRoundsError(ReplayLogError):
    """The log ends before the round that is asked for."""


class OtherRunError(ReplayLogError):
    """The log, or the history it holds, is not that of this run."""


class WitnessError(ReplayLogError):
    """A round that was executed again gave another update than the one that is on record."""


class _Entry(NamedTuple):
    type: int
    round: int
    offset: int  # of the body, bytes from the start of the file
    body: bytes
    digest: bytes

    @property
    def end(self) -> int:
        return self.offset + len(self.body) + _DIGEST


class _Record(NamedTuple):
    offset: int
    length: int
    digest: bytes
    incarnation: str


class ReplayLog:
    """All updates of a run; opened by :meth:`open` to write and by :meth:`read` to read.

    Opening reads the file once, in O(file) time and O(rounds) memory; appending is O(1).

    Attributes:
        path: The file.
        starts: The START entries in the order of the file, each with its ``from_round``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.starts: list[dict[str, Any]] = []
        self._records: list[_Record] = []  # the live ones: the index is the round
        self._voided: list[tuple[int, _Record]] = []  # with the number of the START that voided it
        self._origin = self._tip = _GENESIS  # chain values of the first START and of the last entry
        self._size = 0  # of the whole entries
        self._next: int | None = None
        if self.path.is_file():
            with self.path.open("rb") as file:
                for entry in _entries(file):
                    self._take(entry)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ReplayLog:
        """A log to read; a last entry that a kill cut short is skipped.

        Raises:
            CorruptLogError: A byte is not as it was written.
            ReplayLogError: There is no log.
        """
        log = cls(path)
        if not log.starts:
            raise ReplayLogError(f"{path}: no replay log; give the folder or file of a run that wrote one")
        return log

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], start: dict[str, Any], at_round: int = 0, head: str | None = None
    ) -> ReplayLog:
        """A log to append to from ``at_round`` on: a new one, or that of a run which is resumed there.

        Records of rounds >= ``at_round`` become *witnesses*: :meth:`append` compares with them instead of writing.
        Unless they are of another incarnation: then a START that voids them is appended. A last entry that a kill cut
        short is dropped.

        Args:
            path: The file; made when it holds no whole entry and ``at_round`` is 0.
            start: What a replay has to know, as JSON writes it. ``incarnation`` tells apart servers that may compute
                other bits; every other value but ``hardware`` and ``pretrained`` must be that of the log's first START.
            at_round: The checkpoint's round: the number of rounds that are done.
            head: What :meth:`head` gave when the checkpoint was made.

        Raises:
            CorruptLogError: A byte is not as it was written.
            MissingRoundsError: The log ends before ``at_round``.
            OtherRunError: It is another run's, or the checkpoint's history is not the log's.
        """
        log, start = cls(path), json.loads(_canonical(start))
        mine = start["incarnation"]
        if not log.starts and at_round == 0:
            write_whole(path, lambda file: file.write(_encode(_START, 0, _canonical(start), _GENESIS)))
            log = cls(path)
        log._check(start, at_round, head)
        if log._size < log.path.stat().st_size:
            truncate(log.path, log._size)
        log._next = at_round
        if {log.starts[-1]["incarnation"], *(record.incarnation for record in log._records[at_round:])} != {mine}:
            log._write(_START, at_round, _canonical(start))
        return log

    @property
    def rounds(self) -> int:
        """The number of rounds on record, witnesses included."""
        return len(self._records)

    def append(self, round: int, frame: bytes) -> None:
        """Put the update of a round on record: durable on return. Where there is a witness, compare with it instead.

        Raises:
            WitnessError: The witness has other bytes.
            ReplayLogError: Not the next round, or the log was opened to read.
        """
        if self._next is None:
            raise ReplayLogError(f"{self.path}: opened to read; ReplayLog.open opens it to append")
        if round != self._next:
            raise ReplayLogError(f"{self.path}: round {round} cannot be recorded, the next is {self._next}")
        if round == self.rounds:
            self._write(_UPDATE, round, frame)
        elif frame != next(self.frames(round, round + 1)):
            raise WitnessError(
                f"{self.path}: round {round}, executed again, differs from the update on record, which clients may "
                "have applied. Data, code, library versions or hardware are not those of the first time: resume with "
                "those, or start a new run"
            )
        self._next += 1

    def void(self, round: int, start: dict[str, Any]) -> None:
        """Another server goes on from ``round``: a START voids what is on record from there on.

        Raises:
            ReplayLogError: Not the next round, or the log was opened to read.
        """
        if self._next != round:
            raise ReplayLogError(f"{self.path}: round {round} cannot be voided, the next is {self._next}")
        self._write(_START, round, _canonical(start))

    def head(self, round: int) -> str:
        """The chain value, in hex, after the records of all rounds below ``round``; a checkpoint keeps that of its own.

        Raises:
            MissingRoundsError: The log ends before ``round``.
        """
        self._require(round)
        return (self._records[round - 1].digest if round else self._origin).hex()

    def frames(self, first: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The live frames of rounds ``first`` .. ``stop`` - 1, read one by one; None: to the end.

        Raises:
            MissingRoundsError: The log ends before ``stop``.
        """
        stop = self.rounds if stop is None else stop
        self._require(stop)
        yield from self._read_frames(self._records[first:stop])

    def voided_frames(self, first: int = 0) -> Iterator[bytes]:
        """What was broadcast and then voided by ``starts[first:]``, in the order in which clients received it."""
        voided = [record for start, record in self._voided if start >= first]
        yield from self._read_frames(sorted(voided))  # by their place in the file

    def incarnation_of(self, round: int) -> str:
        """The incarnation of the server that recorded a round.

        Raises:
            MissingRoundsError: The round is not on record.
        """
        self._require(round + 1)
        return self._records[round].incarnation

    def _read_frames(self, records: list[_Record]) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            for record in records:
                file.seek(record.offset)
                yield file.read(record.length)

    def _require(self, rounds: int) -> None:
        if rounds > self.rounds:
            raise MissingRoundsError(
                f"{self.path}: holds {self.rounds} rounds, {rounds} are needed: use a checkpoint or a round of at most "
                f"{self.rounds}, or put back the whole file"
            )

    def _check(self, start: dict[str, Any], at_round: int, head: str | None) -> None:
        self._require(at_round)
        recorded = self.starts[0] if self.starts else {}
        # A model may have moved: its fingerprint tells which one it is.
        apart = {"incarnation", "hardware", "from_round", "pretrained"}
        if recorded and (words := other_rules(recorded, start.get("rules"))):
            raise OtherRunError(
                f"{self.path}: {words}; go on with the version that wrote it, or start a new run in a folder of its own"
            )
        if other := sorted(k for k in (start.keys() | recorded.keys()) - apart if start.get(k) != recorded.get(k)):
            raise OtherRunError(
                f"{self.path}: the log of another run: {', '.join(other)} differ; resume with that run's settings, or "
                "start a new run in a folder of its own"
            )
        if head not in (None, self.head(at_round)):
            raise OtherRunError(
                f"{self.path}: the checkpoint of round {at_round} belongs to voided rounds or to another log; "
                "resume from a later checkpoint of this run"
            )

    def _take(self, entry: _Entry) -> None:
        if entry.type == _START:
            fits = entry.round <= self.rounds
        else:
            fits = entry.type == _UPDATE and bool(self.starts) and entry.round == self.rounds
        if not fits:
            raise CorruptLogError(
                f"{self.path}: an entry of type {entry.type} and round {entry.round} after {self.rounds} rounds; read "
                "it with the version of hosfl_lightning that wrote it"
            )
        if entry.type == _START:
            self._origin = self._origin if self.starts else entry.digest
            self._voided += [(len(self.starts), record) for record in self._records[entry.round :]]
            del self._records[entry.round :]
            self.starts.append(json.loads(entry.body) | {"from_round": entry.round})
        else:
            incarnation = self.starts[-1]["incarnation"]
            self._records.append(_Record(entry.offset, len(entry.body), entry.digest, incarnation))
        self._tip, self._size = entry.digest, entry.end

    def _write(self, type: int, round: int, body: bytes) -> None:
        data = _encode(type, round, body, self._tip)
        append(self.path, data)
        self._take(_Entry(type, round, self._size + _HEADER.size, body, data[-_DIGEST:]))


def other_rules(start: dict[str, Any], mine: str | None) -> str | None:
    """In words, that the updates behind a START are to be applied by other arithmetic than mine; None: they are not."""
    theirs = start.get("rules", BEFORE_RULES)
    if theirs == (mine or BEFORE_RULES):
        return None
    return f"its updates move weights by {theirs}, this version by {mine}, to other bits"


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _encode(type: int, round: int, body: bytes, previous: bytes) -> bytes:
    header = struct.pack("<IBI", len(body), type, round)
    data = header + struct.pack("<I", zlib.crc32(header)) + body
    return data + hashlib.sha256(previous + data).digest()


def _entries(file: BinaryIO) -> Iterator[_Entry]:
    previous, number = _GENESIS, 0
    while (entry := _read(file, previous, number)) is not None:
        yield entry
        previous, number = entry.digest, number + 1


def _read(file: BinaryIO, previous: bytes, number: int) -> _Entry | None:
    """The next entry; None at the end of the file and where a kill or a crash cut the last entry short."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    length, type, round, checksum = _HEADER.unpack(header)
    offset = blank = file.tell()
    name = f"entry {number}"
    if zlib.crc32(header[:-4]) == checksum:
        if os.fstat(file.fileno()).st_size < offset + length + _DIGEST:
            return None
        body, digest = file.read(length), file.read(_DIGEST)
        if digest == hashlib.sha256(previous + header + body).digest():
            return _Entry(type, round, offset, body, digest)
        blank, name = offset + length + _DIGEST - _BLANK, f"{name}, of round {round},"
    # A crash of the machine can leave the length of a write without its bytes, zeros to the end of the file.
    if _is_blank(file, blank):
        return None
    raise CorruptLogError(f"{file.name}: {name} is not as it was written; put back a sound copy of the file")


def _is_blank(file: BinaryIO, position: int) -> bool:
    file.seek(position)
    return not any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(1 << 20), b""))
