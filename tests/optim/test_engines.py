"""The update rules against numpy, where every operation rounds once: the same bits, and golden vectors of them."""

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


def numpy_step(rule: dict[str, Any], theta: Floats, g: Floats, state: dict[str, Floats], k: int, lr: float) -> Floats:
    """As the standard says it, line by line."""
    if rule["name"] == "SGD":
        if rule["weight_decay"]:
            g = g + theta * f32(rule["weight_decay"])
        if rule["momentum"]:
            g = state["m"] = state["m"] * f32(rule["momentum"]) + g
        return theta - g * f32(lr)
    beta1, beta2 = rule["betas"]
    theta = theta * f32(1 - lr * rule["weight_decay"])
    state["m"] = state["m"] * f32(beta1) + g * f32(1 - beta1)
    state["s"] = state["s"] * f32(beta2) + g * g * f32(1 - beta2)
    r = np.sqrt(state["s"].astype(np.float64)).astype(f32) / f32((1 - beta2**k) ** 0.5) + f32(rule["eps"])
    return theta - state["m"] * f32(lr / (1 - beta1**k)) / r


def narrowed(values: Floats, dtype: torch.dtype) -> Floats:
    """Rounded to nearest even, and back."""
    if dtype == torch.float16:
        return values.astype(np.float16).astype(f32)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(f32)


def schedule(rule: dict[str, Any], step: int) -> float:
    """Of a record, which carries its round's rate."""
    return rule["lr"] / (1 + step)


def moved_by_numpy(
    rule: dict[str, Any], start: Floats, directions: list[list[Floats]], scalars: list[list[float]], dtype: torch.dtype
) -> Floats:
    theta, state = start, {"m": np.zeros_like(start), "s": np.zeros_like(start)}
    for step, (us, values) in enumerate(zip(directions, scalars)):
        g = np.zeros_like(start)
        for u, alpha in zip(us, values):
            g = g + u * f32(alpha)
        theta = numpy_step(rule, theta, g, state, step + 1, schedule(rule, step))
        theta = theta if dtype == torch.float32 else narrowed(theta, dtype)
    return theta


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
    directions = [
        [np.concatenate([direction(s, t, 0, n).numpy() for t, n in enumerate(sizes)]) for s in basis.streams]
        for basis in bases
    ]
    begun = np.concatenate([p.float().numpy() for p in start])
    for name, rule in RULES.items():
        described = {"name": type(rule).__name__, **rule.hyper_parameters()}
        ours = [nn.Parameter(p.clone()) for p in start]
        optimizer = ZerothOrder(ours, rule)
        for step, basis in enumerate(bases):
            optimizer.param_groups[0]["lr"] = schedule(described, step)
            optimizer.record(scalars[step] * 2, basis)  # the mean over two probes
            optimizer.step()
        wanted = moved_by_numpy(described, begun, directions, scalars.tolist(), dtype)
        found = torch.cat([p.detach().float() for p in ours]).numpy()
        assert int((found.view(np.uint32) != wanted.view(np.uint32)).sum()) == 0, name


def golden(rule: UpdateRule) -> dict[str, Any]:
    """A case: 256 gauss16 elements, two of them denormal and one zero, moved by five records of two probes."""
    start = direction(SharedDirections(1, 0, 1, "gauss16").streams[0], 0, 0, 256).numpy().copy()
    start[:3] = [1e-40, -3e-41, 0.0]
    scalars = [[0.75, -1.5], [1.25, 0.0], [-0.0625, 2.0], [1e-20, 1e-21], [-3.0, 0.5]]
    described = {"name": type(rule).__name__, **rule.hyper_parameters()}
    directions = [[direction(s, 0, 0, 256).numpy() for s in SharedDirections(7, k, 2).streams] for k in range(5)]
    alphas = [[float(f32(v / 2)) for v in values] for values in scalars]
    end = moved_by_numpy(described, start, directions, alphas, torch.float32)
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
