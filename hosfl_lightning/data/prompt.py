"""Classification as language modelling: a prompt around the text, and a word of the vocabulary for each class."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from hosfl_lightning.data.tokenization import IGNORE_INDEX, Example, leading_special_tokens

_SLOT = "{text}"


class LabelWords(NamedTuple):
    """By which of their tokens label words differ.

    Attributes:
        place: Of that token within a word, from 0: the first in which not all words are alike.
        tokens: There, of each class, by index; all different.
    """

    place: int
    tokens: tuple[int, ...]


class PromptEncoder:
    """Encode "prompt(text) + word(label)" with the loss on the word's tokens only.

    With x the T_p tokens of the prompt and w the T_w tokens that the label word adds to them, input_ids = [x, w] and
    labels = [-100 · T_p, w], as MeZO trains SST-2 on a causal LM: "{text} It was" with " terrible", " great".
    Prompt and word are tokenized together, as the model will see them. A text that is too long loses its end; the
    prompt around it and the word stay whole. The tokenizer's leading special tokens (bos) are kept, trailing ones are
    not: nothing may stand between the prompt and the word.

    Args:
        prompt: A template with one "{text}".
        label_words: The word of each class, by index, usually with a leading space.
        tokenizer: The model's tokenizer.
        max_length: Most tokens of an example, label word included.

    Raises:
        ValueError: If the prompt has not exactly one "{text}", two label words are equal or one is empty, or
            `max_length` leaves no space for any text.

    Reference: Malladi et al. 2023, MeZO, arXiv 2305.17333, appendix E.
    """

    def __init__(
        self, prompt: str, label_words: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        if prompt.count(_SLOT) != 1:
            raise ValueError(f"prompt={prompt!r} must contain {_SLOT} exactly once")
        if len(set(label_words)) < len(label_words) or not all(word.strip() for word in label_words):
            raise ValueError(f"label_words={list(label_words)}: give a different, non-empty word for every class")
        self.prompt = prompt
        self.label_words = list(label_words)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._start = leading_special_tokens(tokenizer)
        self._longest = max(self.label_words, key=lambda word: len(self._encode([""], [word])[0]))
        if self._length("") >= max_length:
            raise ValueError(f"max_length={max_length} leaves no space for text beside the prompt and its label word")

    def __call__(self, texts: Sequence[str], labels: Sequence[int]) -> list[Example]:
        """Encode texts with their class indices.

        Raises:
            ValueError: If a label word's first token merges with the prompt's last.
        """
        lengths = map(len, self._encode(texts, [self._longest] * len(texts)))
        texts = [text if length <= self.max_length else self._shorten(text) for text, length in zip(texts, lengths)]
        words = [self.label_words[label] for label in labels]
        asked, answered = self._encode(texts, [""] * len(texts)), self._encode(texts, words)
        return [self._example(*parts) for parts in zip(asked, answered, words)]

    def told_apart_by(self) -> LabelWords | None:
        """The token by which the words differ; None where one does not tell all of them apart."""
        asked = len(self._encode([""], [""])[0])
        words = [self._encode([""], [word])[0][asked:] for word in self.label_words]
        for place, tokens in enumerate(zip_longest(*words)):
            if len(set(tokens)) > 1:
                apart = None not in tokens and len(set(tokens)) == len(tokens)
                return LabelWords(place, tokens) if apart else None
        return None

    def _example(self, asked: list[int], answered: list[int], word: str) -> Example:
        if answered[: len(asked)] != asked or len(answered) == len(asked):
            raise ValueError(
                f"label_words: {word!r} merges with the end of the prompt {self.prompt!r}; "
                "start the word with a space and end the prompt without one"
            )
        return Example(answered, [IGNORE_INDEX] * len(asked) + answered[len(asked) :])

    def _shorten(self, text: str) -> str:
        """The longest beginning of the text that fits beside the longest label word, whatever this label is."""
        kept = bisect_right(range(len(text)), self.max_length, key=lambda count: self._length(text[:count])) - 1
        while self._length(text[:kept]) > self.max_length:  # a longer text may have fewer tokens, so bisection may miss
            kept -= 1
        return text[:kept]

    def _length(self, text: str) -> int:
        return len(self._encode([text], [self._longest])[0])

    def _encode(self, texts: Sequence[str], words: Sequence[str]) -> list[list[int]]:
        if not texts:  # tokenizers fail on an empty batch
            return []
        full = [self.prompt.replace(_SLOT, text) + word for text, word in zip(texts, words)]
        encoded = self.tokenizer(full, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [[*self._start, *ids] for ids in encoded["input_ids"]]
