from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from hosfl_lightning import HOSFL, SplitCausalLM
from hosfl_lightning.callbacks import LagrangianUpdate
from hosfl_lightning.clients import Endpoint, ForwardOnlyClient, Minibatches
from hosfl_lightning.clients.split_endpoint import SplitEndpoint
from hosfl_lightning.server import Inbox
from hosfl_lightning.wire import Codecs, Multiplier, SmashedData, StepRequest
from tests.conftest import RandomTokens


class Logged:
    """In the place of the LightningModule."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def log(self, name: str, value: torch.Tensor) -> None:
        self.values[name] = float(value)


@pytest.fixture
def clients(make_model: Callable[..., SplitCausalLM]) -> SplitEndpoint:
    """Two clients, of two and of three examples."""
    model, data = make_model(), RandomTokens([[12] * 2, [20] * 3])
    data.setup("fit")
    data.tokenizer = model.tokenizer()
    terms = HOSFL().terms(model, 0, Codecs(), 2)
    endpoint = Endpoint.of(model, Minibatches(data, model), terms, Fabric(accelerator="cpu"))
    assert isinstance(endpoint, SplitEndpoint)
    return endpoint


@pytest.mark.parametrize("joint", [True, False], ids=["one batch", "one after the other"])
def test_it_logs_norm_and_term_of_all_clients(clients: SplitEndpoint, joint: bool) -> None:
    callback, module = LagrangianUpdate(), Logged()
    requests = [StepRequest(0, client) for client in range(2)]
    groups = [requests] if joint else [[request] for request in requests]
    inbox = Inbox.of(
        [z for group in groups for z in sent(clients, group)],
        lambda message: clients.model.count(message.unpack_labels()),  # type: ignore[union-attr]
        None if joint else [0, 1],
    )
    multipliers: dict[int, Multiplier] = {}
    squares, terms = 0.0, 0.0
    for message in inbox.messages:
        z, _, mask = message.unpack()
        multiplier = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        squares += float(multiplier.square().sum())
        terms += float((multiplier * z).double().sum())
        multipliers[message.client] = Multiplier.pack(0, message.client, multiplier, mask)
    callback.on_multipliers(inbox, multipliers)
    callback.on_train_batch_end(None, module, None, None, 0)
    assert module.values == {
        "client/multiplier_norm": pytest.approx(squares**0.5, rel=1e-5),
        "client/lagrangian_term": pytest.approx(terms, rel=1e-4),
    }
    module.values.clear()
    callback.on_train_batch_end(None, module, None, None, 1)
    assert module.values == {}


def test_mu_is_checked_once_and_no_probe_of_the_answer_sees_z(
    clients: SplitEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    who, alive, checks = clients.client, list[bool](), list[None]()
    check = ForwardOnlyClient.check_probe
    monkeypatch.setattr(ForwardOnlyClient, "check_probe", lambda *a: checks.append(check(*a)))  # type: ignore[func-returns-value]
    for round in range(2):
        [message] = sent(clients, [StepRequest(round, 0)])
        multiplier = Multiplier.pack(round, 0, torch.full_like(message.unpack()[0], 1e-3), message.mask)
        del message
        z: Any = weakref.ref(clients.visits[0].anchor.z.untyped_storage())
        with monkeypatch.context() as patch:
            patch.setattr(who, "evaluate", _watched(who, z, alive))
            clients.handle([multiplier])
    assert len(checks) == 1
    assert alive[:8] == [True] * 8  # both sides of four directions
    assert alive[8:] == [False] * (len(alive) - 8) != []


def sent(clients: SplitEndpoint, requests: list[StepRequest]) -> list[SmashedData]:
    messages = clients.handle(requests)
    assert all(isinstance(message, SmashedData) for message in messages)
    return messages  # type: ignore[return-value]


def _watched(who: Any, z: Any, alive: list[bool]) -> Callable[[dict[str, Tensor]], Tensor]:
    evaluate = who.evaluate

    def watched(batch: dict[str, Tensor]) -> Tensor:
        alive.append(z() is not None)
        return evaluate(batch)

    return watched
