"""What the server asks beyond its answers, and the terms on which a client joins."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import nn

from hosfl_lightning.wire import (
    Acknowledgement,
    AddressError,
    Bye,
    DuplicateKeyError,
    FieldError,
    HeldOutRequest,
    Hello,
    Message,
    NonFiniteError,
    ProbeRequest,
    RoundEnd,
    StepRequest,
    Terms,
    WireError,
    check_finite,
    decode,
    encode,
    manifest,
)
from tests.wire.samples import BASIS, RULE, RUN, SETTINGS, frame, same

STEP = StepRequest(5, 2, 3, 4, RULE)
PROBE = ProbeRequest(5, 2, 4095, 1, 3)
END = RoundEnd(5, [0, 2, 7], 3)
MANIFEST: list[list[Any]] = [["a.weight", [2, 3], "float32"], ["b", [], "bfloat16"]]
TERMS = Terms(
    5, 2, "SplitEndpoint", SETTINGS, 2**64 - 1, MANIFEST, RULE, BASIS, {"smashed_data": "int8", "gradient": "ternary"},
    False, "bf16-mixed", "ab12", "hosfl-rules/2", {"level": "example", "clip": 0.5}, True,
)  # fmt: skip
HELLO = Hello(5, "ann", "0.1", "00ff", ["SplitEndpoint"])
BYE = Bye(5, "over", False, True)
HELD_OUT = HeldOutRequest(5, 2, 7, 3)
MOVED = Acknowledgement(5, 2, 3, False)
ALL: list[Message] = [STEP, PROBE, END, TERMS, HELLO, BYE, HELD_OUT, MOVED]
KINDS = {"step_request": 10, "probe_request": 11, "round_end": 12, "terms": 13, "hello": 14, "bye": 15,
         "held_out_request": 16, "acknowledgement": 17}  # fmt: skip
"""With the number of each in a frame."""


def _plain(message: Message, **changes: Any) -> dict[str, Any]:
    """The plain values of a frame, with some changed or, where given as ``...``, dropped."""
    values = {name: value for name, value in vars(message).items() if name not in ("round", "client")} | changes
    return {"fields": {name: value for name, value in values.items() if value is not ...}, "bits": {}}


def _received(message: Message, tensors: Any = None, **changes: Any) -> Message:
    receiver = 0 if isinstance(message, RoundEnd | Hello | Bye) else 3
    return decode(frame(_plain(message, **changes), tensors or {}, kind=KINDS[message.kind], round=5, client=receiver))


@pytest.mark.parametrize("message", ALL, ids=KINDS)
def test_every_field_arrives(message: Message) -> None:
    """Also those that have a default: none of them has it here."""
    received = decode(encode(message, RUN), message.kind, run_id=RUN, round=5, client=getattr(message, "client", None))
    assert type(received) is type(message)
    for field in fields(message):
        sent = getattr(message, field.name)
        assert same(getattr(received, field.name), sent)
        assert sent != field.default


def test_what_is_optional_is_a_first_attempt_of_a_first_step_without_a_rule() -> None:
    assert same(decode(encode(StepRequest(5, 2))), StepRequest(5, 2, 0, 0, {}))
    assert same(decode(encode(ProbeRequest(5, 2, 1, 0))), ProbeRequest(5, 2, 1, 0, 0))
    assert same(decode(encode(RoundEnd(5, []))), RoundEnd(5, [], 0))


def test_who_it_is_for() -> None:
    """A request for one client, the end of a round for everybody, terms for either."""
    assert same(decode(encode(replace(TERMS, client=None))), replace(TERMS, client=None))
    for message in (STEP, PROBE):
        with pytest.raises(AddressError, match=f"{message.kind}: expected client 7, got 2"):
            decode(encode(message), client=7)
        with pytest.raises(FieldError, match=f"{message.kind}: client must be"):
            encode(replace(message, client=None))  # type: ignore[arg-type]
        with pytest.raises(AddressError, match=f"{message.kind}: it is from or to one client"):
            decode(frame(_plain(message), {}, kind=KINDS[message.kind], client=0))
    with pytest.raises(AddressError, match="round_end: it is for everybody"):
        decode(frame(_plain(END), {}, kind=KINDS["round_end"], client=3))


PLAIN = ("settings", "rule", "basis", "codecs")
NO_DICT: list[Any] = [None, [], "a"]
BAD: list[tuple[Message, str, Any, str]] = [
    *((message, "round", value, "an integer >= 0") for message in ALL for value in (-1, 1.0, None, True, 2**63)),
    *((message, "client", value, "an integer >= 0") for message in (STEP, PROBE, TERMS) for value in (-1, "2", True)),
    *((message, "attempt", value, "an integer >= 0") for message in (STEP, PROBE, END, MOVED)
      for value in (-1, None, 2**63)),
    *((MOVED, "moved", value, "a bool") for value in (None, 1, "yes")),
    *((STEP, "step", value, "an integer >= 0") for value in (-1, 0.0, None)),
    (STEP, "rule", None, "a dict with string keys"),
    (STEP, "rule", {1: 2}, "a dict with string keys"),
    (STEP, "rule", {"lr": {"a": 1}}, "a plain value"),
    (STEP, "rule", {"lr": float("nan")}, "a plain value"),
    (STEP, "rule", {"lr": torch.ones(1)}, "a plain value"),
    *((PROBE, "probe", value, "an integer >= 0") for value in (-1, True, None)),
    (PROBE, "probe", 4096, "below 4096, got 4096"),
    *((PROBE, "side", value, "an integer >= 0") for value in (-1, 1.0)),
    (PROBE, "side", 2, "0 .* or 1 .*, got 2"),
    *((END, "counted", value, "a list") for value in [None, (0, 2), {"0": 1}, "02"]),
    *((END, "counted", [0, value], "an integer >= 0") for value in (-1, None, "2", 1.0)),
    *((HELLO, "endpoints", value, "a list") for value in (None, "SplitEndpoint", {"a": 1})),
    *((HELLO, name, value, "a string") for name in ("name", "package", "session") for value in (None, 3)),
    (HELLO, "endpoints", [3], "a string"),
    (BYE, "reason", None, "a string"),
    *((HELD_OUT, "step", value, "an integer >= 0") for value in (-1, True, None)),
    *((TERMS, name, value, "a string") for name in ("precision", "backbone") for value in (None, 3)),
    *((TERMS, name, value, "true or false") for name in ("keeps", "secure_aggregation") for value in (None, 1, "yes")),
    *((TERMS, "endpoint", value, "a string") for value in (None, 3, ["SplitEndpoint"])),
    *((TERMS, name, value, "a dict") for name in PLAIN for value in NO_DICT),
    *((TERMS, name, {"a": [[1]]}, "a plain") for name in PLAIN),
    *((TERMS, "seed", value, "an integer of 64 bits") for value in (-1, 2**64, 1.0, None, True)),
    *(
        (TERMS, "manifest", value, r"a list of \[name, shape, dtype\]")
        for value in (
            None, {"a": 1}, [["a", [2]]], [["a", [2], "float32", 1]], [[1, [2], "float32"]], [["a", 2, "float32"]],
            [["a", [-2], "float32"]], [["a", [2.0], "float32"]], [["a", [True], "float32"]], [["a", [2], 32]],
            [*MANIFEST, "a"],
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("message", "name", "value", "wanted"), BAD, ids=range(len(BAD)))
def test_a_bad_field_is_refused_by_name_when_sent(message: Message, name: str, value: Any, wanted: str) -> None:
    with pytest.raises(FieldError, match=rf"^{message.kind}: {name}(\.\w+)? must be {wanted}"):
        encode(replace(message, **{name: value}))


@pytest.mark.parametrize("message", ALL, ids=KINDS)
def test_a_missing_or_unexpected_field_is_refused_by_name_when_received(message: Message) -> None:
    assert same(_received(message), message)
    for name in vars(message).keys() - {"round", "client"}:
        with pytest.raises(FieldError, match=f"{message.kind}: missing or unexpected fields: {name}"):
            _received(message, **{name: ...})
    with pytest.raises(FieldError, match=f"{message.kind}: missing or unexpected fields: secret"):
        _received(message, secret=1)
    with pytest.raises(FieldError, match=f"{message.kind}: missing or unexpected fields: weights"):
        _received(message, {"weights": torch.ones(2)})
    with pytest.raises(DuplicateKeyError, match=f"{message.kind}: round and client are in the envelope"):
        _received(message, round=5)


@pytest.mark.parametrize(
    ("message", "name", "value", "error"),
    [
        (STEP, "attempt", -1, FieldError),
        (STEP, "step", "0", FieldError),
        (STEP, "rule", {"lr": {"a": 1}}, FieldError),
        (STEP, "rule", {"lr": float("nan")}, NonFiniteError),
        (PROBE, "probe", 4096, FieldError),
        (PROBE, "side", 2, FieldError),
        (END, "counted", {"0": 1}, FieldError),
        (END, "counted", [[0]], FieldError),
        (TERMS, "seed", 2**64, FieldError),
        (TERMS, "settings", {"mu": float("inf")}, NonFiniteError),
        (TERMS, "manifest", [["a", [float("nan")], "float32"]], NonFiniteError),
        (TERMS, "manifest", [["a", [[]], "float32"]], FieldError),
    ],
)
def test_a_bad_field_is_refused_by_name_when_received(
    message: Message, name: str, value: Any, error: type[WireError]
) -> None:
    with pytest.raises(error, match=f"^{message.kind}: {name}"):
        _received(message, **{name: value})


@pytest.mark.parametrize("name", PLAIN)
def test_settings_hold_no_tensors(name: str) -> None:
    for message in ALL:
        if hasattr(message, name):
            with pytest.raises(FieldError, match=rf"^{message.kind}: {name}\.a must be a plain value"):
                _received(message, {f"{name}.a": torch.ones(1)})


def test_what_is_handed_over_is_looked_through_for_what_is_not_finite() -> None:
    for message in ALL:
        check_finite(message)
    with pytest.raises(NonFiniteError, match="step_request: rule"):
        check_finite(replace(STEP, rule={"lr": float("nan")}))
    with pytest.raises(NonFiniteError, match="terms: settings"):
        check_finite(replace(TERMS, settings={"mu": [1.0, float("inf")]}))


def test_the_manifest_lists_what_is_trained_in_its_order() -> None:
    trained = {"b": nn.Parameter(torch.ones(2, 3)), "a": nn.Parameter(torch.tensor(1.0).bfloat16())}
    assert manifest(trained) == [["b", [2, 3], "float32"], ["a", [], "bfloat16"]]
    received = decode(encode(replace(TERMS, manifest=manifest(trained))))
    assert isinstance(received, Terms)
    assert received.manifest == manifest(trained)
    assert received.manifest != manifest(dict(reversed(trained.items())))
