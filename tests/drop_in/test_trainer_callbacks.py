"""Pattern: averaged weights, the best checkpoint, early stopping, a monitored and a plateau's learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from hosfl_lightning.callbacks import HybridOrder, ZerothOrderTraining
from hosfl_lightning.optim import SGD
from tests.drop_in.side_by_side import (
    CLIENT_KEYS,
    QUIET_WARNINGS,
    ZEROTH_ORDER_KEYS,
    Outcome,
    assert_learns,
    assert_only_added,
    fit,
)

pytestmark = [*QUIET_WARNINGS, pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")]


class Regressor(L.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh())
        self.head = nn.Linear(width, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = mse_loss(self.head(self.body(batch[0])), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", mse_loss(self.head(self.body(batch[0])), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.RMSprop(self.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}


def waves() -> TensorDataset:
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (2 * x[:, :1]).sin() + x[:, 1:2])


def averages(kind: str) -> Callback:
    return EMAWeightAveraging(decay=0.8) if kind == "ema" else StochasticWeightAveraging(5e-3, swa_epoch_start=5)


def train(folder: Path, kind: str, *callbacks: Callback, make: type[Regressor] = Regressor) -> Outcome:
    """Ours comes first: what it does at the end of a batch is there when the average is taken."""
    L.seed_everything(0, verbose=False)
    usual = [
        averages(kind),
        ModelCheckpoint(monitor="val/loss", save_top_k=1, save_last=True),
        EarlyStopping("train/loss", stopping_threshold=0.0, patience=50),
        LearningRateMonitor("step"),
    ]
    loaders = DataLoader(waves(), batch_size=12, shuffle=True), DataLoader(waves(), batch_size=24)
    settings: dict[str, Any] = {"logger": CSVLogger(folder), "default_root_dir": folder, "num_sanity_val_steps": 2}
    return fit(make(), *loaders, callbacks=[*callbacks, *usual], max_epochs=8, **settings)


OURS = [
    (HybridOrder("head", SGD(lr=0.1), probes=4), HybridOrder("head", SGD(lr=0.0)), CLIENT_KEYS),
    (ZerothOrderTraining(SGD(lr=0.03), probes=4), ZerothOrderTraining(SGD(lr=0.0)), ZEROTH_ORDER_KEYS),
]


@pytest.mark.parametrize(("callback", "frozen", "keys"), OURS, ids=["hybrid", "zeroth"])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_beside_ours(kind: str, callback: Callback, frozen: Callback, keys: set[str], tmp_path: Path) -> None:
    plain, ours = train(tmp_path / "plain", kind), train(tmp_path / "ours", kind, callback)
    assert_only_added(plain, ours, keys)
    assert_learns(ours, train(tmp_path / "frozen", kind, frozen), margin=0.1)
    averaging = next(c for c in ours.trainer.callbacks if isinstance(c, type(averages(kind))))
    average: Any = averaging._average_model
    for name, value in ours.module.named_parameters():
        assert torch.equal(value, dict(getattr(average, "module", average).named_parameters())[name]), name


class Late(Regressor):
    """Some layers are made when Trainer asks for them, or the average, which asks first."""

    def configure_model(self) -> None:
        if isinstance(self.head, nn.Linear):
            self.head = nn.Sequential(nn.Tanh(), self.head)


class Early(Late):
    """All layers are there from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.configure_model()


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_an_average_that_completes_the_module(tmp_path: Path) -> None:
    late, early = (
        train(tmp_path / kind.__name__, "ema", HybridOrder("head", SGD(lr=0.1)), make=kind) for kind in (Late, Early)
    )
    assert late.seen.losses == early.seen.losses
