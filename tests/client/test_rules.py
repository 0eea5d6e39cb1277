"""Update rules, bases and what a client holds, in numpy; runs without PyTorch."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hosfl_client.basis import Coordinates, Dense, SharedDirections
from hosfl_client.basis_of import basis_of
from hosfl_client.beside import Beside
from hosfl_client.bfloat16 import BFLOAT16, DTYPES, cast, widen
from hosfl_client.optimizer import CatchUpError, Optimizer, UpdateError
from hosfl_client.rng import DISTRIBUTIONS, direction, round_coefficient
from hosfl_client.rules import SGD, AdamW, RuleError, rule_of

GOLDEN = json.loads((Path(__file__).parents[1] / "optim" / "golden_rules.json").read_text())
SIZES = [300, 0, 40_000, 7]
ADAMW = {"name": "AdamW", "lr": 0.01, "weight_decay": 0.01, "betas": [0.9, 0.999], "eps": 1e-8}


def record(step: int, rule: dict[str, Any], basis: dict[str, Any], coefficients: Any) -> Any:
    return SimpleNamespace(
        round=step - 1, step=step, rule=rule, basis=basis, coefficients=np.asarray(coefficients, np.float32)
    )


def drawn(sizes: list[int] = SIZES, seed: int = 0) -> list[Any]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(size, np.float32) for size in sizes]


@pytest.mark.parametrize("name", GOLDEN)
def test_an_update_ends_at_the_golden_bits(name: str) -> None:
    case = GOLDEN[name]
    theta = np.frombuffer(bytes.fromhex(case["start"]), "<f4").copy()
    optimizer = Optimizer([theta], rule_of(case["rule"]), case["seed"])
    basis = {"kind": "shared_directions", "probes": 2, "distribution": case["distribution"]}
    for step, one in enumerate(case["records"], 1):
        optimizer.apply(record(step, {**case["rule"], "lr": one["lr"]}, basis, one["coefficients"]))
    assert theta.tobytes().hex() == case["end"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_probe_is_theta_beside_its_direction(distribution: str, dtype: str) -> None:
    basis = SharedDirections(7, 3, 4, distribution)
    theta = [cast(x, np.empty(x.shape, DTYPES[dtype])).reshape(-1, 1) for x in drawn()]
    mu = round_coefficient(1e-3, basis.domain)
    out = [np.zeros_like(x) for x in theta]
    basis.perturb(theta, 2, -mu, [out[0], out[1], out[2], None])
    assert not out[3].view(np.uint8).any()  # left where it was
    for number, (x, moved) in enumerate(zip(theta[:3], out)):
        u = direction(basis.streams[2], number, 0, x.size).reshape(x.shape)
        wanted = cast(widen(x) + u * np.float32(-mu), np.empty_like(x))
        assert moved.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_projections_are_those_on_the_directions(distribution: str) -> None:
    gradient = drawn()
    basis = SharedDirections(7, 3, 40, distribution)
    wanted = [
        sum(float(g.astype(np.float64) @ direction(s, t, 0, g.size)) for t, g in enumerate(gradient))
        for s in basis.streams
    ]
    assert np.allclose(basis.project(gradient), wanted, rtol=1e-6, atol=1e-9)
    assert (basis.part(3, 5).project(gradient) == basis.project(gradient)[3:8]).all()
    assert (basis.of_client(4).project(gradient) != basis.project(gradient)).all()


def gathered(basis: Any, coefficients: Any) -> list[Any]:
    out = [np.full(size, np.nan, np.float32) for size in SIZES]
    for tensor, piece, values in basis.chunks(np.asarray(coefficients, np.float32), SIZES):
        out[tensor][piece] = values
    return out


def test_what_is_projected_comes_back() -> None:
    gradient = drawn()
    for basis, scale in ((Dense(SIZES), 1.0), (Coordinates(7, 3, SIZES, 1000), sum(SIZES) / 1000)):
        back = gathered(basis, basis.project(gradient))
        for found, wanted in zip(back, gradient):
            kept = found != 0
            assert (found[kept] == wanted[kept] * np.float32(scale)).all()
        assert sum(int((found != 0).sum()) for found in back) == basis.size


def test_a_sum_begins_at_zero() -> None:
    """-0 is not 0: momentum without a gradient would have another sign than elsewhere."""
    shared = SharedDirections(7, 3, 1)
    for basis, coefficients in ((shared, [0.0]), (Dense(SIZES), np.full(sum(SIZES), -0.0))):
        assert not any(np.signbit(values).any() for values in gathered(basis, coefficients))


def test_a_basis_is_known_by_its_description() -> None:
    for basis in (
        SharedDirections(7, 3, 4, "gauss16"),
        Dense(SIZES),
        Coordinates(7, 3, SIZES, 10),
        Beside(Dense(SIZES[:-1]), SIZES, 1),
    ):
        again = basis_of(basis.describe(), 7, 3, SIZES)
        assert (type(again), again.size, again.describe()) == (type(basis), basis.size, basis.describe())
    for wrong in ({}, {"kind": "sphere"}, {"kind": "dense", "probes": 1}, {"kind": "coordinates", "count": 0},
                  {"kind": "shared_directions", "probes": True, "distribution": "gauss16"},
                  {"kind": "shared_directions", "probes": 2, "distribution": "normal"},
                  {"kind": "dense", "beside": len(SIZES)}, {"kind": "dense", "beside": True}):  # fmt: skip
        with pytest.raises(ValueError):  # noqa: PT011  # each names its own setting
            basis_of(wrong, 7, 3, SIZES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_goes_on_where_it_was(dtype: str) -> None:
    def start() -> Optimizer:
        theta = [cast(x, np.empty(x.shape, DTYPES[dtype])) for x in drawn()]
        return Optimizer(theta, rule_of(ADAMW), 7)

    whole, first, second = start(), start(), start()
    records = [
        record(step, ADAMW | {"lr": 0.1 / step}, SharedDirections(7, 0, 2).describe(), [step, -1]) for step in (1, 2, 3)
    ]
    for one in records:
        whole.apply(one)
    first.apply(records[0])
    second.load(first.state(), 1)
    digest = first.digest()
    for one in records[1:]:
        second.apply(one)
    assert second.digest() == whole.digest() != digest
    assert first.digest() == digest  # what was loaded is a copy
    assert second.state()["2.theta"].dtype == DTYPES[dtype]


def test_what_does_not_belong_is_refused_and_moves_nothing() -> None:
    optimizer = Optimizer(drawn(), rule_of(ADAMW), 7)
    digest, basis = optimizer.digest(), {"kind": "shared_directions", "probes": 2, "distribution": "rademacher"}
    for step, rule, error in [
        (2, ADAMW, "apply the 1 missing"), (0, ADAMW, "applied already"), (1, ADAMW | {"name": "SGD"}, "rule SGD"),
        (1, ADAMW | {"eps": "small"}, "eps"), (1, ADAMW | {"lr": float("inf")}, "lr"), (1, ADAMW | {"lr": -1.0}, "lr"),
        (1, ADAMW | {"betas": [0.9]}, "betas"), (1, ADAMW | {"amsgrad": True}, "amsgrad"),
    ]:  # fmt: skip
        with pytest.raises(UpdateError, match=error):
            optimizer.apply(record(step, rule, basis, [1, 2]))
    with pytest.raises(ValueError, match="needs 2 coefficients"):
        optimizer.apply(record(1, ADAMW, basis, [1, 2, 3]))
    for state, error in [
        ({}, "0 tensors"), (optimizer.state() | {"0.momentum_buffer": drawn()[0]}, "another rule"),
        (optimizer.state() | {"0.theta": drawn()[2]}, "0.theta"),
        (optimizer.state() | {"0.theta": drawn()[0].astype(np.float64)}, "0.theta"),
    ]:  # fmt: skip
        with pytest.raises(CatchUpError, match=error):
            optimizer.load(state, 1)
    assert (optimizer.digest(), optimizer.steps) == (digest, 0)
    with pytest.raises(ValueError, match="contiguous"):
        Optimizer([np.ones((4, 4), np.float32).T[1:]], SGD(), 7)
    with pytest.raises(ValueError, match="float64"):
        Optimizer([np.ones(4)], SGD(), 7)


def test_a_rule_says_what_it_does_not_take() -> None:
    for rule, error in [({"name": "Lion"}, "Lion"), ({"name": "SGD", "lr": 0.1}, "settings")]:
        with pytest.raises(RuleError, match=error):
            rule_of(rule)
    for make in (lambda: SGD(lr=-1), lambda: SGD(momentum=1), lambda: AdamW(betas=(1.0, 0.9))):
        with pytest.raises(RuleError):
            make()


def test_the_root_is_that_of_fp64() -> None:
    bits = np.arange(0, 0x7F800000, 4099, dtype=np.uint32).view(np.float32)
    assert (np.sqrt(bits) == np.sqrt(bits.astype(np.float64)).astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=["fp32", "bf16"])
def test_scratch_of_a_step_is_small(dtype: Any) -> None:
    theta = [np.zeros(1 << 20, dtype)]
    optimizer, basis = Optimizer(theta, rule_of(ADAMW), 7), SharedDirections(7, 0, 8)
    optimizer.step(basis, np.ones(8, np.float32))
    tracemalloc.start()
    optimizer.step(basis, np.ones(8, np.float32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * (1 << 20)
