from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.optim import SGD, AdamW, LocalWalk, SharedDirections, ZerothOrder, check_linear

STEPS, PROBES = 4, 3


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (7, 300)]


def copies(theta: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in theta]


def test_the_steps_add_up_to_one_along_all_directions() -> None:
    theta = parameters()
    optimizer = ZerothOrder(theta, SGD(lr=0.1), seed=5)
    basis = optimizer.basis(9, STEPS * PROBES)
    values = torch.randn(STEPS, PROBES, generator=torch.Generator().manual_seed(1))
    values[2] = 0  # left out below
    expected, start = copies(theta), copies(theta)
    with LocalWalk(optimizer, basis, STEPS) as walk:
        for s in (0, 1, 3):
            walk.move(s, values[s])
            for p, v in enumerate(values[s]):
                u = SharedDirections(5, 9, STEPS * PROBES).part(s * PROBES + p, 1)
                u.apply(expected, v[None], -0.1 / PROBES)
            if s < STEPS - 1:
                torch.testing.assert_close([p.detach() for p in theta], expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, bits) for p, bits in zip(theta, start))
    assert optimizer.steps == 0
    optimizer.record(walk.coefficients, basis)
    optimizer.step()
    torch.testing.assert_close([p.detach() for p in theta], expected, rtol=1e-5, atol=1e-6)


def test_a_part_has_the_bits_that_it_has_among_all() -> None:
    whole = SharedDirections(3, 1, 6, "gauss16")
    assert [s.probe for s in whole.part(2, 3).streams] == [2, 3, 4]
    assert whole.part(2, 3).streams == whole.streams[2:5]
    assert (whole.part(2, 3).size, whole.size) == (3, 6)
    assert whole.part(2, 3).describe() == {"kind": "shared_directions", "probes": 3, "distribution": "gauss16"}


@pytest.mark.parametrize("fails", [False, True])
def test_the_start_comes_back_bit_for_bit(fails: bool) -> None:
    """In bf16 going back step by step would not."""
    theta = parameters(torch.bfloat16)
    start = copies(theta)
    optimizer = ZerothOrder(theta, SGD(lr=0.1))
    with suppress(KeyError), LocalWalk(optimizer, optimizer.basis(0, 6), 3) as walk:
        walk.move(0, torch.tensor([3.0, -2.0]))
        assert not torch.equal(theta[1], start[1])
        walk.move(1, torch.tensor([torch.nan, 1.0]))
        if fails:
            raise KeyError
    assert all(torch.equal(p, bits) for p, bits in zip(theta, start))
    assert optimizer.steps == 0


def test_a_single_step_keeps_no_copy_and_moves_nothing() -> None:
    theta = parameters()
    start = copies(theta)
    optimizer = ZerothOrder(theta, AdamW())
    with LocalWalk(optimizer, optimizer.basis(0), 1) as walk:
        assert walk._start == []
        walk.move(0, torch.tensor([1.0, 2.0]))
        assert all(torch.equal(p, bits) for p, bits in zip(theta, start))
    assert walk.coefficients.tolist() == [1.0, 2.0]
    assert not optimizer.state


def test_only_plain_sgd_is_linear() -> None:
    check_linear(SGD(lr=3.0), "this")
    for rule in (SGD(momentum=0.1), SGD(weight_decay=0.1), AdamW()):
        with pytest.raises(ValueError, match=r"trainer.algorithm: this averages scalars .* set client_optimizer to"):
            check_linear(rule, "this")
