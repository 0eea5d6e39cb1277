"""What a model is given: data that it can take, and tensors that are its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hosfl_lightning.data.tokenization import Example, pad_token_id
from hosfl_lightning.optim.submodules import submodules
from hosfl_lightning.split import SplitError
from hosfl_lightning.wire import SmashedData, UnlabelledData

#: Largest magnitude of smashed data: what a norm squares and sums must stay far within fp32. Real ones are below 1e5.
LIMIT = 1e9
#: Of halves that were asked for them, what only a walk over all their modules tells.
_POSITIONS: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()
_PARAMETERS: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()


def check_tokens(examples: Sequence[Example], owner: str, half: nn.Module, pretrained: str) -> None:
    """Refuse tokens without an embedding, and rows without positions.

    Args:
        examples: Not padded.
        owner: Whose they are.
        half: The client's.
        pretrained: For the message.

    Raises:
        ValueError: Names the owner.
    """
    if any(not hasattr(example, "input_ids") for example in examples):
        raise ValueError(
            f"data of {owner}: an example has no input_ids; give text data, or override check_examples in the model's "
            "class"
        )
    rows = [torch.as_tensor(e.input_ids) for e in examples if len(e.input_ids)]
    embedded = vocabulary(half)
    if rows and not all(0 <= i < embedded for i in torch.cat(rows).aminmax()):
        wrong = next(int(i) for row in rows for i in row.aminmax() if not 0 <= i < embedded)
        raise ValueError(
            f"data of {owner}: token id {wrong}, but {pretrained!r} embeds {embedded} tokens; "
            "set data.init_args.tokenizer to the model's own (null)"
        )
    most = positions(half)
    longest = max((len(e.input_ids) for e in examples), default=0)
    if most is not None and longest > most:
        raise ValueError(
            f"data of {owner}: a row of {longest} tokens, but {pretrained!r} has {most} positions; "
            f"lower the data's sequence_length or max_length to {most}"
        )


def check_token_labels(examples: Sequence[Example], owner: str, vocab_size: int, ignored: int) -> None:
    """Refuse labels that are no tokens, and one label for a whole row.

    Raises:
        ValueError: Names whose they are.
    """
    rows = [torch.as_tensor(e.labels) for e in examples if hasattr(e, "labels")]
    if any(labels.ndim != 1 for labels in rows):
        raise ValueError(
            f"data of {owner}: one label an example, and a causal LM has one a token; take SplitSequenceClassifier, or "
            "a prompt and label_words"
        )
    labels = torch.cat(rows) if rows else torch.empty(0)
    wrong = labels[(labels != ignored) & ((labels < 0) | (labels >= vocab_size))]
    if len(wrong):
        raise ValueError(
            f"data of {owner}: label {int(wrong[0])} is neither {ignored} nor one of the model's {vocab_size} "
            "tokens; set data.init_args.tokenizer to the model's own (null)"
        )


def check_padding(tokenizer: Any, examples: Iterable[Sequence[Any]], half: nn.Module, pretrained: str) -> None:
    """Refuse a padding token without an embedding, where rows of one owner have several lengths.

    Args:
        tokenizer: Of the data; None: there is none.
        examples: Of every owner.
        half: The client's.
        pretrained: For the message.

    Raises:
        ValueError: Names the token.
    """
    padded = tokenizer is not None and any(len({len(e.input_ids) for e in of_owner}) > 1 for of_owner in examples)
    pad, embedded = (pad_token_id(tokenizer), vocabulary(half)) if padded else (0, 1)
    if pad >= embedded:
        raise ValueError(
            f"data.init_args.tokenizer: it pads with token {pad}, but {pretrained!r} embeds {embedded} tokens; give "
            "one whose pad_token the model has (tokenizer.pad_token = tokenizer.eos_token, saved)"
        )


def vocabulary(half: nn.Module) -> int:
    """Tokens that a text model embeds."""
    config: Any = half.config
    return int(config.get_text_config().vocab_size)


def positions(half: nn.Module) -> int | None:
    """The longest row that a text model takes; None: any.

    A table of positions with a row for padding (RoBERTa and its kin) counts from the row after that one.
    """
    if half not in _POSITIONS:  # asked for every message of every client
        _POSITIONS[half] = _positions(half)
    return _POSITIONS[half]


def _positions(half: nn.Module) -> int | None:
    config: Any = half.config
    rows = getattr(config.get_text_config(), "max_position_embeddings", None)
    padded = {m for m in submodules(half) if isinstance(m, nn.Embedding) and m.padding_idx is not None}
    for name, module in half.named_modules() if padded else ():
        if module in padded and "position" in name:
            return module.num_embeddings - module.padding_idx - 1
    return rows


def check_sizes(differ: Iterable[tuple[str, Sequence[int], Sequence[int]]], pretrained: str, backbone: str) -> str:
    """Tensors of other sizes than the model has, which are drawn at random then, may be those of its head.

    Args:
        differ: Name, saved size and the model's of each.
        pretrained: For the message.
        backbone: How the names of all others begin; empty: none may differ.

    Returns:
        One line that says what is fresh; empty: nothing is.

    Raises:
        SplitError: A tensor is not the head's.
    """
    found = sorted((name, tuple(saved), tuple(here)) for name, saved, here in differ)
    wrong = [one for one in found if not backbone or one[0].startswith(f"{backbone}.")]
    for name, saved, here in wrong[:1]:
        raise SplitError(
            f"model.init_args.pretrained={pretrained!r}: its {name} has the size {saved}, its config says {here}; "
            "save the model again"
        )
    if not found:
        return ""
    name, saved, here = found[-1]
    return f"model: the saved head of {pretrained!r} is of another size ({name}: {saved}, not {here}): a fresh one"


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


def smashed_objection(message: SmashedData | UnlabelledData, half: Any) -> str | None:
    """Why no server's half can run what a client sent as the output of ``half``, in words; None: it can."""
    z, width = message.z, half.hidden_size
    if z.width != width:
        return f"its smashed data have {z.width} columns, the cut has {width}"
    if not _computes_in(half, z.dtype):
        return f"its smashed data are {z.dtype}, the half computes in {' or '.join(sorted(_dtypes(half)))}"
    most = positions(half) if hasattr(half, "config") else None
    if most is not None and message.mask.shape[1] > most:
        return f"its rows have {message.mask.shape[1]} positions, the model has {most}"
    largest = float(z.restore().abs().amax()) if len(z.values) else 0.0
    if largest > LIMIT:
        return f"its smashed data reach {largest:g}, beyond ±{LIMIT:g}"
    return None


def _computes_in(half: Any, dtype: str) -> bool:
    """As `_dtypes` says, which looks at every tensor; most often the first frozen one will do."""
    first = next((p for p in half.parameters() if p.is_floating_point() and not p.requires_grad), None)
    return (first is not None and str(first.dtype) == f"torch.{dtype}") or dtype in _dtypes(half)


def _dtypes(half: Any) -> set[str]:
    """Those in which the output of a half may come: its backbone's, and autocast's where that is on."""
    if half not in _PARAMETERS:
        _PARAMETERS[half] = list(half.parameters())
    found = [p for p in _PARAMETERS[half] if p.is_floating_point()]
    dtypes = {p.dtype for p in found if not p.requires_grad} or {p.dtype for p in found}
    device = found[0].device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return {str(dtype).removeprefix("torch.") for dtype in dtypes}
