"""What names a run, and what tells one machine from another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hosfl_lightning.run.identity import digest, hardware, incarnation, manifest, run_id

SETTINGS = {"algorithm": "HOSFL", "seed": 0, "lr": 0.1, "simulation": "batched"}


def tensors() -> dict[str, Tensor]:
    return {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}


def test_manifest_keeps_the_order_that_numbers_the_directions() -> None:
    assert manifest(tensors()) == [["b", [3], "float32"], ["a", [2, 2], "bfloat16"]]


def test_one_run_has_one_id_wherever_it_takes_place() -> None:
    name = run_id(SETTINGS, tensors(), "f")
    assert len(name) == 16
    assert run_id(dict(reversed(SETTINGS.items())), tensors(), "f") == name
    assert run_id(SETTINGS | {"simulation": "per_client"}, tensors(), "f") == name


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"lr": 0.2}, {"algorithm": "Frozen"}, {"codec": {"multiplier": "int8"}}]
)
def test_other_settings_are_another_run(other: dict[str, object]) -> None:
    assert run_id(SETTINGS | other, tensors(), "f") != run_id(SETTINGS, tensors(), "f")


def test_another_backbone_or_other_trained_tensors_are_another_run() -> None:
    name = run_id(SETTINGS, tensors(), "f")
    assert run_id(SETTINGS, tensors(), "g") != name
    assert run_id(SETTINGS, {n: t.float() for n, t in tensors().items()}, "f") != name
    assert run_id(SETTINGS, dict(reversed(tensors().items())), "f") != name
    assert run_id(SETTINGS, {n: t + 1 for n, t in tensors().items()}, "f") == name  # where it starts is no setting


def test_digest_is_that_of_the_bits() -> None:
    start = digest(tensors())
    assert digest(tensors()) == start
    assert digest({n: t + 1 for n, t in tensors().items()}) != start
    assert digest({n: -t if n == "b" else t for n, t in tensors().items()}) != start  # b[0] is −0 then
    # Bits without a shape: a transposed copy is what it is in row-major order.
    square = torch.arange(4.0).view(2, 2)
    assert digest({"a": square.T}) == digest({"a": square.T.contiguous()}) != digest({"a": square})


def test_hardware_names_what_may_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    here = hardware(torch.device("cpu"))
    assert f"torch {torch.__version__}" in here
    assert torch.backends.cpu.get_cpu_capability() in here
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert hardware(torch.device("cpu")) != here
    assert "77 thread(s)" in hardware(torch.device("cpu"))


def test_incarnations_of_a_run_differ_even_on_one_machine() -> None:
    names = {incarnation(number, machine) for number in range(2) for machine in ("here", "there")}
    assert len(names) == 4
    assert incarnation(0, "here").startswith("0-")
