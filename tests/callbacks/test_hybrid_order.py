"""Hybrid-order training in a plain Trainer: the method, Trainer's settings, checkpoints, two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from hosfl_lightning.callbacks.cut_check import CutError
from hosfl_lightning.callbacks.hybrid_order import HybridOrder
from hosfl_lightning.optim import SGD, AdamW, SharedDirections
from hosfl_lightning.rng import add_direction_
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
            # Not needed without reentrance: z is a leaf with a gradient at the cut.
            self.model.get_base_model().disable_input_require_grads()

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
    below = list(order._client.identity["client"])  # type: ignore[union-attr]
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
    with pytest.raises(CutError, match=r"'net.0' is compiled"):
        fit(module, hybrid())


class Again(HybridOrder):
    """Another state key, which Trainer wants of two callbacks of a kind."""

    @property
    def state_key(self) -> str:
        return "Again"
