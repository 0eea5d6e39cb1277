"""What a model is given: data that it can take, and tensors that are its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hosfl_lightning.data.tokenization import Example
from hosfl_lightning.split import SplitError
from hosfl_lightning.wire import SmashedData

#: Largest magnitude of smashed data: what a norm squares and sums must stay far within fp32. Real ones are below 1e5.
LIMIT = 1e9


def check_tokens(examples: Sequence[Example], owner: str, config: Any, pretrained: str) -> None:
    """Refuse tokens without an embedding, and rows without positions.

    Raises:
        ValueError: Names whose they are.
    """
    if any(not hasattr(example, "input_ids") for example in examples):
        raise ValueError(
            f"data of {owner}: an example has no input_ids; give text data, or override check_examples in the model's "
            "class"
        )
    rows = [torch.as_tensor(e.input_ids) for e in examples if len(e.input_ids)]
    wrong = next((int(i) for row in rows for i in row.aminmax() if not 0 <= i < config.vocab_size), None)
    if wrong is not None:
        raise ValueError(
            f"data of {owner}: token id {wrong}, but {pretrained!r} embeds {config.vocab_size} tokens; "
            "set data.init_args.tokenizer to the model's own (null)"
        )
    positions = getattr(config, "max_position_embeddings", None)
    longest = max((len(e.input_ids) for e in examples), default=0)
    if positions is not None and longest > positions:
        raise ValueError(
            f"data of {owner}: a row of {longest} tokens, but {pretrained!r} has {positions} positions; "
            "lower the data's sequence_length or max_length"
        )


def check_token_labels(examples: Sequence[Example], owner: str, vocab_size: int, ignored: int) -> None:
    """Refuse labels that are no tokens, and one label for a whole row.

    Raises:
        ValueError: Names whose they are.
    """
    for labels in (torch.as_tensor(e.labels) for e in examples if hasattr(e, "labels")):
        if labels.ndim != 1:
            raise ValueError(
                f"data of {owner}: one label an example, and a causal LM has one a token; take "
                "SplitSequenceClassifier, or a prompt and label_words"
            )
        wrong = labels[(labels != ignored) & ((labels < 0) | (labels >= vocab_size))]
        if len(wrong):
            raise ValueError(
                f"data of {owner}: label {int(wrong[0])} is neither {ignored} nor one of the model's {vocab_size} "
                "tokens; set data.init_args.tokenizer to the model's own (null)"
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


def smashed_objection(message: SmashedData, half: Any) -> str | None:
    """Why no server's half can run what a client sent as the output of ``half``, in words; None: it can."""
    z, width = message.z, half.hidden_size
    if z.width != width:
        return f"its smashed data have {z.width} columns, the cut has {width}"
    dtypes = _dtypes(half)
    if z.dtype not in dtypes:
        return f"its smashed data are {z.dtype}, the half computes in {' or '.join(sorted(dtypes))}"
    positions = getattr(getattr(half, "config", None), "max_position_embeddings", None)
    if positions is not None and message.mask.shape[1] > positions:
        return f"its rows have {message.mask.shape[1]} positions, the model has {positions}"
    largest = float(z.restore().abs().amax()) if len(z.values) else 0.0
    if largest > LIMIT:
        return f"its smashed data reach {largest:g}, beyond ±{LIMIT:g}"
    return None


def _dtypes(half: Any) -> set[str]:
    """Those in which the output of a half may come: its backbone's, and autocast's where that is on."""
    found = [p for p in half.parameters() if p.is_floating_point()]
    dtypes = {p.dtype for p in found if not p.requires_grad} or {p.dtype for p in found}
    device = found[0].device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return {str(dtype).removeprefix("torch.") for dtype in dtypes}
