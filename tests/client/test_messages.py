"""Messages with arrays of numpy beside those with tensors of PyTorch: the same frames, the same refusals."""

from __future__ import annotations

import random
from dataclasses import fields, is_dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hosfl_client import messages as ours  # noqa: E402
from hosfl_client import wire  # noqa: E402
from hosfl_client.arrays import ARRAYS  # noqa: E402
from hosfl_client.bfloat16 import BFLOAT16  # noqa: E402
from hosfl_lightning import wire as theirs  # noqa: E402
from tests.wire.samples import BASIS, CODED, FLOATS, RUN, every_form, frame, messages, reseal, same  # noqa: E402
from tests.wire.test_fuzz import MUTATIONS, mended  # noqa: E402

LIMIT = 1 << 20
MASKS = {
    "no padding": torch.ones(3, 4, dtype=torch.bool),
    "left": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]).bool(),
    "right, and one is empty": torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool(),
}


def of_torch(x: torch.Tensor) -> Any:
    """The same bits in numpy."""
    return x.view(torch.int16).numpy().view(BFLOAT16) if x.dtype == torch.bfloat16 else x.numpy()


def z(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outcome(side: Any, data: bytes, limit: int = LIMIT) -> tuple[str, str]:
    """What comes of a frame: the bytes of its message, or the class and the words of its refusal."""
    try:
        return "decoded", side.encode(side.decode(data, limit=limit), data[16:32]).hex()
    except wire.WireError as error:
        return type(error).__name__, str(error).replace("torch.", "")


def agree(data: bytes, limit: int = LIMIT) -> str:
    results = [outcome(side, data, limit) for side in (ours, theirs)]
    if "codec must be one of" in results[0][1]:  # PyTorch's may be more
        results = [(name, "") for name, _ in results]
    assert results[0] == results[1]
    return results[0][0]


def test_the_kinds_and_their_numbers() -> None:
    assert wire.KINDS == tuple(ours.MESSAGES) == tuple(theirs.MESSAGES)


def test_the_messages_have_the_same_fields() -> None:
    for kind, cls in ours.MESSAGES.items():
        assert [field.name for field in fields(cls)] == [field.name for field in fields(theirs.MESSAGES[kind])]


@pytest.mark.parametrize("codec", theirs.CODECS)
def test_a_frame_of_one_is_read_and_written_by_the_other(codec: str) -> None:
    for seed, dtype in product(range(4), FLOATS):
        for message in messages(seed, codec, dtype):
            if codec != "fp32" and not isinstance(message, CODED):
                continue
            data = theirs.encode(message, RUN)
            read = ours.decode(data, message.kind, run_id=RUN)
            ours.check_finite(read)
            assert type(read) is ours.MESSAGES[message.kind]
            assert ours.encode(read, RUN) == data
            assert ours.encoded_size(read) == len(data)
            assert same(theirs.decode(ours.encode(read, RUN)), message)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("codec", theirs.TOKEN_CODECS)
def test_what_is_packed_is_the_same_and_comes_back_the_same(codec: str, mask: torch.Tensor) -> None:
    per_token = torch.arange(12).view(3, 4) * 7919 - 100
    step = {"seed": 2**63 + 5, "step": 4095, "attempt": 2}
    for dtype, labels in product(FLOATS, (per_token, per_token[:, 0] % 100)):
        given = of_torch(z(dtype)), of_torch(mask)
        sent = theirs.SmashedData.pack(7, 3, z(dtype), labels, mask, codec, **step)
        made = ours.SmashedData.pack(7, 3, given[0], labels.numpy(), given[1], codec, **step)
        assert ours.encode(made) == theirs.encode(sent)
        restored = [side.decode(theirs.encode(sent)).unpack() for side in (ours, theirs)]
        assert all(left.tobytes() == of_torch(right).tobytes() for left, right in zip(*restored, strict=True))
        assert ours.encode(made.with_z(made.z)) == theirs.encode(sent)

        answer = theirs.Multiplier.pack(7, 3, z(dtype), mask, codec, **step)
        assert ours.encode(ours.Multiplier.pack(7, 3, *given, codec, **step)) == theirs.encode(answer)
        known = ours.decode(theirs.encode(answer)).unpack(given[1])
        assert known.tobytes() == of_torch(answer.unpack(mask)).tobytes()
        assert known.shape == (3, 4, 5)

        probed = theirs.ProbedData.pack(7, 3, 4095, 1, z(dtype), mask, codec, **step)
        assert ours.encode(ours.ProbedData.pack(7, 3, 4095, 1, *given, codec, **step)) == theirs.encode(probed)
        assert ours.decode(theirs.encode(probed)).unpack(given[1]).tobytes() == of_torch(probed.unpack(mask)).tobytes()


@pytest.mark.parametrize("codec", theirs.CODECS)
def test_a_gradient_is_packed_the_same_and_comes_back_the_same(codec: str) -> None:
    for count in (0, 1, 128, 300):
        x = torch.randn(count, generator=torch.Generator().manual_seed(count))
        sent = theirs.CodedGradient.pack(7, 3, BASIS, x, 5, codec, 11, attempt=1)
        made = ours.CodedGradient.pack(7, 3, BASIS, x.numpy(), 5, codec, 11, attempt=1)
        assert ours.encode(made) == theirs.encode(sent)
        assert ours.decode(theirs.encode(sent)).unpack().tobytes() == sent.unpack().numpy().tobytes()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_what_is_packed_without_labels_is_the_same(mask: torch.Tensor) -> None:
    x, at = z(), {"seed": 11, "step": 5, "attempt": 1, "codec": "int8"}
    terms = {"num_terms": int(mask.sum()) // 2}
    others = {"UnlabelledData": terms, "MiddleOutput": {}, "OutputMultiplier": {"loss": 0.5}}
    for name, own in others.items():
        sent = getattr(theirs, name).pack(7, 3, x, mask, **own, **at)
        made = getattr(ours, name).pack(7, 3, x.numpy(), mask.numpy(), **own, **at)
        assert ours.encode(made) == theirs.encode(sent)
        back = ours.decode(theirs.encode(sent)).unpack(mask.numpy())
        assert back.tobytes() == sent.unpack(mask).numpy().tobytes()
        assert (back[~mask.numpy()] == 0).all()


def test_more_loss_terms_than_valid_tokens_are_refused() -> None:
    for side, x, mask in ((ours, z().numpy(), np.ones((3, 4), bool)), (theirs, z(), torch.ones(3, 4).bool())):
        with pytest.raises(wire.FieldError, match="num_terms is 13, of 12 valid tokens"):
            side.encode(side.UnlabelledData.pack(0, 0, x, mask, num_terms=13))


def test_what_is_unpacked_is_the_receivers_own() -> None:
    x = of_torch(z())
    message = ours.Multiplier.pack(0, 0, x, np.ones((3, 4), bool))
    message.unpack(np.ones((3, 4), bool))[:] = 9
    assert message.multiplier.values.tobytes() == z().numpy().tobytes()


def test_a_manifest_is_the_same() -> None:
    tensors = {f"a.{i}": torch.ones(i, 2, dtype=dtype) for i, dtype in enumerate(FLOATS)}
    words = ["float32", "bfloat16", "float16", "float64"]
    expected = [[f"a.{i}", [i, 2], word] for i, word in enumerate(words)]
    assert theirs.manifest(tensors) == expected
    assert ARRAYS.manifest({name: of_torch(x) for name, x in tensors.items()}) == expected


def test_damaged_frames_are_refused_alike() -> None:
    draw = random.Random(1)
    frames = [theirs.encode(message, RUN) for seed in (0, 3, 5) for message in every_form(seed)]
    outcomes = set()
    for trial in range(3000):
        mutant = bytearray(draw.choice(frames))
        draw.choice(MUTATIONS)(draw, mutant, draw.choice(frames))
        outcomes.add(agree(mended(draw, bytes(mutant)) if trial % 4 else bytes(mutant)))
    assert {"decoded", "ChecksumError", "DtypeError", "FieldError", "FrameError", "NonFiniteError", "ShapeError",
            "TooLargeError", "TruncatedError"} <= outcomes  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_refused_alike(bad: float) -> None:
    x, mask = z(), MASKS["left"]
    x[1, 2, 3] = bad
    for codec, dtype in product(theirs.CODECS, FLOATS):
        sent = [theirs.Multiplier.pack(0, 0, x.to(dtype), mask, codec)]
        sent += [theirs.CodedGradient.pack(0, 0, BASIS, x.flatten(), 1, codec, 0)]
        sent += [theirs.Snapshot(0, 0, 0, "", "", 0, {"w": x.to(dtype)})]
        for message in sent:
            assert agree(theirs.encode(message)) == "NonFiniteError"
        with pytest.raises(wire.NonFiniteError, match=r"multiplier: multiplier\.\w+ has \d+ values"):
            ours.check_finite(ours.Multiplier.pack(0, 0, of_torch(x.to(dtype)), of_torch(mask), codec))


def test_frames_made_by_hand_are_refused_alike() -> None:
    plain = {"basis": {}, "num_terms": 3, "attempt": 0, "loss": None, "num_examples": 0}
    whole = theirs.encode(every_form(4)[0], RUN)
    longer = reseal(whole[:32] + (len(whole) - 71).to_bytes(8, "little") + whole[40:] + b"x")
    cases = {
        "unknown field": frame({"fields": plain | {"seed": 1}, "bits": {}}),
        "missing field": frame({"fields": {}, "bits": {}}),
        "wrong dtype": frame({"fields": plain, "bits": {}}, {"coefficients": torch.ones(2).double()}),
        "wrong shape": frame({"fields": plain, "bits": {}}, {"coefficients": torch.ones(1, 2)}),
        "does not travel": frame({"fields": plain, "bits": {}}, {"coefficients": torch.ones(2).long()}),
        "another tensor": frame({"fields": plain, "bits": {}}, {"coefficients": torch.ones(2), "w": torch.ones(1)}),
        "bits": frame({"fields": plain, "bits": {"coefficients": [16]}}, {"coefficients": torch.ones(2)}),
        "no bits": frame({"fields": plain, "bits": {"mask": [16]}}),
        "truncated": whole[:-1],
        "flipped": whole[:200] + bytes([whole[200] ^ 4]) + whole[201:],
        "longer": longer,
        "another version": reseal(whole[:4] + b"\1" + whole[5:]),
        "another kind": reseal(whole[:6] + b"\xc8" + whole[7:]),
    }
    refused = {name: agree(data) for name, data in cases.items()}
    assert refused == {
        "unknown field": "FieldError", "missing field": "FieldError", "wrong dtype": "DtypeError",
        "wrong shape": "ShapeError", "does not travel": "DtypeError", "another tensor": "FieldError",
        "bits": "ShapeError", "no bits": "FieldError", "truncated": "TruncatedError", "flipped": "ChecksumError",
        "longer": "FrameError", "another version": "VersionError", "another kind": "KindError",
    }  # fmt: skip


def test_a_message_that_unpacks_to_more_than_the_limit_is_refused_alike() -> None:
    one_token = torch.zeros(4, 100, dtype=torch.bool)
    one_token[0, 0] = True
    packed = theirs.Multiplier.pack(0, 0, torch.ones(1, 1, 20000), one_token[:1, :1], "int4")
    padded = theirs.SmashedData.pack(0, 0, torch.ones(4, 100, 64), torch.ones(4), one_token)
    for message in (packed, padded):
        data = theirs.encode(message)
        assert [agree(data, limit) for limit in (1 << 18, 1 << 16, 1 << 10)] == ["decoded", *2 * ["TooLargeError"]]


def test_a_side_refuses_the_kinds_that_it_does_not_know() -> None:
    frames = wire.Frames(ARRAYS, {"hello": wire.Hello})
    hello = wire.Hello(0, "ann", "0.1", "00ff", [])
    assert frames.encode(frames.decode(frames.encode(hello))) == frames.encode(hello)
    with pytest.raises(wire.KindError, match="bye: this side knows no such message"):
        frames.decode(ours.encode(wire.Bye(0, "")))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"mask": np.ones((3, 4))}, wire.DtypeError, "the mask must be bool"),
        ({"mask": np.ones((4, 3), bool)}, wire.ShapeError, r"must be \(B, S, h\)"),
        ({"labels": np.ones((3, 3), np.int64)}, wire.ShapeError, "labels must be"),
        ({"labels": np.full(3, 2**31)}, wire.FieldError, "beyond 32 bits"),
        ({"z": np.ones((3, 4, 5), np.int32)}, wire.DtypeError, "got int32"),
        ({"codec": "zip"}, wire.FieldError, "codec must be one of fp32"),
        ({"step": 4096}, wire.FieldError, "step must be in 0 .. 4095"),
    ],
)
def test_what_cannot_be_packed(changes: dict[str, Any], error: type[wire.WireError], match: str) -> None:
    given = {"z": of_torch(z()), "labels": np.ones(3, np.int64), "mask": np.ones((3, 4), bool)}
    assert ours.encode(ours.SmashedData.pack(0, 0, **given))
    with pytest.raises(error, match=match):
        ours.SmashedData.pack(0, 0, **{**given, **changes})


def test_what_is_no_array_of_this_engine_is_refused_when_sent() -> None:
    update = ours.ProjectedGradients(0, 0, BASIS, np.ones(2, np.float32), 1)
    assert ours.encode(update)
    for bad, error in (
        (torch.ones(2), wire.FieldError), ([1.0, 2.0], wire.FieldError), (np.float32(1), wire.FieldError),
        (np.ones(2), wire.DtypeError), (np.ones(2, np.complex64), wire.DtypeError),
        (np.ones(2, ">f4"), wire.DtypeError), (np.ones((1, 2), np.float32), wire.ShapeError),
    ):  # fmt: skip
        with pytest.raises(error, match="projected_gradients: coefficients must") as refused:
            ours.encode(replace(update, coefficients=bad))
        assert refused.type is error
    with pytest.raises(wire.DtypeError, match=r"tensors\.w must be float32 or bfloat16 .* got int64"):
        ours.encode(ours.Snapshot(0, 0, 0, "", "", 0, {"w": np.ones(1, np.int64)}))


def test_arrays_with_strides_travel_as_their_values() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    narrow = np.zeros((3, 2), BFLOAT16)
    narrow["bfloat16"] = np.arange(6).reshape(3, 2)
    state = {"a": x.T, "b": x[:, ::2], "c": x[1, 1, ...], "d": narrow.T, "e": x[:0]}
    read = ours.decode(ours.encode(ours.Snapshot(0, 0, 0, "", "", 0, state)))
    for name, value in state.items():
        assert (read.tensors[name].shape, read.tensors[name].dtype) == (value.shape, value.dtype)
        assert read.tensors[name].tobytes() == value.tobytes()


def test_a_coded_tensor_is_the_one_dataclass_in_a_message() -> None:
    for message in every_form(1):
        held = [value for value in vars(message).values() if is_dataclass(value)]
        assert all(type(value) is theirs.Coded for value in held)
        assert bool(held) == isinstance(message, CODED)
