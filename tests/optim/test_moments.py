from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.optim import AdamW, Dense, Moments, ZerothOrder
from tests.small_run import plain


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]


def gradient(number: int) -> Tensor:
    return torch.randn(7, generator=torch.Generator().manual_seed(number))


def step(optimizer: ZerothOrder, number: int) -> None:
    optimizer.record(gradient(number), Dense([3, 4]))
    optimizer.step()


def alone(numbers: list[int]) -> list[Tensor]:
    """Steps of one client with torch's optimizer, from ones."""
    mine = parameters()
    optimizer = torch.optim.AdamW(mine, lr=0.1, weight_decay=0.01)
    for number in numbers:
        for parameter, values in zip(mine, gradient(number).split([3, 4])):
            parameter.grad = values.view_as(parameter)
        optimizer.step()
    return [p.detach() for p in mine]


def test_each_client_steps_as_if_it_had_an_optimizer_of_its_own() -> None:
    optimizer = ZerothOrder(parameters(), AdamW(lr=0.1))
    moments = Moments(optimizer)
    at = {client: [p.detach().clone() for p in optimizer.parameters] for client in (0, 4)}
    done: dict[int, list[int]] = {0: [], 4: []}
    for number, clients in enumerate([[0, 4], [4], [0, 4]]):
        for client in clients:
            with moments.of(client):
                for parameter, values in zip(optimizer.parameters, at[client]):
                    parameter.data.copy_(values)
                step(optimizer, 10 * number + client)
                at[client] = [p.detach().clone() for p in optimizer.parameters]
            done[client].append(10 * number + client)
            assert not optimizer.state, "between clients it holds nobody's moments"
        moments.commit(clients)
    for client, numbers in done.items():
        for ours, theirs in zip(at[client], alone(numbers)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert {client: steps for client, (steps, _) in moments.held.items()} == {0: 2, 4: 3}


def fail_midway(optimizer: ZerothOrder) -> None:
    step(optimizer, 2)
    raise ValueError("midway")


def test_what_was_not_committed_is_forgotten() -> None:
    optimizer = ZerothOrder(parameters(), AdamW())
    moments = Moments(optimizer)
    with moments.of(1):
        step(optimizer, 0)
    moments.commit([1])
    before = plain(moments.state_dict())
    for client in (1, 2):
        with moments.of(client):
            step(optimizer, 1)
    moments.commit([])
    assert plain(moments.state_dict()) == before
    with pytest.raises(ValueError, match="midway"), moments.of(1):
        fail_midway(optimizer)
    assert not optimizer.state
    moments.commit([])
    assert plain(moments.state_dict()) == before


def test_its_state_goes_through_a_checkpoint() -> None:
    optimizer = ZerothOrder(parameters(), AdamW())
    moments, again = Moments(optimizer), Moments(optimizer)
    with moments.of(3):
        step(optimizer, 0)
    moments.commit([3])
    again.load_state_dict(moments.state_dict())
    assert plain(again.state_dict()) == plain(moments.state_dict())
    with again.of(3):
        step(optimizer, 1)
    again.commit([3])
    assert moments.held[3][0] == 1, "a copy"
    assert plain(again.state_dict()) != plain(moments.state_dict())
