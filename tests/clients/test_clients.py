from __future__ import annotations

import math
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.clients import (
    Cohort,
    FirstOrderClient,
    ForwardOnlyClient,
    FrozenClient,
    lagrangian,
    lagrangian_term,
)
from hosfl_lightning.memory import MemoryMeter
from hosfl_lightning.optim import Dense, ZerothOrder


class Half(nn.Module):
    """``f_c``: a two-layer network on float inputs, in the place of a model's lower half."""

    inputs = ("input_ids", "attention_mask")

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.lower, self.upper = nn.Linear(6, 16, bias=False), nn.Linear(16, 8, bias=False)
        for layer in (self.lower, self.upper):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) / layer.weight.shape[1] ** 0.5
        self.to(dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.upper(torch.tanh(self.lower(x.to(self.lower.weight.dtype))))


def setting(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor, list[slice]]:
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randn(5, 3, 6, generator=generator), "attention_mask": torch.ones(5, 3)}
    return batch, torch.randn(5, 3, 8, generator=generator).to(dtype), [slice(0, 2), slice(2, 5)]


def forward_only(mu: float, estimator: str = "forward", dtype: torch.dtype = torch.float32) -> ForwardOnlyClient:
    half = Half(dtype)
    return ForwardOnlyClient(half, ZerothOrder(half.parameters(), module=half, mu=mu, probes=64, estimator=estimator))


@pytest.mark.parametrize(("estimator", "mu"), [("central", 2**-8), ("forward", 2**-12)])
def test_projected_gradients_are_those_of_the_exact_gradient(estimator: str, mu: float) -> None:
    batch, multiplier, rows = setting()
    client = forward_only(mu, estimator)
    basis = client.optimizer.basis(3)
    answers = client.answer(batch, client.forward(batch, rows), multiplier, rows, basis)
    half = Half()
    exact = FirstOrderClient(half, ZerothOrder(half.parameters(), module=half))
    dense = exact.answer(batch, exact.forward(batch, rows), multiplier, rows, Dense([96, 128]))
    for k in range(2):
        expected = basis.project(dense[k].split([96, 128]))
        torch.testing.assert_close(answers[k], expected, rtol=1e-2, atol=5e-2)
    assert all(p.grad is None for p in [*client.half.parameters(), *half.parameters()])


def products(z: Tensor, multiplier: Tensor) -> list[float]:
    """Elementwise, exact."""
    return (z.double() * multiplier.double()).flatten().tolist()


@pytest.mark.parametrize(
    ("dtype", "delta"),
    [
        *((torch.float32, delta) for delta in (1e-1, 1e-3, 1e-5, 1e-7)),
        *((dtype, delta) for dtype in (torch.bfloat16, torch.float16) for delta in (1e-1, 1e-2, 1e-3)),
    ],
)
def test_sums_in_fp64_keep_the_difference(dtype: torch.dtype, delta: float) -> None:
    """For a λ that is correlated with z: no error beside z's own rounding, which a sum in z's precision loses it in."""
    generator = torch.Generator().manual_seed(0)
    normal = [torch.randn(4, 64, 256, generator=generator) for _ in range(3)]
    z = normal[0].to(dtype)
    multiplier = (normal[1] + normal[0]).to(dtype)
    moved = (z.float() + delta * normal[2]).to(dtype)
    terms = [lagrangian_term(t, multiplier, [slice(0, 4)]).item() for t in (moved, z)]

    minus, plus = products(-z, multiplier), products(moved, multiplier)
    exact = math.fsum(plus + minus)  # rounded once
    magnitude = math.fsum(map(abs, minus))
    error = abs(terms[0] - terms[1] - exact)
    assert error <= 2**-52 * magnitude
    rounding_of_z = torch.finfo(dtype).eps / 12**0.5 * math.hypot(*minus)
    assert error <= 1e-5 * rounding_of_z
    if delta >= 1e-5:
        assert error <= 1e-8 * abs(exact)
        before_the_sum = float(((moved.float() - z.float()) * multiplier.float()).sum(dtype=torch.float64))
        assert terms[0] - terms[1] == pytest.approx(before_the_sum, rel=1e-5)
    narrow = float((moved * multiplier).sum() - (z * multiplier).sum())
    assert abs(narrow - exact) > 1e3 * error


def test_each_clients_term_is_its_own_rows_and_no_threads_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    z, multiplier = (torch.randn(6, 70, 130, generator=generator) for _ in range(2))
    rows = [slice(0, 1), slice(1, 6)]
    threads = torch.get_num_threads()
    try:
        terms = []
        for n in (1, 2):
            torch.set_num_threads(n)
            terms.append(lagrangian_term(z, multiplier, rows))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*terms)
    expected = torch.tensor([math.fsum(products(z[r], multiplier[r])) for r in rows], dtype=torch.float64)
    torch.testing.assert_close(terms[0], expected, rtol=1e-12, atol=0)


def test_the_term_is_summed_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    z, multiplier = (torch.randn(2, 50, 200, generator=generator) for _ in range(2))
    rows = [slice(0, 1), slice(1, 2)]
    terms = []
    for elements, parts in ((1, 100), (3000, 100), (1, 3), (1 << 16, 32)):
        monkeypatch.setattr(lagrangian, "WIDENED", elements)
        monkeypatch.setattr(lagrangian, "PARTS", parts)
        terms.append(lagrangian_term(z, multiplier, rows))
    assert all(torch.equal(term, terms[0]) for term in terms)


def test_the_term_widens_a_part_of_z_at_a_time() -> None:
    z = torch.ones(1, 4096, 256)
    with MemoryMeter() as meter, meter.role("term"):
        lagrangian_term(z, z, [slice(0, 1)])
    assert meter.peak("term") <= z.nbytes // 8 + (64 << 10)  # and the tokens' sums


@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_z_is_gone_before_the_first_probe(estimator: str) -> None:
    """Whoever still holds the anchor."""
    batch, multiplier, rows = setting()
    client = forward_only(1e-3, estimator)
    anchor = client.forward(batch, rows)
    z = weakref.ref(anchor.z.untyped_storage())
    expected = lagrangian_term(anchor.z, multiplier, rows)
    alive: list[bool] = []
    client.half.register_forward_pre_hook(lambda *_: alive.append(z() is not None))
    answers = client.answer(batch, anchor, multiplier, rows, client.optimizer.basis(0))
    assert alive == [False] * {"forward": 64, "central": 128}[estimator]
    assert torch.equal(anchor.release(multiplier, rows), expected)
    # What was released before, for a log, makes no difference.
    anchor = client.forward(batch, rows)
    anchor.release(multiplier, rows)
    assert torch.equal(client.answer(batch, anchor, multiplier, rows, client.optimizer.basis(0)), answers)


@pytest.mark.parametrize(
    ("mu", "dtype", "message"),
    [
        (1e-9, torch.float32, "changes only"),
        (1e-4, torch.bfloat16, "changes only"),
        (2.0, torch.float32, "two sides of a probe disagree"),
    ],
)
def test_a_bad_mu_is_warned_about(mu: float, dtype: torch.dtype, message: str) -> None:
    batch, multiplier, rows = setting(dtype)
    client = forward_only(mu, dtype=dtype)
    with pytest.warns(UserWarning, match=message):
        client.check_probe(batch, client.forward(batch, rows).z, multiplier)


@pytest.mark.parametrize(("mu", "estimator"), [(1e-3, "forward"), (2.0, "central")])
def test_a_good_mu_is_not(mu: float, estimator: str) -> None:
    batch, multiplier, rows = setting()
    client = forward_only(mu, estimator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client.check_probe(batch, client.forward(batch, rows).z, multiplier)


def test_what_a_relu_has_put_out_is_not_called_rounding() -> None:
    batch, multiplier, rows = setting()
    client = forward_only(1e-3)
    out = torch.zeros(8).index_fill_(0, torch.tensor([2]), 1.0)  # one feature of eight is alive
    client.half.register_forward_hook(lambda module, inputs, z: z * out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client.check_probe(batch, client.forward(batch, rows).z, multiplier)


def test_forward_only_and_frozen_clients_have_no_graph_and_eval_mode() -> None:
    batch, _, rows = setting()
    for kind in (ForwardOnlyClient, FrozenClient):
        half = Half().train()
        client = kind(half, ZerothOrder(half.parameters(), module=half))
        anchor = client.forward(batch, rows)
        assert anchor.z.grad_fn is None
        assert anchor.graphs == ()
        assert not half.training
        assert not any(p.requires_grad for p in half.parameters())


def test_a_forward_only_client_refuses_a_dense_basis() -> None:
    batch, multiplier, rows = setting()
    client = forward_only(1e-3)
    with pytest.raises(TypeError, match="SharedDirections"):
        client.answer(batch, client.forward(batch, rows), multiplier, rows, Dense([96, 128]))


def test_joining_pads_to_the_longest_and_remembers_who_is_who() -> None:
    def batch(rows: int, length: int) -> dict[str, Tensor]:
        ones = torch.ones(rows, length, dtype=torch.long)
        return {"input_ids": ones * 7, "attention_mask": ones, "labels": ones * 7}

    cohort = Cohort.join([2, 5], [batch(1, 3), batch(2, 4)], lambda labels: int((labels[:, 1:] != -100).sum()))
    assert cohort.rows == [slice(0, 1), slice(1, 3)]
    assert (cohort.widths, cohort.num_terms) == ([3, 4], [2, 6])
    assert cohort.batch["labels"][0].tolist() == [7, 7, 7, -100]
    assert cohort.batch["attention_mask"][0].tolist() == [1, 1, 1, 0]
