from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hosfl_lightning.data.chat import ChatTemplate, read_messages
from hosfl_lightning.data.instruction_encoding import DROPPED, PROMPT, RESPONSE, TURNS, ChatEncoder
from hosfl_lightning.data.responses import Part, tokenize_parts
from hosfl_lightning.data.rows import MissingError, Row
from hosfl_lightning.data.tokenization import Example
from tests.data.chat_models import CHAT_MODELS, CHATML, LLAMA_3, MISTRAL, ChatModel

#: Questions and answers; white space and line breaks where templates and merges can go wrong.
TURNS_OF_CHAT = [("hi there", "hi. You"), ("and?\n", "no hi"), ("you", "good\n")]
#: Drops the reasoning of all answers but the last, as Qwen 3 and R1 do.
FORGETFUL = (
    "{% for message in messages %}{% if loop.last or message['role'] == 'user' %}{{ message['content'] }}"
    "{% else %}{{ message['content'].split('</think>')[-1] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
)


def conversation(pairs: list[tuple[str, str]] = TURNS_OF_CHAT) -> list[dict[str, Any]]:
    roles = [{"role": role, "content": said} for pair in pairs for role, said in zip(("user", "assistant"), pair)]
    return roles


def encode(model: ChatModel, template: str, messages: list[dict[str, Any]], length: int = 999) -> Example | None:
    return ChatEncoder(ChatTemplate(template, model.tokenizer), length, False)(messages, "chats.jsonl line 1")


def said(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every stretch of labelled tokens."""
    stretches: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels):  # type: ignore[arg-type]
        assert label in (token, -100)
        stretches = [*stretches, []] if label == -100 else [*stretches[:-1], [*stretches[-1], label]]
    return [tokenizer.decode(ids) for ids in stretches if ids]


@pytest.fixture(params=CHAT_MODELS.values(), ids=CHAT_MODELS.keys())
def model(request: pytest.FixtureRequest) -> ChatModel:
    return request.param


@pytest.fixture(params=["published", "template"])
def template(request: pytest.FixtureRequest, model: ChatModel) -> str:
    return getattr(model, request.param)


class TestLabels:
    def test_are_exactly_what_the_model_is_to_say(self, model: ChatModel, template: str) -> None:
        """Every answer with the token that ends it, and nothing else; input_ids are the template's."""
        example = encode(model, template, conversation())
        expected = [model.chat(*pair).split(model.opened)[1].rstrip(" ") for pair in TURNS_OF_CHAT]
        expected = [text[: text.index(model.closed)] + model.closed for text in expected]
        assert said(example, model.tokenizer) == expected
        ids = model.tokenizer.apply_chat_template(conversation(), chat_template=template, return_dict=False)
        assert example.input_ids == ids

    def test_are_the_mask_of_transformers(self, model: ChatModel) -> None:
        example = encode(model, model.template, conversation())
        options = {"return_assistant_tokens_mask": True, "return_dict": True, "tokenize": True}
        told = model.tokenizer.apply_chat_template(conversation(), chat_template=model.template, **options)
        assert [label != -100 for label in example.labels] == list(map(bool, told["assistant_masks"]))

    def test_follow_the_tokens_that_the_model_is_asked_with(self, model: ChatModel, template: str) -> None:
        """A response may begin with what the tokenizer would merge into the template."""
        messages = conversation([("a", "\nhi")])
        example = encode(model, template, messages)
        asked = model.tokenizer.apply_chat_template(
            messages[:1], chat_template=template, add_generation_prompt=True, return_dict=False
        )
        assert example.input_ids[: len(asked)] == asked
        assert example.labels[: len(asked)] == [-100] * len(asked)
        assert example.labels[len(asked)] != -100

    def test_on_everything(self, model: ChatModel, template: str) -> None:
        example = ChatEncoder(ChatTemplate(template, model.tokenizer), 999, True)(conversation(), "")
        assert example.labels == example.input_ids

    def test_by_the_name_chatml(self) -> None:
        published = CHATML.published.replace("messages[0]['role'] != 'system'", "false")
        assert encode(CHATML, "chatml", conversation()) == encode(CHATML, published, conversation())

    def test_with_a_real_tokenizer(self, real_data: Any) -> None:
        tokenizer = AutoTokenizer.from_pretrained(real_data("stories260k"))
        for template in (MISTRAL.published, MISTRAL.template):
            encoder = ChatEncoder(ChatTemplate(template, tokenizer), 999, False)
            example = encoder(conversation(), "")
            assert said(example, tokenizer) == ["hi. You</s>", "no hi</s>", "good\n</s>"]
            whole = "<s> " + "".join(MISTRAL.chat(*p) for p in TURNS_OF_CHAT)
            assert tokenizer.decode(example.input_ids).split() == whole.replace("</s>", "</s> ").split()


class TestRefused:
    def test_no_template(self) -> None:
        with pytest.raises(ValueError, match=r"chat_template: the tokenizer '\w+' has none; set .* to chatml, or"):
            ChatTemplate("tokenizer", MISTRAL.tokenizer)

    def test_no_file(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"chat_template: there is no file 'chat\.jinja'; give a file, a"):
            ChatTemplate("chat.jinja", MISTRAL.tokenizer)

    def test_a_template_that_writes_the_past_anew(self) -> None:
        """Its responses cannot be told without marks; one answer alone has no past."""
        with pytest.raises(ValueError, match=r"c\.jsonl line 1: the chat template marks no .* set .*chat_template to"):
            encode_line(FORGETFUL, conversation([("a", "x</think>b"), ("c", "d")]))
        assert encode(CHATML, FORGETFUL, conversation([("a", "x</think>b")])) is not None

    def test_marks_around_some_turns_only(self) -> None:
        some = CHATML.template.replace("message['role'] == 'assistant'", "loop.index == 2")
        with pytest.raises(ValueError, match=r"c\.jsonl line 1: the chat template marks 1 of 3 turns of the assistant"):
            encode_line(some, conversation())

    def test_what_the_template_refuses(self) -> None:
        twice = [{"role": "user", "content": "a"}, *conversation()]
        with pytest.raises(
            ValueError, match=r"line 1: the chat template refuses the messages \(Conversation roles must"
        ):
            encode(MISTRAL, MISTRAL.published, twice)
        with pytest.raises(ValueError, match=r"line 1: the chat template refuses the messages \(.*end of template"):
            encode_line("{% for m in messages %}", conversation())

    def test_a_space_that_cannot_be_told_from_the_response(self) -> None:
        spaced = MISTRAL.template.replace("[/INST]", "[/INST] ")
        with pytest.raises(ValueError, match="line 1: the first token of a response merges with what stands before it"):
            encode(MISTRAL, spaced, conversation([("a", "hi")]))

    @pytest.mark.parametrize(
        ("messages", "reason"),
        [
            ("hello", " must be a list of messages with role and content, not 'hello'"),
            ({}, " must be a list of messages"),
            ([{"role": "user"}], r"\[0\] must have a role and a content"),
            (
                [{"from": "human", "value": "a"}],
                r"\[0\] must have a role and a content that are strings, not \{'f",
            ),
            ([{"role": "user", "content": ["a"]}], r"\[0\] must have a role and a content"),
        ],
    )
    def test_no_conversation(self, messages: Any, reason: str) -> None:
        with pytest.raises(ValueError, match=f"^c.jsonl line 7: messages{reason}"):
            read_messages(Row("c.jsonl line 7", {"messages": messages}), "messages")

    @pytest.mark.parametrize(
        ("messages", "reason"),
        [
            ([], " is an empty list"),
            ([{"role": "user", "content": None}], r"\[0\] has a content that is null"),
            (
                [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}],
                " has no .*; its roles are human, gpt",
            ),
            ([{"role": "assistant", "content": " "}], " has no message of role assistant that says anything"),
        ],
    )
    def test_nothing_said(self, messages: Any, reason: str) -> None:
        with pytest.raises(MissingError, match=f"^c.jsonl line 7: messages{reason}"):
            read_messages(Row("c.jsonl line 7", {"messages": messages}), "messages")


def encode_line(template: str, messages: list[dict[str, Any]]) -> Example | None:
    return ChatEncoder(ChatTemplate(template, CHATML.tokenizer), 999, False)(messages, "c.jsonl line 1")


class TestTruncation:
    """Turns go first, then the question, and the answer last."""

    SYSTEM = {"role": "system", "content": "be good"}
    CHAT = [SYSTEM, *conversation([("old old", "past"), ("a long question", "answer")])]
    LAST = "<|im_start|>assistant\nanswer<|im_end|>"

    def shortened(self, length: int) -> tuple[str, list[str], dict[str, int]]:
        encoder = ChatEncoder(ChatTemplate(CHATML.template, CHATML.tokenizer), length, False)
        example = encoder(self.CHAT, "")
        if example is None:
            return "", [], encoder.shortened
        assert len(example.input_ids) <= length
        return CHATML.tokenizer.decode(example.input_ids), said(example, CHATML.tokenizer), encoder.shortened

    def length(self, text: str) -> int:
        return len(CHATML.tokenizer(text)["input_ids"])

    def test_none(self) -> None:
        whole = self.length(self.shortened(999)[0])
        assert self.shortened(whole)[1:] == (["past<|im_end|>", "answer<|im_end|>"], {})

    def test_the_oldest_turn_goes_and_the_system_message_stays(self) -> None:
        text, answers, lost = self.shortened(self.length(self.shortened(999)[0]) - 1)
        assert text.startswith("<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\na long question<|im_end|>")
        assert (answers, lost) == (["answer<|im_end|>"], {TURNS: 1})

    def test_then_the_beginning_of_the_question(self) -> None:
        head = "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\n"
        text, answers, lost = self.shortened(self.length(f"{head}question<|im_end|>\n{self.LAST}\n"))
        assert text == f"{head}question<|im_end|>\n{self.LAST}\n"
        assert (answers, lost) == (["answer<|im_end|>"], {TURNS: 1, PROMPT: 1})

    def test_then_the_end_of_the_answer(self) -> None:
        head = "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\nn<|im_end|>\n<|im_start|>assistant\n"
        text, answers, lost = self.shortened(self.length(f"{head}ans"))
        assert (text, answers, lost) == (f"{head}ans", ["ans"], {TURNS: 1, PROMPT: 1, RESPONSE: 1})
        assert self.shortened(self.length(head)) == ("", [], {DROPPED: 1})

    def test_what_follows_the_last_answer_does_not_push_it_out(self) -> None:
        messages = [*conversation([("a question", "b")]), {"role": "user", "content": "no more " * 9}]
        expected = encode(LLAMA_3, LLAMA_3.template, messages[:2])
        assert encode(LLAMA_3, LLAMA_3.template, messages, len(expected.input_ids)) == expected


def test_no_token_lies_across_a_border() -> None:
    """Together where the tokens keep apart, each alone where not."""
    parts = [Part("a\n", False), Part("\nhi", True), Part(" hi", False)]
    pieces = tokenize_parts(parts, CHATML.tokenizer, "")
    assert [CHATML.tokenizer.decode(piece.ids) for piece in pieces] == ["a\n", "\nhi", " hi"]
    assert [len(piece.ids) for piece in pieces] == [2, 2, 1]
