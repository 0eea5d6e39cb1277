"""Pattern: labelled and unlabelled batches together, two validation sets, collections of torchmetrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

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

pytestmark = QUIET_WARNINGS
Batches = dict[str, Any]


class SemiSupervised(L.LightningModule):
    """Cross-entropy on the labelled rows, low entropy on the others; one forward for both."""

    def __init__(self, features: int = 6, classes: int = 3, weight: float = 0.1) -> None:
        super().__init__()
        self.weight = weight
        self.backbone = nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Dropout(0.1))
        self.head = nn.Linear(8, classes)
        metrics = MetricCollection({"accuracy": MulticlassAccuracy(classes), "f1": MulticlassF1Score(classes)})
        self.train_metrics = metrics.clone(prefix="train/")
        self.entropy = MeanMetric()
        self.val_metrics = nn.ModuleList([metrics.clone(prefix=f"val_{name}/") for name in ("in", "out")])

    def logits(self, labelled: Tensor, unlabelled: Tensor) -> tuple[Tensor, Tensor]:
        both = self.head(self.backbone(torch.cat([labelled, unlabelled])))
        return both[: len(labelled)], both[len(labelled) :]

    def training_step(self, batch: Batches, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch["labelled"]
        labelled, unlabelled = self.logits(x, batch["unlabelled"][0])
        entropy = -(unlabelled.softmax(1) * unlabelled.log_softmax(1)).sum(1).mean()
        loss = cross_entropy(labelled, y) + self.weight * entropy
        self.log("train/loss", loss, batch_size=len(x))
        self.log_dict(self.train_metrics(labelled, y), on_step=False, on_epoch=True, batch_size=len(x))
        self.entropy.update(entropy.detach())
        self.log("train/entropy", self.entropy, on_epoch=True)
        return {"loss": loss}

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self.head(self.backbone(batch[0]))
        self.log("val/loss", cross_entropy(logits, batch[1]))
        self.val_metrics[dataloader_idx].update(logits, batch[1])

    def on_validation_epoch_end(self) -> None:
        for metrics in self.val_metrics:
            self.log_dict(metrics.compute())
            metrics.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class TwoForwards(SemiSupervised):
    """The same with a forward each."""

    def logits(self, labelled: Tensor, unlabelled: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.backbone(labelled)), self.head(self.backbone(unlabelled))


class TwoSources(L.LightningDataModule):
    def rows(self, size: int, seed: int, shift: float = 0.0) -> TensorDataset:
        x = torch.randn(size, 6, generator=torch.Generator().manual_seed(seed)) + shift
        return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())

    def train_dataloader(self) -> CombinedLoader:
        loaders = {
            "labelled": DataLoader(self.rows(32, 0), batch_size=8, shuffle=True),
            "unlabelled": DataLoader(self.rows(64, 1), batch_size=8),
        }
        return CombinedLoader(loaders, "max_size_cycle")

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(self.rows(24, 2), batch_size=8), DataLoader(self.rows(16, 3, 1.0), batch_size=8)]


def train(folder: Path, *callbacks: Callback, kind: type[SemiSupervised] = SemiSupervised) -> Outcome:
    L.seed_everything(0, verbose=False)
    return fit(kind(), TwoSources(), callbacks=callbacks, max_epochs=10, default_root_dir=folder)


@pytest.mark.parametrize(
    ("callback", "frozen", "keys"),
    [
        (HybridOrder("head", SGD(lr=0.1), probes=4), HybridOrder("head", SGD(lr=0.0), probes=1), CLIENT_KEYS),
        (ZerothOrderTraining(SGD(lr=0.05), probes=4), ZerothOrderTraining(SGD(lr=0.0)), ZEROTH_ORDER_KEYS),
    ],
)
def test_metrics_count_every_batch_once(callback: Callback, frozen: Callback, keys: set[str], tmp_path: Path) -> None:
    plain, ours = train(tmp_path / "plain"), train(tmp_path / "ours", callback)
    assert_only_added(plain, ours, keys)
    assert ours.seen.updates[1]["train_metrics.accuracy"] == 2
    assert_learns(ours, train(tmp_path / "frozen", frozen), margin=0.1)


def test_two_forwards_have_no_single_multiplier(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"called 'head' 2 times, not once.*all inputs pass together \(torch.cat\)"):
        train(tmp_path, HybridOrder("head"), kind=TwoForwards)
