from __future__ import annotations

import random
import struct
from typing import Any

import pytest
import torch

from hosfl_lightning.wire import (
    PROTOCOL,
    AddressError,
    CatchUpRequest,
    ChecksumError,
    Envelope,
    FieldError,
    FrameError,
    KindError,
    TooLargeError,
    TruncatedError,
    VersionError,
    Weights,
    WireError,
    decode,
    encode,
    peek,
)
from tests.wire.samples import RUN, every_form, messages, reseal, same, seal, smashed

REQUEST = CatchUpRequest(5, 2, 3, "a")
DATA = encode(REQUEST, RUN)
KINDS = [
    "smashed_data", "multiplier", "projected_gradients", "update", "catch_up_request", "snapshot", "weights",
    "probed_data", "coded_gradient", "step_request", "probe_request", "round_end", "terms", "hello", "bye",
    "held_out_request", "acknowledgement", "unlabelled_data", "middle_output", "output_multiplier",
    "secure_keys", "secure_peers", "secure_shares", "masked_gradients",
    "unmask_request",
]  # fmt: skip


def test_the_fixed_part_is_as_described() -> None:
    for message in messages(4):
        data = encode(message, RUN)
        client = getattr(message, "client", None)
        addressee = 0 if client is None else client + 1
        code = KINDS.index(message.kind) + 1
        assert data == seal(data[72:], kind=code, round=message.round, client=addressee, run=RUN)
    assert PROTOCOL == 2


def test_peek_tells_whose_message_it_claims_to_be_even_when_its_payload_is_damaged() -> None:
    for message in every_form(3):
        data = encode(message, RUN)
        expected = Envelope(message.kind, message.round, getattr(message, "client", None), RUN, len(data) - 72)
        assert peek(data) == peek(data[:-1] + bytes([data[-1] ^ 1])) == expected


def _set(offset: int, form: str, value: Any) -> bytes:
    data = bytearray(DATA)
    struct.pack_into(form, data, offset, value)
    return reseal(bytes(data))


BAD: list[tuple[bytes, type[WireError], str]] = [
    (b"", TruncatedError, "0 bytes"),
    (DATA[:3], TruncatedError, "3 bytes"),
    (DATA[:71], TruncatedError, "71 bytes"),
    (DATA[:72], TruncatedError, "are missing"),
    (DATA[:-1], TruncatedError, "last 1 of"),
    (b"\x80\x04pickle", FrameError, "begins with"),
    (_set(0, "<4s", b"hosf"), FrameError, "begins with"),
    (DATA + b"\0", FrameError, "1 bytes follow"),
    (DATA + DATA, FrameError, "bytes follow"),
    (_set(7, "<B", 1), FrameError, "reserved"),
    (_set(4, "<H", 1), VersionError, "version 1, this side speaks 2"),
    (_set(4, "<H", 256), VersionError, "256"),
    (_set(6, "<B", 0), KindError, "unknown kind of message: 0"),
    (_set(6, "<B", 200), KindError, "unknown kind of message: 200"),
    (_set(32, "<Q", 2**64 - 1), TooLargeError, "announces"),
    (_set(32, "<Q", 2**30), TooLargeError, "announces"),
    (_set(32, "<Q", 2**29), TruncatedError, "are missing"),
    (_set(12, "<I", 0), AddressError, "one client"),
]


@pytest.mark.parametrize(("data", "error", "match"), BAD, ids=range(len(BAD)))
def test_a_bad_fixed_part_is_refused(data: bytes, error: type[WireError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        decode(data)
    assert type(caught.value) is error


def test_a_message_to_everybody_has_no_client() -> None:
    update = encode(messages(4)[3])
    assert decode(update).kind == "update"
    with pytest.raises(AddressError, match="everybody"):
        decode(reseal(update[:12] + b"\1\0\0\0" + update[16:]))


@pytest.mark.parametrize("client", [None, 0, 7])
def test_weights_are_a_clients_or_for_everybody(client: int | None) -> None:
    weights = Weights(3, client, {"w": torch.ones(2)})
    received = decode(encode(weights), "weights", client=client)
    assert same(received, weights)
    assert peek(encode(weights)).client == client
    with pytest.raises(AddressError, match="weights: expected client 5"):
        decode(encode(weights), client=5)


def test_every_flipped_bit_is_found() -> None:
    draw = random.Random(0)
    for message in every_form(4):
        data = encode(message, RUN)
        for _ in range(40):
            bit = draw.randrange(8 * 72, 8 * len(data))
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(ChecksumError):
                decode(bytes(flipped))
    for byte in [*range(8, 32), *range(40, 72)]:  # round, client, run id, digest
        with pytest.raises(ChecksumError):
            decode(DATA[:byte] + bytes([DATA[byte] ^ 16]) + DATA[byte + 1 :])


def test_what_is_not_for_here_is_refused() -> None:
    assert same(decode(DATA, "catch_up_request", run_id=RUN, round=5, client=2), REQUEST)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"run_id": bytes(16)}, "run_id"),
        ({"round": 0}, "round 0, got 5"),
        ({"client": 0}, "got 2"),
    ]
    for expected, match in wrong:
        with pytest.raises(AddressError, match=match):
            decode(DATA, **expected)
    with pytest.raises(KindError, match="expected a message of kind update, got catch_up_request"):
        decode(DATA, "update")


def test_the_limit_bounds_the_frame() -> None:
    message = smashed(5)
    data = encode(message)
    generous = 1 << 20
    assert same(decode(data, limit=generous), message)
    with pytest.raises(TooLargeError, match=f"{len(data)} bytes is over the limit"):
        decode(data, limit=len(data) - 1)
    with pytest.raises(TooLargeError):
        peek(data, limit=len(data) - 1)


@pytest.mark.parametrize(("round", "client"), [(2**32, 0), (0, 2**32 - 1)])
def test_what_the_fixed_part_cannot_hold_is_refused_when_sent(round: int, client: int) -> None:
    with pytest.raises(FieldError, match="32 bits"):
        encode(CatchUpRequest(round, client, 0, ""))
    largest = CatchUpRequest(2**32 - 1, 2**32 - 2, 0, "")
    assert same(decode(encode(largest)), largest)


def test_a_run_id_has_16_bytes() -> None:
    with pytest.raises(FieldError, match="run_id must have 16 bytes, got 3"):
        encode(REQUEST, b"run")
