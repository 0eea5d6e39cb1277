"""Few, well-placed parameters of a client: what a word picks, that it alone is trained, and what is exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from hosfl_lightning import (
    HOSFL,
    Control,
    Orchestrator,
    SplitCausalLM,
    SplitImageClassifier,
    SplitSequenceClassifier,
)
from hosfl_lightning.algorithms import SplitFedSGD
from hosfl_lightning.models import SplitModule
from hosfl_lightning.models.another_client import with_client
from hosfl_lightning.networks import ConvNet
from hosfl_lightning.optim import SGD
from hosfl_lightning.run.checkpoint import CheckpointError
from hosfl_lightning.run.folder import LOG
from hosfl_lightning.run.rebuild import rebuild
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.split import Lora, LoraHalf, Side, SplitError
from hosfl_lightning.split.client_parameters import select
from tests.random_tokens import RandomTokens
from tests.recipe_runs import tiny_pretrained
from tests.split.tiny_images import CLASSES, images, tiny_image_model

ALL = LoraHalf(r=2, target_modules="all-linear")
SERVER = Lora(None, ALL)
TOKENS, MASK = torch.arange(3, 15).view(2, 6), torch.ones(2, 6, dtype=torch.long)
Folder = Callable[[str], Path]
#: Of which models: family, word, the ends of what is picked, how many.
PICKED = [
    ("llama", "norm", {"input_layernorm.weight", "post_attention_layernorm.weight"}, 4),
    ("llama", "ia3", {"ia3_l.default"}, 6),
    ("gpt2", "bias", {".bias"}, 12),
    ("gpt2", "ia3", {"attn.c_attn.ia3_l.default", "mlp.c_proj.ia3_l.default"}, 4),
    ("bert", "norm", {"LayerNorm.weight", "LayerNorm.bias"}, 10),
    ("bert", "ia3", {"key.ia3_l.default", "value.ia3_l.default", "output.dense.ia3_l.default"}, 8),
    ("ViT", "first_layer", {"projection.weight", "projection.bias"}, 2),
    ("ViT", "norm", {"weight", "bias"}, 8),
    ("ViT", "ia3", {"ia3_l.default"}, 6),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Where a model of a family is saved."""
    root = tmp_path_factory.mktemp("saved")

    def made(family: str) -> Path:
        if family != "ViT":
            return tiny_pretrained(root / family, family, 4, classifier=family == "bert")
        if not (root / family).exists():
            tiny_image_model("ViT").save_pretrained(root / family)
        return root / family

    return made


def build(folder: Path, **kwargs: Any) -> SplitModule:
    settings: dict[str, Any] = {"pretrained": str(folder), "cut": 2, "lora": SERVER} | kwargs
    if folder.name == "ViT":
        return SplitImageClassifier(num_labels=CLASSES, image_size=32, **settings).eval()
    if folder.name == "bert":
        return SplitSequenceClassifier(num_labels=3, **settings).eval()
    return SplitCausalLM(**settings).eval()


@torch.no_grad()
def moved(model: SplitModule) -> SplitModule:
    """All that is trained is elsewhere."""
    generator = torch.Generator().manual_seed(0)
    for p in (*model.client_parameters.values(), *model.server_parameters.values()):
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of a model, of its halves or of PEFT's."""
    whole = isinstance(model, nn.Module) and not isinstance(model, SplitModule)
    image = isinstance(model, SplitImageClassifier) or "ViT" in type(getattr(model, "base_model", model)).__name__
    config = getattr(model, "config", None)
    image = image or getattr(config, "model_type", "") == "vit"
    given = {"pixel_values": images(2)} if image else {"input_ids": TOKENS, "attention_mask": MASK}
    found = model(**given)
    return found.logits if whole else found


@pytest.mark.parametrize(("family", "word", "ends", "count"), PICKED)
def test_what_a_word_picks_is_all_that_the_client_trains(
    family: str, word: str, ends: set[str], count: int, folder: Folder
) -> None:
    model, plain = build(folder(family), client_parameters=word), build(folder(family))
    assert len(model.client_parameters) == count
    assert all(name.endswith(tuple(ends)) for name in model.client_parameters)
    assert all(any(name.endswith(end) for name in model.client_parameters) for end in ends)
    assert [*model.server_parameters] == [*plain.server_parameters]
    assert all(torch.equal(p, plain.server_parameters[name]) for name, p in model.server_parameters.items())
    assert torch.equal(logits(model), logits(plain))  # nothing has moved yet
    assert torch.equal(logits(moved(model)), logits(model.whole))
    assert not torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize(
    ("family", "word"), [case[:2] for case in PICKED] + [("gpt2", "norm"), ("bert", "bias"), ("ViT", "bias")]
)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "lora_and_side_beside"])
def test_what_is_exported_is_what_was_trained(
    family: str, word: str, beside: bool, folder: Folder, tmp_path: Path
) -> None:
    lora = Lora(ALL if beside and word != "ia3" else None, ALL)
    model = moved(build(folder(family), client_parameters=word, lora=lora, side=Side(client=4) if beside else None))
    model.export(str(tmp_path / "adapter"))
    model.export(str(tmp_path / "adapter"))  # in the place of the one that is there
    base = base_of(family, folder)
    if word == "ia3":
        base = PeftModel.from_pretrained(base, tmp_path / "adapter" / "ia3").get_base_model()
        del base.peft_config  # else PEFT warns
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))
    assert (tmp_path / "adapter" / "ia3").exists() == (word == "ia3")
    if word != "ia3":  # and PEFT, which knows of all of it, saves all of it
        loaded.save_pretrained(str(tmp_path / "again"))
        again = PeftModel.from_pretrained(base_of(family, folder), tmp_path / "again").eval()
        assert torch.equal(logits(again), logits(model))


def base_of(family: str, folder: Folder) -> Any:
    kinds: dict[str, tuple[Any, dict[str, int]]] = {
        "bert": (AutoModelForSequenceClassification, {"num_labels": 3}),
        "ViT": (AutoModelForImageClassification, {"num_labels": CLASSES}),
    }
    auto, head = kinds.get(family, (AutoModelForCausalLM, {}))
    return auto.from_pretrained(folder(family), **head).eval()


def test_ia3_goes_into_the_base_model(folder: Folder, tmp_path: Path) -> None:
    model = moved(build(folder("llama"), client_parameters="ia3"))
    model.export(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(folder("llama"))
    base = PeftModel.from_pretrained(base, tmp_path / "adapter" / "ia3").merge_and_unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_less_than_before_has_nothing_of_it(folder: Folder, tmp_path: Path) -> None:
    build(folder("llama"), client_parameters="ia3").export(str(tmp_path / "adapter"))
    build(folder("llama"), client_parameters="norm").export(str(tmp_path / "adapter"))
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"]
    norms = [f"model.layers.{i}.{norm}" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")]
    assert saved == norms


def network(**kwargs: Any) -> SplitImageClassifier:
    made: dict[str, Any] = {"network": lambda: ConvNet(3, (8, 8, 16), CLASSES, 32), "num_labels": CLASSES}
    return SplitImageClassifier(cut=2, image_size=32, **made | kwargs)


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("norm", ["0.norm.weight", "0.norm.bias", "1.norm.weight", "1.norm.bias"]),
        ("bias", ["0.norm.bias", "1.norm.bias"]),
        ("first_layer", ["0.conv.weight"]),
        ("ia3", ["0.conv.ia3_l.default", "1.conv.ia3_l.default"]),
        (None, [f"{i}.{name}" for i in (0, 1) for name in ("conv.weight", "norm.weight", "norm.bias")]),
    ],
)
def test_a_network_without_lora(word: Any, names: list[str]) -> None:
    model, plain = network(client_parameters=word, frozen=["norm"] if word else []), network()
    assert [*model.client_parameters] == names
    assert torch.equal(logits(model), logits(plain))
    frozen = {n for n, p in model.server_half.named_parameters() if not p.requires_grad}
    assert frozen == ({"2.norm.weight", "2.norm.bias"} if word else set())
    alone = network(client_parameters=word, part="client")
    assert [*alone.client_parameters] == names


@pytest.mark.parametrize("family", ["ResNet", "MobileNetV2", "Swin"])
@pytest.mark.parametrize("word", ["norm", "first_layer", "ia3"])
def test_image_models(family: str, word: Any, tmp_path: Path) -> None:
    tiny_image_model(family).save_pretrained(tmp_path)
    made: dict[str, Any] = {"pretrained": str(tmp_path), "num_labels": CLASSES, "network": None}
    model = network(client_parameters=word, **made)
    with torch.no_grad():
        before = model(images(2))
        assert torch.equal(before, network(**made)(images(2)))
        for p in moved(model).client_parameters.values():
            assert p.requires_grad
        assert torch.equal(model(images(2)), model.whole(images(2)).logits)
        assert not torch.equal(model(images(2)), before)


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("llama", {"client_parameters": "bias"}, "the client's half of LlamaForCausalLM has no bias; take another of"),
        ("llama", {"client_parameters": "first_layer"}, "has no first_layer"),
        ("llama", {"client_parameters": "norms"}, "client_parameters='norms': one of norm, bias"),
        ("llama", {"client_parameters": "ia3", "lora": Lora(ALL, ALL)}, "in place of LoRA; set lora.client to null"),
    ],
)
def test_what_cannot_be_is_refused(family: str, settings: dict[str, Any], says: str, folder: Folder) -> None:
    for part in ("both", "client"):
        with pytest.raises(SplitError, match=says):
            build(folder(family), part=part, **settings)


@pytest.mark.parametrize("word", ["norm", "ia3"])
def test_a_run_goes_on_to_the_same_bits_and_not_with_others(
    word: str, folder: Folder, make_orchestrator: Callable[..., Orchestrator], tmp_path: Path
) -> None:
    data = RandomTokens([[8, 12], [10, 6, 7]])

    def fit(rounds: int, word: str = word, ckpt_path: str | None = None) -> SplitModule:
        model = build(folder("llama"), client_parameters=word)
        method = HOSFL(probes=2, client_optimizer=SGD(lr=0.1))
        trainer = make_orchestrator(method, max_rounds=rounds, enable_checkpointing=True, replay_log=True)
        trainer.fit(model, data, ckpt_path=ckpt_path)
        again, log = build(folder("llama"), client_parameters=word), ReplayLog.read(Path(trainer.log_dir) / LOG)
        rebuild(again, again.client_parameters, log, rounds, method)
        assert all(torch.equal(p, again.client_parameters[name]) for name, p in model.client_parameters.items())
        assert trainer.summary["adapter"] == {"norm": "norms", "ia3": "(IA)³"}[word]
        assert trainer.summary["d_client"] == sum(p.numel() for p in model.client_parameters.values())
        return model

    start, whole, half = build(folder("llama"), client_parameters=word), fit(4), fit(2)
    assert all(not torch.equal(p, start.client_parameters[name]) for name, p in whole.client_parameters.items())
    last = str(max(tmp_path.glob("runs/**/*.ckpt"), key=lambda file: file.stat().st_mtime_ns))
    resumed = fit(4, ckpt_path=last)
    assert all(torch.equal(p, resumed.trained_state()[name]) for name, p in whole.trained_state().items())
    assert any(not torch.equal(p, half.trained_state()[name]) for name, p in whole.trained_state().items())
    other = "norm" if word == "ia3" else "ia3"
    with pytest.raises(CheckpointError, match=f"client_parameters is {other}, the run was made with {word}"):
        fit(4, other, last)


def test_a_control_may_have_others(folder: Folder, make_orchestrator: Callable[..., Orchestrator]) -> None:
    controls = [
        "frozen",
        Control("norms", SplitFedSGD(SGD(lr=0.1)), client_parameters="norm"),
        Control("first_order", SplitFedSGD(SGD(lr=0.1)), lora=ALL),
    ]
    trainer = make_orchestrator(HOSFL(probes=2, client_optimizer=SGD(lr=0.1)), controls=controls)
    model = build(folder("llama"), client_parameters="ia3")
    trainer.fit(model, RandomTokens([[8, 12], [10, 6, 7]]))
    told = {name: found["adapter"] for name, found in trainer.summary["controls"].items()}
    assert told["norms"] == "norms" and told["first_order"] == "LoRA"
    assert trainer.summary["adapter"] == "(IA)³"


def test_another_client_of_a_network_trains_all_of_it() -> None:
    model = network(client_parameters="norm")
    other = with_client(model, None, 0)
    assert [*other.client_parameters] == [*network().client_parameters]
    assert [*with_client(other, None, 0, "norm").client_parameters] == [*model.client_parameters]


def test_words_of_any_module() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    assert select(module, "norm") == ["1.weight", "1.bias"]
    assert select(module, "bias") == ["0.bias", "1.bias", "2.bias", "3.bias"]
    assert select(module, "first_layer") == ["2.weight", "2.bias"]
    beside = nn.ModuleDict({"lora_side": nn.Conv2d(2, 2, 1), "own": nn.Conv2d(2, 2, 1, bias=False)})
    assert select(beside, "first_layer") == ["own.weight"]
    assert select(module, "ia3") == select(module, "nothing") == []
