from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning import SplitCausalLM
from hosfl_lightning.clients import FirstOrderClient
from hosfl_lightning.clients.recompute import recomputing
from hosfl_lightning.memory import MemoryMeter
from hosfl_lightning.optim import Dense, ZerothOrder

#: A half, what is trained of it, and a batch.
Setting = tuple[Any, list[nn.Parameter], dict[str, Tensor]]


class Convolutions(nn.Module):
    """Layers of an image half: ``(B, C, H, W)`` to ``(B, H·W, C)``."""

    inputs = ("pixel_values",)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                *(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GELU(), nn.Tanh()) for _ in range(5))
            )

    @property
    def layers(self) -> dict[int, nn.Module]:
        return {int(number): layer for number, layer in self.net.named_children()}

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.net(pixel_values).flatten(2).transpose(1, 2)


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(80).view(4, 20) + 3, "attention_mask": torch.ones(4, 20, dtype=torch.long)}


@pytest.fixture(params=["adapters under frozen embeddings", "convolutions"])
def setting(request: pytest.FixtureRequest, make_model: Callable[..., SplitCausalLM]) -> Setting:
    if request.param == "convolutions":
        half = Convolutions()
        return half, list(half.parameters()), images()
    model = make_model(cut=3)
    for number, parameter in enumerate(model.client_parameters.values()):  # LoRA begins with B = 0
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 10
    return model.client_half, list(model.client_parameters.values()), tokens()


def gradient(setting: Setting, checkpointing: bool) -> tuple[Tensor, int, int]:
    """``∇⟨λ, f_c⟩`` as the client answers it, the bytes it holds while it waits, and its peak."""
    half, trained, batch = setting
    client = FirstOrderClient(half, ZerothOrder(trained), checkpointing)
    rows = [slice(0, 2), slice(2, 4)]
    with MemoryMeter() as meter, meter.role("client"):
        anchor = client.forward(batch, rows)
        waiting = meter.live("client")
        multiplier = torch.ones_like(anchor.z)
        answer = client.answer(batch, anchor, multiplier, rows, Dense([p.numel() for p in trained]))
    return answer, waiting, meter.peak("client")


def test_the_same_gradient_with_less_memory(setting: Setting) -> None:
    (kept, waiting, peak), (again, waiting_less, peak_less) = (gradient(setting, on) for on in (False, True))
    assert kept.abs().max() > 0
    assert torch.equal(kept, again)
    assert waiting_less < 0.6 * waiting
    assert peak_less < 0.7 * peak


@contextmanager
def watched(half: Any) -> Iterator[list[int]]:
    """The numbers of the layers that run, each time they do."""
    ran: list[int] = []
    first = [next(m for m in layer.modules() if not [*m.children()]) for layer in half.layers.values()]
    hooks = [m.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, m in zip(half.layers, first)]
    yield ran
    for hook in hooks:
        hook.remove()


def test_every_layer_runs_once_more_in_the_backward(setting: Setting) -> None:
    half, numbers = setting[0], [*setting[0].layers]
    with watched(half) as ran:
        gradient(setting, checkpointing=True)
    assert Counter(ran) == dict.fromkeys(numbers, 4), "two clients, forward and backward"


def test_layers_are_left_as_found(setting: Setting) -> None:
    half = setting[0]
    layers = [*half.layers.values()]

    def own(*args: Any, **kwargs: Any) -> Any:
        return type(layers[0]).forward(layers[0], *args, **kwargs)

    def fails() -> None:
        with recomputing(half):
            assert all("forward" in vars(layer) for layer in layers)
            raise RuntimeError("inside")

    half.eval()  # as a client does
    layers[0].forward = own
    before = [dict(vars(layer)) for layer in layers]
    gradient(setting, checkpointing=True)
    assert [vars(layer) for layer in layers] == before
    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert [vars(layer) for layer in layers] == before


def test_a_layer_that_overwrites_its_input_is_not_run_again_in_silence() -> None:
    half = Convolutions()
    half.net[1] = nn.SiLU(inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient((half, [*half.parameters()], images()), checkpointing=True)
