"""The update rules against those of a client without PyTorch: the same bits, and golden vectors of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from hosfl_client.basis_of import basis_of
from hosfl_client.bfloat16 import DTYPES, cast, widen
from hosfl_client.optimizer import Optimizer
from hosfl_client.rules import rule_of as numpy_rule
from hosfl_lightning.optim import SGD, AdamW, SharedDirections, UpdateRule, ZerothOrder, rule_of
from hosfl_lightning.rng import direction

Floats = npt.NDArray[np.float32]
STEPS = 30
RULES = {
    "sgd": SGD(lr=0.03), "sgd, decay": SGD(lr=0.03, weight_decay=0.01),
    "momentum": SGD(lr=0.03, momentum=0.9, weight_decay=0.01), "adamw": AdamW(lr=0.01),
    "adamw, betas": AdamW(lr=0.003, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1),
}  # fmt: skip
GOLDEN = Path(__file__).parent / "golden_rules.json"
DIGEST = "593bb9a8b71eb7d2c6ce5a848fcde907528269a2fa3114f1d19096a31e1779bb"
f32 = np.float32


def schedule(rule: dict[str, Any], step: int) -> float:
    """Of a record, which carries its round's rate."""
    return rule["lr"] / (1 + step)


def moved_by_numpy(
    rule: dict[str, Any], start: list[Floats], bases: list[Any], scalars: Any, dtype: torch.dtype = torch.float32
) -> list[Floats]:
    """What a client without PyTorch does with the records."""
    form = DTYPES[str(dtype).removeprefix("torch.")]
    theta = [cast(values, np.empty(values.shape, form)) for values in start]
    optimizer = Optimizer(theta, numpy_rule(rule), seed=7)
    for step, (basis, values) in enumerate(zip(bases, scalars)):
        optimizer.prescribe({**rule, "lr": schedule(rule, step)}, "a record")
        optimizer.step(basis_of(basis.describe(), 7, step, optimizer.sizes), np.asarray(values, f32))
    return [widen(values) for values in theta]


@pytest.mark.parametrize(
    ("distribution", "dtype", "sizes"),
    [
        ("rademacher", torch.float32, [499_999, 3]), ("gauss16", torch.float32, [20_001]),
        ("rademacher", torch.bfloat16, [20_001]), ("gauss16", torch.float16, [20_001]),
    ],
)  # fmt: skip
def test_numpy_ends_with_the_same_bits_after_thirty_steps(
    distribution: str, dtype: torch.dtype, sizes: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    scalars = torch.randn(STEPS, 2, generator=generator).bfloat16().float()  # that a direction takes as they are
    bases = [SharedDirections(7, step, 2, distribution) for step in range(STEPS)]
    begun = [p.float().numpy() for p in start]
    for name, rule in RULES.items():
        described = {"name": type(rule).__name__, **rule.hyper_parameters()}
        ours = [nn.Parameter(p.clone()) for p in start]
        optimizer = ZerothOrder(ours, rule)
        for step, basis in enumerate(bases):
            optimizer.param_groups[0]["lr"] = schedule(described, step)
            optimizer.record(scalars[step] * 2, basis)  # the mean over two probes
            optimizer.step()
        wanted = np.concatenate(moved_by_numpy(described, begun, bases, (scalars * 2).numpy(), dtype))
        found = torch.cat([p.detach().float() for p in ours]).numpy()
        assert int((found.view(np.uint32) != wanted.view(np.uint32)).sum()) == 0, name


def golden(rule: UpdateRule) -> dict[str, Any]:
    """A case: 256 gauss16 elements, two of them denormal and one zero, moved by five records of two probes."""
    start = direction(SharedDirections(1, 0, 1, "gauss16").streams[0], 0, 0, 256).numpy().copy()
    start[:3] = [1e-40, -3e-41, 0.0]
    scalars = [[0.75, -1.5], [1.25, 0.0], [-0.0625, 2.0], [1e-20, 1e-21], [-3.0, 0.5]]
    described = {"name": type(rule).__name__, **rule.hyper_parameters()}
    (end,) = moved_by_numpy(described, [start], [SharedDirections(7, k, 2) for k in range(5)], scalars)
    return {
        "rule": described, "start": start.tobytes().hex(), "seed": 7, "distribution": "rademacher",
        "records": [{"coefficients": values, "lr": schedule(described, k)} for k, values in enumerate(scalars)],
        "end": end.tobytes().hex(),
    }  # fmt: skip


def test_golden_vectors_are_those_of_the_standard() -> None:
    """Whoever changes the standard changes the file, and its digest here."""
    content = GOLDEN.read_bytes()
    assert hashlib.sha256(content).hexdigest() == DIGEST
    assert json.loads(content) == json.loads(json.dumps({name: golden(rule) for name, rule in RULES.items()}))


@pytest.mark.parametrize("name", RULES)
def test_an_update_ends_at_the_golden_bits(name: str) -> None:
    case = json.loads(GOLDEN.read_text())[name]
    rule = rule_of(case["rule"] | {k: tuple(v) for k, v in case["rule"].items() if isinstance(v, list)})
    parameter = nn.Parameter(torch.frombuffer(bytearray.fromhex(case["start"]), dtype=torch.float32).clone())
    optimizer = ZerothOrder([parameter], rule, seed=case["seed"], distribution=case["distribution"])
    for record in case["records"]:
        optimizer.param_groups[0]["lr"] = record["lr"]
        optimizer.record(torch.tensor(record["coefficients"]), optimizer.basis(optimizer.steps, 2))
        optimizer.step()
    assert parameter.detach().numpy().tobytes().hex() == case["end"]
