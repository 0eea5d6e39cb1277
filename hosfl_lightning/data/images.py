"""Image classification: 8-bit images and their classes, dealt to clients."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.data.checks import check_at_least, check_choice, check_fraction, check_share
from hosfl_lightning.data.federated import FederatedDataModule
from hosfl_lightning.data.labels import LabelSet
from hosfl_lightning.data.partition import Partitioner, fixed_subset, spelled
from hosfl_lightning.data.shift import Shift, seen
from hosfl_lightning.parts import check_part


class ImageExample(NamedTuple):
    """One image.

    Attributes:
        pixel_values: uint8 (C, H, W), C = 1 or 3.
        labels: The class index.
        fields: What else the data says of it, for `ByField`; None: nothing.
    """

    pixel_values: Tensor
    labels: int
    fields: Mapping[str, Any] | None = None


class ImageData(FederatedDataModule):
    """Base of all image data: x = (resize(pixels / 255) − mean) / std; a subclass reads the splits in `read`.

    Images stay 8-bit until a batch is made of them. The held-out sets, and the subsets that `max_train_examples` and
    the like choose, are the same for every seed: `seed` only fixes who holds what and in which order.

    Args:
        num_clients: Number of clients. None: as many as the partitioner makes.
        partition: `iid` deals at random; `dirichlet` skews the labels (`alpha`).
        alpha: Concentration of the Dirichlet partition; smaller is more skewed.
        min_examples_per_client: Of the Dirichlet partition: it is drawn again, and then single examples are moved,
            until no client has fewer. 0: a client may be empty, and is never sampled.
        partitioner: In place of the three before: an object that says which client holds which images; it is told
            their labels and, from the hub, their fields.
        max_train_examples: Use only so many of the training images that are left when others are held out.
        max_validation_examples: Use only so many validation images.
        max_test_examples: Use only so many test images.
        validation_fraction: Share of the training images held out where there is no validation set of its own.
        test_fraction: Share of the training images held out for the test set where there is none of its own. 0: none.
        image_size: Height and width in pixels that every image is resized to, bilinear and without antialiasing. None:
            as stored, which must be one size.
        channels: 3, with a grey image repeated; or 1, which refuses colour images.
        mean: Subtracted from the pixels in [0, 1]; one number or one per channel.
        std: What they are then divided by; one number or one per channel.
        batch_size: Images a client uses a round; a client that holds fewer uses all it has.
        eval_batch_size: Images per batch of the held-out loaders.
        seed: Fixes the partition, every client's order and, with `shift`, its sensor.
        shift: The sensor through which clients see, of `hosfl_lightning.data.shift` or a `Shift` of your own; held-out
            image i is seen through that of client i mod N. None: as stored.

    Attributes:
        label_set: Number of the classes and, where known, their names; known after `setup`.
    """

    def __init__(
        self,
        num_clients: int | None = 10,
        partition: Literal["iid", "dirichlet"] = "iid",
        alpha: float = 0.5,
        min_examples_per_client: int = 1,
        partitioner: Partitioner | None = None,
        max_train_examples: int | None = None,
        max_validation_examples: int | None = None,
        max_test_examples: int | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.0,
        image_size: int | None = None,
        channels: Literal[1, 3] = 3,
        mean: float | list[float] = 0.5,
        std: float | list[float] = 0.5,
        batch_size: int = 4,
        eval_batch_size: int = 32,
        seed: int = 0,
        shift: Shift | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed=seed)
        if shift is not None:
            check_part(shift, Shift, "data.init_args.shift")
        check_at_least(0, min_examples_per_client=min_examples_per_client)
        check_at_least(1, num_clients=num_clients)
        check_at_least(1, max_train_examples=max_train_examples, max_validation_examples=max_validation_examples)
        check_at_least(1, max_test_examples=max_test_examples, image_size=image_size)
        check_fraction(validation_fraction=validation_fraction)
        check_share(test_fraction=test_fraction)
        check_choice(("iid", "dirichlet"), partition=partition)
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: choose 1 (grey) or 3 (colour)")
        self.requested_clients = num_clients
        settings = {"alpha": alpha, "min_examples_per_client": min_examples_per_client}
        self.partitioner = spelled(partitioner, partition, **settings)
        self.limits = {"train": max_train_examples, "validation": max_validation_examples, "test": max_test_examples}
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.image_size = image_size
        self.channels = channels
        self.mean = _per_channel(mean, channels, "mean")
        self.std = _per_channel(std, channels, "std")
        if not (self.std > 0).all():
            raise ValueError(f"std={std}: must be above 0")
        self.shift = shift
        self.label_set = LabelSet(0)

    @property
    @override
    def label_names(self) -> Sequence[str] | None:
        """The names of the classes by index, known after `setup`; None where labels are integers."""
        return self.label_set.names

    def read(self, split: str) -> list[ImageExample]:
        """The images of `train` (asked for first, and then sets `label_set`), `validation` or `test`; [] if none."""
        raise NotImplementedError(f"{type(self).__name__}.read must return the images of a split")

    @override
    def setup(self, stage: str) -> None:
        """Read, check, hold out and partition.

        Raises:
            FileNotFoundError: If a file or a folder is not there.
            ValueError: If a file is bad, the images do not fit the settings, or a client would be empty.
        """
        if self.clients:
            return
        train, validation, test = (self.read(split) for split in ("train", "validation", "test"))
        self._check_images(train + validation + test)
        if test and self.test_fraction:
            raise ValueError(f"test_fraction={self.test_fraction}: the data has a test set of its own; leave it at 0")
        total = len(train)
        if self.test_fraction:
            train, test = _hold_out(train, self.test_fraction * total, "test_fraction")
        if not validation:
            train, validation = _hold_out(train, self.validation_fraction * total, "validation_fraction")
        train = self._limited(train, "train")
        self.validation_set = self._limited(validation, "validation")
        self.test_set = self._limited(test, "test")
        labels = [example.labels for example in train]
        field = None if any(example.fields is None for example in train) else partial(_field, train)
        self.deal(train, self.partitioner, num_clients=self.requested_clients, labels=labels, field=field)
        if self.shift is not None:
            self._see_through(self.shift)

    def _see_through(self, shift: Shift) -> None:
        """Every image as the sensor of its client stores it."""
        numbers = torch.tensor([len(examples) for examples in self.clients]).cumsum(0).tolist()
        self.clients = [
            self._seen(shift, examples, [client] * len(examples), "train", end - len(examples))
            for client, (examples, end) in enumerate(zip(self.clients, numbers))
        ]
        for split in ("validation", "test"):
            examples = getattr(self, f"{split}_set")
            clients = [self.client_of_held_out(number) for number in range(len(examples))]
            setattr(self, f"{split}_set", self._seen(shift, examples, clients, split))

    def _seen(
        self, shift: Shift, examples: Sequence[ImageExample], clients: list[int], split: str, first: int = 0
    ) -> list[ImageExample]:
        # a grey image has its channels before the sensor, which may treat them unequally
        pixels = [example.pixel_values.expand(self.channels, -1, -1) for example in examples]
        images = seen(shift, pixels, clients, self.seed, split, first)
        return [example._replace(pixel_values=image) for example, image in zip(examples, images)]

    @override
    def collate(self, examples: Sequence[ImageExample]) -> dict[str, Tensor]:
        """The batch that a list of B examples makes.

        Returns:
            pixel_values (B, C, H, W) fp32, scaled, resized and normalised; labels (B,) int64.
        """
        pixels = torch.stack([self._resized(example.pixel_values) for example in examples])
        labels = torch.tensor([example.labels for example in examples], dtype=torch.int64)
        return {"pixel_values": (pixels - self.mean) / self.std, "labels": labels}

    def _resized(self, pixels: Tensor) -> Tensor:
        """uint8 (1 or C, h, w) to fp32 (C, H, W) in [0, 1]."""
        scaled = pixels.float() / 255
        size = self.image_size
        if size is not None and pixels.shape[1:] != (size, size):
            scaled = F.interpolate(scaled[None], size=(size, size), mode="bilinear", align_corners=False)[0]
        return scaled.expand(self.channels, -1, -1)

    def _check_images(self, examples: list[ImageExample]) -> None:
        if self.channels == 1 and any(len(example.pixel_values) == 3 for example in examples):
            raise ValueError("channels=1: there are colour images, and grey is not made of them; set channels=3")
        sizes = {tuple(example.pixel_values.shape[1:]) for example in examples}
        if self.image_size is None and len(sizes) > 1:
            found = ", ".join(f"{height}x{width}" for height, width in sorted(sizes)[:4])
            raise ValueError(f"image_size: it is not set, but the images differ in size ({found}); set it")

    def _limited(self, examples: list[ImageExample], split: str) -> list[ImageExample]:
        return [examples[i] for i in fixed_subset(len(examples), self.limits[split])]


def _per_channel(value: float | list[float], channels: int, setting: str) -> Tensor:
    """One number or one per channel as fp32 (1 or C, 1, 1)."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if len(numbers) not in (1, channels):
        raise ValueError(f"{setting}={value}: give one number or one per channel (channels={channels})")
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1)


def _field(examples: list[ImageExample], name: str) -> list[Hashable]:
    """The values of a field, which every example must have."""
    of_each = [example.fields or {} for example in examples]
    for fields in of_each:
        if fields.get(name) is None:
            raise ValueError(f"an image has no field {name!r} (field); its fields are: {', '.join(fields)}")
    return [fields[name] for fields in of_each]


def _hold_out(train: list[ImageExample], share: float, setting: str) -> tuple[list[ImageExample], list[ImageExample]]:
    """The training images without a fixed random choice of about `share` of them, and that choice."""
    count = max(1, round(share))
    if count >= len(train):
        raise ValueError(f"{setting}: it takes {count} of {len(train)} training images and leaves none; lower it")
    chosen = set(fixed_subset(len(train), count))
    kept = [example for index, example in enumerate(train) if index not in chosen]
    return kept, [train[i] for i in sorted(chosen)]
