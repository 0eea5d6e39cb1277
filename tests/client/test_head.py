"""A head on numpy alone gives what the model's own does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hosfl_client import head as arrays
from hosfl_client.bfloat16 import BFLOAT16
from hosfl_lightning.split.closed_form import ACTIVATIONS
from hosfl_lightning.split.head import ClientHead
from hosfl_lightning.split.recognition import distance
from tests.split.test_head import SMALL, given, parts_of

NAMES = ["llama", "gemma2", "cohere", "gpt2", "opt_projected", "llama_lora", "bert_classifier", "distilbert_classifier",
         "electra_classifier", "llama_classifier"]  # fmt: skip


def as_arrays(head: ClientHead) -> arrays.Head:
    """The same closed form over the same memory."""
    known: dict[int, Any] = {}

    def array(p: nn.Parameter | None) -> Any:
        return None if p is None else known.setdefault(id(p), p.detach().numpy())

    def dense(of: Any) -> arrays.Dense:
        low = None if of.low is None else (array(of.low[0]), array(of.low[1]), of.low[2])
        return arrays.Dense(array(of.weight), array(of.bias), low)

    steps: list[arrays.Step] = []
    for step in head.closed.steps:
        if hasattr(step, "centred"):
            norm: Any = step
            steps.append(arrays.Norm(array(norm.weight), array(norm.bias), norm.eps, norm.centred, norm.offset))
        elif hasattr(step, "slope"):
            steps.append(arrays.Activation(next(n for n, a in ACTIVATIONS.items() if a is step)))
        else:
            steps.append(dense(step))
    closed = head.closed
    output = arrays.Output(dense(closed.output.linear), closed.output.scale, closed.output.cap)
    return arrays.Head(closed.place, steps, output, [array(p) for p in head.trained.values()])


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_head_of_the_model(name: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "PIECE", SMALL)
    head = parts_of(name)[1]
    z, mask, labels = given(name, padding)
    wanted = head.differentiate(z, mask, labels)
    told = as_arrays(head).differentiate(z.numpy(), mask.numpy(), labels.numpy())
    assert told.multiplier.dtype == np.float32 and len(told.gradients) == len(wanted.gradients) > 0
    assert abs(told.loss - float(wanted.loss)) < 1e-6
    for mine, theirs in zip([told.multiplier, *told.gradients], [wanted.multiplier, *wanted.gradients]):
        assert distance(torch.from_numpy(mine), theirs) < 1e-5


def test_in_fp64_it_is_autograd_to_the_last_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    z, w, b, gain = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 5, 8), (11, 8), (11,), (8,))
    )
    labels = torch.tensor([[1, -100, 3, 10, 0], [-100] * 5])
    normed = F.layer_norm(z, (8,), gain, None, 1e-5)
    logits = 4 * torch.tanh(0.5 * F.linear(normed, w, b) / 4)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    wanted = torch.autograd.grad(loss, [z, w, b, gain])
    x, *own = (p.detach().numpy() for p in (z, w, b, gain))
    head = arrays.Head(
        "every",
        [arrays.Norm(own[2], None, 1e-5, centred=True)],
        arrays.Output(arrays.Dense(own[0], own[1]), 0.5, 4.0),
        own,
    )
    told, multiplier = head.loss_and_multiplier(x, None, labels.numpy())
    assert abs(told - float(loss.detach())) < 1e-13
    for mine, theirs in zip([multiplier, *head.gradient(x, None, labels.numpy())], wanted):
        assert distance(torch.from_numpy(mine), theirs) < 1e-12


def test_bfloat16_is_widened_and_nothing_labelled_is_no_number() -> None:
    w = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    bits = w.view(torch.int16).numpy().view(BFLOAT16)
    z, labels = np.ones((1, 2, 4), np.float32), np.array([[0, 3]])
    heads = [arrays.Head("every", [], arrays.Output(arrays.Dense(one, None))) for one in (bits, w.float().numpy())]
    one, other = (head.differentiate(z.astype(np.float16), None, labels) for head in heads)
    assert one.loss == other.loss and np.array_equal(one.multiplier, other.multiplier)
    assert one.multiplier.dtype == np.float16
    narrow = heads[0].differentiate(np.zeros((1, 2, 4), BFLOAT16), None, labels)
    assert narrow.multiplier.dtype == BFLOAT16 and narrow.multiplier["bfloat16"].any()
    loss, multiplier = heads[0].loss_and_multiplier(z, None, np.full((1, 2), -100))
    assert np.isnan(loss) and not multiplier.any()
    with pytest.raises(ValueError, match="activation 'sin'"):
        arrays.Activation("sin")


def test_no_array_is_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "PIECE", 1 << 9)
    seen: list[int] = []
    squash = arrays.Output.squash
    monkeypatch.setattr(arrays.Output, "squash", lambda self, a: seen.append(a.size) or squash(self, a))
    w = np.ones((300, 4), np.float32)
    head = arrays.Head("last", [], arrays.Output(arrays.Dense(w, None)))
    head.loss_and_multiplier(np.ones((200, 1, 4), np.float32), None, np.arange(200))
    assert max(seen) <= 1 << 9
