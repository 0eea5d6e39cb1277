"""A model in three: what a client has below the server's layers, those layers, and what a client has above them."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from hosfl_lightning.split.closed_form import Differentiated
from hosfl_lightning.split.cut import prune_to_server
from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.halves import Entry, Half, ServerHalf
from hosfl_lightning.split.recognition import Loss, closed_form
from hosfl_lightning.split.structure import Skip, Structure
from hosfl_lightning.split.views import set_submodule, view_of_path


class Middle(Half):
    """z₂ = f_m(z₁; θ_s): the layers from the cut on, and nothing after them.

    Args:
        model: a pruned whole (see `prune_to_middle`).
        structure: what runs where in it.
        cut: number of layers the client holds below.
    """

    def __init__(self, model: PreTrainedModel, structure: Structure, cut: int) -> None:
        super().__init__(model, structure, cut)
        self.add_module(structure.layers.backbone, model.get_submodule(structure.layers.backbone))

    def forward(self, z: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The smashed data of the first cut to those of the second.

        Args:
            z: z₁, (B, S, h); as in `ServerHalf`.
            attention_mask: (B, S), 1 at valid tokens; ``None`` when there is no padding.

        Returns:
            z₂ of shape (B, S, h), before the final norm.
        """
        entry = cast(Entry, self.get_submodule(f"{self.layer_path.path}.{self.cut - 1}"))
        backbone = self.get_submodule(self.layer_path.backbone)
        entry.smashed = z
        try:
            out = backbone(inputs_embeds=z.detach(), attention_mask=attention_mask, use_cache=False, return_dict=True)
            return cast(Tensor, out.last_hidden_state)
        finally:
            entry.smashed = None


class ClientHead(ServerHalf):
    """What comes after the layers: final norm and head, as the model has them, and their loss in closed form.

    Called with z₂ and the mask it gives the whole model's logits, without dropout. Neither loss nor gradients make a
    graph.

    Args:
        model: a whole that is pruned to what runs after the layers.
        structure: what runs where in it.
        loss: of logits and labels, the mean over the loss terms.

    Raises:
        SplitError: it has no closed form.
    """

    def __init__(self, model: PreTrainedModel, structure: Structure, loss: Loss) -> None:
        super().__init__(model, structure, structure.layers.num_layers)
        self.closed = closed_form(self.eval(), loss)
        self._trained = tuple(name for name, p in self.named_parameters() if p.requires_grad)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained of it, by name: the classifier; nothing where the head is frozen."""
        named = dict(self.named_parameters())
        return {name: named[name] for name in self._trained}

    def loss_and_multiplier(self, z: Tensor, attention_mask: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``ℓ``, fp32, and ``λ₂ = ∂ℓ/∂z₂`` in the dtype of ``z₂ (B, S, h)``."""
        return self.differentiate(z, attention_mask, labels, gradient=False)[:2]

    def gradient(self, z: Tensor, attention_mask: Tensor | None, labels: Tensor) -> list[Tensor]:
        """``∂ℓ/∂p`` of each parameter ``p`` of `trained`, in order."""
        return self.differentiate(z, attention_mask, labels).gradients

    def differentiate(
        self, z: Tensor, attention_mask: Tensor | None, labels: Tensor, *, gradient: bool = True
    ) -> Differentiated:
        """Both at the price of one."""
        return self.closed.differentiate(z, attention_mask, labels, [*self.trained.values()] if gradient else [])


def split_server(server: Any, loss: Loss) -> tuple[Middle, ClientHead]:
    """Cut a server's half once more, before the final norm: f_s(z) = head(middle(z)), bit for bit.

    Both are views, as in :func:`split`.

    Raises:
        SplitError: the head has no closed form, or the half is none of a text model.
    """
    if type(server) is not ServerHalf:
        raise SplitError(
            f"model.init_args.labels=client: {type(server).__name__} cannot be cut before its head; set labels to "
            "server, or take a causal LM or sequence classifier"
        )
    structure, whole = server.structure, cast(PreTrainedModel, server._whole)
    path = structure.layers.path
    middle = Middle(prune_to_middle(view_of_path(whole, path), structure), structure, server.cut)
    return middle, head_of(whole, structure, loss)


def head_of(model: PreTrainedModel, structure: Structure, loss: Loss) -> ClientHead:
    """The head of a model with or without its layers, as a view."""
    twin = view_of_path(model, structure.layers.path)
    return ClientHead(prune_to_server(twin, structure, structure.layers.num_layers), structure, loss)


def prune_to_ends(model: PreTrainedModel, structure: Structure, cut: int) -> PreTrainedModel:
    """Leave in ``model``, in place, only what runs before layer ``cut`` and after the last one."""
    stack = model.get_submodule(structure.layers.path)
    for i in range(cut, structure.layers.num_layers):
        set_submodule(stack, str(i), Skip(structure.rests[i], stack.get_submodule(str(i))))
    return model


def prune_to_middle(model: PreTrainedModel, structure: Structure) -> PreTrainedModel:
    """Leave in a server's ``model``, in place, nothing that runs after the layers."""
    for name in structure.after:
        set_submodule(model, name, nn.Identity())
    return model
