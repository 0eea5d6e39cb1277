"""What a model is told at set-up about data and files that it cannot take."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from hosfl_lightning import Orchestrator, SplitCausalLM, SplitImageClassifier, SplitSequenceClassifier
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.data.tokenization import Example
from hosfl_lightning.models.checks import check_padding, positions
from hosfl_lightning.split import SplitError
from hosfl_lightning.wire import SmashedData
from tests.random_tokens import RandomTokens
from tests.split.tiny_images import tiny_image_model
from tests.split.tiny_models import tiny_causal_lm, tiny_classifier

SETTINGS: dict[str, Any] = {"cut": 2, "num_labels": 3}


def classifier(family: str, folder: Path, **kwargs: Any) -> SplitSequenceClassifier:
    if not folder.exists():
        tiny_classifier(family).save_pretrained(folder)
    return SplitSequenceClassifier(str(folder), **(SETTINGS | kwargs))


# ---- rows and their padding


@pytest.mark.parametrize(("family", "most"), [("roberta", 62), ("bert", 64), ("distilbert", 64), ("opt", 64)])
def test_a_row_may_be_as_long_as_the_family_has_positions(family: str, most: int, tmp_path: Path) -> None:
    """RoBERTa's table of 64 has 62 for tokens, as its 514 have 512."""
    if family == "opt":
        tiny_causal_lm("opt", tie_word_embeddings=False).save_pretrained(tmp_path / "opt")
        model: Any = SplitCausalLM(str(tmp_path / "opt"), cut=2)
    else:
        model = classifier(family, tmp_path / family)
    assert positions(model.client_half) == most
    label = [5] * most if family == "opt" else 0
    tokens = torch.full((1, most), 5)
    model.check_examples([Example([5] * most, label)], "client 'a'")
    assert model(tokens, torch.ones_like(tokens)).isfinite().all()
    with pytest.raises(
        ValueError, match=rf"client 'a': a row of {most + 1} tokens.*{most} pos.* max_length to {most}$"
    ):
        model.check_examples([Example([5] * (most + 1), label)], "client 'a'")
    if family != "opt":  # whose table has two rows more, for an offset
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, most + 1), 5))
    z, mask = torch.zeros(1, most + 1, 32), torch.ones(1, most + 1, dtype=torch.bool)
    labels = mask.long() if family == "opt" else torch.zeros(1, dtype=torch.long)
    objection = model.objection(SmashedData.pack(0, 0, z, labels, mask))
    assert objection == f"its rows have {most + 1} positions, the model has {most}"


@pytest.mark.parametrize("lengths", [[9, 12, 7], [4, 4, 4]])
def test_a_padding_token_beyond_the_embeddings_is_refused_where_rows_are_padded(
    lengths: list[int], make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator]
) -> None:
    model, data = make_model(), RandomTokens([lengths, [4, 4], [4, 4]])
    data.tokenizer = model.tokenizer()
    assert data.tokenizer is not None
    embedded = model.whole.config.vocab_size
    data.tokenizer.add_tokens([f"<another {i}>" for i in range(embedded)])
    data.tokenizer.add_special_tokens({"pad_token": "<pad it>"})
    pad = data.tokenizer.pad_token_id
    if len({*lengths}) == 1:
        make_orchestrator(max_rounds=1).fit(model, data)
        return
    with pytest.raises(
        ValueError, match=rf"data.init_args.tokenizer: it pads with token {pad}, .* embeds {embedded} tokens"
    ):
        make_orchestrator().fit(model, data)


# ---- heads


def test_a_saved_head_of_another_size_is_a_fresh_one_and_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "bert"
    kept = classifier("bert", folder)
    with caplog.at_level(logging.INFO, "lightning.fabric"):
        one, again, other = (classifier("bert", folder, num_labels=2, seed=seed) for seed in (0, 0, 1))
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == (f"model: the saved head of {str(folder)!r} is of another size (classifier.weight: (3, 32), not "
                       "(2, 32)): a fresh one, drawn under seed=0")  # fmt: skip
    assert len(said) == 3
    heads = [model.server_half.get_parameter("classifier.weight") for model in (one, again, other)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    name = "bert.encoder.layer.3.output.dense.weight"
    assert torch.equal(one.server_half.get_parameter(name), kept.server_half.get_parameter(name))
    alone = classifier("bert", folder, num_labels=2, part="client")
    assert alone.client_fingerprint() == one.client_fingerprint()


def test_of_images_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_image_model("ViT").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "lightning.fabric"):
        SplitImageClassifier(cut=1, num_labels=3, image_size=32, pretrained=str(tmp_path))
    assert "(classifier.weight: (5, 32), not (3, 32))" in caplog.text


@pytest.mark.parametrize("head", [True, False])
def test_another_size_elsewhere_is_no_fresh_start(head: bool, tmp_path: Path) -> None:
    model: Any = tiny_classifier("bert") if head else tiny_causal_lm("llama")
    model.save_pretrained(tmp_path)
    name = "bert.encoder.layer.0.output.dense.weight" if head else "lm_head.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = tensors[name][1:].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SplitError, match=rf"pretrained=.*: its {name} has the size \(\d+, \d+\), its config says \(\d"):
        classifier("bert", tmp_path) if head else SplitCausalLM(str(tmp_path), cut=2)


@pytest.mark.parametrize("number", [1, 0, -1])
def test_one_class_is_refused(number: int, tmp_path: Path) -> None:
    for make in (
        lambda: SplitSequenceClassifier("nowhere", 1, number),
        lambda: SplitImageClassifier(1, number, 32, pretrained="nowhere"),
    ):
        with pytest.raises(
            ValueError, match=rf"num_labels={number}: a classifier tells at least 2 classes apart.* regr"
        ):
            make()
    folder = tmp_path / "one"
    tiny_classifier("bert", num_labels=1).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "LABEL_0"}
    model = classifier("bert", folder, num_labels=2)  # one that was trained for regression
    assert model(torch.tensor([[5, 6]])).shape == (1, 2)
    assert AutoModelForSequenceClassification.from_pretrained(folder).num_labels == 1


def test_data_without_a_tokenizer_pads_nothing(make_model: Callable[..., SplitCausalLM]) -> None:
    data: FederatedDataModule = RandomTokens([[3, 4], [5], [6]])
    data.setup("fit")
    model = make_model()
    check_padding(None, data.clients, model.client_half, model.pretrained)
