"""Hybrid-order training of modules that know nothing of it, in a plain Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MeanMetric
from transformers import LlamaConfig, LlamaForCausalLM

from hosfl_lightning.callbacks.hybrid_order import HybridOrder
from hosfl_lightning.callbacks.lower_part import CutError
from hosfl_lightning.optim import SGD, AdamW, SharedDirections
from hosfl_lightning.rng import add_direction_

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # Lightning asks torch for it
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
]
FEATURES, CLASSES = 6, 3
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


class Record(Callback):
    """What each step applied below the cut."""

    def __init__(self, order: HybridOrder) -> None:
        self.order = order
        self.coefficients: list[Tensor] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.coefficients.append(self.order.aggregation._update.coefficients)  # type: ignore[union-attr]


# ---- it trains, and as the formulas say


def test_an_mlp_learns_and_nothing_is_backpropagated_below_the_cut() -> None:
    module, frozen = mlp(), mlp()
    before = loss_of(module)
    trainer = fit(module, hybrid(probes=4), max_epochs=30)
    frozen.net[0].requires_grad_(False)
    fit(frozen, max_epochs=30)
    assert loss_of(module) < loss_of(frozen) - 0.02 < before - 0.1
    assert [p.grad is None for p in module.parameters()] == [True] * 2 + [False] * 4
    assert all(p.requires_grad for p in module.parameters())
    assert trainer.global_step == 120


def reference(module: Sequential, at: int, steps: int, probes: int, mu: float, seed: int) -> None:
    """The method in plain PyTorch, with SGD."""
    lower, upper = module.net[:at], module.net[at:]
    theta = dict(lower.named_parameters())
    sgd = torch.optim.SGD(upper.parameters(), lr=0.1)
    for step, (x, y) in zip(range(steps), loader()):
        z = lower(x).detach().requires_grad_()
        sgd.zero_grad()
        cross_entropy(upper(z), y).backward()
        sgd.step()
        gradient = {name: torch.zeros_like(p) for name, p in theta.items()}
        for stream in SharedDirections(seed, step, probes).streams:
            u = {name: torch.zeros(p.numel()) for name, p in theta.items()}
            for tensor, name in enumerate(theta):
                add_direction_(u[name], torch.tensor(1.0), stream, tensor, 0)
                u[name] = u[name].view_as(theta[name])
            moved = functional_call(lower, {name: p.detach() + mu * u[name] for name, p in theta.items()}, (x,))
            v = ((moved - z) * z.grad).sum(dtype=torch.float64) / torch.tensor(mu).double()
            for name in theta:
                gradient[name] += (v.float() / probes) * u[name]
        with torch.no_grad():
            for name, p in theta.items():
                p -= 0.1 * gradient[name]


def test_equals_the_method_in_plain_pytorch() -> None:
    module, plain, start = mlp(), mlp(), mlp()
    fit(module, hybrid("net.2", probes=3, mu=1e-2, seed=7), max_steps=3)
    reference(plain, 2, steps=3, probes=3, mu=1e-2, seed=7)
    assert distance(plain.net[0], start.net[0]) > 1e-3
    assert distance(module, plain) < 2e-7


def test_the_projected_gradients_are_those_of_the_true_gradient() -> None:
    order = hybrid(probes=2, mu=1e-3, estimator="central", distribution="gauss16")
    record = Record(order)
    fit(mlp(), order, record, max_steps=1)
    module = mlp()
    x, y = next(iter(loader()))
    cross_entropy(module.net(x), y).backward()
    exact = SharedDirections(0, 0, 2, "gauss16").project([p.grad for p in module.net[0].parameters()])  # type: ignore[misc]
    torch.testing.assert_close(record.coefficients[0], exact, rtol=1e-3, atol=1e-5)


def test_only_the_first_batch_makes_a_graph_below_the_cut() -> None:
    module = mlp()
    graphs: list[bool] = []
    module.net[0].register_forward_hook(lambda m, args, out: graphs.append(out.requires_grad))
    fit(module, hybrid())
    assert graphs[0]
    assert not any(graphs[1:])


def test_one_callback_serves_two_runs() -> None:
    order, again, fresh = hybrid(), mlp(), mlp()
    fit(mlp(), order)
    fit(again, order)
    fit(fresh, hybrid())
    assert same_bits(again, fresh)


class CausalLM(L.LightningModule):
    """What users have: a Hugging Face model with LoRA, called with its labels."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, use_cache=False,
        )  # fmt: skip
        self.model = get_peft_model(
            LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
        )
        if checkpointing:
            self.model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch[0], labels=batch[0]).loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


LAYERS = "model.base_model.model.model.layers"


def tokens() -> DataLoader[Any]:
    rows = (torch.arange(12) * torch.arange(1, 9)[:, None]) % 32
    return DataLoader(TensorDataset(rows), batch_size=8)


def test_a_llama_with_lora_learns() -> None:
    module = CausalLM()
    order = HybridOrder(f"{LAYERS}.2", AdamW(lr=1e-2), probes=4)
    first = fit(module, order, data=tokens(), max_steps=1).callback_metrics["train/loss"]
    start = CausalLM().state_dict()
    trainer = fit(module, HybridOrder(f"{LAYERS}.2", AdamW(lr=1e-2), probes=4), data=tokens(), max_epochs=30)
    assert trainer.callback_metrics["train/loss"] < first - 0.02
    below = [name for name in order._client.identity["client"]]  # type: ignore[union-attr]
    assert len(below) == 12
    assert all(".layers.0." in name or ".layers.1." in name for name in below)
    state, gradients = module.state_dict(), {name: p.grad for name, p in module.named_parameters()}
    assert all(gradients[name] is None and not torch.equal(state[name], start[name]) for name in below)
    logged = {"client/multiplier_norm", "client/lagrangian_term", "client/projected_gradient_rms", "client/lr"}
    assert logged <= set(trainer.callback_metrics)


def test_activation_checkpointing_changes_nothing() -> None:
    plain, saving = CausalLM(), CausalLM(checkpointing=True)
    for module in (plain, saving):
        fit(module, HybridOrder(f"{LAYERS}.1", SGD(lr=0.1)), data=tokens(), max_epochs=3)
    assert same_bits(plain, saving)


# ---- Trainer's own settings


def test_two_accumulated_batches_are_one_double_batch() -> None:
    whole, halves = mlp(), mlp()
    fit(whole, hybrid(), data=loader(16))
    trainer = fit(halves, hybrid(), data=loader(8), accumulate_grad_batches=2)
    assert trainer.global_step == 2
    assert 0 < distance(whole, mlp())
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
    fit(narrow, hybrid(mu=0.03, estimator="central"), precision="bf16-mixed", max_steps=2)
    fit(wide, hybrid(mu=0.03, estimator="central"), max_steps=2)
    assert distance(narrow.net[0], wide.net[0]) < 0.2 * distance(wide.net[0], start.net[0])


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


# ---- it leaves no trace


def test_random_state_and_module_are_left_as_found() -> None:
    states = []
    for callbacks in ([hybrid("net.3")], []):
        torch.manual_seed(3)
        module = mlp(nn.Dropout(0.3))
        if not callbacks:
            module.net[0].requires_grad_(False)
        attributes = set(vars(module))
        fit(module, *callbacks)
        states.append(torch.get_rng_state())
        assert set(vars(module)) - attributes <= {"_hparams"}  # Trainer's
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    assert torch.equal(*states)


def test_a_run_that_breaks_off_leaves_the_module_as_found() -> None:
    class Breaks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyError("stop")

    module = mlp()
    attributes = set(vars(module))
    with pytest.raises(KeyError):
        fit(module, hybrid(), Breaks())
    assert set(vars(module)) - attributes <= {"_hparams"}  # Trainer's
    assert all(p.requires_grad for p in module.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())


@pytest.mark.parametrize("parts", [False, True])
def test_probes_see_the_dropout_masks_of_the_batch(parts: bool) -> None:
    module = Parts() if parts else mlp(nn.Dropout(0.3))
    masks: list[Tensor] = []
    dropout = next(m for m in module.modules() if isinstance(m, nn.Dropout))
    dropout.register_forward_hook(lambda m, args, out: masks.append(out.detach() == 0))
    fit(module, hybrid("head" if parts else "net.3", probes=3))
    # A batch is a forward and its probes; the checks of the first one belong to it.
    first = len(masks) - 3 * (1 + 3)
    batches = [masks[:first], *(masks[i : i + 4] for i in range(first, len(masks), 4))]
    assert len(batches) == 4
    for batch in batches:
        assert all(torch.equal(mask, batch[0]) for mask in batch)
    assert not torch.equal(batches[0][0], batches[1][0])


def test_norm_statistics_do_not_see_the_probes() -> None:
    module, frozen = mlp(nn.BatchNorm1d(8)), mlp(nn.BatchNorm1d(8))
    fit(module, hybrid("net.3"), max_steps=1)
    for p in frozen.net[:3].parameters():
        p.requires_grad_(False)
    fit(frozen, max_steps=1)
    assert int(module.net[2].num_batches_tracked) == 1
    assert torch.equal(module.net[2].running_mean, frozen.net[2].running_mean)


def test_a_training_step_that_runs_again_counts_its_batch_once() -> None:
    module = Parts()
    logged: list[float] = []
    log = module.log

    class Watch(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            logged.append(float(module.seen.weight))

    trainer = fit(module, hybrid("head"), Watch())
    assert logged == [1, 2, 3, 4]
    # User code does run again, two probes a batch and the checks of the first, but what it reports is counted once.
    assert module.calls > 4 * (1 + 2)
    assert trainer.callback_metrics["calls"] == module.calls - 2
    assert module.log == log


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


# ---- modules that need care


def test_a_cut_that_works_in_place() -> None:
    torch.manual_seed(0)
    inplace, plain = (
        Sequential(nn.Linear(FEATURES, 8), nn.ReLU(inplace=i), nn.Linear(8, CLASSES)) for i in (True, False)
    )
    inplace.load_state_dict(plain.state_dict())
    for module in (inplace, plain):
        fit(module, hybrid("net.1"))
    assert same_bits(inplace, plain)


class Functional(Sequential):
    """Reads a layer's weight without calling the layer."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        hidden = nn.functional.linear(x, self.net[0].weight, self.net[0].bias).tanh()
        return cross_entropy(self.net[2:](hidden), y)


def test_a_weight_read_outside_its_layer_is_probed_all_the_same() -> None:
    functional, plain = Functional(*mlp().net), mlp()
    with pytest.warns(UserWarning, match="perturb all of them at once"):
        fit(functional, hybrid())
    fit(plain, hybrid())
    assert same_bits(functional, plain)


def test_the_upper_part_may_be_compiled() -> None:
    compiled, plain = mlp(), mlp()
    compiled.net[4].compile(backend="eager")
    for module in (compiled, plain):
        fit(module, hybrid(), max_steps=2)
    assert same_bits(compiled, plain)


def test_smashed_data_given_by_keyword_after_a_float_mask() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, mask: Tensor, hidden: Tensor) -> Tensor:
            return self.linear(hidden * mask)

    class Keyword(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            hidden = self.net[1](self.net[0](batch[0]))
            return cross_entropy(self.net[3:](self.net[2](mask=torch.ones(8), hidden=hidden)), batch[1])

    keyword, plain = Keyword(*mlp().net), mlp()
    keyword.net[2], keyword.net[2].linear = Masked(), keyword.net[2]
    for module in (keyword, plain):
        fit(module, hybrid())
    for p, q in zip(keyword.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# ---- what is refused


class Skip(Sequential):
    """A gated path around the cut, the gate still at zero."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.gate = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        z = self.net[:2](batch[0])
        return cross_entropy(self.net[4](self.net[2:4](z) + self.gate * z), batch[1])


class Tied(Sequential):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0 * self.net[0].weight.sum()


class Twice(Sequential):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)


class Detached(Sequential):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net[4](self.net[2:4](self.net[:2](batch[0])).detach()), batch[1])


class Noisy(Sequential):
    """Draws where no replay of torch's random state reaches."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.generator = np.random.default_rng(0)
        self.net[1].register_forward_hook(lambda m, x, out: out + float(self.generator.normal()))


class Swallows(Sequential):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        z = self.net[:2](x)
        try:
            z = self.net[2](z)
        except Exception:
            z = torch.zeros_like(z)
        return cross_entropy(self.net[3:](z), y)


class Manual(Sequential):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.automatic_optimization = False


class Closures(Sequential):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(p for p in self.parameters() if p.requires_grad)


class Iterates(Sequential):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


@pytest.mark.parametrize(
    ("kind", "order", "message"),
    [
        (Skip, hybrid(), r"net.0.weight, net.0.bias by a path around 'net.2'"),
        (Tied, hybrid(), r"net.0.weight by a path around"),
        (
            Sequential,
            hybrid(client=["net.0", "net.4"]),
            r"client: net.4.weight, net.4.bias are used at or after 'net.2'",
        ),
        (Sequential, hybrid("net.4", client="net.0"), r"net.2.weight, net.2.bias are trained and used before 'net.4'"),
        (Sequential, hybrid(client="net.2"), r"client: net.2.weight is in 'net.2'"),
        (Sequential, hybrid(client=["net.0", "nett"]), r"client: 'nett' matches no trainable parameter"),
        (Sequential, hybrid("net.9"), r"cut: the module has no submodule 'net.9'"),
        (Sequential, hybrid("net.0"), r"no trainable parameter is registered before 'net.0'"),
        (Twice, hybrid(), r"'net.2' is called more than once"),
        (Detached, hybrid(), r"the loss does not depend on the input of 'net.2'"),
        (Noisy, hybrid(), r"again changes its output"),
        (Swallows, hybrid(), r"'net.2' is not reached when the same batch runs again"),
        (Manual, hybrid(), r"automatic_optimization=True"),
        (Closures, hybrid(), r"closure more than once"),
        (Iterates, hybrid(), r"dataloader_iter"),
    ],
)
def test_modules_and_cuts_that_do_not_fit(kind: type[Sequential], order: HybridOrder, message: str) -> None:
    module = kind(*mlp().net)
    with pytest.raises(ValueError, match=message):
        fit(module, order)
    assert all(p.requires_grad for p in module.parameters())


def test_an_unused_parameter_is_not_moved_by_noise() -> None:
    module = mlp()
    module.net[0].register_parameter("spare", nn.Parameter(torch.zeros(3)))
    with pytest.raises(CutError, match=r"net.0.spare are not used before 'net.2'"):
        fit(module, hybrid())


def test_a_cut_that_is_never_called() -> None:
    module = mlp()
    module.register_module("spare", nn.Linear(2, 2))
    with pytest.raises(CutError, match="never called 'spare'"):
        fit(module, hybrid("spare", client="net.0"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": 0}, "probes must be"),
        ({"mu": 0.0}, "mu must be > 0"),
        ({"estimator": "best"}, "estimator must be one of"),
        ({"distribution": "cauchy"}, "distribution must be one of"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hybrid(**settings)


def test_trainer_settings_that_would_break_it() -> None:
    with pytest.raises(ValueError, match="more than one HybridOrder"):
        fit(mlp(), Again("net.2"), hybrid())
    half = L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="GradScaler"):
        fit(mlp(), hybrid(), plugins=half)
    with pytest.raises(ValueError, match="a compiled LightningModule"):
        fit(torch.compile(mlp(), backend="eager"), hybrid())  # type: ignore[arg-type]
    module = mlp()
    module.net[0].compile(backend="eager")
    with pytest.raises(CutError, match="'net.0' is compiled"):
        fit(module, hybrid())


class Again(HybridOrder):
    """Another state key, which Trainer wants of two callbacks of a kind."""

    @property
    def state_key(self) -> str:
        return "Again"
