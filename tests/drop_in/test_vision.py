"""Pattern: a small CNN with batch norm; images are augmented within training_step, by torch's random state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from hosfl_lightning.callbacks import HybridOrder
from hosfl_lightning.optim import SGD
from tests.drop_in.side_by_side import CLIENT_KEYS, QUIET_WARNINGS, Outcome, assert_learns, assert_only_added, fit

pytestmark = QUIET_WARNINGS


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class ImageClassifier(L.LightningModule):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = block(1, 4)
        self.body = block(4, 8)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, classes))
        self.train_accuracy, self.val_accuracy = MulticlassAccuracy(classes), MulticlassAccuracy(classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))

    @torch.no_grad()
    def augment(self, x: Tensor) -> Tensor:
        flipped = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
        return flipped.roll(int(torch.randint(-1, 2, ())), 2) + 0.05 * torch.randn_like(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = self.augment(batch[0]), batch[1]
        share, order = torch.distributions.Beta(0.2, 0.2).sample(), torch.randperm(len(x))
        logits = self(share * x + (1 - share) * x[order])
        loss = share * cross_entropy(logits, y) + (1 - share) * cross_entropy(logits, y[order])
        self.train_accuracy(logits, y)
        self.log("train/loss", loss)
        self.log("train/accuracy", self.train_accuracy, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.val_accuracy(self(batch[0]), batch[1])
        self.log("val/accuracy", self.val_accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def stripes() -> TensorDataset:
    """Horizontal, vertical, or none."""
    generator = torch.Generator().manual_seed(0)
    images, labels = 0.5 * torch.randn(48, 1, 8, 8, generator=generator), torch.arange(48) % 3
    images[labels == 0, :, ::2] += 1
    images[labels == 1, :, :, ::2] += 1
    return TensorDataset(images, labels)


def train(folder: Path, *callbacks: Callback, **settings: Any) -> Outcome:
    L.seed_everything(0, verbose=False)
    loaders = DataLoader(stripes(), batch_size=16, shuffle=True), DataLoader(stripes(), batch_size=24)
    settings = {"max_epochs": 10, "default_root_dir": folder} | settings
    return fit(ImageClassifier(), *loaders, callbacks=callbacks, **settings)


def test_only_the_callback_came_in_and_the_stem_learns(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain")
    ours = train(tmp_path / "ours", HybridOrder("body", SGD(lr=0.1), probes=8))
    frozen = train(tmp_path / "frozen", HybridOrder("body", SGD(lr=0.0)))
    assert_only_added(plain, ours, CLIENT_KEYS)
    assert_learns(ours, frozen, margin=0.03)


def test_probes_leave_no_trace_in_batch_norm(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", max_steps=1)
    ours = train(tmp_path / "ours", HybridOrder("head", probes=8), max_steps=1)
    statistics = [dict(run.module.named_buffers()) for run in (plain, ours)]
    assert statistics[0]["stem.1.num_batches_tracked"] == 1
    assert all(torch.equal(value, statistics[1][name]) for name, value in statistics[0].items())
