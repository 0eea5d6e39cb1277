from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import Tensor

from hosfl_lightning.data import (
    DigitsData,
    FashionMNISTData,
    FederatedDataModule,
    HubImageData,
    ImageData,
    ImageExample,
    ImageFolderData,
    partition_dirichlet,
)
from hosfl_lightning.data.labels import LabelSet

CLASSES = 3


def image(number: int, channels: int = 1, size: tuple[int, int] = (2, 3)) -> ImageExample:
    """An image that shows its number in its first pixel."""
    pixels = torch.arange(channels * size[0] * size[1]).view(channels, *size) * 5 + 1
    pixels[:, 0, 0] = number
    return ImageExample(pixels.to(torch.uint8), number % CLASSES)


class NumberedImages(ImageData):
    """Training images 0..59 and, if asked for, own sets for validation (100..) and testing (200..)."""

    def __init__(self, own: tuple[str, ...] = (), sizes: tuple[tuple[int, int], ...] = ((2, 3),), **kw: Any) -> None:
        super().__init__(**{"num_clients": 4, "channels": 1, "mean": 0.0, "std": 1.0, **kw})
        self.own = own
        self.sizes = sizes

    def read(self, split: str) -> list[ImageExample]:
        self.label_set = LabelSet(CLASSES)
        if split == "train":
            return [image(i, size=self.sizes[i % len(self.sizes)]) for i in range(60)]
        start = {"validation": 100, "test": 200}[split]
        return [image(start + i) for i in range(10)] if split in self.own else []


def make(**settings: Any) -> NumberedImages:
    data = NumberedImages(**settings)
    data.setup("fit")
    return data


def numbers(examples: list[ImageExample]) -> list[int]:
    return [int(example.pixel_values[0, 0, 0]) for example in examples]


def members(batch: dict[str, Tensor]) -> list[int]:
    return (batch["pixel_values"][:, 0, 0, 0] * 255).round().int().tolist()


def test_a_batch_is_a_function_of_seed_client_and_round() -> None:
    wanted = [(client, round) for client in range(4) for round in range(8)]
    first = {at: members(make(seed=7).client_batch(*at)) for at in wanted}
    with torch.random.fork_rng():
        torch.manual_seed(999)
        again = make(seed=7)
        assert all(members(again.client_batch(*at)) == first[at] for at in reversed(wanted))
    assert members(make(seed=8).client_batch(0, 0)) != first[0, 0]


def test_a_client_uses_only_its_own_images_and_each_once_an_epoch() -> None:
    data = make(batch_size=5)
    for client in range(4):
        used = members(data.client_batch(client, 0)) + members(data.client_batch(client, 1))
        assert len(set(used)) == 10
        assert set(used) <= set(numbers(data.clients[client]))


def test_pixels_are_scaled_repeated_and_normalised_by_channel() -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    data = NumberedImages(channels=3, mean=mean, std=std)
    batch = data.collate([image(0), image(4), image(5, channels=3)])
    pixels = torch.stack([image(0).pixel_values.expand(3, -1, -1), image(4).pixel_values.expand(3, -1, -1),
                          image(5, channels=3).pixel_values]).double() / 255  # fmt: skip
    for channel in range(3):
        expected = (pixels[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(batch["pixel_values"][:, channel], expected.float())
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].is_contiguous()
    assert torch.equal(batch["labels"], torch.tensor([0, 1, 2]))
    assert batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("size", [1, 7])
def test_images_of_any_size_become_one_size(size: int) -> None:
    examples = [image(1), image(2, size=(size, 4)), image(3, size=(size, size))]
    batch = NumberedImages(image_size=size).collate(examples)
    for got, example in zip(batch["pixel_values"], examples):
        pixels = example.pixel_values[None].float() / 255
        assert torch.equal(got, F.interpolate(pixels, (size, size), mode="bilinear", antialias=False)[0])


def test_what_is_held_out_is_disjoint_and_the_same_for_every_seed() -> None:
    a, b = (make(seed=seed, validation_fraction=0.1, test_fraction=0.25) for seed in (0, 1))
    held_out = numbers(a.validation_set), numbers(a.test_set)
    assert (numbers(b.validation_set), numbers(b.test_set)) == held_out
    assert list(map(len, held_out)) == [6, 15]
    dealt = [number for client in a.clients for number in numbers(client)]
    assert sorted(dealt + held_out[0] + held_out[1]) == list(range(60))
    assert numbers(a.clients[0]) != numbers(b.clients[0])
    assert list(map(len, a.clients)) == [10, 10, 10, 9]


def test_own_sets_are_used_and_nothing_held_out() -> None:
    data = make(own=("validation", "test"))
    assert numbers(data.validation_set) == list(range(100, 110))
    assert numbers(data.test_set) == list(range(200, 210))
    assert sum(map(len, data.clients)) == 60
    assert [members(batch) for batch in data.test_dataloader()] == [list(range(200, 210))]


def test_limits_choose_the_same_subsets_for_every_seed() -> None:
    limits = {"max_train_examples": 8, "max_validation_examples": 2, "max_test_examples": 3}
    a, b = (make(seed=seed, own=("test",), **limits) for seed in (0, 1))
    chosen = [sorted(number for client in data.clients for number in numbers(client)) for data in (a, b)]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 8
    assert (len(a.validation_set), len(a.test_set)) == (2, 3)
    assert numbers(a.validation_set) == numbers(b.validation_set)
    assert not set(chosen[0]) & set(numbers(make(own=("test",)).validation_set))


def test_dirichlet_goes_by_the_labels() -> None:
    data = make(own=("validation",), partition="dirichlet", alpha=0.3, seed=3)
    parts = partition_dirichlet([i % CLASSES for i in range(60)], 4, 0.3, 3)
    assert [numbers(client) for client in data.clients] == [part.tolist() for part in parts]
    with pytest.raises(ValueError, match="min_examples_per_client=20: 4 clients need 80 examples, and there are 54"):
        make(partition="dirichlet", alpha=0.3, min_examples_per_client=20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clients": 0}, "num_clients=0: must be at least 1"),
        ({"partition": "field"}, "partition='field': choose one of iid, dirichlet"),
        ({"image_size": 0}, "image_size=0: must be at least 1"),
        ({"max_train_examples": 0}, "max_train_examples=0"),
        ({"max_test_examples": 0}, "max_test_examples=0"),
        ({"validation_fraction": 0.0}, "validation_fraction=0.0"),
        ({"test_fraction": -0.1}, "test_fraction=-0.1"),
        ({"channels": 2}, r"channels=2: choose 1 \(grey\) or 3"),
        ({"channels": 3, "mean": [0.5, 0.5]}, r"mean=\[0.5, 0.5\]: give one number or one per channel \(channels=3\)"),
        ({"std": [0.5] * 3}, r"std=.*\(channels=1\)"),
        ({"std": 0.0}, "std=0.0: must be above 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NumberedImages(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clients": 55}, "num_clients=55 is more than the 54 examples"),
        ({"sizes": ((2, 3), (4, 2))}, r"image_size: it is not set, but the images differ in size \(2x3, 4x2\)"),
        ({"own": ("test",), "test_fraction": 0.1}, "test_fraction=0.1: the data has a test set of its own"),
        ({"test_fraction": 0.6, "validation_fraction": 0.5}, "validation_fraction: it takes 30 of 24 training images"),
    ],
)
def test_settings_that_the_images_do_not_allow(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_colour_is_not_made_grey() -> None:
    class Colour(NumberedImages):
        def read(self, split: str) -> list[ImageExample]:
            return [image(i, channels=1 + 2 * (i == 9)) for i in range(10)] if split == "train" else []

    with pytest.raises(ValueError, match="channels=1: there are colour images"):
        Colour().setup("fit")
    data = Colour(channels=3, batch_size=9, num_clients=1, eval_batch_size=1)
    data.setup("fit")
    assert data.client_batch(0, 0)["pixel_values"].shape == (9, 3, 2, 3)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (DigitsData, []),
        (FashionMNISTData, ["--data.folder=x"]),
        (ImageFolderData, ["--data.folder=x"]),
        (HubImageData, ["--data.hub=x", "--data.test=null"]),
    ],
)
def test_a_recipe_can_name_them(kind: type[ImageData], arguments: list[str]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FederatedDataModule, "data")
    arguments += ["--data.image_size=96", "--data.channels=3", "--data.mean=[0.1, 0.2, 0.3]", "--data.std=0.25"]
    config = parser.parse_args([f"--data=hosfl_lightning.data.{kind.__name__}", *arguments, "--data.batch_size=7"])
    data = parser.instantiate(config).data
    assert type(data) is kind
    assert (data.image_size, data.channels, data.batch_size) == (96, 3, 7)
    assert data.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_a_subclass_must_read() -> None:
    with pytest.raises(NotImplementedError, match=r"ImageData.read must return"):
        ImageData().setup("fit")
