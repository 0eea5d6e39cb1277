"""ZerothOrder under Lightning's Trainer (manual optimization) and Fabric: each loop ends at the bits of a plain one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hosfl_lightning.optim import SGD, AdamW, ZerothOrder

BATCHES = 3
PROBES = 2

pytestmark = [
    # Lightning 2.6 calls what torch 2.13 deprecates; its advice on workers is for real data.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batches() -> DataLoader[Any]:
    x = normal(4 * BATCHES, 8, seed=1)
    return DataLoader(TensorDataset(x, x[:, :1].tanh()), batch_size=4)


class Split(L.LightningModule):
    """A lower half for ZerothOrder below an upper half for SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lower, self.upper = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 1)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=seed) / 2)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return (self.upper(self.lower(x)).float() - y).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        return batches()


class ForwardOnly(Split):
    """All parameters by one closure through Lightning's wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.hooks = 0

    def make_optimizer(self) -> ZerothOrder:
        return ZerothOrder(self.parameters(), AdamW(lr=0.05), module=self, probes=PROBES, mu=0.02)

    def configure_optimizers(self) -> ZerothOrder:
        return self.make_optimizer()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = optimizer.step(lambda: self.loss(batch))
        self.losses.append(float(loss))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.hooks += 1


def one_round(model: Split, batch: list[Tensor], fo: torch.optim.Optimizer, zo: ZerothOrder, backward: Any) -> None:
    """λ = ∂loss/∂z by backprop through the upper half, ⟨λ, z⟩ by forwards through the lower one."""
    x, y = batch
    with torch.no_grad():
        z = model.lower(x)
    cut = z.clone().requires_grad_()
    fo.zero_grad()
    backward((model.upper(cut).float() - y).square().mean())
    fo.step()
    multiplier = cut.grad.float()
    zo.record(zo.project(lambda: ((model.lower(x).float() - z.float()) * multiplier).double().sum()))
    zo.step()


class Hybrid(Split):
    """The upper half through Lightning's wrapper, the lower half on the raw optimizer."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        lower = ZerothOrder(self.lower.parameters(), SGD(lr=0.1), module=self.lower, probes=PROBES, mu=0.02)
        return [torch.optim.SGD(self.upper.parameters(), lr=0.1), lower]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        fo, zo = optimizers
        one_round(self, batch, fo, zo.optimizer, self.manual_backward)


def trainer(path: Path, epochs: int = 1, **settings: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, **settings,
    )  # fmt: skip


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


def plain_forward_only(precision: str = "32-true", epochs: int = 1) -> ForwardOnly:
    model = ForwardOnly()
    zo = model.make_optimizer()

    def loss(batch: list[Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return model.loss(batch)

    for _ in range(epochs):
        for batch in batches():
            model.losses.append(float(zo.step(partial(loss, batch))))
    return model


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_closure_through_the_trainers_wrapper(precision: str, tmp_path: Path) -> None:
    model = ForwardOnly()
    before = [p.detach().clone() for p in model.parameters()]
    fit = trainer(tmp_path, precision=precision)
    fit.fit(model)
    plain = plain_forward_only(precision)
    assert_same_weights(model, plain)
    assert model.losses == plain.losses
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    assert fit.global_step == BATCHES
    assert model.hooks == BATCHES * (PROBES + 1)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_hybrid_of_two_optimizers(precision: str, tmp_path: Path) -> None:
    model, plain = Hybrid(), Hybrid()
    fit = trainer(tmp_path, precision=precision)
    fit.fit(model)
    fo, zo = plain.configure_optimizers()
    assert isinstance(zo, ZerothOrder)
    for batch in batches():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            one_round(plain, batch, fo, zo, torch.Tensor.backward)
    assert_same_weights(model, plain)
    assert fit.global_step == BATCHES  # the raw step is not counted
    assert all(p.grad is None for p in model.lower.parameters())
    assert all(p.grad is not None for p in model.upper.parameters())


class Recorded(ForwardOnly):
    """Recorded on the raw optimizer, stepped through the wrapper."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        wrapped: Any = self.optimizers()
        wrapped.optimizer.record(wrapped.optimizer.project(lambda: self.loss(batch)))
        wrapped.step()


def test_recorded_values_through_the_wrapper_fire_one_hook_a_step(tmp_path: Path) -> None:
    model = Recorded()
    fit = trainer(tmp_path)
    fit.fit(model)
    assert_same_weights(model, plain_forward_only())
    assert fit.global_step == model.hooks == BATCHES


class RecordedOnTheWrapper(ForwardOnly):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        wrapped: Any = self.optimizers()
        wrapped.record(wrapped.project(lambda: self.loss(batch)))
        wrapped.step()


def test_recording_on_the_wrapper_is_not_lost(tmp_path: Path) -> None:
    model = RecordedOnTheWrapper()
    trainer(tmp_path).fit(model)
    assert_same_weights(model, plain_forward_only())


def test_a_step_with_nothing_to_apply_is_refused_under_the_wrapper_too(tmp_path: Path) -> None:
    class Nothing(ForwardOnly):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.step()

    with pytest.raises(RuntimeError, match="nothing to apply"):
        trainer(tmp_path).fit(Nothing())


@pytest.mark.parametrize("kind", [ForwardOnly, Hybrid])
def test_resumed_by_the_trainer_is_never_stopped(kind: type[Split], tmp_path: Path) -> None:
    straight, stopped, resumed = kind(), kind(), kind()
    trainer(tmp_path, epochs=2).fit(straight)
    first = trainer(tmp_path, epochs=1)
    first.fit(stopped)
    first.save_checkpoint(tmp_path / "round.ckpt")
    second = trainer(tmp_path, epochs=2)
    second.fit(resumed, ckpt_path=tmp_path / "round.ckpt", weights_only=True)
    assert_same_weights(resumed, straight)
    assert second.global_step == 2 * BATCHES
    assert not torch.equal(stopped.upper.weight, straight.upper.weight)


def fabric_of(precision: Any = "32-true") -> L.Fabric:
    return L.Fabric(accelerator="cpu", devices=1, precision=precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_closure_through_fabrics_wrapper(precision: str) -> None:
    model, fabric = ForwardOnly(), fabric_of(precision)
    fabric.setup_module(model)
    optimizer: Any = fabric.setup_optimizers(model.make_optimizer())

    def loss(batch: list[Tensor]) -> Tensor:
        with fabric.autocast():
            return model.loss(batch)

    for batch in batches():
        model.losses.append(float(optimizer.step(partial(loss, batch))))
    plain = plain_forward_only(precision)
    assert_same_weights(model, plain)
    assert model.losses == plain.losses


def test_recorded_values_through_fabrics_wrapper_and_checkpoint(tmp_path: Path) -> None:
    def make() -> tuple[ForwardOnly, Any]:
        model = ForwardOnly()
        fabric.setup_module(model)
        return model, fabric.setup_optimizers(model.make_optimizer())

    fabric = fabric_of()
    stopped, resumed = make(), make()
    for model, optimizer in (stopped, resumed):
        for batch in batches():
            optimizer.optimizer.record(optimizer.optimizer.project(partial(model.loss, batch)))
            optimizer.step()
        if model is stopped[0]:
            fabric.save(tmp_path / "fabric.ckpt", {"model": model, "optimizer": optimizer})
            fabric.load(tmp_path / "fabric.ckpt", {"model": resumed[0], "optimizer": resumed[1]}, weights_only=True)
    assert_same_weights(resumed[0], plain_forward_only(epochs=2))
    assert resumed[1].optimizer.steps == 2 * BATCHES
