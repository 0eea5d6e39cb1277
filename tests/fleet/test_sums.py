"""Gradients of groups that are spread over processes, against autograd in one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.fleet.sums import LocalSums, RankSums

GROUPS = 5


def parameters() -> list[nn.Parameter]:
    """Of two dtypes with sizes that do not align; the last one gets no gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((3,), torch.bfloat16), ((2, 3), torch.float32), ((), torch.float32), ((4,), torch.float32),
    ]  # fmt: skip
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape, dtype in shapes]


def backward(theta: list[nn.Parameter], group: int) -> Tensor | None:
    """Group 1 has no loss term, and only groups 3 and 4 use the third parameter; the sizes make the order matter."""
    if group == 1:
        return None
    scale = 3.0 ** (2 - group)
    loss = (theta[0].float() * scale).sin().sum() + (theta[1] * scale).sin().sum()
    if group > 2:
        loss = loss + theta[2] * scale
    loss.backward()
    return loss.detach()


def together(size: int, work: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """``work(rank, exchange)`` of every rank, each in a thread."""
    slots, barrier = [None] * size, Barrier(size, timeout=10)

    def exchange(rank: int, value: Any) -> list[Any]:
        slots[rank] = value
        barrier.wait()
        everyone = list(slots)
        barrier.wait()
        return everyone

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(work, rank, lambda value, r=rank: exchange(r, value)) for rank in range(size)]
        return [future.result() for future in futures]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_bits_are_those_of_one_process(size: int) -> None:
    alone = parameters()
    expected = LocalSums(alone)
    assert expected.total([3, 0, 1, 2, 5]) == 11
    for group in range(GROUPS):
        expected.add(backward(alone, group))
    loss = expected.finish()

    def work(rank: int, exchange: Callable[[Any], list[Any]]) -> tuple[Tensor, list[nn.Parameter]]:
        theta = parameters()
        sums = RankSums(theta, exchange, exchange)
        own = range(rank, GROUPS, size)
        assert sums.total([[3, 0, 1, 2, 5][group] for group in own]) == 11
        for group in own:
            sums.add(backward(theta, group))
        return sums.finish(), theta

    for total, theta in together(size, work):
        assert torch.equal(total, loss)
        assert [p.grad is None for p in theta] == [False, False, False, True]
        assert [i for i, (p, q) in enumerate(zip(theta[:3], alone)) if not torch.equal(p.grad, q.grad)] == []
