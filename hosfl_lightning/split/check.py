"""Whole against split, on ten tokens: any architecture that is not cut exactly is refused by name."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.halves import ClientHalf, ServerHalf
from hosfl_lightning.split.views import embedding_weight, padding_token, quiet


def check_equal(model: PreTrainedModel, client: ClientHalf, server: ServerHalf) -> None:
    """Compare the halves with the whole, bit for bit: one row and three, right-padded and left-padded.

    Raises:
        SplitError: they differ, or the halves fail; the message names the architecture.
    """
    name, pad = type(model).__name__, find_padding(model)
    with quiet(model, client, server), padding_token(model, pad):
        # Of several sizes: a forward that unpacks what it should not does so with as many rows as it has names.
        for rows, side in ((1, "no"), (3, "no"), (2, "right"), (2, "left")):
            tokens, mask = tiny_batch(model, pad, side, rows)
            try:
                whole = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
                halves = server(client(tokens, mask), mask)
            except Exception as error:
                raise SplitError(f"{name} cannot be split: its forward fails with {error!r}.") from error
            if halves.shape != whole.shape or not torch.allclose(halves, whole, rtol=0, atol=0, equal_nan=True):
                raise SplitError(f"{name} cannot be split: whole and halves differ on a batch with {side} padding.")


def find_padding(model: PreTrainedModel) -> int:
    """The model's padding token, or 0: decoder classifiers refuse two rows without any."""
    given = model.config.get_text_config().pad_token_id
    valid = isinstance(given, int) and 0 <= given < embedding_weight(model).shape[0]
    return given if valid else 0


def tiny_batch(model: PreTrainedModel, pad: int, side: str, rows: int = 2) -> tuple[Tensor, Tensor | None]:
    """Rows of five tokens, the second with two of padding on that side."""
    weight = embedding_weight(model)
    tokens = torch.arange(5 * rows).mul(7).add(3).remainder(weight.shape[0])
    tokens = torch.where(tokens == pad, (pad + 1) % weight.shape[0], tokens).view(rows, 5)
    if side == "no":
        return tokens.to(weight.device), None
    mask = torch.ones(rows, 5, dtype=torch.long)
    mask[1, slice(3, 5) if side == "right" else slice(0, 2)] = 0
    return torch.where(mask.bool(), tokens, pad).to(weight.device), mask.to(weight.device)
