"""HybridOrder beside Trainer's own settings, callbacks, checkpoints and processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, Subset

from hosfl_lightning.callbacks import (
    CommunicationMonitor,
    DimensionFreeAggregation,
    LagrangianUpdate,
    PeakMemoryMonitor,
    ZerothOrderTraining,
)
from hosfl_lightning.callbacks.drop_in.hybrid_order import HybridOrder
from hosfl_lightning.optim import SGD, AdamW
from tests.callbacks.drop_in.plain_modules import (
    LIGHTNING_WARNINGS,
    QUIET,
    Parts,
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


def test_what_an_optimizer_step_of_the_users_own_gives_up_is_given_up_below_too() -> None:
    """Lightning zeroes the gradients in each closure, so a step every other batch uses the second one alone."""

    class Every(Sequential):
        def optimizer_step(  # type: ignore[override]
            self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any
        ) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    every, second, order = Every(*mlp().net), mlp(), hybrid()
    rows = [i for i in range(32) if i % 16 >= 8]
    trainers = [fit(every, order), fit(second, hybrid(), data=DataLoader(Subset(loader().dataset, rows), 8))]
    assert order._client.optimizer.steps == 2  # type: ignore[union-attr]
    assert same_bits(every, second)
    norms = [float(trainer.callback_metrics["client/multiplier_norm"]) for trainer in trainers]
    assert norms[0] == norms[1]


def test_clipping_acts_above_the_cut_only() -> None:
    free, clipped, start = mlp(), mlp(), mlp()
    fit(free, hybrid(), max_steps=1)
    fit(clipped, hybrid(), max_steps=1, gradient_clip_val=1e-4)
    assert torch.equal(free.net[0].weight, clipped.net[0].weight)
    moved = torch.cat([(p - q).detach().flatten() for p, q in zip(clipped.parameters(), start.parameters())][2:])
    assert float(moved.norm()) == pytest.approx(0.1 * 1e-4, rel=1e-2)


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

    held: list[bool] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            held.append(order.lower.untaken or pl_module.net[0].weight.requires_grad)

    order = hybrid()
    fit(Skips(*mlp().net), order, Watch())
    assert order._client.optimizer.steps == 2  # type: ignore[union-attr]
    assert held == [False] * 4


class Scheduled(Sequential):
    """With what users add: a schedule, validation, a metric to stop at."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", cross_entropy(self.net(batch[0]), batch[1]))

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(32)


class Hooks(Callback):
    """The order in which Trainer calls, and what is logged and saved."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.checkpoint: dict[str, Any] = {}

    def __getattribute__(self, name: str) -> Any:
        hook = super().__getattribute__(name)
        if name.startswith("on_") and name != "on_save_checkpoint":
            self.order.append(name)
        return hook

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.checkpoint = checkpoint


def test_nothing_else_changes(tmp_path: Path) -> None:
    runs = []
    for callbacks in ([hybrid(verify=True)], []):
        hooks, module = Hooks(), Scheduled(*mlp().net)
        save = ModelCheckpoint(tmp_path / str(len(runs)), monitor="val/loss")
        trainer = fit(module, hooks, save, *callbacks, max_epochs=2, enable_checkpointing=True)
        ours = {name for name in trainer.callback_metrics if name.startswith("client/")}
        logged = set(trainer.callback_metrics) - ours
        checkpoint = {
            name: set(value) if isinstance(value, dict) else value for name, value in hooks.checkpoint.items()
        }
        checkpoint = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        checkpoint["callbacks"] = {name for name in checkpoint["callbacks"] if name != "HybridOrder"}
        lr, steps = trainer.optimizers[0].param_groups[0]["lr"], trainer.global_step
        state = list(hooks.checkpoint["state_dict"])
        runs.append((hooks.order, logged, str(checkpoint).replace("/0/", "/1/"), lr, steps, state))
    assert runs[0][3:5] == (0.1 / 4, 8)
    assert runs[0] == runs[1]


def test_early_stopping_and_max_steps_stop_it() -> None:
    stop = EarlyStopping("val/loss", patience=1, min_delta=100.0)
    for settings, callbacks, steps in (({"max_steps": 3}, [], 3), ({"max_epochs": 9}, [stop], 8)):
        order = hybrid()
        trainer = fit(Scheduled(*mlp().net), order, *callbacks, **settings)
        assert trainer.global_step == order._client.optimizer.steps == steps  # type: ignore[union-attr]


def test_the_trainers_own_steps_are_taken_and_report_once_a_step() -> None:
    update, aggregation = LagrangianUpdate(), DimensionFreeAggregation()
    order, reports = hybrid(), []
    report = aggregation.report
    aggregation.report = lambda *args: reports.append(report(*args))  # type: ignore[method-assign]
    given = fit(mlp(), update, order, aggregation, accumulate_grad_batches=2)
    made = fit(mlp(), hybrid(), accumulate_grad_batches=2)
    assert order.lagrangian_update is update
    assert len(reports) == given.global_step == 2
    assert {k: float(v) for k, v in given.callback_metrics.items()} == {
        k: float(v) for k, v in made.callback_metrics.items()
    }
    assert not update.adopted
    with pytest.raises(ValueError, match="more than one LagrangianUpdate"):
        fit(mlp(), hybrid(), LagrangianUpdate(), LagrangianUpdate())


@pytest.mark.parametrize("kind", [LagrangianUpdate, DimensionFreeAggregation, CommunicationMonitor])
def test_a_step_of_a_round_without_rounds_says_so(kind: type[Callback]) -> None:
    with pytest.warns(UserWarning, match=f"{kind.__name__} has nothing to report in this Trainer.*add HybridOrder"):
        fit(mlp(), kind(), max_steps=1)


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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    fit(mlp(), hybrid(), ModelCheckpoint(folder, save_last=True), enable_checkpointing=True)
    return folder / "last.ckpt"


@pytest.mark.parametrize(
    ("name", "value"),
    [("probes", 3), ("mu", 0.01), ("estimator", "central"), ("distribution", "gauss16"), ("seed", 1)],
)
def test_a_checkpoint_of_other_settings_is_refused(checkpoint: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"saved with {name}=.*, now it is {value}"):
        fit(mlp(), hybrid(**{name: value}), max_epochs=2, ckpt_path=checkpoint)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (HybridOrder("net.2", SGD(lr=0.1, momentum=0.5)), r"rule\.momentum=0\.0, now it is 0\.5"),
        (HybridOrder("net.2", SGD(lr=0.1, weight_decay=0.1)), r"rule\.weight_decay=0\.0, now it is 0\.1"),
        (hybrid(cut="net.3", client="net.0."), r"cut=net\.2, now it is net\.3"),
    ],
)
def test_the_rules_settings_and_the_cut_are_compared(checkpoint: Path, order: HybridOrder, message: str) -> None:
    with pytest.raises(ValueError, match=f"ckpt_path: HybridOrder was saved with {message}"):
        fit(mlp(), order, max_epochs=2, ckpt_path=checkpoint)


@pytest.mark.filterwarnings("default::FutureWarning")
def test_a_trainer_without_it_is_told_which_callback_it_lacks(tmp_path: Path) -> None:
    """By Lightning, before torch refuses the optimizer's state; docs/resume.md explains the second."""
    order = HybridOrder("head", SGD(lr=0.01))
    fit(Parts(), order).save_checkpoint(tmp_path / "c.ckpt")
    lacking = pytest.warns(UserWarning, match="Please add the following callbacks: .*'HybridOrder'")
    with lacking, pytest.raises(ValueError, match="parameter group that doesn't match the size"):
        fit(Parts(), max_epochs=2, ckpt_path=tmp_path / "c.ckpt")


@pytest.mark.parametrize("named", ["trainable", "all"])
def test_a_checkpoint_of_a_trainer_without_it_is_refused_before_torch_compares(tmp_path: Path, named: str) -> None:
    class Named(Parts):
        def configure_optimizers(self) -> Any:
            chosen = [p for p in self.parameters() if named == "all" or p.requires_grad]
            return torch.optim.SGD(chosen, lr=0.1)

    plain = fit(Named())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    for callback in (HybridOrder("head"), ZerothOrderTraining()):
        with pytest.raises(ValueError, match="ckpt_path: the checkpoint was written without"):
            fit(Named(), callback, max_epochs=2, ckpt_path=tmp_path / "plain.ckpt")


def test_a_checkpoint_of_another_cut_is_refused_before_torch_compares(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"HybridOrder was saved with cut=net.2, now it is net.1"):
        fit(mlp(), hybrid("net.1"), max_epochs=2, ckpt_path=checkpoint)


def test_a_resumed_run_has_the_learning_rate_of_its_rule(checkpoint: Path) -> None:
    trainer = fit(mlp(), hybrid(lr=0.02), max_epochs=2, ckpt_path=checkpoint)
    assert float(trainer.callback_metrics["client/lr"]) == pytest.approx(0.02)


# ---- several processes


class SaveRank(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        torch.save({"state": pl_module.state_dict(), "logged": logged}, self.folder / f"rank{trainer.global_rank}.pt")


class Interleaved(Sequential):
    """Rank r of two takes examples r, r + 2, ...; a step of both takes those of one process with the double batch."""

    def train_dataloader(self) -> DataLoader[Any]:
        dataset: Any = loader().dataset
        sampler = DistributedSampler(dataset, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(dataset, batch_size=8 // self.trainer.world_size, sampler=sampler)


def test_two_ranks_are_one_process_with_the_double_batch(tmp_path: Path) -> None:
    one, two = Interleaved(*mlp().net), Interleaved(*mlp().net)
    trainers = [L.Trainer(**QUIET, callbacks=[hybrid()], max_epochs=1)]
    callbacks = [CommunicationMonitor(), hybrid(), PeakMemoryMonitor(), SaveRank(tmp_path)]
    trainers += [L.Trainer(**(QUIET | {"devices": 2}), callbacks=callbacks, max_epochs=1,
                           strategy="ddp_spawn", use_distributed_sampler=False)]  # fmt: skip
    for trainer, module in zip(trainers, (one, two)):
        trainer.fit(module)
    saved = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    ranks, logged = [s["state"] for s in saved], saved[0]["logged"]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert all(torch.allclose(ranks[0][name], value, atol=1e-5) for name, value in one.state_dict().items())
    assert distance(one, mlp()) > 1e-2
    # Two scalars in fp32 from each rank to the other, four steps.
    assert logged["comm/projected_gradients_bytes"] == logged["comm/up_bytes"] == 2 * 2 * 4
    assert (logged["comm/down_bytes"], logged["comm/total_bytes"]) == (0, 4 * 16)
    assert logged["memory/step_working_bytes"] > logged["memory/lower_working_bytes"] > 0


def test_trainer_settings_that_would_break_it() -> None:
    with pytest.raises(ValueError, match="more than one HybridOrder"):
        fit(mlp(), Again("net.2"), hybrid())


class Again(HybridOrder):
    """Another state key, which Trainer wants of two callbacks of a kind."""

    @property
    def state_key(self) -> str:
        return "Again"
