from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from transformers import PreTrainedTokenizerBase

from hosfl_lightning.data import Example, FederatedDataModule, InstructionData
from tests.data.chat_models import CHATML, LLAMA_3

Write = Callable[[str, Any], str]
MakeTokenizer = Callable[..., PreTrainedTokenizerBase]
PAIRS = [{"prompt": f"ask {i}:", "response": f"say {i}", "user": "ab"[i % 2]} for i in range(20)]
CHATS = [
    {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"say {i}"}]}
    for i in range(20)
]


def make(tokenizer: PreTrainedTokenizerBase, train: str, **settings: Any) -> InstructionData:
    data = InstructionData(train, **{"tokenizer": tokenizer, "num_clients": 4, **settings})
    data.setup("fit")
    return data


def texts(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """All of it, and what is labelled."""
    labels = [label for label in example.labels if label != -100]  # type: ignore[union-attr]
    return tokenizer.decode(example.input_ids), tokenizer.decode(labels)


def all_of(data: InstructionData) -> list[Example]:
    return [example for client in data.clients for example in client] + data.validation_set


class TestPairs:
    def test_the_response_and_eos_are_labelled(self, write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
        data = make(tokenizer, write("a.jsonl", PAIRS))
        found = sorted(texts(example, tokenizer) for example in all_of(data))
        assert found == sorted((f"ask {i}:say {i}<eos>", f"say {i}<eos>") for i in range(20))
        assert (len(data.clients), len(data.validation_set)) == (4, 2)
        assert data.client_batch(0, 0)["labels"].shape == data.client_batch(0, 0)["input_ids"].shape

    def test_any_fields_and_a_template_around_them(self, write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
        rows = [{"instruction": f"do {i}", "input": "" if i else "{output}", "output": f"did {i}"} for i in range(3)]
        data = make(
            tokenizer, write("a.jsonl", rows), prompt_template="# {instruction}\n{input}\n", response_field="output",
            num_clients=1,
        )  # fmt: skip
        found = sorted(texts(example, tokenizer) for example in all_of(data))
        assert found[0] == ("# do 0\n{output}\ndid 0<eos>", "did 0<eos>")
        assert found[2] == ("# do 2\n\ndid 2<eos>", "did 2<eos>")
        other = make(tokenizer, write("a.jsonl", rows), prompt_field="instruction", response_field="output",
                     num_clients=1)  # fmt: skip
        assert texts(other.validation_set[0], tokenizer)[0].startswith("do ")

    def test_bos_stays_and_is_not_labelled(self, write: Write, make_tokenizer: MakeTokenizer) -> None:
        with_bos = make_tokenizer(template="<bos> $A <eos>", pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
        data = make(with_bos, write("a.jsonl", PAIRS[:10]), max_length=10)
        expected = {(f"<bos> {i}:say {i}<eos>", f"say {i}<eos>") for i in range(10)}
        assert {texts(example, with_bos) for example in all_of(data)} == expected

    def test_all_tokens_on_request(self, write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
        data = make(tokenizer, write("a.jsonl", PAIRS), train_on="all")
        assert all(example.labels == example.input_ids for example in all_of(data))

    def test_truncation_keeps_the_response(
        self, write: Write, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [{"prompt": "0123456789", "response": "abc"}, {"prompt": "0123", "response": "abcdefghijk"}]
        valid = [{"prompt": "?", "response": "yes"}]
        data = make(tokenizer, write("a.jsonl", rows), validation=write("v.jsonl", valid), max_length=8, num_clients=1)
        assert [texts(e, tokenizer) for e in data.clients[0]] == [("6789abc<eos>", "abc<eos>"), ("3abcdefg", "abcdefg")]
        told = capsys.readouterr().out.splitlines()
        assert told == [
            "train: of 2 examples, longer than max_length=8: 2 lost the beginning of the prompt, 1 lost the end of the "
            "response"
        ]

    def test_no_eos(self, write: Write, make_tokenizer: MakeTokenizer) -> None:
        with pytest.raises(ValueError, match="tokenizer: it has no eos token to end a response with"):
            make(make_tokenizer(pad_token="<pad>"), write("a.jsonl", PAIRS))

    def test_through_a_chat_template(self, write: Write) -> None:
        data = make(LLAMA_3.tokenizer, write("a.jsonl", PAIRS), chat_template=LLAMA_3.template)
        found = {texts(example, LLAMA_3.tokenizer) for example in all_of(data)}
        assert found == {(LLAMA_3.bos + LLAMA_3.chat(f"ask {i}:", f"say {i}"), f"say {i}<|eot_id|>") for i in range(20)}


class TestChats:
    def test_by_the_tokenizers_own_template(self, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(CHATML.tokenizer, "chat_template", CHATML.published)
        data = make(CHATML.tokenizer, write("a.jsonl", CHATS), messages_field="messages")
        assert {texts(e, CHATML.tokenizer)[1] for e in all_of(data)} == {f"say {i}<|im_end|>" for i in range(20)}

    def test_by_a_file(self, write: Write) -> None:
        path = write("chat.jinja", CHATML.template)
        data = make(CHATML.tokenizer, write("a.jsonl", CHATS), messages_field="messages", chat_template=path)
        assert {texts(e, CHATML.tokenizer)[1] for e in all_of(data)} == {f"say {i}<|im_end|>" for i in range(20)}

    def test_without_any(self, write: Write) -> None:
        with pytest.raises(ValueError, match=r"chat_template: the tokenizer .* has none; set"):
            make(CHATML.tokenizer, write("a.jsonl", CHATS), messages_field="messages")

    def test_those_of_which_nothing_is_left_are_dropped_and_counted(
        self, write: Write, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rules = [{"role": "system", "content": "rules " * 20}]
        rows = [{"messages": (rules if i == 3 else []) + row["messages"], "user": i % 2} for i, row in enumerate(CHATS)]
        data = make(
            CHATML.tokenizer, write("a.jsonl", rows), validation=write("v.jsonl", CHATS), messages_field="messages",
            chat_template="chatml", max_length=60, partition="field", field="user", num_clients=None,
        )  # fmt: skip
        assert [len(client) for client in data.clients] == [10, 9]
        assert all(int(texts(e, CHATML.tokenizer)[1].split()[1][:-10]) % 2 == k
                   for k, client in enumerate(data.clients) for e in client)  # fmt: skip
        said = "train: of 20 examples, longer than max_length=60: 1 were dropped, as no token of a response fits\n"
        assert capsys.readouterr().out == said
        with pytest.raises(ValueError, match="max_length=20: too short for any response of train; raise it"):
            make(CHATML.tokenizer, write("a.jsonl", CHATS), messages_field="messages", chat_template="chatml",
                 max_length=20)  # fmt: skip

    def test_conversations_without_an_answer_can_be_skipped(
        self, write: Write, caplog: pytest.LogCaptureFixture
    ) -> None:
        nothing = [{"messages": []}, {"messages": [{"role": "assistant", "content": None}]}, {"messages": None}]
        settings: dict[str, Any] = {"messages_field": "messages", "chat_template": "chatml", "num_clients": 2}
        path = write("a.jsonl", [*CHATS, *nothing])
        with caplog.at_level(logging.INFO):
            data = make(CHATML.tokenizer, path, **settings, on_missing="skip")
        assert len(all_of(data)) == len(CHATS)
        assert "train: 3 of 23 records are skipped, the first: a.jsonl line 21: messages is an empty" in caplog.text
        with pytest.raises(ValueError, match=r"line 21: messages is an empty list; on_missing: skip leaves such"):
            make(CHATML.tokenizer, path, **settings)

    @pytest.mark.parametrize("end", ["<|im_end|>", "", "{% endgeneration %}<|im_end|>{% generation %}"])
    def test_a_template_that_does_not_teach_to_stop_is_told_of(
        self, write: Write, capsys: pytest.CaptureFixture[str], end: str
    ) -> None:
        said = "{% generation %}{{ m['content'] }}" + end + "{% endgeneration %}\n"
        template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}" + said
        template += "{% endif %}{% endfor %}"
        make(CHATML.tokenizer, write("a.jsonl", CHATS), messages_field="messages", chat_template=template)
        warned = "Warning: chat_template: no response ends in a special token" in capsys.readouterr().out
        assert warned == (end != "<|im_end|>")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_clients": None}, "num_clients: partition=iid needs the number of clients"),
        ({"partition": "field"}, "field: partition=field needs the name of the field"),
        ({"partition": "dirichlet"}, "partition='dirichlet': choose one of iid, field"),
        ({"train_on": "prompt"}, "train_on='prompt': choose one of response, all"),
        ({"max_length": 1}, "max_length=1: must be at least 2"),
        ({"prompt_template": "Q:"}, "prompt_template='Q:' must name a field of the record, such as {prompt}"),
        (
            {"prompt_template": "{a}", "messages_field": "m"},
            "prompt_template is for pairs, and there is a messages_field",
        ),
        ({"prompt_field": "question"}, r"a.jsonl line \d+: no field 'question' \(prompt_field\)"),
        ({"prompt_template": "{prompt} {input}"}, r"a.jsonl line \d+: no field 'input' \(prompt_template\)"),
        ({"messages_field": "chat"}, r"no field 'chat' \(messages_field\)|has none"),
        ({"num_clients": 3, "partition": "field", "field": "user"}, "num_clients=3: ByField makes 2 clients"),
    ],
)
def test_settings_that_make_no_sense(
    write: Write, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        make(tokenizer, write("a.jsonl", PAIRS), **settings)


def test_from_a_recipe() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(FederatedDataModule, "data")
    settings = {"train": "a.jsonl", "messages_field": "messages", "num_clients": 2, "train_on": "all"}
    config = {"data": {"class_path": "hosfl_lightning.data.InstructionData", "init_args": settings}}
    data = parser.instantiate(parser.parse_object(config)).data
    assert isinstance(data, InstructionData)
    assert (data.chat_template, data.train_on) == ("tokenizer", "all")
