"""A GGUF file is a checkpoint as a folder is: the same weights, cut, tokenizer and client half."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hosfl_lightning import SplitCausalLM
from hosfl_lightning.data.tokenization import load_tokenizer
from hosfl_lightning.models import PretrainedError
from hosfl_lightning.models.pretrained import load_model
from hosfl_lightning.split import Lora, LoraHalf
from tests.models.tiny_gguf import SPECIAL, TEMPLATE, TOKENS, saved, write_gguf

LORA = Lora(LoraHalf(r=2, target_modules="all-linear"), LoraHalf(r=2, target_modules="all-linear"))
BATCH = {"input_ids": torch.arange(3, 15).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


def test_the_weights_are_those_of_the_file_unpacked(file: tuple[Path, Any], capfd: pytest.CaptureFixture[str]) -> None:
    path, model = file
    mine = SplitCausalLM(str(path), cut=2, lora=LORA, dtype="auto")
    assert capfd.readouterr() == ("", "")  # its reader's bar is for terminals
    assert torch.equal(mine.logits(BATCH), model(**BATCH, use_cache=False).logits)
    assert {p.dtype for p in mine.parameters()} == {torch.float32}
    assert mine.whole.config.name_or_path == mine.whole.peft_config["default"].base_model_name_or_path == str(path)


def test_the_client_alone_is_that_of_both(file: tuple[Path, Any]) -> None:
    path, model = file
    both = SplitCausalLM(str(path), cut=1, lora=LORA)
    client = SplitCausalLM(str(path), cut=1, lora=LORA, part="client")
    assert client.client_fingerprint() == both.client_fingerprint()
    folder = saved(model, path.parent / "folder")
    assert SplitCausalLM(str(folder), cut=1, lora=LORA, part="client").client_fingerprint() == both.client_fingerprint()
    assert SplitCausalLM(str(folder), cut=1, lora=LORA).fingerprint() == both.fingerprint()
    assert torch.equal(client.client_half(**BATCH), both.client_half(**BATCH))


def test_an_unpacked_model_can_be_saved_and_its_adapter_loaded(file: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = file
    mine = SplitCausalLM(str(path), cut=2, lora=LORA)
    with torch.no_grad():
        for parameter in (*mine.client_parameters.values(), *mine.server_parameters.values()):
            parameter.add_(0.1)
    mine.export(str(tmp_path / "adapter"))
    load_model(AutoModelForCausalLM, str(path), seed=0).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(adapted(**BATCH, use_cache=False).logits, mine.logits(BATCH))


def test_the_tokenizer_is_the_files_own_whatever_lies_beside_it(
    file: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = file
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(path, folder / "tiny.gguf")
    AutoTokenizer.from_pretrained(str(Path("hosfl_lightning/assets/tiny_lm").resolve())).save_pretrained(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "nowhere"}')
    other = tmp_path / "here"
    write_gguf(other / "tiny.gguf", seed=1)  # of the same name, in the current folder
    monkeypatch.chdir(other)
    mine = SplitCausalLM(str(folder / "tiny.gguf"), cut=2, lora=LORA)
    assert torch.equal(mine.logits(BATCH), model(**BATCH, use_cache=False).logits)
    for tokenizer in (mine.tokenizer(), load_tokenizer(str(folder / "tiny.gguf"))):
        assert tokenizer is not None
        assert (len(tokenizer), tokenizer.eos_token, tokenizer.chat_template) == (len(TOKENS), SPECIAL[2], TEMPLATE)
        assert tokenizer.decode(tokenizer("on the mat")["input_ids"]) == "on the mat"
        assert tokenizer(" the")["input_ids"] == [TOKENS.index("Ġthe")]


def test_what_is_no_gguf_is_refused_in_one_line(file: tuple[Path, Any], tmp_path: Path) -> None:
    content = file[0].read_bytes()
    for name, held in (("text", b"no model"), ("cut", content[: len(content) // 3]), ("short", content[:-5000])):
        broken = tmp_path / f"{name}.gguf"
        broken.write_bytes(held)
        with pytest.raises(PretrainedError, match=rf"model.init_args.pretrained: no model at '.*{name}.gguf'"):
            SplitCausalLM(str(broken), cut=2)
    with pytest.raises(PretrainedError, match=r"there is no file absent\.gguf"):
        SplitCausalLM("absent.gguf", cut=2)


def test_without_the_package_its_extra_is_named(file: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("hosfl_lightning.gguf.find_spec", lambda name: None if name == "gguf" else find(name))
    for part in ("both", "client"):
        with pytest.raises(ImportError, match=r"needs gguf, .* pip install 'hosfl_lightning\[gguf\]'"):
            SplitCausalLM(str(file[0]), cut=2, part=part)
