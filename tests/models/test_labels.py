"""Labels at the client: a model in three, of which the client holds both ends."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hosfl_lightning import SplitCausalLM, SplitSequenceClassifier
from hosfl_lightning.data.prompt import LabelWords
from hosfl_lightning.models import SplitModule
from hosfl_lightning.models.halves import HEAD
from hosfl_lightning.split import Lora, LoraHalf, Side, SplitError
from hosfl_lightning.split.adapters import dropouts
from tests.models.test_part import ALL, assert_same_client, batch
from tests.recipe_runs import tiny_pretrained
from tests.split.test_build import tensors_read
from tests.split.tiny_models import tiny_causal_lm, tiny_classifier

CLASSIFIERS = ("bert", "roberta", "distilbert")
LORA = {"lora": Lora(ALL, LoraHalf(r=3, dropout=0.1, target_modules="all-linear"))}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", LORA),
    ("gpt2", LORA),
    ("gemma3_text", {"side": Side(client=4, server=3), "lora": Lora(None, ALL)}),
    ("bert", LORA),
    ("roberta", {"lora": Lora(None, ALL), "client_parameters": "norm"}),
    ("distilbert", {"lora": Lora(None, ALL), "side": Side(client=4)}),
    ("llama", {"lora": None}),
    ("gpt2", {"lora": Lora(ALL, ALL, head=3)}),
    ("llama", {"lora": Lora(None, LORA["lora"].server, head=2), "side": Side(client=4), "client_parameters": "norm"}),
    ("bert", {"lora": None, "side": Side(client=4)}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a model of a family is saved."""
    root = tmp_path_factory.mktemp("saved")
    return lambda family: tiny_pretrained(root / family, family, 4, classifier=family in CLASSIFIERS)


def build(folder: Path, labels: str = "client", **kwargs: Any) -> SplitModule:
    settings: dict[str, Any] = {"pretrained": str(folder), "cut": 2, "seed": 5, "labels": labels} | kwargs
    if folder.name in CLASSIFIERS:
        return SplitSequenceClassifier(**{"num_labels": 3, **settings})
    return SplitCausalLM(**settings)


def labelled(model: SplitModule) -> dict[str, Tensor]:
    given = batch()
    if isinstance(model, SplitSequenceClassifier):
        return {**given, "labels": torch.tensor([2, 0, 1])}
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels[0, :3] = -100
    return {**given, "labels": labels}


@torch.no_grad()
def move(model: SplitModule) -> None:
    """Adapters, classifiers and all that is trained, away from where they start; wherever they are, to the same."""
    for name, p in {**model.client_parameters, **model.server_parameters}.items():
        generator = torch.Generator().manual_seed(sum(name.removeprefix(HEAD).encode()))
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_the_three_parts_are_the_model_with_two(
    family: str, settings: dict[str, Any], folder: Callable[[str], Path]
) -> None:
    three, two = (build(folder(family), labels, **settings) for labels in ("client", "server"))
    assert {n.removeprefix(HEAD) for n in three.client_parameters} == {
        *two.client_parameters, *two.server_parameters.keys() - three.server_parameters.keys()
    }  # fmt: skip
    assert list(three.client_parameters)[: len(two.client_parameters)] == list(two.client_parameters)
    move(three), move(two)
    assert not dropouts(three.client_head)
    given = labelled(three)
    mask, labels = given["attention_mask"], given["labels"]
    z = two.client_half(given["input_ids"], mask).detach().requires_grad_()
    loss = two.training_step({**given, "z": z}, 0)
    wanted = torch.autograd.grad(loss, [z, *two.server_parameters.values()], allow_unused=True)
    by_name = dict(zip(["z", *two.server_parameters], wanted))

    states = three.server_half(z, mask)
    told, multiplier = three.client_head.loss_and_multiplier(states, mask, labels)
    mine = torch.autograd.grad(states, [z, *three.server_parameters.values()], multiplier)
    for name, gradient in zip(["z", *three.server_parameters], mine):
        torch.testing.assert_close(gradient, by_name[name], rtol=1e-4, atol=1e-6)
    for name, gradient in zip(three.client_head.trained, three.client_head.gradient(states, mask, labels)):
        torch.testing.assert_close(gradient, by_name[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(told, loss.detach())

    with torch.no_grad():
        assert torch.equal(three.logits(given), two.logits(given))
        for module in (three, two):
            if isinstance(module, SplitCausalLM):
                module.choose_among(LabelWords(0, (5, 9)))
            module._evaluate({**given}, "val")
    seen = [model.computed(model._metrics("val")) for model in (three, two)]
    assert seen[0].keys() == seen[1].keys() and all(torch.equal(v, seen[1][n]) for n, v in seen[0].items())
    three.on_save_checkpoint(kept := {})
    two_again = build(folder(family), "client", **settings)
    two_again.load_trained_state(kept["state_dict"])
    assert torch.equal(two_again.logits(given), three.logits(given))


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_a_client_alone_has_both_ends_and_nothing_between(
    family: str, settings: dict[str, Any], folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = build(folder(family), **settings)
    with tensors_read(monkeypatch) as read:
        alone = build(folder(family), part="client", **settings)
    assert read and not any(re.search(r"(layers|layer|h)\.[23]\.", name) for name in read)
    mine, theirs = alone.client_head.state_dict(), both.client_head.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(t, theirs[n]) for n, t in mine.items())
    assert list(alone.client_head.trained) == list(both.client_head.trained)
    assert not any(module.training for module in alone.client_head.modules())
    assert_same_client(alone, both)
    z, given = torch.randn(3, 6, 32), labelled(both)
    one, other = (m.client_head.differentiate(z, given["attention_mask"], given["labels"]) for m in (alone, both))
    assert torch.equal(one.loss, other.loss) and torch.equal(one.multiplier, other.multiplier)
    assert all(torch.equal(*pair) for pair in zip(one.gradients, other.gradients))


def test_a_fresh_head_of_another_size_is_that_of_the_whole(tmp_path: Path) -> None:
    tiny_classifier("bert").save_pretrained(tmp_path / "bert")
    both, alone = (build(tmp_path / "bert", part=part, num_labels=5, **LORA) for part in ("both", "client"))
    name = "classifier.modules_to_save.default.weight"
    assert both.client_head.trained[name].shape == (5, 32)
    assert torch.equal(alone.client_head.trained[name], both.client_head.trained[name])


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_exported_is_trained(family: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    head = 3 if family == "gpt2" else 0
    model = build(folder(family), lora=Lora(ALL, ALL, head=head), client_parameters="norm")
    move(model)
    model.export(str(tmp_path / "out"))
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
    assert not any(HEAD in name for name in saved)
    classes = {"num_labels": 3} if family == "bert" else {}
    auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`|fan_in_fan_out is set to")
        again = PeftModel.from_pretrained(auto.from_pretrained(folder(family), **classes), str(tmp_path / "out")).eval()
    given = batch()
    assert torch.equal(again(**given).logits, model.logits(given))


def test_a_copy_in_another_dtype_computes_with_its_own_weights(folder: Callable[[str], Path]) -> None:
    model = build(folder("bert"), dtype="bfloat16", **LORA)
    again = deepcopy(model.client_head)
    assert again.closed.output.linear.weight is dict(again.named_parameters())[next(iter(again.trained))]
    assert again.loss_and_multiplier(torch.randn(3, 6, 32), None, torch.tensor([1, 0, 2]))[1].abs().sum() > 0


def test_the_fingerprint_of_a_client_is_of_its_head_too(folder: Callable[[str], Path]) -> None:
    model = build(folder("bert"), **LORA)
    before = model.client_fingerprint()
    next(iter(model.client_head.trained.values())).data.add_(1)
    assert model.client_fingerprint() == before
    dict(model.client_head.named_parameters())["bert.pooler.dense.bias"].data.add_(1)
    assert model.client_fingerprint() != before


def test_the_notice_says_what_stays(folder: Callable[[str], Path]) -> None:
    assert "stay at the clients" in build(folder("llama"), **LORA).labels_notice
    assert "travel from the clients" in build(folder("llama"), "server", **LORA).labels_notice


class Own(SplitCausalLM):
    """A loss of one's own."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) + logits.square().mean()


def test_what_has_no_closed_form_or_place_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(SplitError, match="labels=client: the head of LlamaForCausalLM has no closed form"):
        Own(str(folder("llama")), 2, labels="client", **LORA)
    with pytest.raises(SplitError, match="labels=client: the head of LlamaForCausalLM has no closed form"):
        Own(str(folder("llama")), 2, labels="client", part="client", **LORA)
    with pytest.raises(SplitError, match="client_holds=whole"):
        build(folder("llama"), client_holds="whole")
    with pytest.raises(SplitError, match=r"lora\.head: BertForSequenceClassification has no linear layer"):
        build(folder("bert"), lora=Lora(ALL, ALL, head=2))
    with pytest.raises(ValueError, match=r"lora\.head=-1"):
        Lora(head=-1)
    with pytest.raises(SplitError, match="labels='nowhere': server, or client"):
        build(folder("llama"), "nowhere")
    tiny_causal_lm("llama").save_pretrained(tmp_path)
    with pytest.raises(SplitError, match="size"):
        build(tmp_path, part="client", **LORA).load_client("float32", 0, hidden_size=40)
