"""Chat templates as published, the same with generation marks, and small tokenizers like those of the models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXT = [chr(code) for code in range(32, 127)] + ["\n", "é", "▁"]


@dataclass(frozen=True)
class ChatModel:
    """One model's way to write a chat.

    Args:
        published: Its template, without generation marks.
        plain: What in it is written of the assistant's turn.
        marked: The same with marks.
        make: Its tokenizer, from the special tokens.
        special: Its special tokens.
        bos: Its bos, if its template has one.
        opened: What stands before a response.
        closed: What ends one, and is the model's to say.
        chat: Renders a user's and the assistant's turn, as the template does.
    """

    published: str
    plain: str
    marked: str
    make: Callable[[list[str]], Tokenizer]
    special: list[str]
    bos: str
    opened: str
    closed: str
    chat: Callable[[str, str], str]

    @property
    def template(self) -> str:
        """With marks."""
        assert self.plain in self.published
        return self.published.replace(self.plain, self.marked)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        bos = {"bos_token": self.bos} if self.bos else {}
        return PreTrainedTokenizerFast(
            tokenizer_object=self.make(self.special), eos_token=self.closed, pad_token="<pad>", **bos
        )


def byte_level(special: list[str]) -> Tokenizer:
    """As of GPT-2, Llama 3, Qwen and SmolLM2; with merges over white space and into words."""
    merges = [("Ċ", "Ċ"), ("Ġ", "h"), ("Ġh", "i"), ("h", "i"), (".", "Ċ")]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in ["<pad>", *special]])
    return tokenizer


def sentence_pieces(special: list[str]) -> Tokenizer:
    """As of Gemma: "▁" for a space, and none before the text."""
    merges = [("▁", "h"), ("▁h", "i"), ("h", "i"), ("\n", "\n")]
    words = [*TEXT, *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in ["<pad>", *special]])
    return tokenizer


def prepended_pieces(special: list[str]) -> Tokenizer:
    """As of Mistral and Llama 2: "▁" also before the first word of a text."""
    tokenizer = sentence_pieces(special)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


CHATML = ChatModel(  # Qwen 1.5; SmolLM2 has another system message
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}",
    byte_level,
    ["<|im_start|>", "<|im_end|>"],
    "",
    "<|im_start|>assistant\n",
    "<|im_end|>",
    lambda user, assistant: f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n",
)
LLAMA_3 = ChatModel(
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "{{ content }}",
    "{% if message['role'] == 'assistant' %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% generation %}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}{{ content }}{% endif %}",
    byte_level,
    ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "<|begin_of_text|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
    lambda user, assistant: (
        f"<|start_header_id|>user<|end_header_id|>\n\n{user.strip()}<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{assistant.strip()}<|eot_id|>"
    ),
)
GEMMA = ChatModel(
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}",
    "{{ '<start_of_turn>' + role + '\n' }}{% if role == 'model' %}{% generation %}"
    "{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}",
    sentence_pieces,
    ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "<bos>",
    "<start_of_turn>model\n",
    "<end_of_turn>",
    lambda user, assistant: (
        f"<start_of_turn>user\n{user.strip()}<end_of_turn>\n<start_of_turn>model\n{assistant.strip()}<end_of_turn>\n"
    ),
)
MISTRAL = ChatModel(  # 7B Instruct v0.1
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "{{ message['content'] + eos_token + ' ' }}",
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ ' ' }}",
    prepended_pieces,
    ["<s>", "</s>"],
    "<s>",
    " [/INST]",
    "</s>",
    lambda user, assistant: f"[INST] {user} [/INST]{assistant}</s> ",
)
CHAT_MODELS = {"chatml": CHATML, "llama_3": LLAMA_3, "gemma": GEMMA, "mistral": MISTRAL}
