"""The two halves of a model."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hosfl_lightning.split.structure import LayerPath, Skip, Structure


class Entry(Skip):
    """The last skipped layer of the server: puts the smashed data, untouched, in front of the server's first layer."""

    smashed: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
        """Return the smashed data, as a layer would."""
        return super().forward(hidden_states if self.smashed is None else self.smashed)


class Exit(Skip):
    """A skipped layer after the client's last one: takes the smashed data before the backbone goes on with them."""

    smashed: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
        """Return the first argument, as a layer would, and keep it."""
        self.smashed = hidden_states
        return super().forward(hidden_states)


class Stub(nn.Module):
    """In the place of a client's module on the server: hands on the embeddings that it is given, or zero."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Return the first floating argument of shape (B, S, h)."""
        given = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point())
        return next((a for a in given if a.ndim == 3), torch.zeros(()))


class Half(nn.Module):
    """What both halves know: the cut, where the layers are, and the model's config.

    Modules keep the names and the layers the numbers that they have in the whole model, so ``named_parameters()``
    of a half is a part of the whole's. A half may be moved to a device of its own only where no tensor is shared
    with the other one (see :mod:`hosfl_lightning.split.build`).
    """

    def __init__(self, model: PreTrainedModel, structure: Structure, cut: int) -> None:
        super().__init__()
        self.structure = structure
        self.cut = cut
        self.config = model.config
        self.architecture = type(model).__name__

    @property
    def layer_path(self) -> LayerPath:
        """Where the layers are in the whole model."""
        return self.structure.layers

    @property
    def hidden_size(self) -> int:
        """Width of the smashed data."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def layers(self) -> dict[int, nn.Module]:
        """The layers of this half only, by their number in the whole model."""
        stack = self.get_submodule(self.layer_path.path)
        return {int(n): layer for n, layer in stack.named_children() if not isinstance(layer, Skip)}


class ClientHalf(Half):
    """f_c(x; θ_c): the embeddings and the first ``cut`` layers.

    Args:
        model: a pruned whole (see :func:`split`).
        structure: what runs where in it.
        cut: number of layers the client holds.
    """

    #: What it takes of a batch.
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    def __init__(self, model: PreTrainedModel, structure: Structure, cut: int) -> None:
        super().__init__(model, structure, cut)
        self.add_module(structure.layers.backbone, model.get_submodule(structure.layers.backbone))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Tokens to smashed data.

        Args:
            input_ids: (B, S), int64.
            attention_mask: (B, S), 1 at valid tokens; ``None`` when there is no padding.

        Returns:
            z of shape (B, S, h), in the model's compute dtype.
        """
        backbone = self.get_submodule(self.layer_path.backbone)
        end = cast(Exit, self.get_submodule(f"{self.layer_path.path}.{self.cut}"))
        try:
            backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            return cast(Tensor, end.smashed)
        finally:
            end.smashed = None


class ServerHalf(Half):
    """f_s(z; θ_s): the other layers, the final norm and the head. It never sees ``input_ids``.

    Args:
        model: a pruned whole (see :func:`split`).
        structure: what runs where in it.
        cut: number of layers the client holds.
    """

    def __init__(self, model: PreTrainedModel, structure: Structure, cut: int) -> None:
        super().__init__(model, structure, cut)
        # The whole's forward runs on this module's own children, so that their names need no prefix.
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self.__dict__["_whole"] = model

    def forward(self, z: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Smashed data to logits.

        Args:
            z: (B, S, h); entries at padding may be anything finite, such as zero. An encoder classifier reads the
                first position, so its batches are padded on the right.
            attention_mask: (B, S), 1 at valid tokens; ``None`` when there is no padding.

        Returns:
            Logits: (B, S, V) of a causal LM, (B, C) of a classifier. A decoder classifier takes those of the last
            valid token, wherever the padding is.
        """
        path, head = self.layer_path, self.structure.token_head
        entry = cast(Entry, self.get_submodule(f"{path.path}.{self.cut - 1}"))
        whole = cast(nn.Module, self._whole)
        whole.training = self.training
        model = whole if head is None else self.get_submodule(path.backbone)
        entry.smashed = z
        try:  # the embeddings are read for shape and dtype only (masks, positions)
            out = model(inputs_embeds=z.detach(), attention_mask=attention_mask, use_cache=False, return_dict=True)
        finally:
            entry.smashed = None
        if head is None:
            return cast(Tensor, out.logits)
        return last_valid(self.get_submodule(head)(out.last_hidden_state), attention_mask)


def last_valid(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Logits (B, S, C) of every token to those (B, C) of the last valid one, for left and right padding."""
    if attention_mask is None:
        return logits[:, -1]
    places = torch.arange(logits.shape[1], device=logits.device)
    last = (places * attention_mask.to(logits.device).bool()).argmax(-1)
    return logits[torch.arange(logits.shape[0], device=logits.device), last]
