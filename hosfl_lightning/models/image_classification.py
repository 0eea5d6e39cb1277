"""A split image classifier."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from hosfl_lightning.models.base import default_optimizer
from hosfl_lightning.models.classification import SplitClassifier, check_classes
from hosfl_lightning.models.evaluated import Batch
from hosfl_lightning.models.halves import Part
from hosfl_lightning.models.pretrained import PretrainedError, load_model, seeded
from hosfl_lightning.models.weights import load_weights
from hosfl_lightning.split import (
    ImageClientHalf,
    ImageServerHalf,
    Lora,
    Placement,
    Side,
    SplitError,
    linear_head,
    place_side_images,
    split_images,
)
from hosfl_lightning.split.client_parameters import ClientParameters
from hosfl_lightning.wire import SmashedData

#: Of data that is none, in an error.
OF_IMAGES = "for images subclass hosfl_lightning.data.ImageData, whose read returns the images of a split"


class SplitImageClassifier(SplitClassifier):
    r"""``ℓ = −(1/n) Σ_i log p(y_i | x_i)`` over the ``n`` images, in nats; the head is the server's and is trained.

    ``pixel_values (B, C, H, W)`` fp32, ``labels (B,)``. The smashed data are ``(B, S, h)`` whatever the model: of a
    feature map S pixels of h channels, of a vision transformer its tokens, of a vector one position. Both halves stay
    in eval mode, so norm statistics never move. Logs ``loss`` and ``accuracy`` (micro).

    Args:
        cut: Number of layers the client holds: stages of a ResNet, blocks of a MobileNetV2, layers of a ViT, children
            of an ``nn.Sequential``.
        num_labels: Number of classes; where ``pretrained`` has another number it gets a fresh head.
        image_size: Height and width of the images.
        channels: Of the images.
        pretrained: Folder or hub name of an image classifier.
        network: In place of ``pretrained``: the class of a network to train from scratch with its arguments, such as
            ``hosfl_lightning.networks.ConvNet``; in Python what makes one. Its weights are drawn under ``seed``.
        weights: With what the ``network`` starts instead: a safetensors file with all tensors of its ``state_dict``,
            as ``safetensors.torch.save_model(network, FILE)`` writes it.
        lora: Adapters on both halves of a vision transformer; None trains every weight that is not ``frozen``.
        frozen: Regular expressions, searched in the names of the whole model's parameters: what is not trained, such
            as ``normalization`` for MobileNetV2's norms.
        optimizer: The server's optimizer.
        lr_scheduler: The server's schedule, stepped once a round.
        dtype: Of the model: ``float32``, ``bfloat16``, or ``auto`` (as stored). Adapters are fp32.
        seed: Of a network's start, a fresh head's and the adapters'.
        client_holds: ``half``, or ``whole`` where the method has no cut.
        side: As in `SplitModule`, on the client's layers that have parameters: of a feature map by convolutions, 1x1
            or ``side.kernel``, averaged to the resolution of the cut.
        part: ``both`` halves, or the ``client``'s alone. An image model is loaded whole for that, and the server's half
            dropped once it is cut: a device needs room for all of it for that moment. `auxiliary_head` is there all the
            same, as it copies nothing of the server.
        client_parameters: As in `SplitModule`; at the client it decides alone, whatever ``frozen`` says.
        compile: As in `SplitModule`.

    Raises:
        PretrainedError: The model cannot be loaded, or not one of ``pretrained`` and ``network`` is given.
        SplitError: The model cannot be cut as asked, or ``frozen`` matches nothing or leaves a half nothing to train.
    """

    auto_class = AutoModelForImageClassification
    trains_head = True

    def __init__(
        self,
        cut: int,
        num_labels: int,
        image_size: int,
        channels: int = 3,
        pretrained: str | None = None,
        network: Callable[[], nn.Module] | None = None,
        lora: Lora | None = None,
        frozen: Sequence[str] = (),
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: Literal["float32", "bfloat16", "auto"] = "float32",
        seed: int = 0,
        client_holds: Literal["half", "whole"] = "half",
        side: Side | None = None,
        part: Part = "both",
        client_parameters: ClientParameters | None = None,
        weights: str | None = None,
        compile: bool = False,
    ) -> None:
        if bool(pretrained) == (network is not None) or isinstance(network, nn.Module):
            raise PretrainedError(
                "model.init_args: give one of pretrained (a folder or hub name) and network (a class, which is made "
                "anew under seed; not a module)"
            )
        if weights is not None and network is None:
            raise PretrainedError("model.init_args.weights: they are a network's; give network, or leave them out")
        self.num_labels, self.image_size, self.channels = check_classes(num_labels), image_size, channels
        super().__init__(
            pretrained or "", cut, lora, optimizer, lr_scheduler, dtype, seed, client_holds, side,
            part, client_parameters, compile=compile, network=network, frozen=frozen, weights=weights,
        )  # fmt: skip

    def load_whole(self, dtype: str, seed: int, **model_kwargs: Any) -> Any:
        """The pretrained model, or a new network; what is frozen asks for no gradient."""
        network, frozen = model_kwargs["network"], model_kwargs["frozen"]
        if network is None:
            whole: Any = load_model(
                self.auto_class, self.pretrained, seed=seed, fresh_head=True, dtype=dtype, num_labels=self.num_labels
            )
        else:
            with seeded(seed):
                whole = network()
            if not isinstance(whole, nn.Module):
                raise PretrainedError(
                    f"model.init_args.network: it made a {type(whole).__name__}; it is a class or function of an "
                    "nn.Sequential, from images (B, channels, H, W) to logits (B, num_labels)"
                )
            if model_kwargs["weights"] is not None:
                load_weights(whole, model_kwargs["weights"])
            if dtype != "auto":
                whole.to(getattr(torch, dtype))
            self.pretrained = type(whole).__name__
        if self.lora is not None and getattr(getattr(whole, "config", None), "num_hidden_layers", None) is None:
            raise SplitError(
                f"model.init_args.lora: {type(whole).__name__} is no vision transformer; set lora to null, and frozen "
                "to what is not to be trained"
            )
        freeze_named(whole, frozen)
        return whole

    def place_side(self, whole: Any, side: Side) -> Placement:
        """By `place_side_images`."""
        return place_side_images(whole, self.cut, side, self.image_size, self.channels, self.seed)

    def split_whole(self, whole: Any) -> tuple[ImageClientHalf, ImageServerHalf]:
        """Cut by `split_images`."""
        client, server = split_images(whole, self.cut, self.image_size, self.channels)
        for role, half in (("client", client), ("server", server)):
            settled = self.lora is not None or (role == "client" and self.trains_at_client is not None)
            if not settled and not any(p.requires_grad for p in half.parameters()):
                raise SplitError(
                    f"model.init_args.frozen: it leaves the {role}'s half of {self.pretrained!r} nothing to train; "
                    "freeze less, or move the cut"
                )
        with torch.no_grad():
            given = server(client(torch.zeros(1, self.channels, self.image_size, self.image_size))).shape[1]
        if given != self.num_labels:
            raise SplitError(
                f"model.init_args.num_labels={self.num_labels}: {self.pretrained!r} gives {given} logits; set both to "
                "the number of classes"
            )
        return client, server

    def prepare(self, batch: Batch) -> Batch:
        """Adds ``attention_mask (B, S)``: every position of an image counts.

        Raises:
            ValueError: The batch holds no images, or images of another size than the model was cut for.
        """
        images = batch.get("pixel_values", torch.empty(0))
        if images.shape[1:] != (self.channels, self.image_size, self.image_size):
            raise ValueError(
                f"data: pixel_values of shape {tuple(images.shape)}, but the model takes (B, {self.channels}, "
                f"{self.image_size}, {self.image_size}); set image_size and channels of data and model to the same"
            )
        mask = torch.ones(len(images), self.client_half.positions, dtype=torch.long, device=images.device)
        return {**batch, "attention_mask": mask}

    def auxiliary_head(self, blocks: int) -> nn.Module:
        """One linear layer on the mean over positions, drawn under the model's seed; it has no blocks to copy."""
        head = linear_head(self.client_half.hidden_size, self.num_labels, blocks, self.seed)
        return head.to(next(self.client_half.parameters()).device)

    def forward(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        """Logits through both halves, equal to the uncut model's bit for bit."""
        return self.server_half(self.client_half(pixel_values))

    def tokenizer(self) -> None:
        """None: images have none."""

    def check_examples(self, examples: Sequence[Any], owner: str) -> None:
        """Refuse what is no image, and labels beyond ``num_labels``; the images' size is known once they are batches.

        Raises:
            ValueError: Names whose it is.
        """
        if any(not hasattr(example, "pixel_values") for example in examples):
            raise ValueError(f"data of {owner}: an example has no pixel_values; {OF_IMAGES}")
        self.check_labels(examples, owner)

    def objection(self, message: SmashedData) -> str | None:
        """z has the cut's width and all positions of an image, and the labels are classes."""
        positions = self.client_half.positions
        if message.mask.shape[1] != positions or not message.mask.all():
            return f"its smashed data do not have {positions} positions an image, as the cut has"
        return super().objection(message)


def freeze_named(model: nn.Module, patterns: Sequence[str]) -> None:
    """No gradient for the parameters in whose names one of the regular expressions is found.

    Raises:
        SplitError: One of them is found in no name.
    """
    for pattern in patterns:
        found = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not found:
            first = ", ".join(list(dict(model.named_parameters()))[:3])
            raise SplitError(
                f"model.init_args.frozen: {pattern!r} is in no parameter name of {type(model).__name__} ({first}, ...)"
            )
        for parameter in found:
            parameter.requires_grad_(False)
