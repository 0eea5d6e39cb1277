"""The client half as an attacker runs it: on tokens one by one, or on embeddings and pixels that he may move."""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import DynamicCache

from hosfl_lightning.attack.score import NotApplicableError
from hosfl_lightning.split import ClientHalf

#: Tokens of one forward.
CHUNK = 512


class TextHalf:
    """A text model's client half.

    Args:
        half: Of a `hosfl_lightning.models.SplitModule`.

    Attributes:
        table: ``(V, h)``, the embedding of every token as the first layer is given it.

    Raises:
        NotApplicableError: It takes no tokens.
    """

    def __init__(self, half: Any) -> None:
        if not isinstance(half, ClientHalf):
            raise NotApplicableError("the client half takes no tokens")
        self.half: ClientHalf = half
        self.backbone: Any = half.get_submodule(half.layer_path.backbone)
        self.exit: Any = half.get_submodule(f"{half.layer_path.path}.{half.cut}")
        embed = cast(Any, self.backbone).get_input_embeddings()
        with torch.no_grad():
            self.table = embed(torch.arange(half.config.get_text_config().vocab_size, device=embed.weight.device))

    def __call__(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """z ``(B, S, h)`` of embeddings ``(B, S, h)``; ``mask (B, S)``."""
        return self._through(inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False)

    def step(self, tokens: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """z ``(C, h)`` of one more token ``(C,)`` behind what the cache holds, which grows by it; ``mask (t + 1,)``."""
        masks = mask.long().expand(len(tokens), -1)
        z = self._through(input_ids=tokens[:, None], attention_mask=masks, past_key_values=cache, use_cache=True)
        return z[:, 0]

    def looks_ahead(self) -> bool:
        """Whether z of a position depends on tokens behind it."""
        ids = torch.arange(4, device=self.table.device) % len(self.table)
        pairs = torch.stack([ids, torch.cat([ids[:3], ids[:1]])])
        with torch.no_grad():
            one, other = self(self.table[pairs], torch.ones_like(pairs))[:, :3]
        return not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().mean()))

    @cached_property
    def alone(self) -> Tensor:
        """``(V, h)``, z of every token as the only one; of the parameters as they were when it was first asked for."""
        tokens = torch.arange(len(self.table), device=self.table.device)
        with torch.no_grad():
            parts = [self(self.table[some][:, None], torch.ones_like(some)[:, None]) for some in tokens.split(CHUNK)]
        return torch.cat(parts)[:, 0]

    def _through(self, **inputs: Any) -> Tensor:
        try:
            self.backbone(**inputs)
            return self.exit.smashed
        finally:
            self.exit.smashed = None


def cosines(x: Tensor, table: Tensor) -> Tensor:
    """``(…, V)`` of the rows of ``x (…, h)`` with those of ``table (V, h)``."""
    return normalize(x.float(), dim=-1) @ normalize(table.float(), dim=-1).T


def rows(cache: DynamicCache, chosen: Tensor) -> DynamicCache:
    """A cache of its own, with these rows of another one."""
    other, layers = DynamicCache(), list[Any](cache.layers)
    for number, layer in enumerate(layers):
        other.update(layer.keys[chosen], layer.values[chosen], number)
    return other
