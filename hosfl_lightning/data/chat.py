"""Conversations through a tokenizer's chat template, in parts: what the assistant says, and the rest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from hosfl_lightning.data.responses import Part
from hosfl_lightning.data.rows import MissingError, Row

Message = dict[str, Any]

#: The tokenizer's own template.
OWN = "tokenizer"
#: Of OpenAI, SmolLM2 and Qwen, without their default system message.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDY = (
    "set data.init_args.chat_template to a file or string with {% generation %} and {% endgeneration %} around what "
    "the assistant says"
)


class ChatTemplate:
    """Says which characters of a conversation are the assistant's: every turn, with what ends it (``<|im_end|>``).

    With ``{% generation %}`` marks they are what is marked. Without, of turn i they are what ``render(messages[:i+1])``
    adds to ``render(messages[:i], add_generation_prompt=True)``, less the white space behind a special token. That is
    exact where each is a prefix of the next and of the whole, which is checked for every conversation; a template that
    writes earlier turns anew (without their reasoning, say) is refused.

    Args:
        template: ``tokenizer``: the tokenizer's own; ``chatml``; a file; or a Jinja template.
        tokenizer: The model's.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The tokenizer has no template of its own.
    """

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.source = _own(tokenizer) if template == OWN else _read(template)
        self.marked = _MARK.search(self.source) is not None
        #: Whether a response so far ended in a token that can end a turn.
        self.stops = False
        self._tokens = (*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens)

    def parts(self, messages: Sequence[Message], where: str) -> list[Part]:
        """The rendered conversation; at least one part is a response.

        Args:
            messages: With one by the assistant at least.
            where: The record, for errors.

        Raises:
            ValueError: The template refuses the messages, or does not say which characters are the assistant's.
        """
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            text, spans = self._marked(messages) if self.marked else self._by_prefixes(messages, turns, where)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"{where}: the chat template refuses the messages ({error})") from error
        if len(spans) < len(turns):
            raise ValueError(
                f"{where}: the chat template marks {len(spans)} of {len(turns)} turns of the assistant; {_REMEDY}"
            )
        borders = [0, *(border for span in spans for border in span), len(text)]
        parts = [Part(text[a:b], index % 2 == 1) for index, (a, b) in enumerate(pairwise(borders))]
        self.stops |= any(part.response and part.text.rstrip().endswith(self._tokens) for part in parts)
        return [part for part in parts if part.text]

    def _marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        # Not `apply_chat_template`, whose mask marks all to the end where a response ends in a character without token.
        render: Any = render_jinja_template  # annotated as if it returned a string
        [text], [spans] = render(
            [list(messages)], chat_template=self.source, return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )  # fmt: skip
        return text, [(a, b) for a, b in spans if a < b]

    def _by_prefixes(
        self, messages: Sequence[Message], turns: list[int], where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        text, spans = self._render(messages), []
        for turn in turns:
            asked = self._render(messages[:turn], add_generation_prompt=True) if turn else ""
            answered = self._render(messages[: turn + 1])
            if not (answered.startswith(asked) and text.startswith(answered)):
                raise ValueError(
                    f"{where}: the chat template marks no responses, and it renders the beginning of this conversation "
                    f"otherwise than the whole, so they cannot be told; {_REMEDY}"
                )
            spans.append((len(asked), self._end(answered)))
        return text, [(a, b) for a, b in spans if a < b]

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(list(messages), chat_template=self.source, tokenize=False, **options)  # type: ignore[return-value]

    def _end(self, answered: str) -> int:
        """Without the white space behind the token that ends a turn: nobody waits for it."""
        stripped = answered.rstrip()
        return len(stripped) if stripped.endswith(self._tokens) else len(answered)


def read_messages(row: Row, field: str) -> list[Message]:
    """The conversation of a record: role and content of each message are strings, other keys are the template's.

    Raises:
        MissingError: Nothing is said in it: it is empty, a content is null, or nobody answers; with the record's place.
        ValueError: It is of another form.
    """
    messages = row.field(field, "messages_field")
    if not isinstance(messages, list | tuple):
        raise ValueError(f"{row.where}: {field} must be a list of messages with role and content, not {messages!r:.60}")
    if not messages:
        raise MissingError(f"{row.where}: {field} is an empty list")
    for number, message in enumerate(messages):
        where = f"{row.where}: {field}[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where} must have a role and a content that are strings, not {message!r:.60}")
        if "content" in message and message["content"] is None:
            raise MissingError(f"{where} has a content that is null")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{where} must have a role and a content that are strings, not {message!r:.60}")
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise MissingError(
            f"{row.where}: {field} has no message of role assistant that says anything; its roles are {roles}"
        )
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _own(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(
            f"chat_template: the tokenizer {name!r} has none; set data.init_args.chat_template to chatml, or to a file "
            "or string with one"
        ) from None


def _read(template: str) -> str:
    if template == "chatml":
        return CHATML
    if "{%" in template or "{{" in template:
        return template
    if not Path(template).is_file():
        raise FileNotFoundError(
            f"chat_template: there is no file {template!r}; give a file, a Jinja template, chatml or {OWN}"
        )
    return Path(template).read_text("utf-8")
