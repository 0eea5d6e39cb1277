"""Logits at chosen positions alone, a piece at a time, by the model's own head and whatever it does behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hosfl_lightning.split.halves import Entry, ServerHalf
from hosfl_lightning.split.views import quiet, view

#: Logits a piece: 32 MiB in fp32; a step makes at most eight copies of them.
PIECE = 1 << 23
#: How much logits at chosen positions may differ from those of all, by their largest: products of other sizes round.
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-8}

#: Of a piece's logits ``(m, V)`` and the ids ``(m,)`` there, fp32 figures ``(m, …)``.
Read = Callable[[Tensor, Tensor], Tensor]


class Given(nn.Module):
    """In the place of the backbone: returns what it was made with; so do its children on the way to the layers."""

    def __init__(self, output: Any, children: list[str]) -> None:
        super().__init__()
        self.__dict__["output"] = output
        if children:  # OPT calls its backbone's decoder
            self._modules[children[0]] = Given(output, children[1:])

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Return it."""
        return self.output


def read_labelled(half: ServerHalf, z: Tensor, attention_mask: Tensor | None, labels: Tensor, read: Read) -> Tensor:
    """``read(logits_t, y_t)`` of every position t with a label, in order, without the logits of any other position.

    With a gradient and more than one piece, a piece's logits are made again for it, so that none outlives its piece.

    Args:
        half: Of a causal LM.
        z: ``(B, S, h)``.
        attention_mask: ``(B, S)``.
        labels: ``(B, S)``, of the *next* token, −100 where there is none; at least one is.
        read: Of a piece.

    Returns:
        ``(n, …)``.
    """
    chosen = (labels.flatten() != -100).nonzero().squeeze(1)
    output = _backbone(half, z, attention_mask)
    hidden = output.last_hidden_state.flatten(0, 1).index_select(0, chosen)
    ids = labels.flatten().index_select(0, chosen)
    rows = max(1, PIECE // half.config.get_text_config().vocab_size)

    def piece(hidden: Tensor, ids: Tensor) -> Tensor:
        return read(_head(half, replace(output, last_hidden_state=hidden[None]), hidden[None])[0], ids)

    if len(chosen) <= rows:
        return piece(hidden, ids)
    pieces = zip(hidden.split(rows), ids.split(rows))
    if not torch.is_grad_enabled():
        return torch.cat([piece(*one) for one in pieces])
    return torch.cat([cast(Tensor, checkpoint(piece, *one, use_reentrant=False)) for one in pieces])


def reads_alike(half: ServerHalf) -> bool:
    """Whether logits at chosen positions are those of all positions, tried on two rows of three."""
    weight = next(p for p in half.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, half.hidden_size, generator=generator).to(weight.device, weight.dtype)
    mask = torch.ones(2, 3, dtype=torch.long, device=weight.device)
    labels = torch.tensor([[1, -100, 1], [-100, 1, -100]], device=weight.device)
    with quiet(half):
        every = half(z, mask)
        try:
            some = read_labelled(half, z, mask, labels, lambda logits, _: logits.float())
        except Exception:  # whatever a foreign forward raises without its backbone, it takes the plain way
            return False
    wanted = every[labels != -100].float()
    bound = CLOSE.get(every.dtype, 0.02) * float(wanted.abs().amax())
    return some.shape == wanted.shape and bool((some - wanted).abs().amax() <= bound)


def _backbone(half: ServerHalf, z: Tensor, attention_mask: Tensor | None) -> Any:
    """What the backbone returns, as within ``half(z, attention_mask)``."""
    path = half.layer_path
    entry = cast(Entry, half.get_submodule(f"{path.path}.{half.cut - 1}"))
    entry.smashed = z
    try:
        return half.get_submodule(path.backbone)(
            inputs_embeds=z.detach(), attention_mask=attention_mask, use_cache=False, return_dict=True
        )
    finally:
        entry.smashed = None


def _head(half: ServerHalf, output: Any, hidden: Tensor) -> Tensor:
    """Logits of the whole's own forward on a backbone's output."""
    whole = view(cast(nn.Module, half._whole))
    whole.training = half.training
    backbone, *children = half.layer_path.path.split(".")[:-1]
    whole._modules[backbone] = Given(output, children)
    return cast(Tensor, whole(inputs_embeds=hidden.detach(), use_cache=False, return_dict=True).logits)
