from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.clients import Cohort, FirstOrderClient, ForwardOnlyClient, FrozenClient, lagrangian_term
from hosfl_lightning.optim import Dense, ZerothOrder


class Half(nn.Module):
    """``f_c``: a two-layer network on float inputs, in the place of a model's lower half."""

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


def test_projected_gradients_are_those_of_the_exact_gradient() -> None:
    batch, multiplier, rows = setting()
    client = forward_only(mu=2**-8, estimator="central")
    basis = client.optimizer.basis(3)
    answers = client.answer(batch, client.forward(batch, rows), multiplier, rows, basis)
    half = Half()
    exact = FirstOrderClient(half, ZerothOrder(half.parameters(), module=half))
    dense = exact.answer(batch, exact.forward(batch, rows), multiplier, rows, Dense([96, 128]))
    for k in range(2):
        expected = basis.project(dense[k].split([96, 128]))
        torch.testing.assert_close(answers[k], expected, rtol=1e-2, atol=1e-2)
    assert all(p.grad is None for p in [*client.half.parameters(), *half.parameters()])


def test_the_difference_is_taken_before_the_sum() -> None:
    """In bf16 a difference of sums is exactly zero where the difference itself is not."""
    z = torch.full((1, 64, 64), 100.0, dtype=torch.bfloat16)
    moved = z.clone()
    moved[0, 0, 0] = 100.5  # one step of bf16 at 100
    multiplier = torch.ones_like(z)
    assert lagrangian_term(moved, z, multiplier, [slice(0, 1)]).item() == 0.5
    assert ((moved * multiplier).sum() - (z * multiplier).sum()).item() == 0.0


def test_each_clients_term_is_its_own_rows_and_no_threads_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    z, moved, multiplier = (torch.randn(6, 70, 130, generator=generator) for _ in range(3))
    rows = [slice(0, 1), slice(1, 6)]
    threads = torch.get_num_threads()
    try:
        terms = []
        for n in (1, 2):
            torch.set_num_threads(n)
            terms.append(lagrangian_term(moved, z, multiplier, rows))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*terms)
    expected = torch.stack([((moved - z)[r] * multiplier[r]).double().sum() for r in rows])
    torch.testing.assert_close(terms[0], expected, rtol=1e-5, atol=1e-4)


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
