"""Parameters that each client has for itself, in one optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.optim import SGD, Dense, OwnParameters, SharedDirections, ZerothOrder, swapped


def made(momentum: float = 0.9) -> tuple[list[nn.Parameter], OwnParameters]:
    parameters = [nn.Parameter(torch.arange(3.0)), nn.Parameter(torch.ones(2, 2))]
    return parameters, OwnParameters(ZerothOrder(parameters, SGD(lr=0.5, momentum=momentum)))


def move(own: OwnParameters, client: int, gradient: float) -> None:
    with own.of(client):
        own.optimizer.record(torch.full((7,), gradient), Dense([3, 4]))
        own.optimizer.step()


def test_each_client_goes_on_from_where_it_was() -> None:
    """Momentum too: 0.5 · (1 + 1.9) after two steps of 1."""
    parameters, own = made()
    start = [p.detach().clone() for p in parameters]
    for client, gradient in ((4, 1.0), (2, -2.0), (4, 1.0)):
        move(own, client, gradient)
        own.commit([client])
        assert all(torch.equal(p, s) for p, s in zip(parameters, start))
    with own.holding(4):
        assert torch.allclose(parameters[1], start[1] - 1.45)
    with own.holding(2):
        assert torch.allclose(parameters[0], start[0] + 1.0)
    with own.holding(0):
        assert torch.equal(parameters[0], start[0])
    assert sorted(own.held) == [2, 4]
    assert [len(own.tensors(client)) for client in (0, 4)] == [0, 2]


def test_what_does_not_count_is_forgotten() -> None:
    _, own = made()
    move(own, 1, 1.0)
    move(own, 3, 1.0)
    own.commit([3])
    assert sorted(own.held) == [3]
    assert own.moved(1) is None


def test_a_state_goes_to_another_store() -> None:
    _, own = made()
    move(own, 1, 1.0)
    state = own.moved(1)
    assert state is not None and sorted(state) == [
        "0.momentum_buffer", "0.theta", "1.momentum_buffer", "1.theta", "steps",
    ]  # fmt: skip
    own.commit([1])
    (_, other), (_, third) = made(), made()
    other.put_back(1, state)
    third.load_state_dict(own.state_dict())
    for store in (own, other, third):
        move(store, 1, 1.0)
        store.commit([1])
    for a, b, c in zip(*(store.values(1).values() for store in (own, other, third)), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(ValueError, match=r"the moments of 0\.exp_avg are not those of this run"):
        other.put_back(1, {"steps": torch.tensor(1), "0.exp_avg": torch.ones(3)})


def test_fresh_is_the_start() -> None:
    """As a client is put back that has done nothing that counts; its first step leaves the start alone."""
    parameters, own = made()
    own.put_back(1, {"steps": torch.tensor(0)})
    move(own, 1, 1.0)
    assert torch.equal(parameters[0], torch.arange(3.0))


def test_a_graph_is_good_after_values_were_swapped() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    with swapped([(weight, torch.tensor([3.0]))]):
        loss = weight * weight
    with swapped([(weight, torch.tensor([5.0]))]):
        pass
    assert weight == 2
    with swapped([(weight, torch.tensor([3.0]))]):
        [gradient] = torch.autograd.grad(loss, weight)
    assert gradient == 6


def test_directions_of_what_comes_after() -> None:
    """The second of two tensors alone has the bits that it has beside the first."""

    def expanded(basis: SharedDirections, tensors: list[Tensor]) -> list[Tensor]:
        for tensor in tensors:
            tensor.zero_()
        basis.apply(tensors, torch.tensor([0.5, -2.0]), 1.0)
        return tensors

    basis = SharedDirections(7, 3, 2)
    _, second = expanded(basis, [torch.empty(5), torch.empty(9)])
    [alone] = expanded(basis.after(1), [torch.empty(9)])
    assert torch.equal(second, alone)
