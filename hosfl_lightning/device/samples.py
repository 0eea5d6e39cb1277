"""Random batches for a half, on which an exported one is compared with it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from hosfl_lightning.models import SplitModule
from hosfl_lightning.models.checks import positions, vocabulary
from hosfl_lightning.models.image_classification import SplitImageClassifier
from hosfl_lightning.split import SplitError

Batch = dict[str, Tensor]
Padding = Literal["left", "right"]
#: Tokens in a short and in a long row.
SHORT, LONG = 8, 128
TEXT, IMAGES = ("input_ids", "attention_mask"), ("pixel_values",)


class Samples:
    """What a model's client half takes.

    Args:
        model: The cut model.

    Attributes:
        image: Shape of one image; None: it takes tokens.

    Raises:
        SplitError: The half takes something else.
    """

    def __init__(self, model: SplitModule) -> None:
        self.half: Any = model.client_half
        inputs = tuple(self.half.inputs)
        if inputs != TEXT and (inputs != IMAGES or not isinstance(model, SplitImageClassifier)):
            raise SplitError(
                f"model: the client's half takes {', '.join(inputs)}; exported are halves of {', '.join(TEXT)} or of "
                "SplitImageClassifier's pixel_values"
            )
        self.image: tuple[int, ...] | None = None
        if isinstance(model, SplitImageClassifier):
            self.image = model.channels, model.image_size, model.image_size

    @property
    def longest(self) -> int:
        """Tokens in a long row; images have none."""
        return 0 if self.image is not None else min(LONG, positions(self.half) or LONG)

    def batch(self, size: int, length: int = SHORT, padding: Padding = "right") -> Batch:
        """Random images, or random tokens of which all rows but the last may be padded.

        Args:
            size: Examples.
            length: Of the longest row; of images nothing.
            padding: On which side.
        """
        generator = torch.Generator().manual_seed(1000 * size + length)
        if self.image is not None:
            return {"pixel_values": torch.randn(size, *self.image, generator=generator)}
        ids = torch.randint(vocabulary(self.half), (size, length), generator=generator)
        lengths = torch.randint(1, length + 1, (size, 1), generator=generator)
        lengths[-1] = length
        mask = (torch.arange(length) < lengths).long()
        return {"input_ids": ids, "attention_mask": mask if padding == "right" else mask.flip(1)}

    def six(self) -> dict[str, Batch]:
        """One and eight examples, short and long, padded on the left and on the right; images of six sizes of batch."""
        if self.image is not None:
            return {f"{size} images": self.batch(size) for size in (1, 2, 3, 4, 7, 8)}
        long, short = self.longest, min(SHORT, self.longest)
        kinds: list[tuple[int, int, Padding]] = [
            (1, short, "right"), (1, long, "right"), (8, short, "left"), (8, short, "right"), (8, long, "left"),
            (8, long, "right"),
        ]  # fmt: skip
        return {f"{size} x {length} {padding}": self.batch(size, length, padding) for size, length, padding in kinds}


def counted(batch: Batch, z: Tensor) -> Tensor:
    """``(B, S)``, true at the positions of z that travel."""
    mask = batch.get("attention_mask")
    return torch.ones(z.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
