"""The two halves of an image classifier."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.halves import Entry, Exit, Stub
from hosfl_lightning.split.structure import Rest, Skip


class Hollow(Stub):
    """A stub that still tells the dtypes of what it stands for: ViT's forward asks its patch embeddings for theirs.

    Args:
        module: in whose place it is.
        rest: what that returns behind its tensor, such as the height and width of Swin's patches; ``None``: nothing.
    """

    def __init__(self, module: nn.Module, rest: Rest = None) -> None:
        super().__init__()
        self.rest = rest
        for name, parameter in module.named_parameters(recurse=False):
            setattr(self, name, torch.empty(0, dtype=parameter.dtype))
        for name, child in module.named_children():
            setattr(self, name, Hollow(child))

    def forward(self, *args: object, **kwargs: object) -> Any:
        """As `Stub`, with what it returns behind it."""
        given = super().forward(*args, **kwargs)
        return given if self.rest is None else (given, *self.rest)


class ImageHalf(nn.Module):
    """What both halves of an image classifier know; modules keep the names that they have in the whole model.

    A half is always in eval mode, and norms with running statistics are put there again before every forward, should
    somebody have switched the whole model to training: the statistics never move.

    Args:
        module: a pruned whole, whose children become this module's own.
        run: what the forward calls: ``module``, or its backbone.
        door: where the smashed data leave or enter.
        cut: number of layers the client holds.
        shape: of one image's features at the cut: ``(C, H', W')``, ``(S, h)`` or ``(h,)``.
        names: dotted names of all layers of the whole model.
    """

    def __init__(
        self,
        module: nn.Module,
        run: nn.Module,
        door: Exit | Entry,
        cut: int,
        shape: tuple[int, ...],
        names: Sequence[str],
    ) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self.__dict__.update(_run=run, _door=door)  # they are inside already, under their own names
        self.cut, self.shape, self.names = cut, shape, tuple(names)
        self.architecture = type(module).__name__
        self.eval()

    @property
    def hidden_size(self) -> int:
        """``h``: channels of a feature map, else the width."""
        return self.shape[0] if len(self.shape) == 3 else self.shape[-1]

    @property
    def positions(self) -> int:
        """``S``: pixels of a feature map, tokens, or 1."""
        return prod(self.shape[1:] if len(self.shape) == 3 else self.shape[:-1])

    @property
    def layers(self) -> dict[int, nn.Module]:
        """The layers of this half only, by their number in the whole model."""
        held = dict(self.named_modules())
        numbered = {i: held[name] for i, name in enumerate(self.names) if name in held}
        return {i: layer for i, layer in numbered.items() if not isinstance(layer, Skip)}

    def train(self, mode: bool = True) -> ImageHalf:
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def _through(self, value: Tensor) -> object:
        for module in self.modules():
            if getattr(module, "running_mean", None) is not None:
                module.training = False
        return cast(nn.Module, self._run)(value)


class ImageClientHalf(ImageHalf):
    """z = f_c(x; θ_c): what comes before the layers, and the first ``cut`` of them. Arguments as in `ImageHalf`."""

    #: What it takes of a batch.
    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images to smashed data.

        Args:
            pixel_values: ``(B, C, H, W)``; cast to the dtype of the half's first parameter.

        Returns:
            z of shape ``(B, S, h)``, contiguous. A feature map ``(B, C, H', W')`` is copied to channels last, its
            pixels row by row: S = H'·W', h = C. Tokens ``(B, S, h)`` stay, a vector ``(B, h)`` has S = 1.

        Raises:
            SplitError: the images are of another size than the model was split for.
        """
        parameter, door = next(self.parameters(), pixel_values), cast(Exit, self._door)
        try:
            self._through(pixel_values.to(parameter.dtype))
            features = cast(Tensor, door.smashed)
        finally:
            door.smashed = None
        if tuple(features.shape[1:]) != self.shape:
            raise SplitError(
                f"images of shape {tuple(pixel_values.shape[1:])} give features of shape {tuple(features.shape[1:])} "
                f"at the cut of {self.architecture}, it was split for {self.shape}: set image_size and channels to "
                "the data's."
            )
        if features.ndim == 2:
            return features[:, None]
        return features.flatten(2).transpose(1, 2).contiguous() if features.ndim == 4 else features.contiguous()


class ImageServerHalf(ImageHalf):
    """f_s(z; θ_s): the other layers and the head. It never sees ``pixel_values``. Arguments as in `ImageHalf`."""

    def forward(self, z: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Smashed data to logits.

        Args:
            z: ``(B, S, h)``; copied once into the shape that the layers take, so they may work in place.
            attention_mask: not read: every position of an image is valid.

        Returns:
            Logits ``(B, classes)``.

        Raises:
            SplitError: z is of another cut or image size.
        """
        if tuple(z.shape[1:]) != (self.positions, self.hidden_size):
            raise SplitError(
                f"smashed data of shape {tuple(z.shape[1:])}, but the cut of {self.architecture} has "
                f"{self.positions} positions of width {self.hidden_size}: use one cut and image_size on both halves."
            )
        rows = z.transpose(1, 2) if len(self.shape) == 3 else z
        # Contiguous: a kernel for channels last may round in another way than the one of the whole.
        features = rows.reshape(len(z), *self.shape).clone(memory_format=torch.contiguous_format)
        door = cast(Entry, self._door)
        door.smashed = features
        try:
            return logits_of(self._through(features.detach()))
        finally:
            door.smashed = None


def logits_of(output: object) -> Tensor:
    """The logits of what a model returns: a tensor, or an output of transformers."""
    return output if isinstance(output, Tensor) else cast(Tensor, output.logits)  # type: ignore[attr-defined]
