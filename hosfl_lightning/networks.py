"""Small networks to train from scratch, to be cut between their children."""

from __future__ import annotations

from collections import OrderedDict
from math import gcd

from torch import Tensor, nn

#: Images beyond this size are halved by the first block too: z would hold more numbers than the image.
LARGE = 16


class ConvNet(nn.Sequential):
    """``head(block_n(… block_1(x)))``, ``block = ReLU(GroupNorm(conv3x3(x)))``: each block one child, then the head.

    ``x (B, channels, H, W)`` to logits ``(B, num_labels)``. Every block but the first halves height and width, the
    first one as well for images above 16x16: 8x8 digits become maps of 8, 4, 2, grey 28x28 images of 14, 7, 4. The
    head averages over the map. No batch norm: there are no statistics that a forward could move.

    Args:
        channels: Of the images.
        widths: Channels of the blocks.
        num_labels: Classes.
        image_size: Height and width of the images.

    Raises:
        ValueError: No block, or nothing would be left of the image.
    """

    def __init__(
        self, channels: int = 1, widths: tuple[int, ...] = (16, 32, 64), num_labels: int = 10, image_size: int = 8
    ) -> None:
        if not widths or min(channels, *widths, num_labels) < 1:
            raise ValueError(
                f"channels={channels}, widths={tuple(widths)}, num_labels={num_labels}: give at least one block, "
                "and at least 1 of each"
            )
        halvings = len(widths) - (image_size <= LARGE)
        if image_size < 2**halvings:
            raise ValueError(f"image_size={image_size}: {len(widths)} blocks halve it {halvings} times; shorten widths")
        strides = [2 if image_size > LARGE else 1] + [2] * (len(widths) - 1)
        blocks = [ConvBlock(*sizes) for sizes in zip((channels, *widths), widths, strides)]
        super().__init__(*blocks, Head(widths[-1], num_labels))


class ConvBlock(nn.Sequential):
    """``ReLU(GroupNorm(conv3x3(x)))``, ``(B, in, H, W)`` to ``(B, out, ⌈H/stride⌉, ⌈W/stride⌉)``.

    Args:
        in_channels: Of ``x``.
        out_channels: Normed in groups of eight, or of the largest smaller power of two that divides them.
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        norm = nn.GroupNorm(out_channels // gcd(8, out_channels), out_channels)
        super().__init__(OrderedDict(conv=conv, norm=norm, activation=nn.ReLU()))


class Head(nn.Module):
    """``W mean(x) + b``: the average over the map ``(B, width, H, W)``, then a linear layer to ``(B, num_labels)``.

    Args:
        width: Channels of the map.
        num_labels: Classes.
    """

    def __init__(self, width: int, num_labels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_labels)

    def forward(self, features: Tensor) -> Tensor:
        """Maps to logits."""
        return self.linear(features.mean((-2, -1)))
