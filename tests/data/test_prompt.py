from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from hosfl_lightning.data.prompt import PromptEncoder
from hosfl_lightning.data.tokenization import Example

MakeTokenizer = Callable[..., PreTrainedTokenizerBase]
WORDS = [" terrible", " great"]


def one(encode: PromptEncoder, text: str, label: int) -> Example:
    return encode([text], [label])[0]


def labelled(tokenizer: PreTrainedTokenizerBase, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != -100])


def test_only_the_label_word_is_labelled(tokenizer: PreTrainedTokenizerBase) -> None:
    encode = PromptEncoder("{text} It was", WORDS, tokenizer, max_length=64)
    for label, word in enumerate(WORDS):
        ids, labels = one(encode, "a fine film.", label)
        assert tokenizer.decode(ids) == "a fine film. It was" + word
        assert labelled(tokenizer, labels) == word
        assert labels[: -len(word)] == [-100] * len("a fine film. It was")
        assert labels[-len(word) :] == ids[-len(word) :]


def test_many_are_encoded_as_one_by_one(tokenizer: PreTrainedTokenizerBase) -> None:
    encode = PromptEncoder("{text} It was", WORDS, tokenizer, max_length=30)
    texts, labels = ["short", "long " * 20, "middling"], [1, 0, 1]
    assert encode(texts, labels) == [one(encode, *pair) for pair in zip(texts, labels)]
    assert encode([], []) == []


@pytest.mark.parametrize("label", [0, 1])
def test_a_long_text_is_cut_and_the_prompt_is_not(tokenizer: PreTrainedTokenizerBase, label: int) -> None:
    encode = PromptEncoder("Review: {text} It was", WORDS, tokenizer, max_length=40)
    ids, labels = one(encode, "0123456789" * 5, label)
    kept = 40 - len("Review:  It was terrible")
    assert tokenizer.decode(ids) == f"Review: {('0123456789' * 5)[:kept]} It was{WORDS[label]}"
    assert labelled(tokenizer, labels) == WORDS[label]


def test_a_text_that_just_fits_stays_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    encode = PromptEncoder("{text} It was", WORDS, tokenizer, max_length=len("abcd It was terrible"))
    assert tokenizer.decode(one(encode, "abcd", 0).input_ids) == "abcd It was terrible"
    assert tokenizer.decode(one(encode, "abcde", 0).input_ids) == "abcd It was terrible"


def test_braces_in_text_and_prompt_are_plain(tokenizer: PreTrainedTokenizerBase) -> None:
    encode = PromptEncoder("{x} {text} =", WORDS, tokenizer, max_length=64)
    assert tokenizer.decode(one(encode, "{0} {y}", 1).input_ids) == "{x} {0} {y} = great"


def test_leading_special_tokens_stay_and_trailing_ones_do_not(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(template="<bos> $A <eos>", bos_token="<bos>", eos_token="<eos>")
    ids, labels = one(PromptEncoder("{text} It was", WORDS, tokenizer, max_length=64), "ok", 1)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert len(ids) == 1 + len("ok It was great") == len(labels)
    assert labels[0] == -100


def test_words_of_several_lengths_in_tokens(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(merges=(("g", "r"), ("gr", "e"), ("a", "t"), ("gre", "at"), ("Ġ", "great")))
    ids, labels = one(PromptEncoder("{text} It was", WORDS, tokenizer, max_length=64), "ok", 1)
    assert len(ids) == len("ok It was") + 1
    assert sum(label != -100 for label in labels) == 1


def test_a_word_that_merges_with_the_prompt_is_refused(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(merges=(("s", "g"),))
    encode = PromptEncoder("{text} It was", ["bad", "great"], tokenizer, max_length=64)
    assert one(encode, "x", 0).labels[-3:] == one(encode, "x", 0).input_ids[-3:]
    with pytest.raises(ValueError, match="label_words: 'great' merges with the end of the prompt"):
        one(encode, "x", 1)


@pytest.mark.parametrize(
    ("prompt", "words", "max_length", "message"),
    [
        ("It was", WORDS, 64, "must contain {text} exactly once"),
        ("{text} {text}", WORDS, 64, "exactly once"),
        ("{text} It was", [" a", " a"], 64, "label_words"),
        ("{text} It was", [" a", " "], 64, "label_words"),
        ("{text} It was", WORDS, len(" It was terrible"), "max_length=16 leaves no space"),
    ],
)
def test_bad_settings(
    tokenizer: PreTrainedTokenizerBase, prompt: str, words: list[str], max_length: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PromptEncoder(prompt, words, tokenizer, max_length)
