from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from hosfl_lightning.data.tokenization import (
    Example,
    collate,
    language_blocks,
    load_tokenizer,
    pad_token_id,
    token_stream,
)

MakeTokenizer = Callable[..., PreTrainedTokenizerBase]


def test_collate_pads_on_the_right_to_the_longest_row() -> None:
    batch = collate([Example([5, 6, 7], [-100, 6, 7]), Example(torch.tensor([8]), torch.tensor([8]))], pad_id=9)
    assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_collate_of_classes() -> None:
    batch = collate([Example([5, 6], 3), Example([8], 0)], pad_id=0)
    assert batch["labels"].tolist() == [3, 0]
    assert batch["labels"].dtype == torch.int64


def test_stream_has_eos_between_documents(tokenizer: PreTrainedTokenizerBase) -> None:
    a, b = (tokenizer(letter)["input_ids"][0] for letter in "ab")
    eos = tokenizer.eos_token_id
    assert token_stream(["aa", "b", "a"], tokenizer).tolist() == [a, a, eos, b, eos, a]
    assert token_stream(["a"], tokenizer).dtype == torch.int64


def test_stream_adds_no_other_special_tokens(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(template="<bos> $A <eos>", eos_token="<eos>", bos_token="<bos>")
    assert len(token_stream(["aa", "b"], tokenizer)) == 4


def test_special_tokens_spelled_in_a_document_are_text(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = token_stream(["a <eos> <pad>"], tokenizer)
    assert tokenizer.eos_token_id not in stream
    assert tokenizer.pad_token_id not in stream
    assert len(stream) == len("a <eos> <pad>")


def test_blocks_are_consecutive_and_their_own_labels() -> None:
    blocks = language_blocks(torch.arange(11), 4)
    assert [block.input_ids.tolist() for block in blocks] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(torch.equal(torch.as_tensor(block.labels), torch.as_tensor(block.input_ids)) for block in blocks)
    assert language_blocks(torch.arange(3), 4) == []


def test_padding_falls_back_to_eos(make_tokenizer: MakeTokenizer) -> None:
    assert pad_token_id(make_tokenizer(pad_token="<pad>", eos_token="<eos>")) == 0
    assert pad_token_id(make_tokenizer(eos_token="<eos>")) == 1
    with pytest.raises(ValueError, match="neither a pad nor an eos token"):
        pad_token_id(make_tokenizer())


def test_several_documents_need_eos(make_tokenizer: MakeTokenizer) -> None:
    assert len(token_stream(["a"], make_tokenizer())) == 1
    with pytest.raises(ValueError, match="no eos token to put between documents"):
        token_stream(["a", "b"], make_tokenizer())


def test_load(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert load_tokenizer(tokenizer) is tokenizer
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    with pytest.raises(ValueError, match="tokenizer: none is set"):
        load_tokenizer(None)
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_tokenizer(str(tmp_path / "none"))
    assert "\n" not in str(caught.value)
