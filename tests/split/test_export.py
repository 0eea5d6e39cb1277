from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from hosfl_lightning.split import Lora, LoraHalf, add_lora, export_adapter, split
from tests.split.tiny_models import tiny_causal_lm, tiny_classifier

Case = tuple[Callable[[], PreTrainedModel], list[str], bool]
CASES: dict[str, Case] = {
    "llama": (lambda: tiny_causal_lm("llama"), ["q_proj", "down_proj"], False),
    "gpt2": (lambda: tiny_causal_lm("gpt2"), ["c_attn", "c_fc"], False),
    "mixtral": (lambda: tiny_causal_lm("mixtral"), ["q_proj"], False),
    "bert": (lambda: tiny_classifier("bert"), ["query", "value"], True),
    "distilbert": (lambda: tiny_classifier("distilbert"), ["q_lin"], True),
    "llama_classifier": (lambda: tiny_classifier("llama"), ["v_proj"], True),
}


def trained(case: Case) -> PeftModel:
    """LoRA of another rank on each half, with every trained value random."""
    build, targets, head = case
    lora = Lora(LoraHalf(2, 3, targets), LoraHalf(3, 7, targets[:1]))
    peft_model = add_lora(build(), 1, lora, head=head)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator)
    return peft_model


@pytest.mark.parametrize("name", CASES)
def test_the_exported_adapter_gives_the_logits_of_the_split_model(name: str, tmp_path: Path) -> None:
    peft_model = trained(CASES[name])
    client, server = split(peft_model.get_base_model(), 1)
    folder = export_adapter(peft_model, tmp_path / "run" / "adapter", "some/base")
    assert {f.name for f in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert [f.name for f in folder.parent.iterdir()] == ["adapter"]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"

    loaded = PeftModel.from_pretrained(CASES[name][0](), folder)
    tokens, mask = torch.arange(3, 15).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    tokens[1, 4:] = mask[1, 4:] = 0
    with torch.no_grad():
        ours = server(client(tokens, mask), mask)
        assert torch.equal(loaded(input_ids=tokens, attention_mask=mask).logits, ours)
        assert not torch.equal(CASES[name][0]()(input_ids=tokens, attention_mask=mask).logits, ours)


def test_an_adapter_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft_model = trained(CASES["llama"])
    folder = export_adapter(peft_model, tmp_path / "adapter", "first")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("hosfl_lightning.split.export.sync", fail)
        with pytest.raises(OSError, match="no space"):
            export_adapter(peft_model, folder, "second")
    config = folder / "adapter_config.json"
    assert json.loads(config.read_text())["base_model_name_or_path"] == "first"
    export_adapter(peft_model, folder, "second")
    assert json.loads(config.read_text())["base_model_name_or_path"] == "second"
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]


def test_errors(tmp_path: Path) -> None:
    peft_model = trained(CASES["llama"])
    with pytest.raises(ValueError, match="base_model_name_or_path is not set"):
        export_adapter(peft_model, tmp_path / "adapter")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt"):
        export_adapter(peft_model, tmp_path, "base")
    assert (tmp_path / "notes.txt").read_text() == "mine"
