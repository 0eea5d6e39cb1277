"""Pattern: modules that step by themselves. One optimizer is followed; the two of a GAN are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from hosfl_lightning.callbacks import HybridOrder
from hosfl_lightning.optim import SGD
from tests.drop_in.side_by_side import (
    CLIENT_KEYS,
    QUIET,
    QUIET_WARNINGS,
    Outcome,
    assert_learns,
    assert_only_added,
    fit,
)

pytestmark = QUIET_WARNINGS


class Autoencoder(nn.Module):
    def __init__(self, features: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 8), nn.Tanh(), nn.Linear(8, features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        sample = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(sample), mean, log_variance


class VariationalAutoencoder(L.LightningModule):
    """Its KL term grows with the steps; gradients are accumulated, clipped and scheduled by hand."""

    def __init__(self, features: int = 6, latent: int = 2, accumulate: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.model = Autoencoder(features, latent)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        x_hat, mean, log_variance = self.model(batch[0])
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
        loss = mse_loss(x_hat, batch[0]) + 1e-4 * min(1.0, self.global_step / 40) * divergence
        self.manual_backward(loss / self.hparams.accumulate)
        if (batch_idx + 1) % self.hparams.accumulate == 0:
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.log_dict({"train/loss": loss, "train/divergence": divergence})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)]


class GAN(L.LightningModule):
    """A generator and a discriminator take turns in every batch."""

    def __init__(self, features: int = 6, latent: int = 2) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.latent = latent
        self.generator = nn.Sequential(nn.Linear(latent, 8), nn.ReLU(), nn.Linear(8, features))
        self.discriminator = nn.Sequential(nn.Linear(features, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real, noise = batch[0], torch.randn(len(batch[0]), self.latent)
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        of_generator, of_discriminator = self.optimizers()
        self.toggle_optimizer(of_generator)
        loss = binary_cross_entropy_with_logits(self.discriminator(self.generator(noise)), ones)
        self.step(of_generator, loss)
        self.toggle_optimizer(of_discriminator)
        fake = binary_cross_entropy_with_logits(self.discriminator(self.generator(noise).detach()), zeros)
        loss = (fake + binary_cross_entropy_with_logits(self.discriminator(real), ones)) / 2
        self.step(of_discriminator, loss)

    def step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), lr=2e-4, betas=(0.5, 0.999)) for part in parts], []


def rows() -> DataLoader[Any]:
    """Six features that two numbers determine."""
    generator = torch.Generator().manual_seed(0)
    plane, hidden = torch.randn(2, 6, generator=generator), torch.randn(64, 2, generator=generator)
    return DataLoader(TensorDataset((hidden @ plane).tanh()), batch_size=16)


def train(folder: Path, kind: type[L.LightningModule], *callbacks: Callback) -> Outcome:
    L.seed_everything(0, verbose=False)
    return fit(kind(), rows(), callbacks=callbacks, max_epochs=30, default_root_dir=folder)


def test_one_optimizer_is_followed(tmp_path: Path) -> None:
    cut = "model.encoder.2"
    plain = train(tmp_path / "plain", VariationalAutoencoder)
    ours = train(tmp_path / "ours", VariationalAutoencoder, HybridOrder(cut, SGD(lr=0.1), probes=4))
    frozen = train(tmp_path / "frozen", VariationalAutoencoder, HybridOrder(cut, SGD(lr=0.0)))
    assert_only_added(plain, ours, CLIENT_KEYS)
    assert ours.trainer.global_step == 60
    assert_learns(ours, frozen, margin=0.05)


def hooks(module: nn.Module) -> Iterator[Any]:
    return (hook for m in module.modules() for hook in (*m._forward_pre_hooks, *m._forward_hooks))


@pytest.mark.parametrize(
    ("kind", "cut", "message"),
    [
        (GAN, "generator.2", r"configure_optimizers gives 2 optimizers \(as a GAN does\).*exactly one; train such a "
                             r"module with hosfl_lightning.optim.ZerothOrder in its own training_step"),
        (VariationalAutoencoder, "model.decoder", r"a path around 'model.decoder'.*move the cut"),
    ],
)  # fmt: skip
def test_what_has_no_single_multiplier_is_refused(kind: Any, cut: str, message: str) -> None:
    module, settings = kind(), QUIET | {"enable_checkpointing": False, "max_epochs": 1}
    with pytest.raises(ValueError, match=message):
        L.Trainer(**settings, callbacks=[HybridOrder(cut)]).fit(module, rows())
    assert all(p.requires_grad for p in module.parameters())
    assert not list(hooks(module))
    L.Trainer(**settings).fit(module, rows())
