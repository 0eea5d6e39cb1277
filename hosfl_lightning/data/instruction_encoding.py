"""Prompts with responses, and conversations, as examples of at most `max_length` tokens that keep their responses."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from hosfl_lightning.data.chat import ChatTemplate, Message
from hosfl_lightning.data.responses import Part, Piece, labelled, tokenize_parts
from hosfl_lightning.data.tokenization import IGNORE_INDEX, Example, leading_special_tokens

#: What is said of examples that were too long.
PROMPT, RESPONSE = "lost the beginning of the prompt", "lost the end of the response"
TURNS, DROPPED = "lost their oldest turns", "were dropped, as no token of a response fits"


class PairEncoder:
    """Tokens ``[bos, p, r, eos]`` of a prompt and a response, labels ``[-100, -100 · T_p, r, eos]``.

    Prompt and response are tokenized together where that keeps them apart (`tokenize_parts`). What is too long loses
    the beginning of p, but for one token where there is no bos; a response that is too long by itself loses its end,
    with eos. bos is what the tokenizer puts before every text.

    Args:
        tokenizer: The model's.
        max_length: Most tokens of an example, at least 2.
        everything: Label the prompt too, and bos.

    Raises:
        ValueError: The tokenizer has no eos token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, everything: bool) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: it has no eos token to end a response with; set tokenizer.eos_token")
        self.tokenizer, self.max_length, self.everything = tokenizer, max_length, everything
        self.start = leading_special_tokens(tokenizer)
        self.shortened: Counter[str] = Counter()

    def __call__(self, prompt: str, response: str, where: str) -> Example:
        """One example.

        Raises:
            ValueError: The two cannot be told apart in tokens; `where` is the record.
        """
        asked, answered = tokenize_parts([Part(prompt, False), Part(response, True)], self.tokenizer, where)
        ids = [*answered.ids, self.tokenizer.eos_token_id]
        room = self.max_length - len(self.start)
        least = 0 if self.start else 1  # the first token of a row is predicted by nothing
        kept = max(least, min(len(asked.ids), room - len(ids)))
        if kept < len(asked.ids):
            self.shortened[PROMPT] += 1
        if kept + len(ids) > room:
            self.shortened[RESPONSE] += 1
        prompt_ids = asked.ids[len(asked.ids) - kept :]
        return labelled([Piece(self.start + prompt_ids, False), Piece(ids[: room - len(prompt_ids)], True)],
                        self.everything)  # fmt: skip


class ChatEncoder:
    """Tokens of a conversation through its chat template; the labels are those of every turn of the assistant.

    What is too long loses its oldest turns (a turn begins with the user; system messages stay), then the beginning of
    the last question, then the end of the last answer.

    Args:
        template: Of the conversation.
        max_length: Most tokens of an example.
        everything: Label all tokens; else what follows the last answer is left out.
    """

    def __init__(self, template: ChatTemplate, max_length: int, everything: bool) -> None:
        self.template, self.max_length, self.everything = template, max_length, everything
        self.shortened: Counter[str] = Counter()

    def __call__(self, messages: Sequence[Message], where: str) -> Example | None:
        """One example; None where no token of a response would be left."""
        if not self.everything:
            last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
            messages = messages[: last + 1]
        example = self._encode(messages, where)
        return example if self._fits(example) else self._shorten(messages, where)

    def _shorten(self, messages: Sequence[Message], where: str) -> Example | None:
        """Without the oldest turns; where one turn is too long, see `_shorten_turn`."""
        system, turns = _turns(messages)
        left = [turns[number:] for number in range(1, len(turns)) if any(map(_answered, turns[number:]))]
        for kept in left:
            example = self._encode([*system, *(message for turn in kept for message in turn)], where)
            if self._fits(example):
                self.shortened[TURNS] += 1
                return example
        turn = next(turn for turn in reversed(turns) if _answered(turn))
        shortest, lost = self._shorten_turn(system, turn, where)
        self.shortened.update(lost if shortest is None or not left else [TURNS, *lost])
        return shortest

    def _shorten_turn(self, system: list[Message], turn: list[Message], where: str) -> tuple[Example | None, list[str]]:
        """Without the beginning of the question, then without the end of the answer; and what was lost."""
        question, *rest = turn
        length = len(question["content"])

        def ending(count: int) -> Example:
            shorter = {**question, "content": question["content"][length - count :]}
            return self._encode([*system, shorter, *rest], where)

        lost = []
        if question["role"] == "user" and length > 1:
            counts = range(1, length)
            fitting = bisect_right(counts, self.max_length, key=lambda count: len(ending(count).input_ids))
            example = ending(counts[max(0, fitting - 1)])
            lost.append(PROMPT)
        else:
            example = self._encode([*system, *turn], where)
        if self._fits(example):
            return example, lost
        ids, labels = list(example.input_ids)[: self.max_length], list(example.labels)[: self.max_length]  # type: ignore[arg-type]
        if all(label == IGNORE_INDEX for label in labels[1:]):
            return None, [DROPPED]
        return Example(ids, labels), [*lost, RESPONSE]

    def _encode(self, messages: Sequence[Message], where: str) -> Example:
        parts = self.template.parts(messages, where)
        return labelled(tokenize_parts(parts, self.template.tokenizer, where), self.everything)

    def _fits(self, example: Example) -> bool:
        return len(example.input_ids) <= self.max_length


def _turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system messages at the beginning, and the rest in stretches that each begin with the user."""
    first = next(i for i, message in enumerate(messages) if message["role"] not in ("system", "developer"))
    number, numbers = 0, []
    for message in messages[first:]:
        number += message["role"] == "user"
        numbers.append(number)
    turns = groupby(zip(numbers, messages[first:]), key=lambda pair: pair[0])
    return list(messages[:first]), [[message for _, message in turn] for _, turn in turns]


def _answered(messages: Sequence[Message]) -> bool:
    return any(message["role"] == "assistant" for message in messages)
