"""A whole module trained by forwards in a plain Trainer: the method, Trainer's settings, checkpoints, two processes."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceXLAStrategy, XLAStrategy
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, DistributedSampler

from hosfl_lightning.callbacks import HybridOrder, ZerothOrderTraining
from hosfl_lightning.optim import SGD, AdamW, SharedDirections, UpdateRule, ZerothOrder, together
from hosfl_lightning.rng import add_direction_
from tests.callbacks.drop_in.plain_modules import (
    LIGHTNING_WARNINGS,
    QUIET,
    Parts,
    Sequential,
    distance,
    fit,
    loader,
    loss_of,
    mlp,
    same_bits,
)

pytestmark = LIGHTNING_WARNINGS


def zeroth(lr: float = 0.1, **settings: Any) -> ZerothOrderTraining:
    return ZerothOrderTraining(SGD(lr=lr), **settings)


class Each(Callback):
    """What ``look`` returns after every batch."""

    def __init__(self, look: Any) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen.append(self.look(trainer))


# ---- it trains, and as the formulas say


def test_it_learns_and_makes_neither_graph_nor_gradient() -> None:
    module = mlp()
    before = loss_of(module)
    graphs: list[bool] = []
    module.net.register_forward_hook(lambda m, args, out: graphs.append(out.requires_grad))
    gradients = Each(lambda trainer: [p.grad for p in module.parameters()])
    order = zeroth(probes=4)
    trainer = fit(module, order, gradients, max_epochs=30)
    assert order._optimizer.module is module  # type: ignore[union-attr]  # so its probes are layer-wise
    assert loss_of(module) < before - 0.3
    assert trainer.global_step == 120
    assert len(graphs) > 120 and not any(graphs)
    assert gradients.seen == [[None] * 6] * 120
    assert all(p.requires_grad for p in module.parameters())


def reference(module: Sequential, steps: int, probes: int, mu: float, seed: int, central: bool) -> None:
    """The method in plain PyTorch, with SGD."""
    theta = dict(module.net.named_parameters())
    for step, (x, y) in zip(range(steps), loader()):
        gradient = {name: torch.zeros_like(p) for name, p in theta.items()}
        for stream in SharedDirections(seed, step, probes).streams:
            u = {name: torch.zeros(p.numel()) for name, p in theta.items()}
            for tensor, name in enumerate(theta):
                add_direction_(u[name], torch.tensor(1.0), stream, tensor, 0)

            def moved(scale: float, u: dict[str, Tensor] = u, x: Tensor = x, y: Tensor = y) -> Tensor:
                shifted = {n: p.detach() + scale * u[n].view_as(p) for n, p in theta.items()}
                return cross_entropy(functional_call(module.net, shifted, (x,)), y).double()

            v = (moved(mu) - moved(-mu)) / (2 * mu) if central else (moved(mu) - moved(0.0)) / mu
            for name, p in theta.items():
                gradient[name] += v.float() / probes * u[name].view_as(p)
        with torch.no_grad():
            for name, p in theta.items():
                p -= 0.1 * gradient[name]


@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_equals_the_method_in_plain_pytorch(estimator: str) -> None:
    module, plain = mlp(), mlp()
    fit(module, zeroth(probes=3, mu=2**-7, seed=7, estimator=estimator), max_steps=3)
    reference(plain, 3, probes=3, mu=2**-7, seed=7, central=estimator == "central")
    assert distance(plain, mlp()) > 1e-2
    assert distance(module, plain) < 2e-6


@pytest.mark.parametrize("distribution", ["rademacher", "gauss16"])
def test_equals_zeroth_order_in_a_loop_bit_for_bit(distribution: str) -> None:
    settings: dict[str, Any] = {"probes": 2, "mu": 0.01, "seed": 3, "distribution": distribution}
    module, plain = mlp(), mlp()
    fit(module, ZerothOrderTraining(AdamW(lr=0.01), **settings))
    zo = ZerothOrder(plain.parameters(), AdamW(lr=0.01), module=plain, estimator="central", **settings)
    for x, y in loader():
        zo.step(lambda x=x, y=y: cross_entropy(plain.net(x), y))
    assert same_bits(module, plain)


def test_what_is_light_beside_the_module_moves_all_at_once_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hosfl_lightning.optim.together.FEW", 0)  # what is few has no hooks in any batch

    def light() -> Sequential:
        torch.manual_seed(0)
        module = mlp(nn.Linear(8, 200), nn.Tanh(), nn.Linear(200, 8))
        module.requires_grad_(False)
        module.net[0].bias.requires_grad_(True)
        return module

    module, plain, order = light(), light(), zeroth(probes=2)
    hooks: list[int] = []
    module.net[0].register_forward_pre_hook(lambda layer, args: hooks.append(len(layer._forward_pre_hooks)))
    fit(module, order)
    zo = ZerothOrder([plain.net[0].bias], SGD(lr=0.1), module=plain, probes=2, estimator="central")
    for x, y in loader():
        zo.step(lambda x=x, y=y: cross_entropy(plain.net(x), y))
    assert same_bits(module, plain)
    assert not same_bits(module, light())
    assert hooks == [2, 2, 2, 2, 1, 1, 2, 1] + [1] * 12  # the first batch by layers, two of its checks at θ


def test_what_the_users_optimizer_does_not_hold_or_is_frozen_stays() -> None:
    class Head(Sequential):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.net[2].weight.requires_grad_(False)
            return torch.optim.AdamW(self.net[2:].parameters(), weight_decay=0.5)

    module, start = Head(*mlp().net), mlp()
    fit(module, zeroth())
    changed = [not torch.equal(p, q) for p, q in zip(module.parameters(), start.parameters())]
    assert changed == [False, False, False, True, True, True]


def test_parameters_unfrozen_or_frozen_after_the_start_are_told() -> None:
    class Backbone(Sequential):
        @property
        def backbone(self) -> nn.Module:
            return self.net[0]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=self.lr)

    module, order = Backbone(*mlp().net), zeroth()
    with pytest.raises(ValueError, match="unfrozen since training started, as by BackboneFinetuning"):
        fit(module, order, BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False), max_epochs=2)
    assert order.state_dict()["optimizer"]["param_groups"][0]["step"] == 4
    fit(Backbone(*mlp().net), zeroth(), BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False), max_epochs=2)
    with pytest.raises(ValueError, match="parameters were frozen or unfrozen"):
        fit(mlp(), zeroth(), Each(lambda trainer: trainer.model.net[2].requires_grad_(False)))


# ---- the user's step, as often as the user wrote it


@pytest.mark.parametrize(("estimator", "count"), [("central", 2 * 2), ("forward", 1 + 2)])
def test_logs_and_metrics_count_every_batch_once(estimator: str, count: int) -> None:
    module = Parts()
    trainer = fit(module, zeroth(probes=2, estimator=estimator))
    assert module.seen.update_count == 4
    assert module.calls == 4 * count + 4  # four to check the first batch
    assert trainer.callback_metrics["calls"] == 3 * count + 4 + 1  # logged by the first run of the last batch
    assert {"zeroth_order/lr", "zeroth_order/projected_gradient_rms", "calls"} == set(trainer.callback_metrics)


@pytest.mark.parametrize("normed", [False, True])
def test_central_counts_its_first_side_and_returns_the_mean_unless_statistics_move(normed: bool) -> None:
    class Tells(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "kept": batch_idx} if normed else loss

    class Kept(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, out: Any, *_: Any) -> None:
            self.out = out

    nets = [mlp(*[nn.BatchNorm1d(8)] * normed) for _ in range(2)]
    module, plain, kept = Tells(*nets[0].net), nets[1], Kept()
    logged = fit(module, zeroth(probes=2, mu=0.1), kept, max_steps=1).callback_metrics["train/loss"]
    x, y = next(iter(loader()))
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(cross_entropy(plain.net(x), y))
        return seen[-1]

    zo = ZerothOrder(plain.parameters(), SGD(lr=0.1), module=plain, probes=2, mu=0.1, estimator="central")
    returned = zo.step(closure)
    assert len({float(loss) for loss in seen}) == len(seen) == 4 + normed
    assert torch.equal(logged, seen[0])
    assert torch.equal(kept.out["loss"], returned)
    assert torch.equal(returned, seen[0] if normed else torch.stack(seen).double().mean().float())
    assert ("kept" in kept.out) == normed


def test_probes_see_the_batchs_dropout_and_leave_the_random_state_and_statistics() -> None:
    states, statistics, outputs = [], [], []
    for callbacks in ([], [zeroth(lr=0.0)]):
        torch.manual_seed(3)
        module = mlp(nn.BatchNorm1d(8, momentum=0.5), nn.Dropout(0.5), lr=0.0)
        module.net[3].register_forward_hook(lambda m, args, out: outputs.append(out == 0))
        fit(module, *callbacks)
        states.append(torch.get_rng_state())
        statistics.append(module.net[2].running_var)
        assert module.net[2].num_batches_tracked == 4
    assert torch.equal(*states)
    assert torch.equal(*statistics)
    plain, ours = outputs[:4], outputs[4:]
    assert [torch.equal(ours[i], plain[0]) for i in range(7)] == [True] * 7
    assert [torch.equal(ours[i], plain[1]) for i in range(7, 10)] == [True] * 3
    assert not torch.equal(plain[0], plain[1])


class Hooked(Sequential):
    """Notes every hook that Trainer calls while it trains."""

    def __init__(self) -> None:
        super().__init__(*mlp().net)
        self.called: list[str] = []


def note(name: str) -> Any:
    return lambda self, *args, **kwargs: self.called.append(name)


for hook in ("train_start train_epoch_start train_batch_start before_zero_grad before_backward after_backward "
             "before_optimizer_step train_batch_end train_epoch_end train_end").split():  # fmt: skip
    setattr(Hooked, f"on_{hook}", note(hook))


def test_hooks_logged_keys_and_checkpoints_are_those_of_a_plain_run(tmp_path: Path) -> None:
    found = []
    for number, callbacks in enumerate(([], [zeroth()])):
        module = Hooked()
        trainer = fit(module, *callbacks)
        trainer.save_checkpoint(tmp_path / f"{number}.ckpt")
        keys = torch.load(tmp_path / f"{number}.ckpt", weights_only=True)
        added = keys["callbacks"].pop("ZerothOrderTraining", None)
        assert (added is not None) == bool(callbacks)
        logged = {key for key in trainer.callback_metrics if not key.startswith("zeroth_order/")}
        found.append([module.called, logged, set(keys), set(keys["state_dict"]), set(keys["callbacks"])])
    assert found[0] == found[1]
    assert len(found[0][0]) > 4 * 6


def test_the_module_is_left_as_found() -> None:
    class Breaks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyError("stop")

    for callbacks in ([], [Breaks()]):
        module = mlp()
        attributes = set(vars(module))
        try:
            trainer = fit(module, zeroth(), *callbacks)
        except KeyError:
            assert callbacks
        else:
            assert trainer.global_step == 4
        assert set(vars(module)) - attributes <= {"_hparams"}  # Trainer's
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    again, fresh, order = mlp(), mlp(), zeroth()
    for module in (mlp(), again):
        fit(module, order)
    fit(fresh, zeroth())
    assert same_bits(again, fresh)


def test_a_skipped_batch_is_skipped() -> None:
    class Skips(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (0, 2) else loss

    order = zeroth()
    fit(Skips(*mlp().net), order)
    assert order.state_dict()["optimizer"]["param_groups"][0]["step"] == 2


def test_a_step_that_does_not_repeat_itself_is_refused() -> None:
    draws = random.Random(0)

    class Augments(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step([batch[0] * draws.random(), batch[1]], batch_idx)

    class InPlace(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step([batch[0].mul_(0.5), batch[1]], batch_idx)

    for kind in (Augments, InPlace):
        with pytest.raises(ValueError, match="running training_step again on a batch, its loss changes"):
            fit(kind(*mlp().net), zeroth())


def test_a_parameter_used_outside_its_module_is_perturbed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "FEW", 0)  # few parameters move all at once anyway

    class Tied(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return cross_entropy(linear(self.net[:2](batch[0]), self.net[4].weight), batch[1])

    module, plain = Tied(*mlp().net), Tied(*mlp().net)
    with pytest.warns(UserWarning, match=r"outside the forward of the module that owns it.*\(620 bytes\)"):
        fit(module, zeroth(mu=0.01))
    zo = ZerothOrder(plain.parameters(), SGD(lr=0.1), probes=1, mu=0.01, estimator="central")
    for batch in loader():
        zo.step(lambda batch=batch: plain.training_step(batch, 0))
    assert same_bits(module, plain)
    assert not torch.equal(module.net[4].weight, mlp().net[4].weight)


def test_a_mu_that_is_not_felt_is_told() -> None:
    with pytest.warns(UserWarning, match=r"mu=1.*e-30 does not change the loss in torch.float32"):
        fit(mlp(), zeroth(mu=1e-30))


# ---- the user's schedule


class Scheduled(Sequential):
    """Two groups, whose learning rates ``make`` schedules."""

    def __init__(self, make: Any, config: dict[str, Any]) -> None:
        super().__init__(*mlp().net)
        self.make, self.config = make, config

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[2:].parameters(), "lr": 0.03}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), **self.config}}


def rates(make: Any, epochs: int = 2, **config: Any) -> list[list[float]]:
    order = zeroth(lr=0.5)
    each = Each(lambda trainer: [group["lr"] for group in order.state_dict()["optimizer"]["param_groups"]])
    trainer = fit(Scheduled(make, config), order, each, max_epochs=epochs)
    assert float(trainer.callback_metrics["zeroth_order/lr"]) == pytest.approx(each.seen[-1][0])
    return each.seen


def test_the_users_schedule_is_the_rules() -> None:
    each_step = rates(lambda o: LambdaLR(o, [lambda s: (s + 1) / 8, lambda s: 1.0]), interval="step")
    assert each_step == [pytest.approx([0.5 * (s + 1) / 8, 0.5]) for s in range(8)]
    each_epoch = rates(lambda o: LambdaLR(o, lambda e: 0.1**e))
    assert each_epoch == [pytest.approx([0.5] * 2)] * 4 + [pytest.approx([0.05] * 2)] * 4
    cycle = rates(lambda o: OneCycleLR(o, [0.01, 0.03], total_steps=9), interval="step")
    assert max(cycle) == pytest.approx([0.5, 0.5], rel=0.05)
    assert min(cycle) == pytest.approx([0.02, 0.02], rel=0.05)
    never_better = partial(ReduceLROnPlateau, mode="max", factor=0.1, patience=0, threshold=10)
    plateau = rates(never_better, epochs=3, monitor="train/loss")
    assert plateau == [pytest.approx([0.5] * 2)] * 8 + [pytest.approx([0.05] * 2)] * 4


def test_a_schedule_written_into_the_optimizers_step_counts_too() -> None:
    class WarmsUp(Sequential):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)
            for group in optimizer.param_groups:
                group["lr"] = self.lr / (batch_idx + 2)

    order = zeroth(lr=6.0)
    each = Each(lambda trainer: order.state_dict()["optimizer"]["param_groups"][0]["lr"])
    fit(WarmsUp(*mlp().net), order, each)
    assert each.seen == pytest.approx([6.0, 3.0, 2.0, 1.5])


# ---- precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_probes_in_the_precision_of_the_step(precision: Any) -> None:
    class WideLoss(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return cross_entropy(self.net(batch[0]).float(), batch[1])

    narrow, wide, start = (WideLoss(*mlp().net) for _ in range(3))
    dtypes: list[torch.dtype] = []
    narrow.net[0].register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    fit(narrow, zeroth(mu=0.1, probes=8, lr=0.2), precision=precision, max_steps=2)
    fit(wide, zeroth(mu=0.1, probes=8, lr=0.2), max_steps=2)
    assert set(dtypes) == {torch.bfloat16}
    assert distance(narrow.float(), wide) < 0.3 * distance(wide, start)


# ---- checkpoints


@pytest.mark.parametrize("rule", [SGD(lr=0.1, momentum=0.9), AdamW(lr=0.01)], ids=str)
def test_resumed_is_never_stopped_bit_for_bit(rule: UpdateRule, tmp_path: Path) -> None:
    def make() -> Scheduled:
        return Scheduled(lambda o: LambdaLR(o, lambda s: 1 / (1 + s)), {"interval": "step"})

    whole, resumed = make(), make()
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    fit(whole, ZerothOrderTraining(rule), save, max_epochs=2, enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step={step}.ckpt" for step in (2, 4, 6, 8)]
    middle = tmp_path / "step=4.ckpt"
    stored = torch.load(middle, weights_only=True)["callbacks"]["ZerothOrderTraining"]
    assert stored["optimizer"]["param_groups"][0]["step"] == 4
    trainer = fit(resumed, ZerothOrderTraining(rule), max_epochs=2, ckpt_path=middle)
    assert same_bits(whole, resumed)
    assert trainer.global_step == 8


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    fit(mlp(), zeroth()).save_checkpoint(tmp_path / "c.ckpt")
    for order, message in (
        (ZerothOrderTraining(AdamW()), "rule=SGD, now it is AdamW"),
        (zeroth(mu=0.5), r"mu=0\.001, now it is 0\.5"),
        (ZerothOrderTraining(SGD(momentum=0.5)), r"rule\.momentum=0\.0, now it is 0\.5"),
    ):
        with pytest.raises(ValueError, match=f"ckpt_path: ZerothOrderTraining was saved with {message}"):
            fit(mlp(), order, max_epochs=2, ckpt_path=tmp_path / "c.ckpt")


# ---- several processes


class Interleaved(Sequential):
    """Rank r of two takes examples r, r + 2, ...; a step of both takes those of one process with the double batch."""

    def train_dataloader(self) -> DataLoader[Any]:
        dataset: Any = loader().dataset
        sampler = DistributedSampler(dataset, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(dataset, batch_size=8 // self.trainer.world_size, sampler=sampler)

    def configure_model(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(self.trainer.global_rank)


class SaveRank(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert trainer.strategy.model is pl_module
        torch.save(pl_module.state_dict(), self.folder / f"rank{trainer.global_rank}.pt")


def test_two_ranks_are_one_process_with_the_double_batch(tmp_path: Path) -> None:
    one, two = Interleaved(*mlp().net), Interleaved(*mlp().net)
    trainers = [L.Trainer(**QUIET, callbacks=[zeroth(mu=0.01)], max_epochs=1)]
    trainers += [L.Trainer(**(QUIET | {"devices": 2}), callbacks=[zeroth(mu=0.01), SaveRank(tmp_path)], max_epochs=1,
                           strategy="ddp_spawn", use_distributed_sampler=False)]  # fmt: skip
    for trainer, module in zip(trainers, (one, two)):
        trainer.fit(module)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert all(torch.allclose(ranks[0][name], value, atol=1e-4) for name, value in one.state_dict().items())
    assert distance(one, mlp()) > 1e-2


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": 0}, "probes must be"),
        ({"mu": 0.0}, "mu must be > 0"),
        ({"estimator": "jvp"}, "estimator must be one of forward, central"),
        ({"distribution": "cauchy"}, "distribution must be one of"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zeroth(**settings)


def scaler() -> Any:
    return L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clip_val": 1.0}, "gradient_clip_val and configure_gradient_clipping have no gradient to clip"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches has no gradient to accumulate"),
        ({"plugins": scaler()}, "a GradScaler has no gradient to scale"),
    ],
)
def test_trainers_settings_that_need_a_gradient(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(mlp(), zeroth(), **settings)


def test_callbacks_that_would_break_it() -> None:
    class Again(ZerothOrderTraining):
        @property
        def state_key(self) -> str:
            return "Again"

    for other in (Again(), HybridOrder("net.2")):
        with pytest.raises(ValueError, match="beside another of its kind or HybridOrder"):
            fit(mlp(), zeroth(), other)
    with pytest.raises(ValueError, match="accumulate_grad_batches"):
        fit(mlp(), zeroth(), GradientAccumulationScheduler({0: 1, 1: 2}))


class Clips(Sequential):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None: ...


class Backward(Sequential):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None: ...


class Manual(Sequential):
    @property
    def automatic_optimization(self) -> bool:
        return False


class TakesIterator(Sequential):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


class NoOptimizer(Sequential):
    def configure_optimizers(self) -> None: ...  # type: ignore[override]


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Clips, "configure_gradient_clipping"),
        (Backward, "Backward overrides backward"),
        (Manual, r"automatic_optimization=True.*docs/manual_optimization.md"),
        (TakesIterator, "dataloader_iter"),
        (NoOptimizer, "configure_optimizers names no trainable parameter"),
    ],
)
def test_modules_it_cannot_train(kind: type[Sequential], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(kind(*mlp().net), zeroth())


@pytest.mark.parametrize("order", [zeroth(), HybridOrder("net.2")], ids=lambda order: type(order).__name__)
@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy])
def test_strategies_that_divide_parameters_or_run_steps_later_are_refused(kind: type[Any], order: Callback) -> None:
    strategy = object.__new__(kind)  # what they need need not be installed
    trainer: Any = SimpleNamespace(callbacks=[], strategy=strategy)

    def set_up() -> None:
        order.setup(trainer, mlp(), "fit")
        strategy.setup(trainer)  # when HybridOrder looks

    with pytest.raises(ValueError, match=f"strategy={kind.__name__}: {type(order).__name__} probes whole parameters"):
        set_up()
    order.teardown(trainer, mlp(), "fit")


# ---- it diverges


class Diverges(Sequential):
    """Its loss is no number from a batch on."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (torch.nan if batch_idx else 1.0)


def test_a_loss_that_is_not_a_number_ends_the_run() -> None:
    with pytest.raises(ValueError, match=r"ZerothOrderTraining: at step 1 the loss is not finite; lower rule\.lr"):
        fit(Diverges(*mlp().net), zeroth())


@pytest.mark.parametrize("kind", ["HybridOrder", "ZerothOrderTraining"])
def test_probes_that_are_lost_in_what_has_run_away_are_told_of(kind: str) -> None:
    rule = SGD(lr=1e12)
    module = Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3))
    callback = HybridOrder("net.2", rule, mu=1e-2) if kind == "HybridOrder" else ZerothOrderTraining(rule, mu=1e-2)
    with pytest.warns(match="exactly 0: .* has grown .*-fold since the start, it has diverged; lower rule.lr") as seen:
        fit(module, callback)
    assert sum("exactly 0" in str(one.message) for one in seen) == 1
