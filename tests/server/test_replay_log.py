from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning import files
from hosfl_lightning.server import replay_log as replay
from hosfl_lightning.server.replay_log import (
    CorruptLogError,
    MissingRoundsError,
    OtherRunError,
    ReplayLog,
    ReplayLogError,
    WitnessError,
)
from tests.faults import Killed, count_writes, killed_at, points

START = {"run_id": "r", "incarnation": "a", "manifest": {"lora_A": [[2, 3], "float32"]}, "seed": 2**63 + 1}
FRAMES = [bytes([n]) * (5 + n) + b"\0" * n for n in range(4)]


def incarnation(name: str) -> dict[str, Any]:
    return START | {"incarnation": name}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "updates.log"


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk() -> Iterator[None]:
    with count_writes():
        yield


def write(path: Path, frames: list[bytes] = FRAMES) -> list[int]:
    """A new log of these frames; the file's size after the START and after each of them."""
    log = ReplayLog.open(path, START)
    ends = [path.stat().st_size]
    for round, frame in enumerate(frames):
        log.append(round, frame)
        ends.append(path.stat().st_size)
    return ends


def entries(path: Path) -> list[bytes]:
    """The entries of a new log, as bytes."""
    ends = [0, *write(path)]
    return [path.read_bytes()[a:b] for a, b in pairwise(ends)]


def test_what_was_appended_is_read(path: Path) -> None:
    write(path)
    log = ReplayLog.read(path)
    assert log.rounds == 4
    assert list(log.frames()) == FRAMES
    assert list(log.frames(1, 3)) == FRAMES[1:3]
    assert log.starts == [START | {"from_round": 0}]
    assert log.incarnation_of(3) == "a"
    with pytest.raises(MissingRoundsError, match="holds 4 rounds, 5 are needed"):
        list(log.frames(0, 5))
    with pytest.raises(MissingRoundsError, match="holds 4 rounds"):
        log.incarnation_of(4)


def test_the_bytes_are_those_of_the_format(path: Path) -> None:
    """Written down once more, by hand: a log has to be readable in years."""
    body = json.dumps(START, sort_keys=True, separators=(",", ":")).encode()
    chain, expected = hashlib.sha256(b"hosfl replay log 1").digest(), b""
    for type, round, content in [(1, 0, body), (2, 0, FRAMES[0]), (2, 1, FRAMES[1])]:
        header = struct.pack("<I", len(content)) + bytes([type]) + struct.pack("<I", round)
        entry = header + struct.pack("<I", zlib.crc32(header)) + content
        chain = hashlib.sha256(chain + entry).digest()
        expected += entry + chain
    write(path, FRAMES[:2])
    assert path.read_bytes() == expected
    assert ReplayLog.read(path).head(2) == chain.hex()


def test_a_record_is_durable_when_append_returns(path: Path) -> None:
    log = ReplayLog.open(path, START)
    with count_writes() as calls:
        log.append(0, FRAMES[0])
    assert calls == ["write", "fsync"]


def test_rounds_are_consecutive(path: Path) -> None:
    log = ReplayLog.open(path, START)
    log.append(0, FRAMES[0])
    for round in (0, 2):
        with pytest.raises(ReplayLogError, match=f"round {round} cannot be recorded, the next is 1"):
            log.append(round, FRAMES[0])
    with pytest.raises(ReplayLogError, match="opened to read"):
        ReplayLog.read(path).append(1, FRAMES[1])


def check_opens_to(path: Path, frames: list[bytes], end: int) -> None:
    """Readers see these frames; a writer cuts the rest off and goes on to the same file as if nothing had been."""
    assert list(ReplayLog.read(path).frames()) == frames
    log = ReplayLog.open(path, START)
    assert path.stat().st_size == end
    for round, frame in enumerate(FRAMES):
        log.append(round, frame)


def test_every_cut_leaves_the_whole_records_before_it(path: Path) -> None:
    ends = write(path)
    data = path.read_bytes()
    for size in range(ends[0], len(data) + 1):
        whole = sum(end <= size for end in ends)
        path.write_bytes(data[:size])
        check_opens_to(path, FRAMES[: whole - 1], ends[whole - 1])
        assert path.read_bytes() == data


def test_a_cut_in_the_first_entry_leaves_no_log_and_it_begins_anew(path: Path) -> None:
    start = write(path)[0]
    data = path.read_bytes()
    for size in range(start):
        path.write_bytes(data[:size])
        with pytest.raises(ReplayLogError, match="no replay log"):
            ReplayLog.read(path)
        with pytest.raises(MissingRoundsError):
            ReplayLog.open(path, START, at_round=1)
        ReplayLog.open(path, START)
        assert path.read_bytes() == data[:start]


@pytest.mark.parametrize("to_its_end", [True, False], ids=["to the record's end", "beyond it"])
def test_a_cut_filled_with_zeros_is_a_cut(path: Path, to_its_end: bool) -> None:
    """A file system may have given the file its new length before its bytes."""
    ends = write(path)
    data = path.read_bytes()
    for size in range(ends[0], len(data)):
        whole = sum(end <= size for end in ends)
        missing = ends[whole] - size
        path.write_bytes(data[:size] + bytes(missing if to_its_end else 5000))
        if missing < 8:  # a flipped byte might have made it, so nothing is dropped
            with pytest.raises(CorruptLogError):
                ReplayLog.read(path)
        else:
            check_opens_to(path, FRAMES[: whole - 1], ends[whole - 1])
            assert path.read_bytes() == data


def test_a_cut_inside_a_record_followed_by_zeros_is_torn_only_at_its_end(path: Path) -> None:
    ends = write(path)
    data = path.read_bytes()
    path.write_bytes(data[: ends[1] + 15] + b"\0" * (ends[2] - ends[1] - 15) + data[ends[2] :])
    with pytest.raises(CorruptLogError, match="entry 2, of round 1"):
        ReplayLog.read(path)


@pytest.mark.parametrize("mask", [0x01, 0x80, 0x10, 0xFF])
def test_every_flipped_byte_is_found(path: Path, mask: int) -> None:
    ends = write(path)
    data = path.read_bytes()
    for position in range(len(data)):
        entry = sum(end <= position for end in ends)
        flipped = data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]
        path.write_bytes(flipped)
        with pytest.raises(CorruptLogError, match=f"entry {entry}\\b"):
            ReplayLog.read(path)
        with pytest.raises(CorruptLogError, match=f"entry {entry}\\b"):
            ReplayLog.open(path, START)
        assert path.read_bytes() == flipped


@pytest.mark.parametrize(
    "change",
    [
        lambda e: [e[0], e[2], e[1], e[3], e[4]],
        lambda e: [e[0], e[1], e[3], e[4]],
        lambda e: [e[0], e[1], e[1], e[2], e[3], e[4]],
        lambda e: e[1:],
        lambda e: [e[0], *e],
    ],
    ids=["swapped", "one left out", "one twice", "no start", "two starts"],
)
def test_whole_entries_in_another_order_are_found(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    changed = b"".join(change(entries(path)))
    path.write_bytes(changed)
    with pytest.raises(CorruptLogError):
        ReplayLog.read(path)


@pytest.mark.parametrize(
    "wrong",
    [[(2, 0)], [(1, 1)], [(1, 0), (2, 1)], [(1, 0), (2, 0), (2, 0)], [(1, 0), (1, 1)], [(1, 0), (3, 0)]],
    ids=["no start", "late start", "a round skipped", "a round twice", "a start beyond the end", "unknown type"],
)
def test_a_chain_in_order_over_rounds_that_are_not_is_refused(path: Path, wrong: list[tuple[int, int]]) -> None:
    chain, data = replay._GENESIS, b""
    for type, round in wrong:
        data += replay._encode(type, round, b'{"incarnation":"a"}', chain)
        chain = data[-32:]
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(CorruptLogError, match=f"type {wrong[-1][0]} and round {wrong[-1][1]}"):
        ReplayLog.read(path)


def test_a_resumed_run_is_compared_with_what_it_did_before_then_goes_on(path: Path) -> None:
    write(path, FRAMES[:3])
    before = path.read_bytes()
    log = ReplayLog.open(path, START, at_round=1)
    assert log.rounds == 3
    with count_writes() as calls:
        log.append(1, FRAMES[1])
    assert calls == []
    with pytest.raises(WitnessError, match="round 2, executed again, differs"):
        log.append(2, FRAMES[2][:-1] + b"\1")
    assert path.read_bytes() == before
    log = ReplayLog.open(path, START, at_round=2)
    log.append(2, FRAMES[2])
    log.append(3, FRAMES[3])
    assert list(ReplayLog.read(path).frames()) == FRAMES


def test_a_witness_that_only_begins_like_the_frame_differs(path: Path) -> None:
    write(path)
    with pytest.raises(WitnessError):
        ReplayLog.open(path, START, at_round=3).append(3, FRAMES[3] + b"\0")


def test_another_incarnation_voids_the_rounds_it_does_again(path: Path) -> None:
    write(path)
    before, head = path.read_bytes(), ReplayLog.read(path).head(2)
    log = ReplayLog.open(path, incarnation("b"), at_round=2, head=head)
    assert log.rounds == 2
    log.append(2, b"other bits")
    again = ReplayLog.read(path)
    assert list(again.frames()) == [*FRAMES[:2], b"other bits"]
    assert [again.incarnation_of(round) for round in range(3)] == ["a", "a", "b"]
    assert [(start["incarnation"], start["from_round"]) for start in again.starts] == [("a", 0), ("b", 2)]
    assert path.read_bytes().startswith(before), "what was voided stays"
    assert again.head(2) == head


def test_what_was_voided_is_read_in_the_order_in_which_it_was_sent(path: Path) -> None:
    write(path)
    ReplayLog.open(path, incarnation("b"), at_round=2).append(2, b"by b")
    ReplayLog.open(path, incarnation("c"), at_round=1)
    log = ReplayLog.read(path)
    assert list(log.voided_frames()) == [*FRAMES[1:], b"by b"]
    assert list(log.voided_frames(first=2)) == [FRAMES[1], b"by b"]
    assert list(log.voided_frames(first=3)) == []


def test_an_incarnation_has_no_witnesses_but_its_own(path: Path) -> None:
    write(path)
    ReplayLog.open(path, incarnation("b"), at_round=2).append(2, b"by b")
    size = path.stat().st_size
    with pytest.raises(WitnessError):
        ReplayLog.open(path, incarnation("b"), at_round=2).append(2, b"by a")
    assert path.stat().st_size == size, "the same incarnation needs no second START"
    log = ReplayLog.open(path, incarnation("b"), at_round=1)  # an older checkpoint: round 1 was a's
    log.append(1, b"by b")
    assert list(ReplayLog.read(path).frames()) == [FRAMES[0], b"by b"]
    log = ReplayLog.open(path, incarnation("a"), at_round=2)  # back on the old hardware
    log.append(2, b"by a")
    assert [ReplayLog.read(path).incarnation_of(round) for round in range(3)] == ["a", "b", "a"]


def test_a_checkpoint_of_voided_rounds_is_refused(path: Path) -> None:
    write(path)
    voided = ReplayLog.read(path).head(3)
    log = ReplayLog.open(path, incarnation("b"), at_round=2)
    log.append(2, FRAMES[2])
    size = path.stat().st_size
    with pytest.raises(OtherRunError, match="checkpoint of round 3"):
        ReplayLog.open(path, incarnation("a"), at_round=3, head=voided)
    assert path.stat().st_size == size
    assert ReplayLog.open(path, incarnation("b"), at_round=3, head=log.head(3)).rounds == 3


def test_heads_are_of_the_rounds_below(path: Path) -> None:
    digests = [entry[-32:].hex() for entry in entries(path)]
    log = ReplayLog.read(path)
    assert [log.head(round) for round in range(5)] == digests
    again = ReplayLog.open(path, incarnation("b"), at_round=2)
    assert [again.head(round) for round in range(3)] == digests[:3], "another START changes none of the heads below it"
    with pytest.raises(MissingRoundsError):
        log.head(5)


@pytest.mark.parametrize("change", [{"run_id": "s"}, {"manifest": {}}, {"more": 1}])
def test_the_log_of_another_run_is_refused(path: Path, change: dict[str, Any]) -> None:
    write(path)
    with path.open("ab") as file:
        file.write(b"torn")
    before = path.read_bytes()
    with pytest.raises(OtherRunError, match=f"{next(iter(change))} differ"):
        ReplayLog.open(path, START | change)
    assert path.read_bytes() == before


def test_a_model_that_was_moved_is_the_same_model(path: Path) -> None:
    ReplayLog.open(path, START | {"pretrained": "/here/model"}).append(0, FRAMES[0])
    assert ReplayLog.open(path, START | {"pretrained": "/there/model"}, at_round=1).rounds == 1


def test_a_log_that_ends_before_the_checkpoint_is_refused(path: Path) -> None:
    with pytest.raises(MissingRoundsError, match="holds 0 rounds, 1 are needed"):
        ReplayLog.open(path, START, at_round=1)
    assert not path.exists()
    write(path)
    with pytest.raises(MissingRoundsError, match="holds 4 rounds, 5 are needed"):
        ReplayLog.open(path, START, at_round=5)


def test_a_start_reads_back_as_json_gives_it(path: Path) -> None:
    """Tuples become lists: that is no other run."""
    ReplayLog.open(path, START | {"betas": (0.9, 0.999)})
    assert ReplayLog.open(path, START | {"betas": (0.9, 0.999)}).starts[0]["betas"] == [0.9, 0.999]


def train(path: Path, name: str = "a", at_round: int = 0) -> None:
    log = ReplayLog.open(path, incarnation(name), at_round)
    for round in range(at_round, 4):
        log.append(round, FRAMES[round])


def test_wherever_a_run_is_killed_its_records_are_a_prefix_and_it_can_go_on(path: Path) -> None:
    with count_writes() as calls:
        train(path)
    whole = path.read_bytes()
    assert calls == ["write", "fsync", "replace", "fsync"] + 4 * ["write", "fsync"]
    for n, torn in points(calls):
        path.unlink()
        with pytest.raises(Killed), killed_at(n, torn):
            train(path)
        done = list(ReplayLog.read(path).frames()) if path.exists() else []
        assert done == FRAMES[: len(done)]
        acknowledged = max(n - 4, 0) // 2
        assert acknowledged <= len(done) <= acknowledged + 1
        train(path, at_round=len(done))
        assert path.read_bytes() == whole


def test_wherever_the_next_incarnation_is_killed_it_can_go_on(path: Path) -> None:
    def broken_off() -> None:
        path.unlink(missing_ok=True)
        write(path, FRAMES[:3])
        with path.open("ab") as file:
            file.write(b"\x07\0torn")

    broken_off()
    with count_writes() as calls:
        train(path, "b", at_round=1)
    whole = path.read_bytes()
    assert calls == ["truncate", "fsync"] + 4 * ["write", "fsync"]
    for n, torn in points(calls):
        broken_off()
        with pytest.raises(Killed), killed_at(n, torn):
            train(path, "b", at_round=1)
        train(path, "b", at_round=1)
        assert path.read_bytes() == whole, (n, torn)


def test_an_append_that_failed_can_be_tried_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        def __getattr__(self, name: str) -> Any:
            return self._half if name == "write" else getattr(os, name)

        def _half(self, descriptor: int, data: bytes) -> int:
            os.write(descriptor, data[:9])
            raise OSError("disk full")

    log = ReplayLog.open(path, START)
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", FullDisk())
        with pytest.raises(OSError, match="disk full"):
            log.append(0, FRAMES[0])
    log.append(0, FRAMES[0])
    assert list(ReplayLog.read(path).frames()) == FRAMES[:1]
