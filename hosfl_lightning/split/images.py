"""An image classifier cut at one layer: a client half and a server half that share the parameters of the whole."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hosfl_lightning.split.cut import check_cut, prune_to_client, prune_to_server
from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.halves import Entry, Exit, Stub
from hosfl_lightning.split.image_halves import Hollow, ImageClientHalf, ImageServerHalf, logits_of
from hosfl_lightning.split.image_structure import Recording, entries, find_image_structure, record
from hosfl_lightning.split.placement import Placement, check_direct
from hosfl_lightning.split.side import Side
from hosfl_lightning.split.structure import LayerPath, Skip, Structure, siblings
from hosfl_lightning.split.views import quiet, set_submodule, view, view_of_path

Halves = tuple[ImageClientHalf, ImageServerHalf]
#: Sizes of the batches on which whole and halves are compared: kernels, and what a forward unpacks, go by the number.
BATCHES = (1, 2, 3, 8)


def split_images(model: nn.Module, cut: int, image_size: int, channels: int = 3) -> Halves:
    """Cut an image classifier at one layer: f(x) = f_s(f_c(x)), bit for bit, with z of shape (B, S, h).

    The halves are *views*: the same parameters under the same names, with other modules around them. What a family's
    forward does around its layers is not written again: both halves run it. ``model`` is put into eval mode, and the
    halves stay there: norm statistics never move.

    Args:
        model: a Hugging Face image classifier with one list of layers that run in order (``resnet.encoder.stages``,
            ``mobilenet_v2.layer``, ``vit.layers``, ...), or an ``nn.Sequential`` that ends in logits.
        cut: number of entries of that list, or of children, that the client holds: from 1 to all but one. What comes
            before the list is the client's too, what comes after it the server's.
        image_size: height and width of the images.
        channels: of the images.

    Returns:
        The client half, ``pixel_values (B, C, H, W)`` to ``z (B, S, h)``, and the server half, ``z`` to logits
        ``(B, classes)``.

    Raises:
        SplitError: the cut is out of range, the forward fails on such images, the layers do not run once each in
            order, both halves would need one parameter, or whole and halves differ on 1, 2, 3 or 8 images.
    """
    model.eval()
    images = example_images(model, image_size, channels)
    names, recording = _layers(model, cut, images[:1])
    shape = _shape(model, recording, names[cut])
    if isinstance(model, PreTrainedModel):
        client, server = _cut_pretrained(model, cut, find_image_structure(model, recording), shape, names, recording)
    else:
        client, server = _cut_sequential(model, cut, shape, names)
    _check_disjoint(client, server)
    _check_equal(model, client, server, images)
    return client, server


def place_side_images(
    model: nn.Module, cut: int, side: Side, image_size: int, channels: int = 3, seed: int = 0
) -> Placement:
    """Find the place of a side adapter in an image classifier; arguments and the other errors as in `split_images`.

    A map's bottleneck is a 1x1 convolution down, averaged to the resolution of the cut, and one up.

    Raises:
        SplitError: something runs between the layers.
    """
    model.eval()
    images = example_images(model, image_size, channels)
    names, recording = _layers(model, cut, images[:1])
    with quiet(model):
        check_direct(model, names[: cut + 1], lambda: model(images[:1]))
    return Placement(side, names[: cut + 1], [recording.outputs[name] for name in names[:cut]], seed)


def example_images(model: nn.Module, image_size: int, channels: int) -> Tensor:
    """Images (8, C, H, W) of numbers between -1 and 1, on the model's device and in its dtype."""
    count = max(BATCHES)
    images = (
        torch.linspace(0, 400, count * channels * image_size**2).sin().view(count, channels, image_size, image_size)
    )
    parameter = next(model.parameters(), images)
    return images.to(parameter.device, parameter.dtype)


def _layers(model: nn.Module, cut: int, images: Tensor) -> tuple[list[str], Recording]:
    """Dotted names of all layers, among which the cut is, and the forward that showed them."""
    name = type(model).__name__
    if not isinstance(model, nn.Sequential | PreTrainedModel):
        raise SplitError(f"{name} cannot be split: it is neither a transformers image classifier nor an nn.Sequential.")
    recording = record(model, images)
    path, counted = "", "children"
    if isinstance(model, PreTrainedModel):
        path = find_image_structure(model, recording).layers.path
        counted = f"entries of {path}"
    names = entries(model, path)
    if not recording.in_order(names):
        raise SplitError(f"{name} cannot be split: its children do not run once each, in order.")
    check_cut(cut, LayerPath(path, len(names)), name, counted)
    return names, recording


def _cut_pretrained(
    model: PreTrainedModel,
    cut: int,
    structure: Structure,
    shape: tuple[int, ...],
    names: list[str],
    recording: Recording,
) -> Halves:
    layers = structure.layers
    client = prune_to_client(view_of_path(model, layers.path), structure, cut)
    server = prune_to_server(view_of_path(model, layers.path), structure, cut)
    for name, module in siblings(model, layers):
        if isinstance(server.get_submodule(name), Stub):
            set_submodule(server, name, Hollow(module, recording.rests.get(name)))
    leave, enter = client.get_submodule(names[cut]), server.get_submodule(names[cut - 1])
    return (
        ImageClientHalf(client, client.get_submodule(layers.backbone), cast(Exit, leave), cut, shape, names),
        ImageServerHalf(server, server, cast(Entry, enter), cut, shape, names),
    )


def _cut_sequential(model: nn.Module, cut: int, shape: tuple[int, ...], names: list[str]) -> Halves:
    client, server = view(model), view(model)
    leave, enter = Exit(None), Entry(None)
    client._modules[names[cut]] = leave
    for name in names[cut + 1 :]:
        del client._modules[name]
    server._modules.update({name: Skip(None) for name in names[: cut - 1]} | {names[cut - 1]: enter})
    return ImageClientHalf(client, client, leave, cut, shape, names), ImageServerHalf(
        server, server, enter, cut, shape, names
    )


def _shape(model: nn.Module, recording: Recording, name: str) -> tuple[int, ...]:
    shape = recording.shapes[name]
    if len(shape) not in (1, 2, 3):
        raise SplitError(
            f"{type(model).__name__} cannot be split before {name}: features of shape {shape} are neither a map, "
            "nor tokens, nor a vector."
        )
    return shape


def _check_disjoint(client: ImageClientHalf, server: ImageServerHalf) -> None:
    held = {id(p) for p in client.parameters()}
    both = [n for n, p in server.named_parameters() if id(p) in held]
    if both:
        raise SplitError(f"{client.architecture} cannot be split: both halves would need {', '.join(both)}.")


def _check_equal(model: nn.Module, client: ImageClientHalf, server: ImageServerHalf, images: Tensor) -> None:
    name = type(model).__name__
    for count in BATCHES:
        with quiet(model, client, server):
            try:
                whole = logits_of(model(images[:count]))
                halves = server(client(images[:count]))
            except Exception as error:
                raise SplitError(f"{name} cannot be split: its forward fails with {error!r}.") from error
        if whole.ndim != 2:
            raise SplitError(
                f"{name} is no classifier: its output has shape {tuple(whole.shape)}, logits (B, classes)."
            )
        if halves.shape != whole.shape or not torch.allclose(halves, whole, rtol=0, atol=0, equal_nan=True):
            raise SplitError(f"{name} cannot be split: whole and halves differ on a batch of {count}.")
