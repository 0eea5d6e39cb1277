from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PoolFormerConfig, PoolFormerForImageClassification, ResNetModel, ViTModel

from hosfl_lightning.clients.recompute import recomputing
from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.split import ImageClientHalf, ImageServerHalf, SplitError, split_images
from tests.split.tiny_images import CLASSES, MODELS, PRETRAINED, images, tiny_image_model

get = cache(tiny_image_model)
CUTS = {name: 2 if name in PRETRAINED else 1 for name in MODELS}
CUTS["perceptron"] = 2  # before what works in place
CUTS["one_channel"] = 2


def whole_logits(model: nn.Module, pixel_values: Tensor) -> Tensor:
    output: Any = model(pixel_values)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("name", MODELS)
def test_halves_equal_the_whole_bit_for_bit(name: str) -> None:
    model, pixel_values = get(name), images()
    with torch.no_grad():
        whole = whole_logits(model, pixel_values)
        assert whole.isfinite().all()
        for cut in (1, CUTS[name]):
            client, server = split_images(model, cut, image_size=32)
            for count in (1, 2, 8):
                given = images(count)
                assert torch.equal(server(client(given)), whole_logits(model, given)), count
        for cut in (1, CUTS[name]):
            client, server = split_images(model, cut, image_size=32)
            z = client(pixel_values)
            assert client.inputs == ("pixel_values",)
            assert client.cut == server.cut == cut
            assert z.shape == (3, client.positions, client.hidden_size)
            assert z.is_contiguous()
            kept = z.clone()
            assert torch.equal(server(z, torch.ones(z.shape[:2])), whole)
            assert torch.equal(z, kept), "the server worked in the smashed data"
        assert torch.equal(whole_logits(model, pixel_values), whole), "the whole model changed"


def test_smashed_data_are_the_features_with_channels_last() -> None:
    pixel_values = images()
    with torch.no_grad():
        model = get("ResNet")
        maps = model.resnet.encoder.stages[1](model.resnet.encoder.stages[0](model.resnet.embedder(pixel_values)))
        client, _ = split_images(model, 2, 32)
        assert (client.positions, client.hidden_size) == (16, 16)
        assert torch.equal(client(pixel_values), maps.permute(0, 2, 3, 1).reshape(3, 16, 16))
        model = get("ViT")
        tokens = model(pixel_values, output_hidden_states=True).hidden_states[1]
        client, _ = split_images(model, 1, 32)
        assert (client.positions, client.hidden_size) == (17, 32)
        assert torch.equal(client(pixel_values), tokens)
        model = get("perceptron")
        client, _ = split_images(model, 2, 32)
        assert (client.positions, client.hidden_size) == (1, 16)
        assert torch.equal(client(pixel_values)[:, 0], model[1](pixel_values.flatten(1)))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_the_backward_of_the_whole(name: str) -> None:
    model, pixel_values = copy.deepcopy(get(name)), images()
    client, server = split_images(model, CUTS[name], 32)
    weights = torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(2))
    (whole_logits(model, pixel_values) * weights).sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        z = client(pixel_values)
    z.requires_grad_()
    (server(z) * weights).sum().backward()
    assert not any(p.grad is not None for p in client.parameters())
    client(pixel_values).backward(z.grad)
    actual = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    # Swin's attention runs in another kernel where there is a graph, as there is none at the client.
    near = {"rtol": 1e-4, "atol": 1e-5} if name == "Swin" else {"rtol": 1e-5, "atol": 1e-6}
    for parameter, gradient in expected.items():
        torch.testing.assert_close(actual[parameter], gradient, **near, msg=parameter)


@pytest.mark.parametrize("name", MODELS)
def test_halves_hold_the_parameters_of_the_whole_and_none_of_each_other(name: str) -> None:
    model = get(name)
    whole = dict(model.named_parameters())
    client, server = split_images(model, CUTS[name], 32)
    held = [dict(half.named_parameters()) for half in (client, server)]
    assert all(parameter is whole[n] for half in held for n, parameter in half.items())
    assert not {id(p) for p in held[0].values()} & {id(p) for p in held[1].values()}
    assert held[0].keys() | held[1].keys() == whole.keys()
    modules = [{id(m) for m in half.modules() if list(m.parameters(recurse=False))} for half in (client, server)]
    assert not modules[0] & modules[1]


@pytest.mark.parametrize("name", ["ResNet", "MobileNetV2", "one_channel"])
def test_norm_statistics_never_move(name: str) -> None:
    model = tiny_image_model(name)
    client, server = split_images(model, CUTS[name], 32)
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    expected = whole_logits(model, images())
    for module in (client, server, model):
        module.train()
    z = client(images()).detach().requires_grad_()
    logits = server(z)
    logits.sum().backward()
    client(images()).backward(z.grad)
    assert any(n.endswith("num_batches_tracked") for n in statistics)
    for buffer, value in model.named_buffers():
        assert torch.equal(value, statistics[buffer]), buffer
    assert not client.training
    assert not server.training
    if name != "MobileNetV2":  # its dropout, a child of the whole, is on by now
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", ["ResNet", "MobileNetV2", "ViT", "ConvNet", "one_channel"])
def test_layer_wise_probes_perturb_every_parameter(name: str) -> None:
    client, _ = split_images(tiny_image_model(name), CUTS[name], 32)
    named = {n: p for n, p in client.named_parameters() if p.requires_grad}
    for parameter_name, parameter in named.items():
        before = {n: p.detach().clone() for n, p in named.items()}
        seen: list[Tensor] = []

        def objective() -> Tensor:
            seen.append(client(images()))  # noqa: B023
            return seen[-1].sum()  # noqa: B023

        with torch.no_grad():
            ZerothOrder([parameter], module=client, probes=1, mu=0.1).project(objective)
        assert len(seen) == 2 or seen[0].sum() == seen[1].sum()  # then it is asked whether the probe was seen
        assert not torch.equal(seen[0], seen[1]), f"{parameter_name} was read unperturbed"
        assert all(torch.equal(p, before[n]) for n, p in named.items())


def test_the_random_state_the_hooks_and_the_whole_stay() -> None:
    model = tiny_image_model("ResNet")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    names = [n for n, _ in model.named_modules()]
    state = torch.get_rng_state()
    client, server = split_images(model.train(), 2, 32)
    assert not any(m.training for half in (model, client, server) for m in half.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [n for n, _ in model.named_modules()] == names


class Draws(nn.Identity):
    """Draws random numbers."""

    def forward(self, value: Tensor) -> Tensor:
        torch.rand(2)
        return value


def test_a_forward_that_draws_leaves_the_random_state() -> None:
    network = nn.Sequential(nn.Flatten(), Draws(), nn.Linear(3072, 2))
    state = torch.get_rng_state()
    split_images(network, 1, 32)
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_are_numbered_as_in_the_whole() -> None:
    model = get("ResNet")
    client, server = split_images(model, 1, 32)
    assert client.layers == {0: model.resnet.encoder.stages[0]}
    assert server.layers == {i: model.resnet.encoder.stages[i] for i in (1, 2, 3)}
    network = get("ConvNet")
    client, server = split_images(network, 2, 32)
    assert client.layers == {0: network[0], 1: network[1]}
    assert server.layers == {2: network[2], 3: network[3]}


@pytest.mark.parametrize("name", ["ResNet", "MobileNetV2", "ViT", "ConvNet"])
def test_gradients_through_recomputed_layers_are_the_same(name: str) -> None:
    client, _ = split_images(get(name), 2, 32)
    gradients = []
    for active in (False, True):
        with recomputing(client, active):
            z = client(images())
        gradients.append(torch.autograd.grad(z.square().sum(), list(client.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert not any("forward" in vars(layer) for layer in client.layers.values())


@pytest.mark.parametrize("name", ["ResNet", "ViT", "ConvNet"])
def test_halves_copy_deeply_and_work_in_bfloat16(name: str) -> None:
    model = copy.deepcopy(get(name)).to(torch.bfloat16)
    client, server = split_images(model, 1, 32)
    with torch.no_grad():
        expected = server(client(images()))
        assert expected.dtype == torch.bfloat16
        twins = copy.deepcopy(client), copy.deepcopy(server)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twins[1](twins[0](images())), expected)


@pytest.mark.parametrize("cut", [0, 4, -1, True, 1.5, None])
def test_cut_out_of_range(cut: object) -> None:
    message = r"ResNetForImageClassification has 4 entries of resnet\.encoder\.stages, .* goes from 1 to 3"
    with pytest.raises(SplitError, match=message):
        split_images(get("ResNet"), cut, 32)  # type: ignore[arg-type]
    with pytest.raises(SplitError, match=r"ConvNet has 4 children, .* from 1 to 3"):
        split_images(get("ConvNet"), cut, 32)  # type: ignore[arg-type]


class OutOfOrder(nn.Sequential):
    """Runs its children backwards."""

    def forward(self, value: Tensor) -> Tensor:
        for module in reversed(self):
            value = module(value)
        return value


class FailsOn(nn.Sequential):
    """Adds the images at the end, past the cut, where there are so many."""

    def __init__(self, count: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3072, 4), nn.Linear(4, 4))
        self.count = count

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value) + (value.mean() if len(value) == self.count else 0)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_check_at_set_up_has_batches_of_several_sizes(count: int) -> None:
    with pytest.raises(SplitError, match=f"FailsOn cannot be split: whole and halves differ on a batch of {count}"):
        split_images(FailsOn(count), 2, 32)


class SkipsTheCut(nn.Sequential):
    """Adds the images at the end, past the cut."""

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value) + value.mean()


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    linear, flat = nn.Linear(3072, 3072), nn.Flatten()
    with pytest.raises(SplitError, match="OutOfOrder cannot be split: its children do not run once each, in order"):
        split_images(OutOfOrder(linear, flat), 1, 32)
    with pytest.raises(SplitError, match="SkipsTheCut cannot be split: whole and halves differ on a batch of 1"):
        split_images(SkipsTheCut(flat, nn.Linear(3072, 4), nn.Linear(4, 4)), 2, 32)
    with pytest.raises(SplitError, match="Sequential cannot be split: its children do not run once each, in order"):
        split_images(nn.Sequential(flat, linear, linear), 2, 32)
    twin = nn.Linear(3072, 3072)
    twin.weight = linear.weight
    with pytest.raises(SplitError, match=r"both halves would need 2\.weight\."):
        split_images(nn.Sequential(flat, linear, twin), 2, 32)
    with pytest.raises(SplitError, match=r"Sequential is no classifier: its output has shape \(1, 3, 29, 29\)"):
        split_images(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 2)), 1, 32)
    with pytest.raises(SplitError, match=r"before 1: features of shape \(3, 4, 8, 32\) are neither"):
        split_images(nn.Sequential(nn.Unflatten(2, (4, 8)), nn.Flatten()), 1, 32)
    with pytest.raises(SplitError, match="Linear cannot be split: it is neither"):
        split_images(linear, 1, 32)
    with pytest.raises(SplitError, match="ViTModel cannot be split: it has no head"):
        split_images(ViTModel(get("ViT").config), 1, 32)
    with pytest.raises(SplitError, match="ResNetModel cannot be split: its forward fails"):
        split_images(ResNetModel(get("ResNet").config), 1, 32)
    config = PoolFormerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    with pytest.raises(SplitError, match="PoolFormerForImageClassification cannot be split"):
        split_images(PoolFormerForImageClassification(config), 1, 32)
    with pytest.raises(SplitError, match=r"fails on images of shape \(1, 32, 32\) .* set channels and image_size"):
        split_images(get("ViT"), 1, 32, channels=1)
    with pytest.raises(SplitError, match=r"fails on images of shape \(3, 16, 16\) .* set channels and image_size"):
        split_images(get("ViT"), 1, 16)


def test_other_images_than_those_it_was_split_for_are_refused_and_leave_nothing_behind() -> None:
    client, server = split_images(get("ResNet"), 2, 32)
    with pytest.raises(SplitError, match=r"\(3, 64, 64\) give features of shape \(16, 8, 8\) .* for \(16, 4, 4\)"):
        client(torch.zeros(2, 3, 64, 64))
    with pytest.raises(SplitError, match=r"shape \(64, 16\), but the cut of ResNet.* has 16 positions of width 16"):
        server(torch.zeros(2, 64, 16))
    with pytest.raises(ValueError, match="channel dimension"):
        client(torch.zeros(2, 1, 32, 32))
    assert isinstance(client, ImageClientHalf)
    assert isinstance(server, ImageServerHalf)
    assert not any(getattr(m, "smashed", None) is not None for half in (client, server) for m in half.modules())
