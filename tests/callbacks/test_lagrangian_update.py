from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hosfl_lightning import SplitCausalLM
from hosfl_lightning.callbacks import LagrangianUpdate
from hosfl_lightning.clients import Cohort, ForwardOnlyClient
from hosfl_lightning.optim import ZerothOrder
from tests.conftest import RandomTokens


class Logged:
    """In the place of the LightningModule."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def log(self, name: str, value: torch.Tensor) -> None:
        self.values[name] = float(value)


@pytest.fixture
def client(make_model: Callable[..., SplitCausalLM]) -> tuple[ForwardOnlyClient, list[Cohort]]:
    """A client half and two clients' batches."""
    model, data = make_model(), RandomTokens([[12] * 2, [20] * 3])
    data.setup("fit")
    data.tokenizer = model.tokenizer()
    optimizer = ZerothOrder(model.client_parameters.items(), module=model.client_half)
    cohorts = [Cohort.join([k], [data.client_batch(k, 0)], model.count) for k in range(2)]
    return ForwardOnlyClient(model.client_half, optimizer), cohorts


def test_it_logs_norm_and_term_of_all_cohorts(client: tuple[ForwardOnlyClient, list[Cohort]]) -> None:
    who, cohorts = client
    callback, module = LagrangianUpdate(), Logged()
    squares, terms = 0.0, 0.0
    for cohort in cohorts:
        anchor = who.forward(cohort.batch, cohort.rows)
        multiplier = torch.randn(anchor.z.shape, generator=torch.Generator().manual_seed(0))
        squares += float(multiplier.square().sum())
        terms += float((multiplier * anchor.z).double().sum())
        callback.answer(who, cohort.batch, anchor, multiplier, cohort, who.optimizer.basis(0))
    callback.on_train_batch_end(None, module, None, None, 0)
    assert module.values == {
        "client/multiplier_norm": pytest.approx(squares**0.5, rel=1e-5),
        "client/lagrangian_term": pytest.approx(terms, rel=1e-4),
    }
    module.values.clear()
    callback.on_train_batch_end(None, module, None, None, 1)
    assert module.values == {}


def test_mu_is_checked_once_and_no_probe_of_the_answer_sees_z(
    client: tuple[ForwardOnlyClient, list[Cohort]], monkeypatch: pytest.MonkeyPatch
) -> None:
    who, [cohort, _] = client
    callback, alive, checks = LagrangianUpdate(), [], []
    check = ForwardOnlyClient.check_probe
    monkeypatch.setattr(ForwardOnlyClient, "check_probe", lambda *a: checks.append(check(*a)))  # type: ignore[func-returns-value]
    for _ in range(2):
        anchor = who.forward(cohort.batch, cohort.rows)
        z: Any = weakref.ref(anchor.z.untyped_storage())
        multiplier = torch.full_like(anchor.z, 1e-3)
        with monkeypatch.context() as patch:
            patch.setattr(who, "evaluate", _watched(who, z, alive))
            callback.answer(who, cohort.batch, anchor, multiplier, cohort, who.optimizer.basis(0))
    probes = who.optimizer.basis(0).size
    assert len(checks) == 1
    assert alive == [True] * 8 + [False] * probes + [False] * probes  # 8: both sides of four directions


def _watched(who: ForwardOnlyClient, z: Any, alive: list[bool]) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    evaluate = who.evaluate

    def watched(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        alive.append(z() is not None)
        return evaluate(batch)

    return watched
