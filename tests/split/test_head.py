"""What a client computes above the server's layers: the model's own head, and its loss and gradients in closed form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from hosfl_lightning.split import SplitError, closed_form, split
from hosfl_lightning.split.adapters import add_head_lora
from hosfl_lightning.split.head import ClientHead, Middle, split_server
from hosfl_lightning.split.recognition import distance
from tests.split.tiny_models import tiny_causal_lm, tiny_classifier

CAUSAL = ["llama", "qwen2", "gemma3_text", "granite", "cohere", "gpt2", "opt"]
CLASSIFIERS = ["bert", "roberta", "distilbert", "electra", "llama", "gpt2"]


def with_lora(model: Any) -> Any:
    """On its head, away from zero."""
    add_head_lora(model, 3, seed=0)
    nn.init.normal_(model.lm_head.lora_B.default.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{f: lambda f=f: tiny_causal_lm(f) for f in CAUSAL},
    "gemma2": lambda: tiny_causal_lm("gemma2", final_logit_softcapping=0.3),
    "opt_projected": lambda: tiny_causal_lm("opt", word_embed_proj_dim=16),
    "llama_tied": lambda: tiny_causal_lm("llama", tie_word_embeddings=True),
    "llama_lora": lambda: with_lora(tiny_causal_lm("llama")),
    **{f"{f}_classifier": lambda f=f: tiny_classifier(f) for f in CLASSIFIERS},
}
#: Elements of a piece: less than a row of logits.
SMALL = 320


def of_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def loss_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return of_rows if name.endswith("_classifier") else of_tokens


@cache
def server_of(name: str) -> Any:
    return split(MODELS[name](), 2, check=False)[1]


@cache
def parts_of(name: str) -> tuple[Middle, ClientHead]:
    """With all of the head trained that is not tied."""
    server = server_of(name)
    trained = (server.structure.after, server.structure.layers.backbone)
    for n, p in server.named_parameters():
        above = n.split(".")[0] != trained[1] or any(n.startswith(f"{after}.") for after in trained[0])
        p.requires_grad_(above and not name.endswith("tied"))
    return split_server(server, loss_of(name))


def given(name: str, padding: str) -> tuple[Tensor, Tensor, Tensor]:
    """Four rows of seven; of tokens one row has no label."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4, 7, 32, generator=generator) * torch.tensor([1.0, 0.1, 5.0, 1.0])[:, None, None]
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, 4:] = mask[2, 2:] = 0
    mask = mask.flip(1) if padding == "left" else mask
    if name.endswith("_classifier"):
        return z, mask, torch.tensor([2, 0, 1, 2])
    labels = torch.randint(0, 64, (4, 7), generator=generator).masked_fill(mask == 0, -100)
    labels[0, 2] = labels[3] = -100
    return z, mask, labels


@pytest.mark.parametrize("name", MODELS)
def test_the_three_parts_are_the_whole_bit_for_bit(name: str) -> None:
    middle, head = parts_of(name)
    for padding in ("right", "left"):
        z, mask, _ = given(name, padding)
        with torch.no_grad():
            assert torch.equal(head(middle(z, mask), mask), server_of(name)(z, mask))
    assert not {id(p) for p in middle.parameters()} & {id(p) for p in head.parameters()}


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_multiplier_and_gradients_are_those_of_autograd(
    name: str, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_form, "PIECE", SMALL)
    _, head = parts_of(name)
    z, mask, labels = given(name, padding)
    asked = z.clone().requires_grad_()
    loss = loss_of(name)(head(asked, mask), labels)
    wanted = torch.autograd.grad(loss, [asked, *head.trained.values()])
    told, multiplier = head.loss_and_multiplier(z, mask, labels)
    gradients = head.gradient(z, mask, labels)
    assert told.shape == () and told.dtype == torch.float32 and multiplier.dtype == z.dtype
    assert distance(told, loss) < 1e-6
    assert len(gradients) == len(wanted) - 1 > 0 or name == "llama_tied"
    for mine, theirs in zip([multiplier, *gradients], wanted):
        assert distance(mine, theirs) < 1e-5
        assert not mine.requires_grad


def test_positions_without_a_label_have_no_multiplier() -> None:
    z, mask, labels = given("llama", "right")
    _, multiplier = parts_of("llama")[1].loss_and_multiplier(z, mask, labels)
    assert torch.equal(multiplier.abs().sum(-1) > 0, closed_form.following(labels) != -100)
    loss, multiplier = parts_of("llama")[1].loss_and_multiplier(z, mask, labels.fill_(-100))
    assert loss.isnan() and not multiplier.any()


def test_of_half_precision_only_the_multiplier_is_rounded() -> None:
    model = MODELS["gemma2"]().bfloat16()
    z, mask, labels = given("gemma2", "right")
    told = [
        split_server(split(one, 2, check=False)[1], of_tokens)[1].differentiate(z.bfloat16().to(dtype), mask, labels)
        for one, dtype in ((model, torch.bfloat16), (copy.deepcopy(model).float(), torch.float32))
    ]
    assert told[0].loss == told[1].loss and told[0].loss.dtype == torch.float32
    assert torch.equal(told[0].multiplier, told[1].multiplier.bfloat16())


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that an operation gives."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        fresh = {x.untyped_storage().data_ptr(): x for x in tree_leaves(out) if isinstance(x, Tensor)}
        held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self.largest = max([self.largest, *(x.numel() for p, x in fresh.items() if p not in held)])
        return out


def test_no_tensor_is_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "PIECE", 1 << 12)
    head = split_server(split(tiny_causal_lm("llama", vocab_size=5000), 2, check=False)[1], of_tokens)[1]
    z, labels = torch.randn(4, 30, 32), torch.randint(0, 5000, (4, 30))
    with Sizes() as seen:
        head.loss_and_multiplier(z, None, labels)
    assert z.numel() <= seen.largest <= 1 << 12


class MeanNorm(nn.RMSNorm):
    """By the mean of magnitudes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


class Shifted(nn.Module):
    """A linear layer and something behind it."""

    def __init__(self, linear: nn.Module, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.after = linear, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.linear(x))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: setattr(m, "lm_head", Shifted(m.lm_head, lambda a: a + 1)), "scale and a soft cap"),
        (lambda m: setattr(m, "lm_head", Shifted(m.lm_head, torch.sin)), "scale and a soft cap"),
        (lambda m: setattr(m, "lm_head", Shifted(nn.Bilinear(32, 32, 64), lambda a: a)), "Bilinear"),
        (lambda m: setattr(m.model, "norm", nn.Sequential(m.model.norm, nn.Softplus())), "leads to its Linear"),
        (lambda m: setattr(m.model, "norm", nn.GroupNorm(1, 4)), "GroupNorm"),
        (lambda m: setattr(m.model, "norm", MeanNorm(32, eps=1e-6)), "MeanNorm"),
        (lambda m: setattr(m, "lm_head", Shifted(m.lm_head, lambda a: a.flip(-1))), "logits is not"),
    ],
)
def test_a_head_without_closed_form_is_refused_by_name(change: Callable[[Any], None], why: str) -> None:
    model = tiny_causal_lm("llama")
    server = split(model, 2, check=False)[1]
    change(server._whole)
    if "Bilinear" in why:
        server._whole.lm_head.linear.forward = lambda x: nn.Bilinear.forward(server._whole.lm_head.linear, x, x)
    with pytest.raises(SplitError, match=f"labels=client: the head of LlamaForCausalLM .*{why}.*labels to server"):
        split_server(server, of_tokens)


def test_a_pooled_head_is_refused() -> None:
    with pytest.raises(SplitError, match=r"ModernBert.*no closed form"):
        split_server(split(tiny_classifier("modernbert"), 2, check=False)[1], of_rows)


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, labels: of_tokens(logits, labels) + logits.mean(),
        lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
        lambda logits, labels: of_tokens(logits, labels[:, :2]),
    ],
)
def test_another_loss_is_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(SplitError, match="its loss"):
        split_server(server_of("qwen2"), loss)


def test_a_wrong_closed_form_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    slope = closed_form.ACTIVATIONS["tanh"]._replace(slope=lambda x: 1 - x.tanh())
    monkeypatch.setitem(closed_form.ACTIVATIONS, "tanh", slope)
    with pytest.raises(SplitError, match="its multiplier"):
        split_server(server_of("bert_classifier"), of_rows)


def test_what_is_no_text_half_is_refused() -> None:
    with pytest.raises(SplitError, match="labels=client: Linear cannot be cut before its head"):
        split_server(nn.Linear(2, 2), of_rows)
