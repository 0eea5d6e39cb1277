"""Auxiliary heads: what gives a client a loss of its own, beside the server's."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.halves import Entry, ServerHalf
from hosfl_lightning.split.structure import Skip
from hosfl_lightning.split.views import set_submodule, view, view_of_path


class LinearHead(nn.Module):
    r"""``W z̄ + b``, z̄ the mean over z's positions: for images, whose positions all count. fp32.

    Args:
        width: ``h``.
        classes: ``C``.
        seed: Of the start; the global random state is left alone.
    """

    def __init__(self, width: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.linear = nn.Linear(width, classes)

    def forward(self, z: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Smashed data to logits.

        Args:
            z: ``(B, S, h)``.
            attention_mask: Not read.

        Returns:
            ``(B, C)``.
        """
        return self.linear(z.mean(1).to(self.linear.weight.dtype))


def linear_head(width: int, classes: int, blocks: int, seed: int = 0) -> LinearHead:
    """The `LinearHead` of a model whose layers are not copied.

    Raises:
        SplitError: Copied layers are asked for.
    """
    if blocks:
        raise SplitError(
            f"trainer.algorithm: auxiliary_blocks={blocks}, but the auxiliary head of an image model is one linear "
            "layer; set it to 0."
        )
    return LinearHead(width, classes, seed)


def copied_head(server: ServerHalf, blocks: int) -> ServerHalf:
    """The server's first layers, its final norm and its head: ``f_s(z; θ_s)`` without the layers in between.

    It starts as the server's. What the server trains of it (adapters; all weights without LoRA) is a copy, and what is
    frozen is shared. With all blocks its logits are the server's, bit for bit.

    Args:
        server: A server half.
        blocks: Number of its layers, counted from the cut.

    Raises:
        SplitError: The server does not hold as many.

    Reference: HERON-SFL, arXiv 2601.09076, 0 to 3 blocks.
    """
    structure, held = server.structure, len(server.layers)
    if not 0 <= blocks <= held:
        raise SplitError(
            f"trainer.algorithm: auxiliary_blocks={blocks} is out of range: the server holds {held} of the "
            f"{structure.layers.num_layers} layers of {server.architecture}; set it to 0 .. {held}."
        )
    path = structure.layers.path
    whole = view_of_path(cast(PreTrainedModel, server._whole), path)
    last = server.cut - 1
    set_submodule(whole, f"{path}.{last}", Entry(structure.rests[last], whole.get_submodule(f"{path}.{last}")))
    for i in range(server.cut + blocks, structure.layers.num_layers):
        set_submodule(whole, f"{path}.{i}", Skip(structure.rests[i], whole.get_submodule(f"{path}.{i}")))
    return ServerHalf(_with_own_trainable(whole, {}, {}), structure, server.cut).eval()


def _with_own_trainable(
    module: nn.Module, modules: dict[int, nn.Module], parameters: dict[int, nn.Parameter]
) -> PreTrainedModel:
    """A view all the way down with copies of what is trained; what is one in ``module`` is one in the view."""
    if id(module) not in modules:
        twin = modules[id(module)] = view(module)
        for name, child in module._modules.items():
            twin._modules[name] = child and _with_own_trainable(child, modules, parameters)
        for name, held in module._parameters.items():
            if held is not None and held.requires_grad:
                twin._parameters[name] = parameters.setdefault(id(held), nn.Parameter(held.detach().clone()))
    return cast(PreTrainedModel, modules[id(module)])
