"""Modules that know nothing of hybrid order, their data, and a quiet Trainer."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from hosfl_lightning.callbacks.drop_in.hybrid_order import HybridOrder
from hosfl_lightning.optim import SGD

FEATURES, CLASSES = 6, 3
#: What Lightning says to small runs, and asks of torch.
LIGHTNING_WARNINGS = [
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
]
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "log_every_n_steps": 1,
}  # fmt: skip


class Sequential(L.LightningModule):
    """One submodule holds everything: replays call it."""

    def __init__(self, *layers: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.net, self.lr = nn.Sequential(*layers), lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Parts(L.LightningModule):
    """The parts are held by the module itself: replays call ``training_step``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.3))
        self.head = nn.Linear(8, CLASSES)
        self.seen = MeanMetric()
        self.calls = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        self.calls += 1
        self.seen.update(len(x))
        self.log("calls", float(self.calls))
        return {"loss": cross_entropy(self.head(self.encoder(x)), y)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)


def mlp(*extra: nn.Module, lr: float = 0.1) -> Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 8), nn.Tanh(), *extra, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES)]
    return Sequential(*layers, lr=lr)


def loader(batch_size: int = 8, size: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, FEATURES, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def fit(
    module: L.LightningModule, *callbacks: Callback, data: Any = None, ckpt_path: Any = None, **kw: Any
) -> L.Trainer:
    trainer = L.Trainer(callbacks=list(callbacks), **(QUIET | {"max_epochs": 1} | kw))
    trainer.fit(module, data if data is not None else loader(), ckpt_path=ckpt_path)
    return trainer


def hybrid(cut: str = "net.2", lr: float = 0.1, **kwargs: Any) -> HybridOrder:
    return HybridOrder(cut, SGD(lr=lr), **kwargs)


def loss_of(module: Sequential) -> float:
    x, y = loader(32).dataset[:]
    with torch.no_grad():
        return float(cross_entropy(module.net(x), y))


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def distance(a: nn.Module, b: nn.Module) -> float:
    return max(
        float((p - q).abs().max()) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
