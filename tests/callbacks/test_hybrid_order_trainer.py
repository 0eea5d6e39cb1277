"""HybridOrder beside Trainer's own settings, callbacks, checkpoints and processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

from hosfl_lightning.callbacks.cut_check import CutError
from hosfl_lightning.callbacks.hybrid_order import HybridOrder
from hosfl_lightning.optim import SGD, AdamW
from tests.callbacks.plain_modules import (
    LIGHTNING_WARNINGS,
    QUIET,
    Sequential,
    distance,
    fit,
    hybrid,
    loader,
    loss_of,
    mlp,
    same_bits,
)

pytestmark = LIGHTNING_WARNINGS


# ---- Trainer's own settings


def test_two_accumulated_batches_are_one_double_batch() -> None:
    whole, halves = mlp(), mlp()
    fit(whole, hybrid(), data=loader(16))
    trainer = fit(halves, hybrid(), data=loader(8), accumulate_grad_batches=2)
    assert trainer.global_step == 2
    assert distance(whole, mlp()) > 0
    assert distance(whole, halves) < 1e-5


def test_an_incomplete_accumulation_steps_at_the_end_of_the_epoch() -> None:
    order = hybrid()
    trainer = fit(mlp(), order, data=loader(8, size=24), accumulate_grad_batches=2)
    assert trainer.global_step == order._client.optimizer.steps == 2  # type: ignore[union-attr]


def test_clipping_acts_above_the_cut_only() -> None:
    free, clipped, start = mlp(), mlp(), mlp()
    fit(free, hybrid(), max_steps=1)
    fit(clipped, hybrid(), max_steps=1, gradient_clip_val=1e-4)
    assert torch.equal(free.net[0].weight, clipped.net[0].weight)
    moved = torch.cat([(p - q).detach().flatten() for p, q in zip(clipped.parameters(), start.parameters())][2:])
    assert float(moved.norm()) == pytest.approx(0.1 * 1e-4, rel=1e-2)


def test_bf16_mixed_agrees_with_fp32() -> None:
    narrow, wide, start = mlp(), mlp(), mlp()
    dtypes: list[torch.dtype] = []
    narrow.net[0].register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    fit(narrow, hybrid(mu=0.03, estimator="central"), precision="bf16-mixed", max_steps=2)
    fit(wide, hybrid(mu=0.03, estimator="central"), max_steps=2)
    assert distance(narrow.net[0], wide.net[0]) < 0.2 * distance(wide.net[0], start.net[0])
    assert set(dtypes) == {torch.bfloat16}  # probes run in the precision of the step


def test_a_module_built_in_configure_model() -> None:
    class Late(Sequential):
        def configure_model(self) -> None:
            if not len(self.net):
                self.net = mlp().net

    late, early = Late(), mlp()
    for module in (late, early):
        fit(module, hybrid(), max_steps=2)
    assert same_bits(late, early)


def test_validation_sees_the_updated_module() -> None:
    class Validated(Sequential):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val/loss", cross_entropy(self.net(batch[0]), batch[1]))

        def val_dataloader(self) -> DataLoader[Any]:
            return loader(32)

    module = Validated(*mlp().net)
    trainer = fit(module, hybrid())
    assert float(trainer.callback_metrics["val/loss"]) == loss_of(module)


def test_a_skipped_batch_is_skipped_below_too() -> None:
    class Skips(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (0, 2) else loss

    order = hybrid()
    fit(Skips(*mlp().net), order)
    assert order._client.optimizer.steps == 2  # type: ignore[union-attr]


# ---- checkpoints


@pytest.mark.parametrize("rule", [SGD(lr=0.1, momentum=0.9), AdamW(lr=0.01)])
def test_resumed_is_never_stopped_bit_for_bit(tmp_path: Path, rule: Any) -> None:
    whole, resumed = mlp(), mlp()
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    fit(whole, HybridOrder("net.2", rule), save, max_epochs=2, enable_checkpointing=True)
    middle = tmp_path / "step=4.ckpt"
    stored = torch.load(middle, weights_only=True)["callbacks"]["HybridOrder"]
    assert stored["optimizer"]["param_groups"][0]["step"] == 4
    fit(resumed, HybridOrder("net.2", rule), max_epochs=2, ckpt_path=middle)
    assert same_bits(whole, resumed)


def test_a_checkpoint_of_another_rule_is_refused(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, save_last=True)
    fit(mlp(), HybridOrder("net.2", SGD()), save, enable_checkpointing=True)
    with pytest.raises(ValueError, match="rule=SGD, now it is AdamW"):
        fit(mlp(), HybridOrder("net.2", AdamW()), max_epochs=2, ckpt_path=tmp_path / "last.ckpt")


# ---- several processes


class SaveRank(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"rank{trainer.global_rank}.pt")


class Interleaved(Sequential):
    """Rank r of two takes examples r, r + 2, ...; a step of both takes those of one process with the double batch."""

    def train_dataloader(self) -> DataLoader[Any]:
        dataset: Any = loader().dataset
        sampler = DistributedSampler(dataset, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(dataset, batch_size=8 // self.trainer.world_size, sampler=sampler)


def test_two_ranks_are_one_process_with_the_double_batch(tmp_path: Path) -> None:
    one, two = Interleaved(*mlp().net), Interleaved(*mlp().net)
    trainers = [L.Trainer(**QUIET, callbacks=[hybrid()], max_epochs=1)]
    trainers += [L.Trainer(**(QUIET | {"devices": 2}), callbacks=[hybrid(), SaveRank(tmp_path)], max_epochs=1,
                           strategy="ddp_spawn", use_distributed_sampler=False)]  # fmt: skip
    for trainer, module in zip(trainers, (one, two)):
        trainer.fit(module)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert all(torch.allclose(ranks[0][name], value, atol=1e-5) for name, value in one.state_dict().items())
    assert distance(one, mlp()) > 1e-2


def test_trainer_settings_that_would_break_it() -> None:
    with pytest.raises(ValueError, match="more than one HybridOrder"):
        fit(mlp(), Again("net.2"), hybrid())
    with pytest.raises(ValueError, match="a compiled LightningModule"):
        fit(torch.compile(mlp(), backend="eager"), hybrid())  # type: ignore[arg-type]
    module = mlp()
    module.net[0].compile(backend="eager")
    with pytest.raises(CutError, match=r"'net.0' is compiled"):
        fit(module, hybrid())


class Again(HybridOrder):
    """Another state key, which Trainer wants of two callbacks of a kind."""

    @property
    def state_key(self) -> str:
        return "Again"
