"""What a model is given: data that it can take, and tensors that are its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hosfl_lightning.data.tokenization import Example
from hosfl_lightning.split import SplitError


def check_tokens(examples: Sequence[Example], owner: str, config: Any, pretrained: str) -> None:
    """Refuse tokens without an embedding, and rows without positions.

    Raises:
        ValueError: Names whose they are.
    """
    largest = max((int(torch.as_tensor(e.input_ids).max()) for e in examples), default=0)
    if largest >= config.vocab_size:
        raise ValueError(
            f"data of {owner}: token id {largest}, but {pretrained!r} embeds {config.vocab_size} tokens; "
            "set data.init_args.tokenizer to the model's own (null)"
        )
    positions = getattr(config, "max_position_embeddings", None)
    longest = max((len(e.input_ids) for e in examples), default=0)
    if positions is not None and longest > positions:
        raise ValueError(
            f"data of {owner}: a row of {longest} tokens, but {pretrained!r} has {positions} positions; "
            "lower the data's sequence_length or max_length"
        )


def check_state(mine: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other names or shapes.

    Raises:
        SplitError: The state is of another model, cut or adapter.
    """
    differ = sorted(set(mine) ^ set(state)) + [n for n in mine if n in state and mine[n].shape != state[n].shape]
    if differ:
        raise SplitError(
            f"the checkpoint is of another model, cut or LoRA setting: {len(differ)} tensors differ, "
            f"the first is {differ[0]!r}; use the recipe it was made with"
        )
