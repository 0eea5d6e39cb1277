from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from hosfl_lightning.split import Lora, LoraHalf, Side, SplitError, add_lora, export_adapter, place_side, split
from tests.split.tiny_models import tiny_causal_lm, tiny_classifier

Case = tuple[Callable[[], PreTrainedModel], list[str], bool]
CASES: dict[str, Case] = {
    "llama": (lambda: tiny_causal_lm("llama"), ["q_proj", "down_proj"], False),
    "gpt2": (lambda: tiny_causal_lm("gpt2"), ["c_attn", "c_fc"], False),
    "mixtral": (lambda: tiny_causal_lm("mixtral"), ["q_proj"], False),
    "bert": (lambda: tiny_classifier("bert"), ["query", "value"], True),
    "distilbert": (lambda: tiny_classifier("distilbert"), ["q_lin"], True),
    "llama_classifier": (lambda: tiny_classifier("llama"), ["v_proj"], True),
    "modernbert": (lambda: tiny_classifier("modernbert"), ["Wqkv", "Wo"], True),
    "deberta-v2": (lambda: tiny_classifier("deberta-v2"), ["query_proj", "value_proj"], True),
}


TOKENS, MASK = torch.arange(3, 15).view(2, 6), torch.ones(2, 6, dtype=torch.long)
TOKENS[1, 4:] = MASK[1, 4:] = 0


def trained(case: Case, side: Side | None = None, client: bool = True) -> PeftModel:
    """LoRA of another rank on each half, and a side adapter, with every trained value random."""
    build, targets, head = case
    model, cut = build(), 1 if side is None else 2
    lora = Lora(LoraHalf(2, 3, targets) if client else None, LoraHalf(3, 7, targets[:1]))
    placement = None if side is None else place_side(model, cut, side)
    peft_model = add_lora(model, cut, lora, head=head, side=placement).eval()
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
    with torch.no_grad():
        ours = server(client(TOKENS, MASK), MASK)
    assert torch.equal(logits(loaded), ours)
    assert not torch.equal(logits(CASES[name][0]()), ours)


def logits(model: PreTrainedModel | PeftModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=MASK).logits


SIDE = Side(4, taps="all", server=5)


@pytest.mark.parametrize("client", [True, False], ids=["lora_beside", "side_alone"])
@pytest.mark.parametrize("name", CASES)
def test_a_side_adapter_is_in_the_one_adapter(name: str, client: bool, tmp_path: Path) -> None:
    peft_model = trained(CASES[name], SIDE, client)
    front, server = split(peft_model.get_base_model(), 2)
    folder = export_adapter(peft_model, tmp_path / "adapter", "some/base")
    assert {f.name for f in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(CASES[name][0](), folder)
    with torch.no_grad():
        ours = server(front(TOKENS, MASK), MASK)
    assert torch.equal(logits(loaded), ours)
    assert not any(p.requires_grad for p in loaded.parameters())

    named = PeftModel.from_pretrained(CASES[name][0](), folder, adapter_name="mine", is_trainable=True).eval()
    assert torch.equal(logits(named), ours)
    own = [n for n, p in named.get_base_model().named_parameters() if p.requires_grad]
    before = [n for n, p in peft_model.get_base_model().named_parameters() if p.requires_grad]
    assert [n.replace(".mine.", ".default.") for n in own] == before
    assert sum("lora_side" in n for n in own) == 6
    assert any("lora_" in n and "lora_side" not in n and "0." in n for n in own) == client


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's adapter with a side adapter."""
    base = tmp_path_factory.mktemp("base")
    CASES["llama"][0]().save_pretrained(base)
    return export_adapter(trained(CASES["llama"], SIDE), base.parent / "with_side", str(base))


def test_the_file_says_how_to_build_it_again_and_names_its_base(exported: Path) -> None:
    config = json.loads((exported / "adapter_config.json").read_text())
    assert config["side"] == {
        "side": {"client": 4, "taps": "all", "server": 5, "kernel": 1},
        "layers": ["model.layers.0", "model.layers.1", "model.layers.2"],
        "shapes": [[0, 32], [0, 32]],
        "seed": 0,
    }
    with safe_open(exported / "adapter_model.safetensors", "pt") as file:
        assert "base_model.model.model.layers.0.lora_side.down.weight" in file.keys()  # noqa: SIM118
    loaded = AutoPeftModelForCausalLM.from_pretrained(exported)
    assert torch.equal(logits(loaded), logits(trained(CASES["llama"], SIDE)))
    small = PeftModel.from_pretrained(CASES["llama"][0](), exported, low_cpu_mem_usage=True)
    assert torch.equal(logits(small), logits(loaded))


def test_peft_switches_it_off_and_takes_it_out(exported: Path) -> None:
    base = logits(CASES["llama"][0]())
    loaded = PeftModel.from_pretrained(CASES["llama"][0](), exported)
    ours = logits(loaded)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), base)
    assert torch.equal(logits(loaded), ours)
    with pytest.raises(ValueError, match="a model takes one adapter with side modules: unload"):
        loaded.load_adapter(exported, "second")
    with pytest.raises(ValueError, match="cannot be merged into the base: keep the PeftModel"):
        loaded.merge_and_unload()
    assert torch.equal(logits(loaded), ours)
    assert torch.equal(logits(loaded.unload()), base)
    loaded = PeftModel.from_pretrained(CASES["llama"][0](), exported)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded.base_model.model), base)


def test_without_this_package_peft_names_what_it_does_not_know(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "HOSFL_LIGHTNING_SIDE_LORA")
    with pytest.raises(KeyError, match="HOSFL_LIGHTNING_SIDE_LORA"):
        PeftModel.from_pretrained(CASES["llama"][0](), exported)


def test_another_version_of_peft_is_refused(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.__version__", "0.22.0")
    with pytest.raises(SplitError, match=r"needs peft 0\.21\.x, and this is 0\.22\.0: pip install 'peft==0\.21\.\*'"):
        PeftModel.from_pretrained(CASES["llama"][0](), exported)
    assert trained(CASES["llama"]).peft_config["default"].peft_type == "LORA", "LoRA alone goes on working"


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
