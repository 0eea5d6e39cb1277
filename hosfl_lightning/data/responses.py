"""Text in parts, some of them responses: tokens whose labels are exactly the responses' own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from hosfl_lightning.data.tokenization import IGNORE_INDEX, Example


class Part(NamedTuple):
    """A stretch of a text.

    Attributes:
        text: What stands there.
        response: Whether it is the model's to say.
    """

    text: str
    response: bool


class Piece(NamedTuple):
    """The tokens of a `Part`."""

    ids: list[int]
    response: bool


def tokenize_parts(parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase, where: str) -> list[Piece]:
    r"""Tokens of the joined text, part by part; no token lies across the border of two parts.

    The tokens of text[:b] begin those of the whole for every border b, as they do when the model is asked text[:b] and
    goes on. Where a token would lie across a border ("\n" before a response that begins with "\n"), each part is
    tokenized alone, if that decodes to the same text. No special tokens are added; those in the text are read as such.

    Args:
        parts: At least one.
        tokenizer: The model's.
        where: The record, for messages.

    Raises:
        ValueError: Neither is possible.
    """
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    texts = [part.text for part in parts]
    begun = tokenizer(list(accumulate(texts)), **options)["input_ids"]
    if all(b[: len(a)] == a for a, b in pairwise(begun)):
        return [Piece(b[len(a) :], part.response) for (a, b), part in zip(pairwise([[], *begun]), parts)]
    alone = tokenizer(texts, **options)["input_ids"]
    if _decode([i for ids in alone for i in ids], tokenizer) != _decode(begun[-1], tokenizer):
        raise ValueError(
            f"{where}: the first token of a response merges with what stands before it; let the template end without a "
            "space, or with a line break"
        )
    return [Piece(ids, part.response) for ids, part in zip(alone, parts)]


def labelled(pieces: Sequence[Piece], everything: bool = False) -> Example:
    """input_ids are the pieces joined, labels the same where a response is (or everywhere), -100 elsewhere."""
    ids = [i for piece in pieces for i in piece.ids]
    labels = [i if piece.response or everything else IGNORE_INDEX for piece in pieces for i in piece.ids]
    return Example(ids, labels)


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
