"""Side adapters: the formula, the cut, what is refused, and that nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hosfl_lightning.split import (
    Placement,
    Side,
    SplitError,
    add_side,
    copied_head,
    place_side_images,
    split,
    split_images,
)
from hosfl_lightning.split.placement import check_direct
from hosfl_lightning.split.side import Bottleneck, Tap, attach_side, detach_side, ladder
from tests.split.tiny_images import images, tiny_image_model
from tests.split.tiny_models import tiny_causal_lm, tiny_classifier

Build = Callable[[], Any]
TEXT: dict[str, Build] = {
    **{name: lambda name=name: tiny_causal_lm(name) for name in ("llama", "gpt2", "gemma3_text", "mixtral", "opt")},
    **{name: lambda name=name: tiny_classifier(name) for name in ("bert", "distilbert", "modernbert", "deberta-v2")},
    "llama_classifier": lambda: tiny_classifier("llama"),
}
#: Maps of other sizes, layers that are an nn.Sequential, tokens, vectors; the last entry is the cut.
IMAGES = {"ConvNext": 2, "MobileNetV2": 3, "ConvNet": 2, "ViT": 2, "perceptron": 3}
TOKENS, MASK = torch.arange(3, 15).view(2, 6), torch.ones(2, 6, dtype=torch.long)
TOKENS[1, 4:] = MASK[1, 4:] = 0


def noisy(model: nn.Module) -> None:
    """Random values in every bottleneck: at the start they add nothing."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_side" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)


def sided(cut: int = 3, **settings: Any) -> Any:
    """A Llama with a side adapter."""
    model = tiny_causal_lm("llama").requires_grad_(False)
    add_side(model, cut, Side(**({"client": 4, "taps": "all"} | settings)))
    return model


def sided_images(name: str, side: Side) -> Any:
    model = tiny_image_model(name, noise=0)
    place_side_images(model, IMAGES[name], side, 32).attach(model)
    return model


def logits(model: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(*args, **kwargs)
    return cast(Tensor, getattr(output, "logits", output))


@pytest.mark.parametrize("name", TEXT)
def test_it_adds_nothing_at_the_start_and_split_equals_whole_after(name: str) -> None:
    model, batch = TEXT[name](), {"input_ids": TOKENS, "attention_mask": MASK}
    plain = logits(model, **batch)
    add_side(model, 3, Side(4, taps="all", server=5))
    assert torch.equal(logits(model, **batch), plain)
    noisy(model)
    client, server = split(model, 3)
    assert torch.equal(logits(server, client(TOKENS, MASK), MASK), logits(model, **batch))
    assert not torch.equal(logits(model, **batch), plain)


@pytest.mark.parametrize("name", IMAGES)
def test_it_adds_nothing_to_images_at_the_start_and_split_equals_whole_after(name: str) -> None:
    plain, model = tiny_image_model(name, noise=0), sided_images(name, Side(4, taps="all", server=5))
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    assert torch.equal(logits(model, images()), logits(plain, images()))
    noisy(model)
    client, server = split_images(model, IMAGES[name], 32)
    assert torch.equal(logits(server, client.train()(images())), logits(model, images()))
    assert not torch.equal(client(images()), split_images(plain, IMAGES[name], 32)[0](images()))
    assert all(torch.equal(b, statistics[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize("width", [4, 40], ids=["narrow", "wider than z"])
@pytest.mark.parametrize(("taps", "tapped"), [("below", [0, 1]), ("all", [0, 1, 2])])
def test_z_is_the_sum_of_the_formula(taps: Any, tapped: list[int], width: int) -> None:
    model = sided(client=width, taps=taps)
    noisy(model)
    client, _ = split(model, 3)
    states = tiny_causal_lm("llama")(TOKENS, attention_mask=MASK, output_hidden_states=True).hidden_states
    expected = states[3]
    for layer in tapped:
        down, up = (client.get_parameter(f"model.layers.{layer}.lora_side.default.{n}.weight") for n in ("down", "up"))
        h = states[layer + 1]
        normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        expected = expected + F.gelu(normed @ down.T) @ up.T
    assert [n for n, _ in client.named_modules() if n.endswith("lora_side")] == [
        f"model.layers.{layer}.lora_side" for layer in tapped
    ]
    torch.testing.assert_close(client(TOKENS, MASK), expected)


def test_a_maps_bottleneck_is_two_convolutions_around_an_average() -> None:
    bottleneck = Bottleneck((6, 8, 8), (10, 4, 4), 3)
    nn.init.normal_(bottleneck.up.weight)
    h = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    normed = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    a = F.gelu(F.conv2d(normed, bottleneck.down.weight[:, :, None, None]))
    q = F.conv2d(F.avg_pool2d(a, 2), bottleneck.up.weight[:, :, None, None])
    torch.testing.assert_close(bottleneck(h), q.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("size", [8, 4])
def test_with_a_kernel_it_sees_a_pixels_neighbours(size: int) -> None:
    bottleneck = Bottleneck((6, 8, 8), (10, size, size), 3, kernel=3)
    nn.init.normal_(bottleneck.up.weight)
    assert bottleneck.down.weight.shape == (3, 6, 3, 3)
    h = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    normed = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    a = torch.zeros(2, 3, 8, 8)
    for row in range(3):
        for column in range(3):
            around = F.pad(normed, (1, 1, 1, 1))[:, :, row : row + 8, column : column + 8]
            a += F.conv2d(around, bottleneck.down.weight[:, :, row, column, None, None])
    q = F.conv2d(F.avg_pool2d(F.gelu(a), 8 // size), bottleneck.up.weight[:, :, None, None])
    torch.testing.assert_close(bottleneck(h), q.flatten(2).transpose(1, 2))


def test_tokens_have_no_neighbours() -> None:
    with pytest.raises(SplitError, match=r"side.kernel=3 .* features of shape \(17, 32\) are no map; set it to 1"):
        Bottleneck((17, 32), (17, 32), 4, kernel=3)
    with pytest.raises(SplitError, match=r"side.kernel=3"):
        sided(client=4, kernel=3)


def test_of_a_sequential_only_layers_with_parameters_are_tapped() -> None:
    def layers() -> list[nn.Module]:
        return [nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()]

    assert Side(2).tapped(layers()) == [1, 3]
    assert Side(2, taps="all").tapped(layers()) == [1, 3, 4]
    assert Side(0, server=2).tapped(layers()[:1]) == []
    with pytest.raises(SplitError, match=r"side.taps='below' with cut=2: no layer with parameters is below"):
        Side(2).tapped(layers()[:2])


def test_the_start_follows_from_the_seed_and_leaves_the_random_state() -> None:
    def start(seed: int) -> dict[str, Tensor]:
        model = tiny_causal_lm("llama")
        add_side(model, 3, Side(4, server=5), seed)
        return {n: p for n, p in model.named_parameters() if "lora_side" in n}

    state = torch.get_rng_state()
    first = start(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = start(0), start(1)
    assert len(first) == 2 * 3
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert all(torch.equal(first[n], other[n]) == n.endswith("up.weight") for n in first)
    assert all(n.endswith("down.weight") or not p.any() for n, p in first.items())


@pytest.mark.parametrize("client", [0, 3])
def test_the_server_starts_the_same_whatever_its_clients_have(client: int) -> None:
    ours, theirs = (sided(client=width, server=5).model.layers[3].lora_side for width in (4, client))
    assert torch.equal(ours.bottleneck.down.weight, theirs.bottleneck.down.weight)


def test_no_two_bottlenecks_start_alike() -> None:
    downs = [p for n, p in sided(client=4, server=4).named_parameters() if n.endswith("down.weight")]
    assert len(downs) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(downs) for b in downs[:i])


@pytest.mark.parametrize("cut", [2, 3])
def test_a_second_side_adapter_on_one_model_is_refused(cut: int) -> None:
    model = sided(cut=3)
    with pytest.raises(SplitError, match="has a side adapter already"):
        add_side(model, cut, Side(2))
    detach_side(model)
    add_side(model, cut, Side(2))


def test_each_half_holds_its_own_bottlenecks() -> None:
    client, server = split(sided(server=5), 3)
    own = {n: p.shape for n, p in client.named_parameters() if p.requires_grad}
    assert own == {
        f"model.layers.{i}.lora_side.default.{n}.weight": shape
        for i in range(3)
        for n, shape in (("down", (4, 32)), ("up", (32, 4)))
    }
    assert {n: p.shape for n, p in server.named_parameters() if p.requires_grad} == {
        "model.layers.3.lora_side.default.down.weight": (5, 32),
        "model.layers.3.lora_side.default.up.weight": (32, 5),
    }
    assert ladder(client) is not None
    assert ladder(split(sided(client=0, server=5), 3)[0]) is None


def test_it_is_fp32_on_a_bfloat16_backbone_and_z_is_not() -> None:
    model = tiny_causal_lm("llama").to(torch.bfloat16)
    add_side(model, 3, Side(4))
    noisy(model)
    client, _ = split(model, 3)
    assert {p.dtype for n, p in client.named_parameters() if "lora_side" in n} == {torch.float32}
    assert client(TOKENS, MASK).dtype == torch.bfloat16


@pytest.mark.parametrize("train", [False, True])
def test_backprop_reaches_the_side_adapter_alone(train: bool) -> None:
    client, _ = split(sided(), 3)
    client.train(train)
    optimizer = torch.optim.SGD([p for p in client.parameters() if p.requires_grad], lr=1.0)
    gradients: list[set[str]] = []
    for _ in range(2):
        optimizer.zero_grad()
        client(TOKENS, MASK).square().mean().backward()
        gradients.append({n for n, p in client.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    assert gradients[1] == {n for n, _ in client.named_parameters() if "lora_side" in n}
    assert gradients[0] == {n for n in gradients[1] if "up" in n}, "up is zero, so down has no gradient yet"


def test_a_copy_of_a_half_is_independent() -> None:
    client, _ = split(sided(), 3)
    before = client(TOKENS, MASK)
    twin = copy.deepcopy(client)
    noisy(twin)
    assert ladder(twin) is not ladder(client)
    assert not torch.equal(twin(TOKENS, MASK), before)
    assert torch.equal(client(TOKENS, MASK), before)
    noisy(client)
    assert torch.equal(client(TOKENS, MASK), twin(TOKENS, MASK))


def test_an_auxiliary_head_has_its_own_copy_of_the_servers_bottleneck() -> None:
    model = sided(client=0, server=5)
    _, server = split(model, 3)
    head, z = copied_head(server, 1), torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    before = logits(head, z)
    assert torch.equal(before, logits(server, z))
    noisy(model)
    assert torch.equal(logits(head, z), before)
    noisy(head)
    assert torch.equal(logits(head, z), logits(server, z))
    assert not torch.equal(logits(head, z), before)


class Tuple(nn.Module):
    """A layer that returns more than its hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return self.linear(x), "cache"


def test_what_a_layer_returns_beside_its_hidden_state_stays() -> None:
    layers = [Tuple() for _ in range(3)]
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    plain = layers[1](layers[0](x)[0])
    attach_side(layers, 2, [(0, 3)] * 2, Side(2, taps="all"))
    noisy(nn.ModuleList(layers))
    z, cache = layers[1](layers[0](x)[0])
    bottlenecks = [cast(Tap, layer.lora_side).bottleneck for layer in layers[:2]]
    hidden = [layers[0].linear(x), plain[0]]
    torch.testing.assert_close(z, plain[0] + sum(b(h) for b, h in zip(bottlenecks, hidden) if b is not None))
    assert cache == "cache"


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu_(x))


def test_kept_tokens_are_not_overwritten_by_a_layer_that_works_in_place() -> None:
    layers = nn.ModuleList([nn.Linear(3, 3), InPlace(3, 3), InPlace(3, 3)])
    attach_side([*layers], 2, [(0, 3)] * 2, Side(2))
    lad = next(hook.__self__ for hook in layers[0]._forward_hooks.values())  # type: ignore[attr-defined]
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), lad.keeping() as kept:
        layers[1](layers[0](x))
    assert torch.equal(kept[0][1], nn.functional.linear(x, layers[0].weight, layers[0].bias))


def test_what_is_kept_is_not_overwritten_by_a_layer_that_works_in_place() -> None:
    model = sided_images("perceptron", Side(4))
    client, _ = split_images(model, IMAGES["perceptron"], 32)
    lad = ladder(client)
    assert lad is not None
    with lad.keeping() as kept, torch.no_grad():
        client(images())
    assert len(kept) == 1
    assert torch.equal(kept[0][1], model[1](images().flatten(1)))
    assert (kept[0][1] < 0).any(), "what comes after the ReLU would have no negative value"


@pytest.mark.parametrize("width", [4, 40])  # the narrow one waits squeezed, the wide one as a sum
def test_a_forward_that_failed_leaves_nothing_for_the_next(width: int) -> None:
    model = sided(client=width)
    noisy(model)
    client, _ = split(model, 3)
    before = client(TOKENS, MASK)
    handle = client.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        client(TOKENS, MASK)
    handle.remove()
    assert torch.equal(client(TOKENS, MASK), before)


def test_it_can_be_taken_out_again() -> None:
    model, plain = sided(server=5), tiny_causal_lm("llama")
    noisy(model)
    detach_side(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert torch.equal(logits(model, TOKENS), logits(plain, TOKENS))
    assert ladder(split(model, 3)[0]) is None


@pytest.mark.parametrize(
    "settings", [{"client": -1}, {"client": 0}, {"server": -1}, {"taps": "z"}, {"kernel": 2}, {"kernel": -1}]
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"side.{next(iter(settings))}="):
        Side(**settings)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [((17, 32), (8, 4, 4)), ((8, 4, 4), (16,)), ((4, 32), (8, 32)), ((), (16,)), ((2, 8, 4, 4),) * 2],
)
def test_features_of_another_kind_are_refused(given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    with pytest.raises(SplitError, match=r"no side adapter leads from .*; move the cut to .* or set side to null"):
        Bottleneck(given, wanted, 4)


def test_what_cannot_be_placed_is_refused_and_nothing_is_left() -> None:
    model = tiny_causal_lm("llama")
    with pytest.raises(SplitError, match=r"side.taps='below' with cut=1: .* set side.taps: all, or a deeper cut"):
        add_side(model, 1, Side())
    with pytest.raises(SplitError, match="cut=4 is out of range"):
        add_side(model, 4, Side())
    mixed = nn.Sequential(nn.Conv2d(3, 4, 32), nn.Flatten(), nn.Linear(4, 8), nn.Linear(8, 5))
    with pytest.raises(SplitError, match=r"of shape \(4, 1, 1\) to the smashed data of shape \(8,\)"):
        place_side_images(mixed, 3, Side(), 32).attach(mixed)
    for whole in (model, mixed):
        assert not any(isinstance(m, Tap) for m in whole.modules())
    with pytest.raises(SplitError, match=r"a layer model.layers.9, which LlamaForCausalLM has not"):
        Placement(Side(), ["model.layers.0", "model.layers.9"], [(0, 32)]).attach(model)


class Between(nn.Sequential):
    """Something happens between its layers that is in none of them."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self[1](2 * self[0](x)))


def test_a_model_that_works_between_its_layers_is_refused() -> None:
    model = Between(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(SplitError, match=r"Between takes no side adapter at this cut: 1 is not called with what 0"):
        check_direct(model, ["0", "1"], lambda: model(torch.ones(1, 3)))
    assert not model[0]._forward_hooks
    assert not model[1]._forward_pre_hooks
