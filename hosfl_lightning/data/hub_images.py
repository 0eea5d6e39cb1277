"""Image sets of the Hugging Face hub, such as CIFAR."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.data.images import ImageData, ImageExample
from hosfl_lightning.data.labels import LabelSet, infer_labels
from hosfl_lightning.data.pixels import to_pixels
from hosfl_lightning.data.rows import Row
from hosfl_lightning.data.tables import open_hub


class HubImageData(ImageData):
    """A labelled image set for `datasets.load_dataset`, on the hub or in a local folder; needs the extra `hub`.

    Args:
        hub: Name of the dataset or its folder.
        hub_config: Its configuration, if it has several.
        train: Name of the training split.
        validation: Name of the validation split. None: `validation_fraction` of the training images.
        test: Name of the test split. None: `test_fraction` of the training images, if that is not 0.
        image_field: The field with the image.
        label_field: The field with the label: a class index or a class name.
        settings: All others of `ImageData`.

    Example::

        cifar10 = HubImageData("uoft-cs/cifar10", image_field="img", num_clients=10)
        cifar100 = HubImageData("uoft-cs/cifar100", image_field="img", label_field="fine_label", num_clients=10)
    """

    def __init__(
        self,
        hub: str,
        hub_config: str | None = None,
        train: str = "train",
        validation: str | None = None,
        test: str | None = "test",
        image_field: str = "image",
        label_field: str = "label",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.hub = hub
        self.hub_config = hub_config
        self.sources = {"train": train, "validation": validation, "test": test}
        self.image_field = image_field
        self.label_field = label_field

    @override
    def read(self, split: str) -> list[ImageExample]:
        """The images of a split in the dataset's order."""
        source = self.sources[split]
        if source is None:
            return []
        records, names = open_hub(self.hub, self.hub_config, source)
        # Pixels take the image's place one record at a time: no more than one picture is held in full size.
        rows = [Row(row.where, {**row.fields, self.image_field: self._pixels(row)}) for row in records]
        if split == "train":
            known = names.get(self.label_field)
            self.label_set = infer_labels(rows, self.label_field) if known is None else LabelSet(len(known), known)
        labels = [self.label_set.index(row, self.label_field) for row in rows]
        others = [{name: v for name, v in row.fields.items() if name != self.image_field} for row in rows]
        return [ImageExample(row.fields[self.image_field], *rest) for row, rest in zip(rows, zip(labels, others))]

    def _pixels(self, row: Row) -> Tensor:
        image = row.field(self.image_field, "image_field")
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"{row.where}: image_field {self.image_field!r} holds no image but a {type(image).__name__}"
            )
        return to_pixels(image, row.where, self.image_size)
