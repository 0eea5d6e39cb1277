"""The arithmetic in numpy beside that in PyTorch: the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hosfl_client import codecs, rng  # noqa: E402
from hosfl_client.basis import SharedDirections  # noqa: E402
from hosfl_client.basis_of import basis_of  # noqa: E402
from hosfl_client.bfloat16 import BFLOAT16  # noqa: E402
from hosfl_client.optimizer import Optimizer  # noqa: E402
from hosfl_client.rules import rule_of  # noqa: E402
from hosfl_client.side import Bottleneck  # noqa: E402
from hosfl_lightning import rng as torch_rng  # noqa: E402
from hosfl_lightning.aggregation import apply_update  # noqa: E402
from hosfl_lightning.clients.catch_up import client_state, state_digest  # noqa: E402
from hosfl_lightning.optim import AdamW, ZerothOrder  # noqa: E402
from hosfl_lightning.optim import basis_of as torch_basis_of  # noqa: E402
from hosfl_lightning.optim.local_gradient import add_local_gradient_  # noqa: E402
from hosfl_lightning.split import side  # noqa: E402
from hosfl_lightning.wire import CODECS, Coded, Update  # noqa: E402
from tests.client.golden import DTYPES, FOLDER, golden_codecs, golden_rng, raw  # noqa: E402


def of_torch(x: Any) -> Any:
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16).view(BFLOAT16)
    return x.numpy()


def test_golden_files_are_torchs() -> None:
    assert json.loads((FOLDER / "golden_rng.json").read_text()) == golden_rng()
    assert json.loads((FOLDER / "golden_codecs.json").read_text()) == golden_codecs()


@pytest.mark.parametrize("name", rng.DISTRIBUTIONS)
def test_directions(name: str) -> None:
    fields = {"seed": 0xFEDCBA9876543210, "round": 70_000, "client": 12, "probe": 4}
    ours = rng.Stream(domain=rng.DISTRIBUTIONS[name], **fields)
    theirs = torch_rng.Stream(domain=torch_rng.DISTRIBUTIONS[name], **fields)
    for start, stop in [(0, 100_001), (13, 14), ((1 << 35) - 100, (1 << 35) + 1000)]:
        out = np.linspace(-1, 1, stop - start, dtype=np.float32)
        wanted = torch.from_numpy(out.copy())
        rng.add_direction(out, 1e-3, ours, 65_535, start)
        torch_rng.add_direction_(wanted, 1e-3, theirs, 65_535, start)
        assert out.tobytes() == raw(wanted)


def rows(count: int, width: int, dtype: Any) -> Any:
    """Of all magnitudes, as far as the dtype goes."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    powers = torch.tensor([0.0, -100, 100, -139, 127, -127, -20])
    x = x * torch.exp2(powers.repeat(count // 7 + 1)[:count, None])
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return x.clamp(-largest, largest).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_codecs(codec: str, dtype: Any) -> None:
    fields = {"seed": 9, "round": 3, "client": 2, "probe": 1}
    for count, width in [(0, 3), (1, 1), (50, 129), (21, 4000)]:
        x = rows(count, width, dtype)
        ours = codecs.Coded.of(of_torch(x), codec, rng.Stream(domain=rng.Domain.ROUNDING, **fields), 1)
        theirs = Coded.of(x, codec, torch_rng.Stream(domain=torch_rng.Domain.ROUNDING, **fields), 1)
        assert ours.values.tobytes() == raw(theirs.values)
        assert theirs.scale is None or (ours.scale is not None and ours.scale.tobytes() == raw(theirs.scale))
        assert ours.restore().tobytes() == raw(theirs.restore())
        assert (ours.row_bytes(), ours.restored_bytes()) == (theirs.row_bytes(), theirs.restored_bytes())


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("basis", [
    {"kind": "shared_directions", "probes": 3, "distribution": "rademacher"},
    {"kind": "shared_directions", "probes": 20, "distribution": "gauss16"},
    {"kind": "client_directions", "probes": 3, "clients": [0, 4], "distribution": "rademacher"},
    {"kind": "dense"}, {"kind": "coordinates", "count": 77},
    {"kind": "shared_directions", "probes": 3, "distribution": "rademacher", "beside": 2},
    {"kind": "coordinates", "count": 77, "beside": 1},
], ids=lambda basis: "_".join(map(str, basis.values())))  # fmt: skip
def test_records_move_both_to_the_same_state(basis: dict[str, Any], dtype: Any) -> None:
    """Of several tensors: digests agree after every step, and a state goes from one engine to the other."""
    start = [torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype) for size in (257, 40_000, 3)]
    sizes = [p.numel() for p in start]
    described = {"name": "AdamW", **AdamW(lr=0.01).hyper_parameters()}
    theirs = ZerothOrder([torch.nn.Parameter(p.clone()) for p in start], AdamW(lr=0.01), seed=7)
    ours = Optimizer([of_torch(p.clone()) for p in start], rule_of(described), 7)
    for step in range(1, 4):
        size = basis_of(basis, 7, step, sizes).size
        coefficients = torch.randn(size, generator=torch.Generator().manual_seed(step))
        record = Update(
            round=step, basis=basis, coefficients=coefficients, rule={**described, "lr": 0.1 / step}, step=step,
            participants=[0], weights=[1.0], mu=None,
        )  # fmt: skip
        apply_update(record, theirs)
        ours.apply(replace(record, coefficients=coefficients.numpy()))
        assert ours.digest() == state_digest(theirs)
    again = Optimizer([of_torch(p.clone()) for p in start], rule_of(described), 7)
    again.load({name: of_torch(held) for name, held in client_state(theirs).items()}, 3)
    assert again.digest() == state_digest(theirs)
    gradient = [p.float().view(-1) for p in start]
    wanted = torch_basis_of(basis, 7, 1, sizes).project(gradient).numpy()
    assert np.allclose(basis_of(basis, 7, 1, sizes).project([g.numpy() for g in gradient]), wanted, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("distribution", rng.DISTRIBUTIONS)
def test_probes(distribution: str, dtype: Any) -> None:
    start = [torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype) for size in (257, 70_000, 3)]
    theirs = ZerothOrder([torch.nn.Parameter(p.clone()) for p in start], seed=7, distribution=distribution)
    ours, out = SharedDirections(7, 5, 2, distribution), [of_torch(torch.zeros_like(p)) for p in start]
    ours.perturb([of_torch(p) for p in start], 1, theirs.mu, out)
    with theirs.perturbed(theirs.basis(5), 1, theirs.mu):
        assert [moved.tobytes() for moved in out] == [raw(p.detach()) for p in theirs.parameters]


@pytest.mark.parametrize(
    ("given", "wanted", "kernel"),
    [((40, 96), (40, 80), 1), ((96,), (80,), 1), ((24, 9, 8), (32, 9, 8), 1), ((24, 9, 8), (32, 4, 3), 3)],
    ids=["tokens", "vectors", "maps", "convolved and pooled"],
)
def test_the_side_adapters_gradient(given: tuple[int, ...], wanted: tuple[int, ...], kernel: int) -> None:
    """Not to the bit: engines add up a matrix product in orders of their own."""
    generator = torch.Generator().manual_seed(0)
    module = side.Bottleneck(given, wanted, 16, kernel)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    h = torch.randn(5, *given, generator=generator) * 3 + 1
    with torch.no_grad():
        q = module(h)
    multiplier = torch.randn(q.shape, generator=generator)
    theirs = [torch.zeros_like(p) for p in module.parameters()]
    add_local_gradient_(theirs, module, h, multiplier)
    down, up = (p.detach().numpy() for p in module.parameters())
    ours, totals = Bottleneck(down, up, module.size), [np.zeros_like(down), np.zeros_like(up)]
    ours.add_gradient(totals, h.numpy(), multiplier.numpy())
    for found, expected in [(ours.forward(h.numpy()), q), *zip(totals, theirs)]:
        assert np.abs(found - expected.numpy()).max() < 1e-5 * expected.abs().max()
