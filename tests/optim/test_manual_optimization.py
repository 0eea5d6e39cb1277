"""The examples of docs/manual_optimization.md, word for word, and what it says of Lightning."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.nn.functional import mse_loss

from tests.callbacks.drop_in.plain_modules import LIGHTNING_WARNINGS, QUIET, fit

pytestmark = LIGHTNING_WARNINGS
PAGE = Path(__file__).parents[2] / "docs" / "manual_optimization.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
BATCHES = 8 * 20


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """Names of the page after its first block, but for a quiet Trainer."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L, "Trainer", partial(L.Trainer, **QUIET))
        torch.manual_seed(0)
        exec(BLOCKS[0], names)
    return names


@pytest.fixture
def page(trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(L, "Trainer", partial(L.Trainer, **QUIET))
    torch.manual_seed(0)
    return {**trained}


def test_the_ten_lines_train(page: dict[str, Any]) -> None:
    body = BLOCKS[0].partition("class ForwardOnly")[2].partition("\n\n\n")[0]
    assert len([line for line in body.splitlines() if line.strip()]) <= 12
    model, trainer = page["model"], page["trainer"]
    assert float(trainer.callback_metrics["train/loss"]) < 0.2
    assert trainer.global_step == model.trainer.optimizers[0].steps == BATCHES
    assert all(p.grad is None for p in model.parameters())


def test_backprop_above_and_forwards_below(page: dict[str, Any]) -> None:
    exec(BLOCKS[1], page)
    model, trainer = page["hybrid"], page["hybrid_trainer"]
    assert float(trainer.callback_metrics["train/loss"]) < 0.05
    assert trainer.global_step == trainer.optimizers[1].steps == BATCHES
    assert all(p.grad is None for p in model.lower.parameters())
    torch.manual_seed(0)
    start = page["Hybrid"]().state_dict()
    # Weight decay alone would take 2 % of it.
    moved = [(value - start[name]).norm() / start[name].norm() for name, value in model.state_dict().items()]
    assert min(moved) > 0.1


def test_fabric(page: dict[str, Any]) -> None:
    exec(BLOCKS[2], page)
    assert len(page["losses"]) == BATCHES
    assert page["losses"][-1] < 0.2 < page["losses"][0]


def test_hooks_fire_a_closure_call_or_once_a_step(page: dict[str, Any]) -> None:
    class Counts(page["ForwardOnly"]):  # type: ignore[misc]
        calls = 0

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.calls += 1

    class Recorded(Counts):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            optimizer = self.optimizers()
            zo = optimizer.optimizer
            zo.record(zo.project(lambda: mse_loss(self.net(x), y)))
            optimizer.step()

    for kind, calls in ((Counts, 4 + 1), (Recorded, 1)):
        module = kind()
        assert fit(module, data=page["data"], max_steps=1).global_step == 1
        assert module.calls == calls


def test_lightning_refuses_clipping_and_torch_a_scaler(page: dict[str, Any]) -> None:
    for setting in ({"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}):
        with pytest.raises(L.pytorch.utilities.exceptions.MisconfigurationException, match="manual optimization"):
            fit(page["ForwardOnly"](), data=page["data"], **setting)
    half = L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(AssertionError, match="Attempted unscale_"):
        fit(page["ForwardOnly"](), data=page["data"], plugins=half)


def test_a_scheduler_is_stepped_by_hand(page: dict[str, Any]) -> None:
    class Decays(page["ForwardOnly"]):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.lr_schedulers().step()

    trainer = fit(Decays(), data=page["data"], max_steps=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-2 / 8
