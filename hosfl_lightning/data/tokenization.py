"""From text to batches: loading a tokenizer, language-modelling blocks, collation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hosfl_lightning.gguf import read_tokenizer

IGNORE_INDEX = -100


class Example(NamedTuple):
    """One training example.

    Attributes:
        input_ids: Token ids, length T.
        labels: T ids with -100 where no loss is taken (causal LM), or one class index (classification).
    """

    input_ids: Tensor | list[int]
    labels: Tensor | list[int] | int


def load_tokenizer(tokenizer: str | PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """A tokenizer from its name, its folder, its model's GGUF file or itself.

    Raises:
        ValueError: If none was given, or the name cannot be loaded.
    """
    if tokenizer is None:
        raise ValueError("tokenizer: none is set; pass the model's name or folder, or a tokenizer")
    if not isinstance(tokenizer, str):
        return tokenizer
    try:
        return read_tokenizer(tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(f"tokenizer={tokenizer!r} cannot be loaded: {' '.join(reason)}") from error


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: pad, else eos (the attention mask and -100 keep it out of the loss).

    Raises:
        ValueError: If the tokenizer has neither.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise ValueError("tokenizer: it has neither a pad nor an eos token to pad with; set tokenizer.pad_token")


def leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text (bos), maybe nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return next(full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain)


def token_stream(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The documents' tokens in one row with eos between them (none at the end), int64, shape (T,).

    A special token spelled out in a document ("</s>") stays plain text.

    Raises:
        ValueError: If there are several documents and the tokenizer has no eos token.
    """
    if len(documents) > 1 and tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: it has no eos token to put between documents; set tokenizer.eos_token")
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    stream: list[int] = []
    if documents:  # tokenizers fail on an empty batch
        first, *others = tokenizer(list(documents), verbose=False, **options)["input_ids"]
        stream += first
        for ids in others:
            stream += [tokenizer.eos_token_id, *ids]
    return torch.tensor(stream, dtype=torch.int64)


def language_blocks(stream: Tensor, sequence_length: int) -> list[Example]:
    """Cut a token stream into examples of exactly `sequence_length` tokens, labels = input_ids; the rest is dropped."""
    count = len(stream) // sequence_length
    return [Example(row, row) for row in stream[: count * sequence_length].view(count, sequence_length)]


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad on the right to the longest of the B examples.

    Returns:
        input_ids (B, T) filled with `pad_id`, attention_mask (B, T) 1 at tokens and 0 at padding, and labels: (B, T)
        with -100 at padding, or (B,) for classes. All int64.
    """
    ids = [torch.as_tensor(example.input_ids, dtype=torch.int64) for example in examples]
    labels = [torch.as_tensor(example.labels, dtype=torch.int64) for example in examples]
    per_token = labels[0].ndim == 1
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
        if per_token
        else torch.stack(labels),
    }
