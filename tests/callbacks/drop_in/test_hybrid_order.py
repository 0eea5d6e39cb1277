"""Hybrid-order training in a plain Trainer: it learns, as the formulas say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from hosfl_lightning.callbacks.drop_in.hybrid_order import HybridOrder
from hosfl_lightning.optim import SGD, AdamW, SharedDirections
from hosfl_lightning.rng import add_direction_
from tests.callbacks.drop_in.plain_modules import (
    CLASSES,
    LIGHTNING_WARNINGS,
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


def convolution() -> Sequential:
    """The smashed data is a map."""
    torch.manual_seed(0)
    return Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES))


@pytest.mark.parametrize(("make", "below"), [(mlp, [0]), (convolution, [0, 1])])
def test_the_projected_gradients_are_those_of_the_true_gradient(
    make: Callable[[], Sequential], below: list[int]
) -> None:
    order = hybrid(f"net.{below[-1] + 1}", probes=2, mu=1e-3, estimator="central", distribution="gauss16")
    record = Record(order)
    fit(make(), order, record, max_steps=1)
    module = make()
    x, y = next(iter(loader()))
    cross_entropy(module.net(x), y).backward()
    gradient = [p.grad for number in below for p in module.net[number].parameters()]
    exact = SharedDirections(0, 0, 2, "gauss16").project(gradient)  # type: ignore[arg-type]
    torch.testing.assert_close(record.coefficients[0], exact, rtol=1e-3, atol=1e-5)


def test_only_the_first_batch_makes_a_graph_below_the_cut() -> None:
    module = mlp()
    graphs: list[bool] = []
    module.net[0].register_forward_hook(lambda m, args, out: graphs.append(out.requires_grad))
    fit(module, hybrid())
    assert graphs[:2] == [True, True]  # the batch, and what it is verified by
    assert not any(graphs[2:])


def test_all_that_is_done_for_the_lower_part_is_inside_of_working(monkeypatch: pytest.MonkeyPatch) -> None:
    order, opened = hybrid(), [0]
    open_now: list[int] = []

    @contextmanager
    def working() -> Iterator[None]:
        opened[0] += 1
        yield
        opened[0] -= 1

    order.working = working
    module = mlp()
    module.net[0].register_forward_hook(lambda *_: open_now.append(opened[0]))
    monkeypatch.setattr(SGD, "update_", lambda *_: open_now.append(opened[0] + 1))
    fit(module, order, max_steps=2, accumulate_grad_batches=2)
    checks = len(open_now) - 4 * 3 - 2 * 2
    # The user's own forward, then with the checks of the first batch its probes; at the end two tensors are updated.
    assert open_now == [0, *[1] * (checks + 2), *[0, 1, 1], 2, 2, *[0, 1, 1] * 2, 2, 2]


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


# ---- what is refused


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
