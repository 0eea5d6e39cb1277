"""Real images that are always there: scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from typing_extensions import override

from hosfl_lightning.data.images import ImageData, ImageExample
from hosfl_lightning.data.labels import LabelSet

_LARGEST = 16  # each pixel counts the dark ones of a 4x4 field


class DigitsData(ImageData):
    """1,797 handwritten digits of 8x8 grey pixels, scaled to 0..255; no file and no network is needed.

    Two fifths are held out, half for validation and half for the test set, the same for every seed.

    Args:
        validation_fraction: Share of all images for validation.
        test_fraction: Share of all images for the test set.
        channels: 1, or 3 for a model that was trained on colour: grey is repeated.
        mean: Of the pixels in [0, 1].
        std: Of the pixels in [0, 1].
        settings: All others of `ImageData`.

    Reference: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI; its test part.

    Example::

        data = DigitsData(num_clients=10, partition="dirichlet", alpha=1.0, batch_size=16)
        data.setup("fit")
        data.client_batch(client=0, round=0)["pixel_values"].shape  # (16, 1, 8, 8)
    """

    def __init__(
        self,
        validation_fraction: float = 0.2,
        test_fraction: float = 0.2,
        channels: Literal[1, 3] = 1,
        mean: float | list[float] = 0.305,
        std: float | list[float] = 0.376,
        **settings: Any,
    ) -> None:
        super().__init__(
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            channels=channels,
            mean=mean,
            std=std,
            **settings,
        )

    @override
    def read(self, split: str) -> list[ImageExample]:
        """All images as `train`; the other sets are held out of them."""
        if split != "train":
            return []
        from sklearn.datasets import load_digits  # a second to import, which other data need not wait for

        digits = load_digits()
        images = (torch.from_numpy(digits.images) * (255 / _LARGEST)).round().to(torch.uint8)
        self.label_set = LabelSet(len(digits.target_names))
        return [ImageExample(image, int(label)) for image, label in zip(images[:, None], digits.target)]
