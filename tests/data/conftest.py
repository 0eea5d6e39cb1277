"""A tiny tokenizer, file writers, and a guard: nothing in `data` may touch the global random state."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def byte_tokenizer(
    merges: tuple[tuple[str, str], ...] = (), template: str | None = None, **special: str
) -> PreTrainedTokenizerBase:
    """Byte-level BPE, one token a byte but for `merges`; `template` such as "<bos> $A <eos>" adds special tokens."""
    words = ["<pad>", "<eos>", "<bos>", *sorted(ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if template is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=[(word, vocabulary[word]) for word in ("<bos>", "<eos>")]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer(pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerBase]:
    return byte_tokenizer


@pytest.fixture(autouse=True)
def global_random_state_untouched() -> Iterator[None]:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    yield
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0]), "torch's global random state changed"
    assert before[1:] == after[1:], "NumPy's or Python's global random state changed"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], str]:
    """Write a file by its extension: text as it is, a list of records as JSON lines; return its path."""

    def write_file(name: str, content: Any) -> str:
        if not isinstance(content, str | bytes):
            content = "".join(json.dumps(record) + "\n" for record in content)
        data = content.encode() if isinstance(content, str) else content
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
        return str(path)

    return write_file


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """A folder of the real data sets beside the checkout, or a skip that names it."""

    def folder(name: str) -> Path:
        path = Path(__file__).parents[3] / "shared" / "data" / name
        if not path.is_dir():
            pytest.skip(f"no real data at {path}")
        return path

    return folder
