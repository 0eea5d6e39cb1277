"""Logits at labelled positions alone: the plain way's numbers in bounded memory; and accuracy among label words."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, LlamaForCausalLM

from hosfl_lightning import SplitCausalLM
from hosfl_lightning.data import ClassificationData
from hosfl_lightning.data.prompt import LabelWords, PromptEncoder
from hosfl_lightning.models.causal_lm import losses
from hosfl_lightning.models.pretrained import resolve
from hosfl_lightning.split import Lora, LoraHalf, ServerHalf, labelled, split
from hosfl_lightning.split.closed_form import IGNORE, following
from hosfl_lightning.split.labelled import read_labelled, reads_alike
from tests.recipe_runs import tiny_pretrained
from tests.split.tiny_models import CAUSAL, VOCAB, tiny_causal_lm

SOFTCAP = {"gemma2": {"final_logit_softcapping": 2.0}, "gemma3_text": {"final_logit_softcapping": 2.0}}
SCALED = {"cohere": {"logit_scale": 0.3}}


def batch(half: Any) -> tuple[Tensor, Tensor, Tensor]:
    """z, mask and labels: three rows of six, padded on both sides, the first two tokens of each not labelled."""
    tokens, mask = torch.arange(3, 21).view(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = mask[2, :2] = 0
    labels = tokens.masked_fill(mask == 0, IGNORE)
    labels[:, :2] = labels[2, 2] = IGNORE
    return half(tokens, mask).detach().requires_grad_(), mask, labels


def plain(server: ServerHalf, z: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(server(z, mask)[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # it is not merged here
@pytest.mark.parametrize("family", CAUSAL)
def test_loss_and_gradients_are_those_of_all_positions(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_causal_lm(family, **SOFTCAP.get(family, {}), **SCALED.get(family, {}))
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[head], init_lora_weights=False), model)
    client, server = split(model.eval(), 2)
    assert reads_alike(server)
    z, mask, labels = batch(client)
    wanted = [z, *(p for p in server.parameters() if p.requires_grad)]
    assert len(wanted) == 3  # LoRA on the head
    loss = plain(server, z, mask, labels)
    for piece in (1 << 23, 3 * VOCAB):  # at once, and three tokens at a time
        monkeypatch.setattr(labelled, "PIECE", piece)
        mine = read_labelled(server, z, mask, following(labels), losses).mean()
        torch.testing.assert_close(mine, loss)
        for one, other in zip(torch.autograd.grad(mine, wanted), torch.autograd.grad(loss, wanted, retain_graph=True)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class Forward(LlamaForCausalLM):
    """Of a family that asks at which position a logit stands, or for more of its backbone than an output."""

    asks = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        weights = self.model.norm.weight.mean() if self.asks else 1
        out.logits = out.logits * torch.arange(1, out.logits.shape[1] + 1)[:, None] * weights
        return out


@pytest.mark.parametrize("asks", [False, True])
def test_a_family_of_which_it_is_not_true_takes_the_plain_way(saved: str, asks: bool) -> None:
    model = SplitCausalLM(saved, 2, lora=Lora(None, LoraHalf(r=2, target_modules="all-linear"))).eval()
    vars(model.server_half)["_whole"].__class__ = Forward
    vars(model.server_half)["_whole"].asks = asks
    assert not reads_alike(model.server_half)
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        z, mask = model.client_half(tokens), torch.ones_like(tokens)
        loss = model.training_step({"z": z, "attention_mask": mask, "labels": tokens}, 0)
        torch.testing.assert_close(loss, plain(model.server_half, z, mask, tokens), rtol=0, atol=0)
    assert evaluated(model, tokens, tokens)["loss"] == loss.item()


@pytest.mark.parametrize("kind", ["bf16", "autocast"])
def test_in_half_precision(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_causal_lm("gemma2", final_logit_softcapping=2.0)
    client, server = split(model.to(torch.bfloat16) if kind == "bf16" else model, 2)
    monkeypatch.setattr(labelled, "PIECE", 3 * VOCAB)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        assert reads_alike(server)
        z, mask, labels = batch(client)
        loss = plain(server, z, mask, labels)
        mine = read_labelled(server, z, mask, following(labels), losses).mean()
    torch.testing.assert_close(mine, loss, rtol=1e-3, atol=1e-3)
    [one], [other] = torch.autograd.grad(mine, z), torch.autograd.grad(loss, z)
    assert (
        one.dtype == other.dtype and torch.cosine_similarity(one.flatten().float(), other.flatten().float(), 0) > 0.999
    )


class Largest(TorchDispatchMode):
    """The most elements in live tensors with a vocabulary's columns, weights left out."""

    def __init__(self, vocabulary: int, weights: set[int]) -> None:
        super().__init__()
        self.vocabulary, self.weights, self.live, self.most = vocabulary, weights, dict[int, Any](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == self.vocabulary:
                key = tensor.untyped_storage()._cdata
                if key not in self.weights and key not in self.live:
                    self.live[key] = tensor.numel()
                    weakref.finalize(tensor.untyped_storage(), self.live.pop, key, None)
        self.most = max(self.most, sum(self.live.values()))
        return out


def test_no_more_logits_are_held_than_eight_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 8 * 4 * labelled.PIECE == 256 << 20
    vocabulary, rows = 1000, 8
    model = tiny_causal_lm("gemma2", vocab_size=vocabulary, final_logit_softcapping=2.0)
    client, server = split(model, 2)
    monkeypatch.setattr(labelled, "PIECE", rows * vocabulary)
    tokens = torch.arange(16 * 32).view(16, 32) + 3
    z = client(tokens).detach().requires_grad_()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    held = {}
    for way in ("plain", "labelled"):
        with Largest(vocabulary, weights) as meter:
            if way == "plain":
                loss = plain(server, z, torch.ones_like(tokens), tokens)
            else:
                loss = read_labelled(server, z, None, following(tokens), losses).mean()
            torch.autograd.grad(loss, z)
        held[way] = meter.most
    assert held["plain"] > 3 * tokens.numel() * vocabulary
    assert 2 * rows * vocabulary < held["labelled"] <= 8 * rows * vocabulary


class Own(SplitCausalLM):
    """With a loss of its own."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) * 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_pretrained(tmp_path_factory.mktemp("model") / "llama", "llama", 4))


def evaluated(model: SplitCausalLM, tokens: Tensor, labels: Tensor) -> dict[str, float]:
    raw = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    metrics = model.build_metrics()
    with torch.no_grad():
        model.take(metrics, raw, labels)
    return {name: float(value) for name, value in model.computed(metrics).items()}


def test_validation_and_training_take_it_and_an_own_loss_does_not(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = Lora(LoraHalf(r=2, target_modules="all-linear"), LoraHalf(r=2, target_modules="all-linear"))
    model, own = (kind(saved, 2, lora=lora).eval() for kind in (SplitCausalLM, Own))
    tokens = torch.arange(3, 27).view(4, 6)
    labels = tokens.clone()
    labels[:, :4] = IGNORE
    calls = []
    read = read_labelled
    monkeypatch.setattr("hosfl_lightning.models.causal_lm.read_labelled", lambda *a: calls.append(1) or read(*a))
    sent = {"z": model.client_half(tokens), "attention_mask": torch.ones_like(tokens), "labels": labels}
    found, loss = evaluated(model, tokens, labels), model.training_step(sent, 0)
    assert len(calls) == 2
    twice, double = evaluated(own, tokens, labels), own.training_step(sent, 0)
    assert len(calls) == 2
    assert (twice["loss"], double.item()) == pytest.approx((2 * found["loss"], 2 * loss.item()), rel=1e-5)
    assert twice["token_accuracy"] == found["token_accuracy"]
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    model.server_half.compile(backend="eager")
    evaluated(model, tokens, labels)
    assert len(calls) == 2


def test_without_a_label_the_loss_is_no_number_as_ever(saved: str) -> None:
    model = SplitCausalLM(saved, 2, lora=Lora(None, LoraHalf(r=2, target_modules="all-linear")))
    tokens = torch.arange(3, 9)[None]
    sent = {"z": model.client_half(tokens), "attention_mask": torch.ones_like(tokens)}
    assert model.training_step({**sent, "labels": torch.full_like(tokens, IGNORE)}, 0).isnan()


@pytest.mark.parametrize("way", ["labelled", "plain"])
def test_accuracy_among_label_words(saved: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SplitCausalLM(saved, 2, lora=Lora(None, LoraHalf(r=2, target_modules="all-linear"))).eval()
    if way == "plain":
        monkeypatch.setattr(model, "_alike", False)
    words = LabelWords(1, (40, 41, 42))
    model.choose_among(words)
    tokens = torch.arange(3, 27).view(4, 6)
    tokens[:, 3], tokens[:, 5] = 9, 7  # in which the words are alike
    with torch.no_grad():
        tokens[:, 4] = model(tokens)[:, 3, 40:43].argmax(-1) + 40
    tokens[2, 4] = 40 + (tokens[2, 4] - 39) % 3  # the likeliest word but in one row
    labels = tokens.clone()
    labels[:, :3] = IGNORE
    found = evaluated(model, tokens, labels)
    assert found["label_word_accuracy"] == 0.75
    assert found["token_accuracy"] < 0.5
    model.choose_among(None)
    assert "label_word_accuracy" not in evaluated(model, tokens, labels)


def test_words_are_told_apart_by_their_first_token_that_differs() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny_lm"))  # a byte a token
    told = lambda words: PromptEncoder("{text} It was", words, tokenizer, 64).told_apart_by()  # noqa: E731
    assert told([" bad", " good"]) == LabelWords(1, (ord("b"), ord("g")))
    assert told([" dull", " dark", " deep"]) == LabelWords(2, (ord("u"), ord("a"), ord("e")))
    assert told([" dull", " dark", " good"]) is None  # d, d, g
    assert told([" good", " goodish"]) is None


def test_every_validation_has_it_the_one_before_training_too(
    saved: str, tmp_path: Path, make_orchestrator: Any
) -> None:
    rows = "".join(f"film {i} was seen,{i % 2}\n" for i in range(24))
    (tmp_path / "train.csv").write_text("text,label\n" + rows)
    data = ClassificationData(
        str(tmp_path / "train.csv"), num_clients=2, prompt="{text} It was", label_words=[" bad", " good"], max_length=32
    )
    model = SplitCausalLM("tiny_lm", 2, lora=Lora(*[LoraHalf(r=2, target_modules="all-linear")] * 2))
    trainer = make_orchestrator(max_rounds=1)
    trainer.fit(model, data)
    assert trainer.run.result is not None
    first, last = trainer.run.result.first.metrics, trainer.run.result.last.metrics
    assert {"val/label_word_accuracy", "val/token_accuracy"} <= first.keys() == last.keys()
    assert 0 <= first["val/label_word_accuracy"] <= 1
