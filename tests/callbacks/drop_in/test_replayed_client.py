"""A side adapter below the cut of somebody else's module: its exact gradient, by λ and one more forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from hosfl_lightning.callbacks.drop_in.cut_check import CutError
from hosfl_lightning.callbacks.drop_in.hybrid_order import HybridOrder
from hosfl_lightning.optim import SGD
from hosfl_lightning.split.side import Side, attach_side
from tests.callbacks.drop_in.plain_modules import LIGHTNING_WARNINGS, Sequential, distance, fit, mlp

pytestmark = LIGHTNING_WARNINGS

TOKENS = DataLoader(TensorDataset((torch.arange(12) * torch.arange(1, 9)[:, None]) % 32), batch_size=4)


class Causal(L.LightningModule):
    """A Llama of four layers; what is below ``cut`` is frozen but for its side adapter."""

    def __init__(self, cut: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, use_cache=False, initializer_range=0.3,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)
        self.model.model.embed_tokens.requires_grad_(False)
        layers = self.model.model.layers
        layers[:3].requires_grad_(False)
        attach_side(layers, cut, [(12, 16)] * cut, Side(4, taps="all"))
        widen(self)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)


class Convolutions(Sequential):
    """Maps of falling resolution, so that the adapter pools."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.Flatten(), nn.Linear(54, 3)]
        layers[0].requires_grad_(False)
        layers[2].requires_grad_(False)
        attach_side(layers, 3, [(4, 8, 8), (4, 8, 8), (6, 3, 3)], Side(4))
        super().__init__(*layers)
        widen(self)


def widen(module: nn.Module) -> None:
    """No bottleneck at its start, where ``down`` has no gradient."""
    for name, p in module.named_parameters():
        if "lora_side" in name:
            nn.init.normal_(p, std=0.3)


def images() -> DataLoader[Any]:
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, torch.arange(8) % 3), batch_size=4)


def local(cut: str, **kwargs: Any) -> HybridOrder:
    return HybridOrder(cut, SGD(lr=0.1), estimator="local", **kwargs)


@pytest.mark.parametrize(
    ("kind", "cut", "data"), [(Causal, "model.model.layers.2", lambda: TOKENS), (Convolutions, "net.3", images)]
)
def test_hybrid_order_with_a_known_gradient_is_first_order_training(
    kind: Callable[[], L.LightningModule], cut: str, data: Callable[[], Any]
) -> None:
    ours, backprop = kind(), kind()
    graphs: list[bool] = []
    below = next(m for name, m in ours.named_modules() if name.endswith("lora_side"))
    below.default.down.register_forward_hook(lambda m, args, out: graphs.append(out.requires_grad))
    order = local(cut)
    fit(ours, order, data=data(), max_epochs=3)
    fit(backprop, data=data(), max_epochs=3)
    start = kind().state_dict()
    moved = [name for name, p in ours.state_dict().items() if not torch.equal(p, start[name])]
    assert [name for name in moved if "lora_side" in name] == order._client.identity["client"]  # type: ignore[union-attr]
    assert distance(ours, backprop) < 1e-5
    assert graphs[0]
    assert len(graphs) > 6


def test_it_takes_one_more_forward_and_logs_the_gradient() -> None:
    module, runs = Causal(), [0]
    module.model.model.layers[0].register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    order = local("model.model.layers.2", verify=False)
    trainer = fit(module, order, data=TOKENS, max_epochs=2)
    assert runs[0] == 2 * 4
    assert order.state_dict()["estimator"] == "local"
    assert float(trainer.callback_metrics["client/projected_gradient_rms"]) > 0


def test_an_adapter_that_ends_before_the_cut_is_found() -> None:
    with pytest.raises(CutError, match="the side adapter does not end at the cut"):
        fit(Causal(), local("model.model.layers.3"), data=TOKENS)


def test_nothing_but_the_adapter_may_be_trained_below_the_cut() -> None:
    module = Causal()
    module.model.model.layers[1].input_layernorm.requires_grad_(True)
    with pytest.raises(CutError, match=r"alone, and model\.model\.layers\.1\.input_layernorm\.weight is trained below"):
        fit(module, local("model.model.layers.2"), data=TOKENS)
    with pytest.raises(CutError, match="needs a side adapter below the cut"):
        fit(mlp(), local("net.2"))


def test_an_adapter_may_be_probed_as_well() -> None:
    order = HybridOrder("model.model.layers.2", SGD(lr=0.1), probes=4)
    trainer = fit(Causal(), order, data=TOKENS)
    assert order._client.basis().size == 4  # type: ignore[union-attr]
    assert trainer.global_step == 2


def test_what_the_server_has_at_the_cut_is_above_it() -> None:
    """The bottleneck on z of `Side.server` enters by a hook at the cut, and the module's own optimizer trains it."""

    class Both(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

    def make() -> Both:
        module = Both(*mlp().net)
        module.net[0].requires_grad_(False)
        attach_side(list(module.net), 2, [(8,), (8,)], Side(4, taps="all", server=4))
        widen(module)
        return module

    ours, backprop, start = make(), make(), make()
    fit(ours, local("net.2"))
    fit(backprop)
    assert distance(ours.net[2], start.net[2]) > 1e-3
    assert distance(ours, backprop) < 1e-5
