from __future__ import annotations

import hashlib
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load

from hosfl_lightning.wire import (
    CODECS,
    Acknowledgement,
    Bye,
    CatchUpRequest,
    Coded,
    CodedGradient,
    DtypeError,
    FieldError,
    HeldOutRequest,
    Hello,
    MaskedGradients,
    Message,
    MiddleOutput,
    Multiplier,
    NonFiniteError,
    OutputMultiplier,
    ProbedData,
    ProbeRequest,
    ProjectedGradients,
    RoundEnd,
    SecureKeys,
    SecurePeers,
    SecureShares,
    ShapeError,
    SmashedData,
    Snapshot,
    StepRequest,
    Terms,
    TooLargeError,
    UnlabelledData,
    UnmaskRequest,
    Update,
    Weights,
    check_finite,
    decode,
    encode,
    encoded_size,
    manifest,
)
from tests.rng.conftest import MemoryMeter
from tests.wire.samples import BASIS, CODED, FLOATS, RULE, RUN, SETTINGS, STREAM, every_form, messages, same, smashed


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_round_trip_is_bit_for_bit_and_the_size_is_known_before(dtype: torch.dtype, codec: str) -> None:
    for seed in range(25):
        for message in messages(seed, codec, dtype):
            data = encode(message)
            assert encoded_size(message) == len(data)
            assert same(message, decode(data))
            assert same(message, decode(data, message.kind))


def _fixed(codec: str = "fp32") -> list[Message]:
    """Messages that no library's random numbers enter."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    z = (torch.arange(18).reshape(2, 3, 3) - 7) / 8
    labels, coefficients = torch.tensor([[5, -100, 9], [300, 1, 1]]), torch.tensor([0.5, -2.0])
    held, octets = manifest({"a": z[0].half(), "b.w": z}), torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    return [
        SmashedData.pack(3, 1, z, labels, mask, codec, seed=5),
        Multiplier.pack(3, 1, z / 1024, mask, codec, seed=5),
        ProjectedGradients(3, 1, BASIS, coefficients, 7, 2, 0.375, 6),
        Update(3, BASIS, coefficients, RULE, 4, [0, 1], [0.25, 0.75], 2**-10, "cpu-1"),
        CatchUpRequest(3, 1, 2, "cpu-1", "0f", 4),
        Snapshot(3, 1, 2, "cpu-1", "the log was longer", 4, {"a": coefficients.bfloat16(), "b": z[0], "c": z[1, 1, 1]}),
        Weights(3, 1, {"a": coefficients.half(), "b.w": z[0], "c": z[1, 1, 1]}, 7, 2, RULE, 0.375, 6),
        ProbedData.pack(3, 1, 2, 1, z, mask, codec, seed=5, step=4),
        CodedGradient.pack(3, 1, {"kind": "dense"}, (torch.arange(131) - 64) / 32, 7, codec, seed=5),
        StepRequest(3, 1, 2, 4, RULE),
        ProbeRequest(3, 1, 2, 1, 2),
        RoundEnd(3, [0, 1], 2),
        Terms(3, None, "SplitEndpoint", SETTINGS, 2**64 - 1, held, RULE, BASIS, {"gradient": "int4"}, False,
              "bf16-mixed", "ab"),
        Hello(3, "ann", "0.1", "00ff", ["A"]),
        Bye(3, "over", True, False),
        HeldOutRequest(3, 1, 4, 2),
        Acknowledgement(3, 1, 2, False),
        UnlabelledData.pack(3, 1, z, mask, num_terms=2, codec=codec, seed=5),
        MiddleOutput.pack(3, 1, z, mask, codec=codec, seed=5),
        OutputMultiplier.pack(3, 1, z / 1024, mask, loss=0.375, codec=codec, seed=5, step=4),
        SecureKeys(3, 1, BASIS, octets.flatten(), 7, 2, ""),
        SecurePeers(3, 1, [0, 1], octets, 2, 2),
        SecureShares(3, 1, [0, 2], octets, 2),
        MaskedGradients(3, 1, octets.flatten(), 2),
        UnmaskRequest(3, 1, [0, 2], 2),
    ]  # fmt: skip


GOLDEN = {
    "fp32": [
        "2d3601770fa7bb7f", "8ee5b6fbc59ba03d", "a032ad99af011e6a", "fc8396c8f3df0d39", "1e47e928491eb490",
        "4d4f4ebd87183d9c", "b9e238238c619ded", "ecafa752242bf87c", "4fdc552531ab2ead", "0ef35edccc1750e3",
        "d95141b381f91051", "8ce6ca27ac95f4eb", "6b6163d12aca47ba", "a2cc19d310a99a09", "f5407c23eb0caea5",
        "4eda4b25f8de0d20", "d9b91b4f199f9f5d", "5d4c16ab8a078723", "b328bcd768d2ebda", "343a968e4f68eff4",
        "65518f07ed41f80f", "911a371f864021f1", "e2673dce6898004f", "a1eaeb3b60b11851", "5b299b1e6d276749",
    ],
    "bf16": [
        "7104ecdd25889d73", "b19c3de03f13023b", "7c9bc14e60aa5975", "02add357467a251d", "139b008a0a7c986d",
        "489d15757d317690", "c67c1a6b624558c1",
    ],
    "fp16": [
        "aa598566c455e249", "6ab31b4b9b08c87b", "7616dc004aadc947", "ca4807db01341afc", "048d83e6061b906a",
        "f7f43effbaf918cd", "90fc9e9dc4b82997",
    ],
    "int8": [
        "8601b404f4389eeb", "1715e2a872650cae", "9fa0e997fca3d0bf", "ba14454bd4bb72d0", "95e7f3cbeeebb29a",
        "3d325aab268833dc", "fe7c7b62e64819a0",
    ],
    "int4": [
        "b4e442790f26d75f", "59acdbcc48c8190d", "0d1ced66ca2f2869", "4bffad084dd1db8e", "293003fe0a829d0e",
        "738683ff070568b3", "e4718c7969f0f5d2",
    ],
    "ternary": [
        "be4b1a639ad56ecb", "cd9d9e9cc1d6e89b", "241bbcea357821ff", "bee522383e703fd9", "37135a106fe63709",
        "3efa1a0c2b717fda", "040a3db955b4d7d0",
    ],
}  # fmt: skip
"""First 16 hex digits of the SHA-256 of `_fixed`'s frames; of coded ones beyond fp32. Another is another protocol."""


def _digests(codec: str) -> list[str]:
    frames = [encode(m, RUN) for m in _fixed(codec) if codec == "fp32" or isinstance(m, CODED)]
    return [hashlib.sha256(frame).hexdigest()[:16] for frame in frames]


@pytest.mark.parametrize("codec", CODECS)
def test_the_bytes_of_a_frame_do_not_change(codec: str) -> None:
    assert _digests(codec) == GOLDEN[codec]


def test_a_frame_byte_by_byte() -> None:
    held = b'{\\"digest\\":\\"0f\\",\\"held_out\\":4,\\"incarnation\\":\\"cpu-1\\",\\"version\\":2}'
    values = b'{\\"bits\\":{},\\"fields\\":' + held + b"}"
    text = b'{"__metadata__":{"message":"' + values + b'"}}'
    text += b" " * (-len(text) % 8)
    fixed = b"HOSF\2\0\5\0\3\0\0\0\2\0\0\0" + RUN + bytes([8 + len(text)]) + bytes(7)
    payload = bytes([len(text)]) + bytes(7) + text
    assert encode(_fixed()[4], RUN) == fixed + hashlib.sha256(fixed + payload).digest() + payload


def test_safetensors_reads_the_payload() -> None:
    for message in every_form(4):
        tensors = load(encode(message)[72:])
        if isinstance(message, SmashedData):
            assert same(tensors["z.values"], message.z.values)
            flat = message.mask.reshape(-1).tolist()
            assert len(tensors["mask"]) == -(-len(flat) // 8)
            for index, valid in enumerate(flat):
                assert bool(tensors["mask"][index // 8] & (128 >> index % 8)) is valid
        if isinstance(message, Snapshot | Weights):
            assert same({f"tensors.{name}": t for name, t in message.tensors.items()}, tensors)


def test_padding_does_not_travel() -> None:
    z, labels = torch.ones(2, 8, 100), torch.ones(2, 8, dtype=torch.int64)
    sizes = {}
    for padding in (0, 8, 800):
        message = SmashedData.pack(
            0,
            0,
            torch.nn.functional.pad(z, (0, 0, padding, 0), value=9.0),
            torch.nn.functional.pad(labels, (padding, 0), value=5),
            torch.nn.functional.pad(torch.ones(2, 8, dtype=torch.bool), (padding, 0)),
        )
        multiplier = Multiplier.pack(0, 0, torch.ones(2, 8 + padding, 100), message.mask)
        sizes[padding] = encoded_size(message), encoded_size(multiplier)
    assert sizes[0][1] == sizes[8][1] == sizes[800][1]
    header_slack = 24
    assert 0 <= sizes[8][0] - sizes[0][0] <= 2 * 8 // 8 + header_slack
    assert 2 * 800 // 8 <= sizes[800][0] - sizes[0][0] <= 2 * 800 // 8 + header_slack


@pytest.mark.parametrize("codec", CODECS)
def test_size_reads_no_tensor_and_makes_none(codec: str) -> None:
    real = smashed(5, codec)
    scale = None if real.z.scale is None else real.z.scale.to("meta")
    z = replace(real.z, values=real.z.values.to("meta"), scale=scale)
    meta = replace(real, z=z, labels=real.labels.to("meta"), mask=real.mask.to("meta"))
    with MemoryMeter() as meter:
        assert encoded_size(meta) == encoded_size(real)
    assert meter.peak == 0
    assert encoded_size(real) == len(encode(real))


def test_equal_messages_are_equal_bytes() -> None:
    message = ProjectedGradients(0, 0, {"kind": "shared_directions", "probes": 2}, torch.ones(2), 1)
    assert encode(message) == encode(replace(message, basis={"probes": 2, "kind": "shared_directions"}))


def test_tensors_with_strides_or_a_graph_travel_as_their_values() -> None:
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    sent = Multiplier(0, 0, Coded.of(z.t(), "fp32", STREAM, 1))
    assert not sent.multiplier.values.requires_grad
    received = decode(encode(sent))
    assert isinstance(received, Multiplier)
    assert torch.equal(received.multiplier.restore(), z.detach().t())
    snapshot = decode(encode(Snapshot(0, 0, 0, "", "", 0, {"w": z, "v": z.t()})))
    assert isinstance(snapshot, Snapshot)
    assert same(snapshot.tensors, {"w": z.detach(), "v": z.detach().t()})
    assert not snapshot.tensors["w"].requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_the_receiver(bad: float) -> None:
    z, mask = torch.ones(1, 3, 5), torch.ones(1, 3, dtype=torch.bool)
    z[0, 1, 2] = bad
    sent: list[Message] = [Multiplier.pack(0, 0, z, mask, codec) for codec in CODECS]
    sent += [SmashedData.pack(0, 0, z, torch.ones(1, 3), mask, codec) for codec in CODECS]
    sent += [ProbedData.pack(0, 0, 0, 1, z, mask, codec) for codec in CODECS]
    sent += [CodedGradient.pack(0, 0, BASIS, z.flatten(), 1, codec, 0) for codec in CODECS]
    sent += [Weights(0, None, {"a": torch.ones(1), "b": torch.tensor(bad).to(dtype)}) for dtype in FLOATS[:3]]
    sent += [ProjectedGradients(0, 0, BASIS, torch.tensor([0.0, bad]), 1)]
    sent += [Update(0, BASIS, torch.tensor([bad]), RULE, 0, [], [])]
    sent += [Snapshot(0, 0, 0, "", "", 0, {"a": torch.ones(1), "b": torch.tensor(bad).to(dtype)}) for dtype in FLOATS]
    for message in sent:
        data = encode(message)
        with pytest.raises(NonFiniteError, match=message.kind):
            decode(data)
        with pytest.raises(NonFiniteError, match=message.kind):
            check_finite(message)


def test_a_message_that_is_handed_over_can_be_checked_for_finite_settings() -> None:
    for message in every_form(4):
        check_finite(message)
    bad: list[dict[str, Any]] = [
        {"basis": {"a": [1.0, float("nan")]}},
        {"rule": {"lr": float("inf")}},
        {"mu": float("nan")},
    ]
    for change in bad:
        with pytest.raises(NonFiniteError, match=f"update: {next(iter(change))}"):
            check_finite(replace(Update(0, BASIS, torch.ones(1), RULE, 0, [], []), **change))


def test_the_limit_bounds_what_a_message_unpacks_to() -> None:
    limit = 1 << 16
    one_token = torch.zeros(4, 100, dtype=torch.bool)
    one_token[0, 0] = True
    padded = SmashedData.pack(0, 0, torch.ones(4, 100, 64), torch.ones(4), one_token)
    assert encoded_size(padded) < 1 << 11
    assert padded.unpacked_bytes() == 4 * 100 * (64 * 4 + 8 + 1)
    packed = Multiplier.pack(0, 0, torch.ones(1, 1, 20000), one_token[:1, :1], "int4")
    probed = ProbedData.pack(0, 0, 0, 0, torch.ones(1, 1, 20000), one_token[:1, :1], "int4")
    gradient = CodedGradient.pack(0, 0, BASIS, torch.ones(20000), 1, "int4", 0)
    empty = Multiplier(0, 0, Coded.of(torch.empty(0, 20000), "int8", STREAM, 1))
    for message in (padded, packed, probed, gradient, empty):
        data = encode(message)
        assert same(decode(data, limit=1 << 18), message)
        with pytest.raises(TooLargeError, match="unpack to"):
            decode(data, limit=limit)


@pytest.mark.parametrize(
    "changes",
    [
        {"coefficients": torch.ones(2, dtype=torch.float64)},
        {"basis": {"mu": float("nan")}},
        {"basis": {"mu": float("inf")}},
        {"basis": {"mu": torch.ones(1)}},
        {"basis": {"mu": {"nested": 1}}},
        {"basis": {"mu": 2**63}},
        {"basis": {1: 2}},
        {"round": torch.tensor(1)},
        {"client": True},
        {"num_terms": -1},
        {"num_terms": 2**63},
        {"attempt": -1},
        {"num_examples": 0.5},
        {"loss": 1},
        {"loss": torch.tensor(1.0)},
    ],
)
def test_what_does_not_travel_exactly_is_refused_when_sent(changes: dict[str, Any]) -> None:
    message = replace(ProjectedGradients(0, 0, BASIS, torch.ones(2), 1), **changes)
    with pytest.raises(FieldError, match=next(iter(changes))):
        encode(message)


COUNTS = ("round", "client", "attempt", "step", "probe", "side", "version", "num_terms", "num_examples", "count")


@pytest.mark.parametrize("bad", [-1, 1.0, "1", 2**63])
def test_what_is_counted_is_an_integer_from_zero_on_in_every_message(bad: Any) -> None:
    for message in messages(3):
        for name in [name for name in COUNTS if name in vars(message)]:
            with pytest.raises(FieldError, match=f"^{message.kind}: {name} must be an integer >= 0, got"):
                encode(replace(message, **{name: bad}))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"weights": [0.5]}, FieldError, "2 participants"),
        ({"participants": [1, "2"]}, FieldError, "participants"),
        ({"participants": [1, -2]}, FieldError, "participants"),
        ({"weights": (0.5, 0.5)}, FieldError, "weights"),
        ({"weights": [0.5, 1.5]}, FieldError, "between 0 and 1"),
        ({"weights": [0.5, float("nan")]}, FieldError, "between 0 and 1"),
        ({"mu": 0.0}, FieldError, "mu must be"),
        ({"mu": 1}, FieldError, "mu must be"),
        ({"mu": float("nan")}, FieldError, "mu must be"),
        ({"incarnation": None}, FieldError, "incarnation"),
        ({"attempt": -1}, FieldError, "attempt"),
        ({"coefficients": [1.0]}, FieldError, "must be a tensor"),
        ({"coefficients": torch.ones(1).double()}, DtypeError, "float32"),
        ({"coefficients": torch.ones(1, 1)}, ShapeError, "1 dimensions"),
    ],
)
def test_an_update_is_checked_when_sent(changes: dict[str, Any], error: type[FieldError], match: str) -> None:
    update = Update(0, BASIS, torch.ones(1), RULE, 0, [1, 2], [0.5, 0.5])
    assert encode(update)
    with pytest.raises(error, match=match):
        encode(replace(update, **changes))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"labels_per_token": 1}, FieldError, "labels_per_token"),
        ({"attempt": -1}, FieldError, "attempt"),
        ({"step": None}, FieldError, "step"),
        ({"labels": torch.ones(3, dtype=torch.int64)}, DtypeError, "labels"),
        ({"labels": torch.ones(2, dtype=torch.int8)}, ShapeError, "expected 3 labels"),
        ({"mask": torch.ones(3, 1)}, DtypeError, "mask"),
        ({"mask": torch.ones(4, 1, dtype=torch.bool)}, ShapeError, "3 rows, the mask 4"),
        ({"z.codec": "zip"}, FieldError, "z.codec must be one of fp32"),
        ({"z.codec": ["fp32"]}, FieldError, "z.codec"),
        ({"z.dtype": "int8"}, DtypeError, "z.dtype must be one of"),
        ({"z.width": 0, "z.values": torch.ones(3, 0, dtype=torch.uint8)}, ShapeError, "columns"),
        ({"z.width": 3}, ShapeError, "must have 2 > 0 columns"),
        ({"z.values": torch.ones(3, 3)}, DtypeError, "z.values"),
        ({"z.scale": None}, FieldError, "z.scale must be a tensor"),
        ({"z.scale": torch.ones(3)}, DtypeError, "z.scale"),
        ({"z.scale": torch.ones(1).bfloat16()}, ShapeError, "3 scales"),
        ({"z.codec": "fp32", "z.values": torch.ones(3, 5)}, FieldError, "fp32 knows none"),
    ],
)
def test_smashed_data_is_checked_when_sent(changes: dict[str, Any], error: type[FieldError], match: str) -> None:
    mask = torch.ones(3, 1, dtype=torch.bool)
    message = SmashedData.pack(0, 0, torch.ones(3, 1, 5), torch.ones(3, 1), mask, "int4")
    assert encode(message)
    of_z = {name[2:]: value for name, value in changes.items() if name.startswith("z.")}
    others = {name: value for name, value in changes.items() if not name.startswith("z.")}
    with pytest.raises(error, match=match):
        encode(replace(message, z=replace(message.z, **of_z), **others))


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (CatchUpRequest(0, 0, -1, ""), "version"),
        (CatchUpRequest(0, 0, 0, 3), "incarnation"),  # type: ignore[arg-type]
        (Snapshot(0, 0, 0, "", "", 0, [torch.ones(1)]), "tensors"),  # type: ignore[arg-type]
        (Snapshot(0, 0, 0, "", "", 0, {1: torch.ones(1)}), "tensors"),  # type: ignore[dict-item]
        (Snapshot(0, 0, 0, "", "", 0, {"w": 1.0}), "tensors.w must be a tensor"),  # type: ignore[dict-item]
        (Snapshot(0, 0, 0, "", "", 0, {"w": torch.ones(1).int()}), "tensors.w"),
        (Snapshot(0, 0, 0, "", 1, 0, {}), "reason"),  # type: ignore[arg-type]
    ],
)
def test_what_catches_up_is_checked_when_sent(message: Message, match: str) -> None:
    with pytest.raises(FieldError, match=match):
        encode(message)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"client": -1}, FieldError, "client must be"),
        ({"num_terms": -1}, FieldError, "num_terms"),
        ({"num_terms": 1.0}, FieldError, "num_terms"),
        ({"attempt": -1}, FieldError, "attempt"),
        ({"num_examples": None}, FieldError, "num_examples"),
        ({"loss": 1}, FieldError, "loss must be a float or None"),
        ({"rule": {"lr": torch.ones(1)}}, FieldError, r"rule\.lr must be"),
        ({"rule": None}, FieldError, "rule must be a dict"),
        ({"tensors": [torch.ones(1)]}, FieldError, "tensors must be a dict from names"),
        ({"tensors": {1: torch.ones(1)}}, FieldError, "tensors must be a dict from names"),
        ({"tensors": {"w": 1.0}}, FieldError, r"tensors\.w must be a tensor"),
        ({"tensors": {"w": torch.ones(1).int()}}, DtypeError, r"tensors\.w must be"),
        ({"tensors": {"w": torch.ones(1).double()}}, DtypeError, r"tensors\.w must be"),
    ],
)
def test_weights_are_checked_when_sent(changes: dict[str, Any], error: type[FieldError], match: str) -> None:
    with pytest.raises(error, match=f"weights: {match}"):
        encode(replace(Weights(0, 3, {"w": torch.ones(1)}, 2), **changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"client": -1}, "client must be"),
        ({"probe": -1}, "probe must be"),
        ({"probe": 4096}, "probe must be below 4096"),
        ({"probe": True}, "probe must be"),
        ({"side": 2}, "side must be 0 "),
        ({"side": -1}, "side must be"),
        ({"attempt": -1}, "attempt must be"),
        ({"z": Coded("zip", "float32", 1, torch.ones(1, 1))}, "z.codec"),
    ],
)
def test_probed_data_are_checked_when_sent_and_when_packed(changes: dict[str, Any], match: str) -> None:
    z, mask = torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(FieldError, match=f"probed_data: {match}"):
        encode(replace(ProbedData.pack(0, 0, 4095, 1, z, mask), **changes))
    if changes.keys() & {"probe", "side"}:
        with pytest.raises(FieldError, match=f"probed_data: {match}"):
            ProbedData.pack(0, 0, changes.get("probe", 0), changes.get("side", 0), z, mask)


def test_a_frame_costs_one_copy_of_its_buffers_to_read() -> None:
    size = 1 << 20
    data = encode(Snapshot(0, 0, 0, "", "", 0, {"w": torch.ones(size // 4)}))
    tracemalloc.start()
    message = decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message.kind == "snapshot"
    assert size < peak < 1.1 * size
