from __future__ import annotations

import inspect
import json
import math
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ASSET = Path(str(files("hosfl_lightning") / "assets" / "tiny_lm"))
TEXTS = [
    "def f(x):\n\treturn x  # two spaces\r\n",
    "naïve café, 日本語, emoji 🙂👩‍👩‍👧, \u0000 and \u200b",
    "  leading,  double   and trailing spaces  ",
    "it 's don 't , . ! punctuation",
    "".join(chr(code) for code in range(0x250)),
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(ASSET).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSET)


def test_loads_as_fp32_from_a_small_folder(model: PreTrainedModel) -> None:
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in load_file(ASSET / "model.safetensors").values()} == {torch.float16}
    assert 0.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.3e6
    assert sum(path.stat().st_size for path in ASSET.rglob("*") if path.is_file()) <= 3e6
    assert model.config.num_hidden_layers == 6
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_gives_the_bytes_and_takes_them_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_pad_and_eos_agree_with_the_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert min(tokenizer.pad_token_id, tokenizer.eos_token_id) >= 256
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) <= model.config.vocab_size
    batch = tokenizer(["a", "abc"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum().item() == 4


def test_reads_docstrings_of_this_python(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "\n\n".join(inspect.getdoc(thing) or "" for thing in (json, json.dump, inspect.getsource, Path, Path.glob))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :512]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert ids.shape[1] == 512
    assert loss < 0.3 * math.log(256)


def test_the_record_belongs_to_a_real_run() -> None:
    record = json.loads((ASSET / "training.json").read_text())
    assert record["tokens_seen"] > 1e7
    assert record["heldout_nats_per_byte"]["prose"] < 2.0
    assert len(record["corpus_sha256"]) == 64
    assert f"{record['heldout_nats_per_byte']['prose']} of prose" in (ASSET / "README.md").read_text()
