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
    Message,
    Multiplier,
    NonFiniteError,
    ProbedData,
    ProbeRequest,
    ProjectedGradients,
    RoundEnd,
    ShapeError,
    SmashedData,
    Snapshot,
    StepRequest,
    Terms,
    TooLargeError,
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
    held = manifest({"a": z[0].half(), "b.w": z})
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
    ]  # fmt: skip


GOLDEN = {
    "fp32": [
        "ea86e66886490e24",
        "9def862c28ea79dd",
        "061ce0e64241f03e",
        "ef8d9d0be2a18e16",
        "aeb1e31dc201993d",
        "bd3f2306efd5e3a1",
        "2d3826f62056e6a3",
        "ee03fd4fee690df4",
        "c709336a415b2588",
        "3906e351a0cca857",
        "5889830d5c14724a",
        "b4b88901e5f05d55",
        "6c8afb1bb771894a",
        "8be32638054337a2",
        "5eebbcf6c92cd2e3",
        "3ce1e3b2da1948d1",
        "556603b10acebdd7",
    ],
    "bf16": ["455215a8e55aa80a", "c146238567c99db4", "a2f035a1fbf87eed", "381889f7c613828a"],
    "fp16": ["bc51270ad5b8b07e", "5a2fd085a3e3207b", "db96df3d1e356e31", "5e5029437ad34a37"],
    "int8": ["0dd41fcdd72c461f", "dd9e3afa4024505e", "a15151c9ded0fea5", "faf6477bf1cf0be0"],
    "int4": ["eb41c3985c498823", "c35e111b1e2a9ac7", "89feb7f1c7018aba", "128e4c62f3163be7"],
    "ternary": ["a23031b75fa2ce8f", "c21b7723d213f2de", "7b081af52dfd7789", "86c050b93ba2dbb4"],
}
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
    fixed = b"HOSF\1\0\5\0\3\0\0\0\2\0\0\0" + RUN + bytes([8 + len(text)]) + bytes(7)
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
