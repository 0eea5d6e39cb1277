"""Pattern: a project around LightningCLI, with arguments and links of its own; it knows nothing of hybrid order."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

CONFIG = """\
seed_everything: 3
project: {name: spirals, label_smoothing: 0.05}
model: {width: 8}
data: {size: 48, batch_size: 8}
optimizer: {lr: 0.05}
lr_scheduler: {T_max: 12}
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 12
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}
  callbacks:
  - class_path: tests.drop_in.side_by_side.Bystander
  - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    init_args: {logging_interval: step}
"""


class Spirals(L.LightningDataModule):
    """Points of ``arms`` arms that wind around each other."""

    def __init__(self, size: int = 60, arms: int = 3, batch_size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.num_classes, self.num_features = arms, 2

    def setup(self, stage: str) -> None:
        radius = torch.rand(self.hparams.size, generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(self.hparams.size) % self.num_classes
        angle = 2 * torch.pi * self.labels / self.num_classes + 2 * radius
        self.points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.points, self.labels), self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.points, self.labels), self.hparams.size)


class PointClassifier(L.LightningModule):
    def __init__(
        self, num_features: int, num_classes: int, width: int = 16, label_smoothing: float = 0.0, run_name: str = ""
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(num_features, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, num_classes)
        )
        self.accuracy = MulticlassAccuracy(num_classes)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1], label_smoothing=self.hparams.label_smoothing)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log_dict({"val/loss": cross_entropy(logits, batch[1]), "val/accuracy": self.accuracy})


class ProjectCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--project.name", default="unnamed")
        parser.add_argument("--project.label_smoothing", type=float, default=0.0)
        parser.link_arguments("project.name", "model.run_name")
        parser.link_arguments("project.label_smoothing", "model.label_smoothing")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.num_features", "model.num_features", apply_on="instantiate")
        parser.add_optimizer_args(torch.optim.SGD)
        parser.add_lr_scheduler_args(torch.optim.lr_scheduler.CosineAnnealingLR)

    def before_fit(self) -> None:
        self.trainer.logger.log_hyperparams({"project": self.config.fit.project.name})


def main() -> ProjectCLI:
    return ProjectCLI(PointClassifier, Spirals)
