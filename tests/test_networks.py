from __future__ import annotations

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from hosfl_lightning.networks import ConvNet


@pytest.mark.parametrize(("size", "maps"), [(8, (8, 4, 2)), (28, (14, 7, 4)), (32, (16, 8, 4))])
def test_blocks_halve_the_map(size: int, maps: tuple[int, ...]) -> None:
    network = ConvNet(channels=3, widths=(8, 12, 16), num_labels=4, image_size=size)
    assert len(network) == 4
    value = torch.zeros(2, 3, size, size)
    for block, width, side in zip(network, (8, 12, 16), maps):
        value = block(value)
        assert value.shape == (2, width, side, side)
    assert network[3](value).shape == (2, 4)


def test_a_block_is_the_formula_and_the_head_the_mean() -> None:
    network = ConvNet(channels=1, widths=(16,), num_labels=3)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.nn.functional.conv2d(x, network.get_parameter("0.conv.weight"), padding=1)
    groups = y.unflatten(1, (2, 8))
    mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, unbiased=False)
    y = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2).relu()
    head = network.get_submodule("1.linear")
    torch.testing.assert_close(network(x), head(y.mean((2, 3))))


def test_no_forward_moves_a_statistic() -> None:
    network = ConvNet()
    assert not list(network.buffers())
    assert not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in network.modules())


def test_it_is_made_from_a_recipe() -> None:
    parser = ArgumentParser()
    parser.add_argument("--network", type=nn.Module)
    settings = {"class_path": "hosfl_lightning.networks.ConvNet", "init_args": {"widths": [4, 6], "num_labels": 2}}
    network = parser.instantiate(parser.parse_object({"network": settings})).network
    assert isinstance(network, ConvNet)
    assert network(torch.zeros(1, 1, 8, 8)).shape == (1, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": ()}, "at least one block"),
        ({"channels": 0}, "channels=0"),
        ({"num_labels": 0}, "num_labels=0"),
        ({"image_size": 8, "widths": (4,) * 5}, "image_size=8: 5 blocks halve it 4 times"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvNet(**settings)  # type: ignore[arg-type]
