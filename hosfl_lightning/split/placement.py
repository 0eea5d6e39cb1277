"""Where in a model a side adapter goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hosfl_lightning.split.check import find_padding, tiny_batch
from hosfl_lightning.split.cut import check_cut
from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.side import ADAPTER, Side, attach_side, features_of
from hosfl_lightning.split.structure import LayerPath, find_layers
from hosfl_lightning.split.views import padding_token, quiet


@dataclass
class Placement:
    """All that is needed to build a side adapter on a base model again.

    Attributes:
        side: its settings.
        layers: dotted names of the client's layers, in order, and of the server's first one.
        shapes: of each client layer's output without the batch; tokens ``(0, h)``, as there may be any number of them.
        seed: of its start.
    """

    side: Side
    layers: list[str]
    shapes: list[tuple[int, ...]]
    seed: int = 0

    def attach(self, model: nn.Module, adapter: str = ADAPTER) -> None:
        """`attach_side` to the whole model, in place.

        Raises:
            SplitError: it is another model's.
        """
        there = dict(model.named_modules())
        missing = [name for name in self.layers if name not in there]
        if missing:
            raise SplitError(
                f"the side adapter is of a model with a layer {missing[0]}, which {type(model).__name__} has not: load "
                "it on the base model that it was trained on."
            )
        layers = [there[name] for name in self.layers]
        attach_side(layers, len(layers) - 1, self.shapes, self.side, self.seed, adapter)


def place_side(model: PreTrainedModel, cut: int, side: Side, seed: int = 0) -> Placement:
    """Find the place of a side adapter in a causal LM or a sequence classifier.

    Raises:
        SplitError: the cut is out of range, or something runs between the layers.
    """
    found = find_layers(model)
    check_cut(cut, found, type(model).__name__)

    def forward(tokens: Tensor, mask: Tensor | None) -> Any:
        return model(input_ids=tokens, attention_mask=mask, use_cache=False)

    return _placed(model, found, cut, side, seed, forward)


def place_client_side(
    model: PreTrainedModel, layers: LayerPath, cut: int, side: Side, seed: int, half: Callable[..., Any]
) -> Placement:
    """The same in a model of which only the client's half is left; the server's bottleneck is not attached.

    Args:
        model: pruned to the client's half.
        layers: of the whole.
        cut: number of layers the client holds.
        side: with a bottleneck at the client.
        seed: of its start.
        half: over ``model``, from tokens and mask.

    Raises:
        SplitError: as for `place_side`.
    """
    return _placed(model, layers, cut, replace(side, server=0), seed, half)


def _placed(
    model: PreTrainedModel, found: LayerPath, cut: int, side: Side, seed: int, forward: Callable[..., Any]
) -> Placement:
    layers = [f"{found.path}.{i}" for i in range(cut + 1)]
    pad = find_padding(model)
    with quiet(model), padding_token(model, pad):
        tokens, mask = tiny_batch(model, pad, "right")
        check_direct(model, layers, lambda: forward(tokens, mask))
    return Placement(side, layers, [(0, int(model.config.get_text_config().hidden_size))] * cut, seed)


def add_side(model: PreTrainedModel, cut: int, side: Side, seed: int = 0) -> None:
    """Attach a side adapter to a causal LM or a sequence classifier, in place; then `split` it.

    With LoRA give the placement to `add_lora` instead, and both become one PEFT adapter.

    Raises:
        SplitError: as for `place_side`, or there is no layer to tap.
    """
    place_side(model, cut, side, seed).attach(model)


def check_direct(model: nn.Module, layers: Sequence[str], forward: Callable[[], Any]) -> None:
    """Refuse a model that changes what the client's last layer returns: λ would not be the gradient of what is added.

    Args:
        model: the whole.
        layers: as in `Placement`.
        forward: of some batch.

    Raises:
        SplitError: the server's first layer is given something else.
    """
    seen: list[Tensor] = []
    last, first = model.get_submodule(layers[-2]), model.get_submodule(layers[-1])
    handles = [
        last.register_forward_hook(lambda _layer, _args, output: seen.append(features_of(output))),
        first.register_forward_pre_hook(lambda _layer, args: seen.extend(args[:1])),
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != 2 or seen[0].shape != seen[1].shape or not torch.equal(seen[0], seen[1]):
        raise SplitError(
            f"{type(model).__name__} takes no side adapter at this cut: {layers[-1]} is not called with what "
            f"{layers[-2]} returns; move the cut, or set side to null."
        )
