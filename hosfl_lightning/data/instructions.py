"""Supervised fine-tuning: prompts with responses, or conversations through a chat template."""

from __future__ import annotations

import re
from typing import Literal

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from hosfl_lightning.data.chat import OWN, ChatTemplate, Message, read_messages
from hosfl_lightning.data.checks import check_at_least, check_choice
from hosfl_lightning.data.instruction_encoding import DROPPED, ChatEncoder, PairEncoder
from hosfl_lightning.data.notice import say
from hosfl_lightning.data.partition import Partitioner
from hosfl_lightning.data.readers import Reader
from hosfl_lightning.data.records import RecordData
from hosfl_lightning.data.rows import OnMissing, Row
from hosfl_lightning.data.tokenization import Example

_SLOT = re.compile(r"\{([^{}]+)\}")


class InstructionData(RecordData):
    r"""Instructions and chats dealt to clients, for a causal LM; the loss is on the responses.

    A record is a prompt and a response, or a conversation: a list of messages with `role` and `content`. Every turn of
    the assistant is a response. input_ids are what the model will see when it is asked, labels are the same tokens at
    the responses (with what ends them) and -100 elsewhere.

    Args:
        train: Training file (.jsonl, .csv, also with .gz), or with `hub` the name of the split.
        validation: The same for validation. None: `validation_fraction` of the training examples, the same for every
            seed.
        test: The same for the test set. None: no test set.
        hub: Name of a dataset for `datasets.load_dataset`; needs the extra `hub`. None: files.
        hub_config: Its configuration, if it has several.
        prompt_field: The field with the prompt.
        response_field: The field with the response.
        prompt_template: Template around the prompt, such as "### Instruction:\n{instruction}\n\n### Response:\n";
            every {name} is a field of the record, which may be empty. None: the prompt as it is, and
            nothing between it and the response.
        messages_field: The field with a conversation; then there are no prompt and response. None: pairs.
        chat_template: What makes a conversation one text: `tokenizer` for the tokenizer's own, `chatml`, a file, or a
            Jinja template. Best with {% generation %} marks around what the assistant says; without them the responses
            are found where that is exact, see `ChatTemplate`. None: the tokenizer's own for conversations, and for
            pairs none: prompt, response and eos follow each other.
        train_on: `response`: the loss is on the responses; `all`: on every token.
        num_clients: Number of clients; by field it may be left out.
        partition: `iid` deals at random; `field` makes a client of each value of `field`.
        field: The field that `partition: field` goes by.
        partitioner: In place of the two before: an object that says which client holds which examples.
        max_length: Most tokens of an example. A longer one loses the beginning of its prompt, a conversation its oldest
            turns before; the end of a response only where nothing else is left. How many did is printed.
        max_train_examples: Use only so many training examples, the same for every seed.
        max_validation_examples: Use only so many validation examples.
        max_test_examples: Use only so many test examples.
        validation_fraction: Share of the training examples held out when `validation` is None.
        batch_size: Examples a client uses a round; a client that holds fewer uses all it has.
        eval_batch_size: Examples per batch of the held-out loaders.
        tokenizer: Name, folder or tokenizer; None: the model's own.
        seed: Fixes the partition and every client's order.
        encoding: Of text files.
        delimiter: Between the columns of a CSV; None: a comma, of a .tsv a tab.
        on_missing: `error`, or `skip` records without what is needed, which are counted and printed; also
            conversations that are empty, have a content that is null, or in which nobody answers.

    Example::

        data = InstructionData("chats.jsonl", messages_field="messages", num_clients=8, tokenizer="my-model")
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        prompt_field: str = "prompt",
        response_field: str = "response",
        prompt_template: str | None = None,
        messages_field: str | None = None,
        chat_template: str | None = None,
        train_on: Literal["response", "all"] = "response",
        num_clients: int | None = None,
        partition: Literal["iid", "field"] = "iid",
        field: str | None = None,
        partitioner: Partitioner | None = None,
        max_length: int = 512,
        max_train_examples: int | None = None,
        max_validation_examples: int | None = None,
        max_test_examples: int | None = None,
        validation_fraction: float = 0.1,
        batch_size: int = 4,
        eval_batch_size: int = 32,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        encoding: str = "utf-8",
        delimiter: str | None = None,
        on_missing: OnMissing = "error",
    ) -> None:
        check_at_least(2, max_length=max_length)
        check_choice(("iid", "field"), partition=partition)
        check_choice(("response", "all"), train_on=train_on)
        if prompt_template is not None and not _SLOT.search(prompt_template):
            raise ValueError(f"prompt_template={prompt_template!r} must name a field of the record, such as {{prompt}}")
        if prompt_template is not None and messages_field is not None:
            raise ValueError("prompt_template is for pairs, and there is a messages_field: set chat_template instead")
        super().__init__(
            sources=(train, validation, test),
            limits=(max_train_examples, max_validation_examples, max_test_examples),
            reader=Reader(encoding, delimiter, on_missing, hub, hub_config),
            validation_fraction=validation_fraction,
            num_clients=num_clients,
            partition=partition,
            partitioner=partitioner,
            words={"field": field},
            batch_size=batch_size, eval_batch_size=eval_batch_size, tokenizer=tokenizer, seed=seed,
        )  # fmt: skip
        self.prompt_field = prompt_field
        self.response_field = response_field
        self.prompt_template = prompt_template
        self.messages_field = messages_field
        self.chat_template = OWN if chat_template is None and messages_field is not None else chat_template
        self.train_on = train_on
        self.max_length = max_length

    @override
    def setup(self, stage: str) -> None:
        """Read, check, tokenize and partition.

        Raises:
            FileNotFoundError: If a file is not there.
            ImportError: If `hub` is set and `datasets` is not installed.
            ValueError: If a file, a record or the chat template is bad, or a client would be empty.
        """
        if self.clients:
            return
        found = {split: self.limited(self.read(split)[0], split) for split in ("train", "validation", "test")}
        train, validation = self.hold_out(found["train"], found["validation"])
        train, examples = self._encode("train", train)
        _, self.validation_set = self._encode("validation", validation)
        _, self.test_set = self._encode("test", found["test"])
        self.deal_rows(examples, train)

    @override
    def needs(self, row: Row) -> None:
        if self.messages_field is not None:
            read_messages(row, self.messages_field)
        else:
            self._prompt(row)
            self._response(row)

    def _encode(self, split: str, rows: list[Row]) -> tuple[list[Row], list[Example]]:
        """The examples, and the rows that they are of: those of which no response would be left are not among them."""
        tokenizer, everything = self.resolve_tokenizer(), self.train_on == "all"
        if self.chat_template is None:
            pairs = PairEncoder(tokenizer, self.max_length, everything)
            encoded: list[Example | None] = [pairs(self._prompt(r), self._response(r), r.where) for r in rows]
            shortened = pairs.shortened
        else:
            template = ChatTemplate(self.chat_template, tokenizer)
            chats = ChatEncoder(template, self.max_length, everything)
            encoded = [chats(self._messages(row), row.where) for row in rows]
            if split == "train" and not template.stops:
                say(
                    "Warning: chat_template: no response ends in a special token of the tokenizer, so the model is not "
                    "taught to stop; end what the assistant says with {{ eos_token }}"
                )
            shortened = chats.shortened
        if rows and shortened[DROPPED] == len(rows):
            raise ValueError(f"max_length={self.max_length}: too short for any response of {split}; raise it")
        if shortened.total():
            told = ", ".join(f"{count} {what}" for what, count in sorted(shortened.items()) if count)
            say(f"{split}: of {len(rows)} examples, longer than max_length={self.max_length}: {told}")
        found = [(row, example) for row, example in zip(rows, encoded) if example is not None]
        return [row for row, _ in found], [example for _, example in found]

    def _messages(self, row: Row) -> list[Message]:
        if self.messages_field is not None:
            return read_messages(row, self.messages_field)
        return [
            {"role": "user", "content": self._prompt(row)},
            {"role": "assistant", "content": self._response(row)},
        ]

    def _prompt(self, row: Row) -> str:
        if self.prompt_template is None:
            return row.text(self.prompt_field, "prompt_field")

        def filled(slot: re.Match[str]) -> str:
            value = row.fields[slot[1]] if slot[1] in row.fields else row.field(slot[1], "prompt_template")
            return "" if value is None else str(value)

        return _SLOT.sub(filled, self.prompt_template)

    def _response(self, row: Row) -> str:
        return row.text(self.response_field, "response_field")
