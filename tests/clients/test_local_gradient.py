"""The client that knows its gradient, against backprop through the same half."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hosfl_lightning import SplitCausalLM
from hosfl_lightning.clients import FirstOrderClient, LocalGradientClient
from hosfl_lightning.memory import MemoryMeter, plain_forward_peak
from hosfl_lightning.optim import Dense, SharedDirections, ZerothOrder
from hosfl_lightning.split import Lora, LoraHalf, Side, add_side, run, split
from hosfl_lightning.split.side import Bottleneck

MakeModel = Callable[..., SplitCausalLM]
Taps = Literal["recompute", "keep"]

#: Three clients of one, three and two examples.
ROWS = [slice(0, 1), slice(1, 4), slice(4, 6)]
BESIDE = Lora(client=LoraHalf(r=2, target_modules=["v_proj"]), server=LoraHalf(r=2, target_modules=["o_proj"]))


def batch() -> dict[str, Tensor]:
    """Examples of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(11) < torch.tensor([5, 11, 8, 2, 7, 7])[:, None]).long()
    return {"input_ids": torch.randint(3, 250, (6, 11), generator=generator) * mask, "attention_mask": mask}


def multiplier_of(z: Tensor) -> Tensor:
    """λ, zero at padding."""
    given = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    return (given * batch()["attention_mask"][..., None]).to(z.dtype)


def model_of(make_model: MakeModel, side: Side, **settings: Any) -> SplitCausalLM:
    """Cut after three of four layers, moved away from its start, where all bottlenecks are silent."""
    model = make_model(**{"cut": 3, "lora": None, "side": side, **settings})
    for number, parameter in enumerate(model.client_parameters.values()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 5
    return model


def optimizer_of(model: SplitCausalLM, **settings: Any) -> ZerothOrder:
    return ZerothOrder(model.client_parameters.values(), module=model.client_half, **settings)


def client_of(model: SplitCausalLM, taps: Taps, **settings: Any) -> LocalGradientClient:
    return LocalGradientClient(model.client_half, optimizer_of(model, **settings), taps)


def dense(model: SplitCausalLM) -> Dense:
    return Dense([p.numel() for p in model.client_parameters.values()])


def projected(gradients: Tensor, model: SplitCausalLM, basis: SharedDirections) -> Tensor:
    """Of each row, a dense gradient."""
    sizes = [p.numel() for p in model.client_parameters.values()]
    return torch.stack([basis.project(row.split(sizes)) for row in gradients])


def answer(client: Any, basis: Any) -> Tensor:
    anchor = client.forward(batch(), ROWS)
    return client.answer(batch(), anchor, multiplier_of(anchor.z), ROWS, basis)


@pytest.mark.parametrize("taps", ["recompute", "keep"])
@pytest.mark.parametrize("below", ["below", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_is_that_of_backprop(make_model: MakeModel, taps: Taps, below: Any, dtype: Any) -> None:
    model = model_of(make_model, Side(4, taps=below), dtype=dtype)
    assert len(model.client_parameters) == 2 * (3 if below == "all" else 2)
    exact = answer(client_of(model, taps), dense(model))
    assert exact.shape == (3, dense(model).size)
    assert exact.dtype == torch.float32
    expected = answer(FirstOrderClient(model.client_half, optimizer_of(model)), dense(model))
    # In bf16 the layers' outputs depend on how many examples run together.
    assert (exact - expected).norm() < (1e-6 if dtype == "float32" else 1e-2) * expected.norm()
    assert (expected.abs().amax(1) > 0).all()


def test_projections_and_both_ways_to_have_the_taps_agree(make_model: MakeModel) -> None:
    model = model_of(make_model, Side(4))
    basis = SharedDirections(3, 2, 16)
    expected = projected(answer(client_of(model, "keep"), dense(model)), model, basis)
    for taps in ("recompute", "keep"):
        torch.testing.assert_close(answer(client_of(model, taps), basis), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("taps", ["recompute", "keep"])
def test_a_client_among_others_answers_as_alone(make_model: MakeModel, taps: Taps) -> None:
    model = model_of(make_model, Side(4))
    client = client_of(model, taps)
    together = answer(client, dense(model))
    for k, r in enumerate(ROWS):
        width = int(batch()["attention_mask"][r].sum(1).max())
        own = {name: tensor[r, :width] for name, tensor in batch().items()}
        everything = [slice(0, len(own["input_ids"]))]
        anchor = client.forward(own, everything)
        multiplier = multiplier_of(torch.empty(6, 11, anchor.z.shape[-1]))[r, :width]
        alone = client.answer(own, anchor, multiplier, everything, dense(model))
        torch.testing.assert_close(alone[0], together[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("taps", ["recompute", "keep"])
@pytest.mark.parametrize("lora", [None, BESIDE], ids=["alone", "beside LoRA"])
def test_no_graph_and_nothing_that_asks_for_one(make_model: MakeModel, taps: Taps, lora: Lora | None) -> None:
    model = model_of(make_model, Side(4), lora=lora)
    client = client_of(model, taps, probes=2)
    anchor = client.forward(batch(), ROWS)
    assert anchor.z.grad_fn is None
    assert anchor.graphs == ()
    assert [h.grad_fn for _, h in anchor.kept] == ([] if taps == "recompute" else [None, None])
    values = client.answer(batch(), anchor, multiplier_of(anchor.z), ROWS, client.optimizer.basis(0))
    assert values.grad_fn is None
    assert not any(p.requires_grad or p.grad is not None for p in model.client_half.parameters())
    assert (client.ladder.squeezed, client.ladder.kept, client.ladder.watch) == ([], None, None)


@contextmanager
def watched(half: Any) -> Iterator[Counter[int]]:
    """How many examples each layer has run on."""
    ran: Counter[int] = Counter()

    def count(number: int) -> Callable[..., None]:
        return lambda _module, _args, output: ran.update({number: len(output)})

    hooks = [layer.mlp.register_forward_hook(count(n)) for n, layer in half.layers.items()]
    yield ran
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("taps", "below", "examples"),
    [("recompute", "below", [12, 12, 6]), ("recompute", "all", [12, 12, 12]), ("keep", "below", [6, 6, 6])],
)
def test_what_is_not_tapped_is_not_run_again(make_model: MakeModel, taps: Any, below: Any, examples: list[int]) -> None:
    model = model_of(make_model, Side(4, taps=below))
    with watched(model.client_half) as ran:
        answer(client_of(model, taps), dense(model))
    assert [ran[n] for n in range(3)] == examples


@pytest.mark.parametrize("taps", ["recompute", "keep"])
def test_beside_lora_the_known_part_is_exact_and_the_rest_is_probed(make_model: MakeModel, taps: Taps) -> None:
    """Dual numbers as the probes: then both parts are exact."""
    model = model_of(make_model, Side(4), lora=BESIDE)
    names = [*model.client_parameters]
    gradient = answer(FirstOrderClient(model.client_half, optimizer_of(model)), dense(model))
    client = client_of(model, taps, estimator="jvp", probes=8)
    assert client.optimizer.probed == {i for i, name in enumerate(names) if "lora_side" not in name}
    assert 0 < len(client.optimizer.probed) < len(names)
    basis = client.optimizer.basis(5)
    expected = projected(gradient, model, basis)
    assert (answer(client, basis) - expected).norm() < 1e-4 * expected.norm()
    for part in ("lora_side", "lora_A", "lora_B"):  # each counts
        kept = torch.cat([torch.full((p.numel(),), part not in name) for name, p in model.client_parameters.items()])
        assert (projected(gradient * kept, model, basis) - expected).norm() > 0.1 * expected.norm()
    with pytest.raises(TypeError, match=r"probed along SharedDirections.*got Dense"):
        answer(client, dense(model))


def test_of_the_side_adapter_nothing_is_perturbed(make_model: MakeModel) -> None:
    model = model_of(make_model, Side(4), lora=BESIDE)
    client = client_of(model, "keep", mu=0.5)
    anchor = client.forward(batch(), ROWS)
    moved: list[bool] = []
    for m in [m for m in model.client_half.modules() if isinstance(m, Bottleneck)]:
        found = m.up.weight.clone()
        m.up.register_forward_hook(lambda up, *_, found=found: moved.append(not torch.equal(up.weight, found)))
    client.answer(batch(), anchor, multiplier_of(anchor.z), ROWS, client.optimizer.basis(0))
    assert len(moved) >= 4, "two bottlenecks, two probes"
    assert not any(moved)


def test_where_nothing_is_probed_no_probe_is_checked(make_model: MakeModel) -> None:
    model = model_of(make_model, Side(4))
    client = client_of(model, "recompute", mu=1e3)
    z = client.forward(batch(), ROWS).z
    with watched(model.client_half) as ran, warnings.catch_warnings():
        warnings.simplefilter("error")
        client.check_probe(batch(), z, multiplier_of(z))
    assert not ran
    model = model_of(make_model, Side(4), lora=BESIDE)
    client = client_of(model, "recompute", mu=1e3)
    with pytest.warns(UserWarning, match="two sides of a probe disagree"):
        client.check_probe(batch(), z, multiplier_of(z))


def test_a_half_without_a_side_adapter_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"needs a side adapter.*set model\.init_args\.side"):
        client_of(model, "recompute")


def llama_half(side: Side | None) -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    if side is not None:
        add_side(model, 3, side)
    return split(model, 3)[0].requires_grad_(False)


@pytest.mark.parametrize(("examples", "share"), [(8, 1.05), (2, 1.05), (1, 1.1)])
@pytest.mark.parametrize("width", [64, 128])
def test_of_a_wide_adapter_one_gradient_is_held(examples: int, share: float, width: int) -> None:
    """As wide as the backbone: what is squeezed, and every further copy of the gradient, would be seen."""
    ids = torch.arange(examples * 64).view(examples, 64) % 64
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    bare = llama_half(None)
    inference = plain_forward_peak(lambda: run(bare, tokens))
    half = llama_half(Side(width))
    trained: list[nn.Parameter] = [p for name, p in half.named_parameters() if "lora_side" in name]
    client, basis = LocalGradientClient(half, ZerothOrder(trained, module=half)), Dense([p.numel() for p in trained])
    with MemoryMeter() as meter, meter.role("client"):
        rows = [slice(0, examples)]
        anchor = client.forward(tokens, rows)
        client.answer(tokens, anchor, torch.ones_like(anchor.z), rows, basis)
    assert meter.peak("client") <= share * inference + 4 * basis.size


@pytest.mark.parametrize(("taps", "below"), [("recompute", "below"), ("recompute", "all"), ("keep", "below")])
def test_its_peak_is_that_of_inference(taps: Taps, below: Any) -> None:
    """Beyond parameters and batch, λ included."""
    tokens = {"input_ids": torch.arange(8 * 64).view(8, 64) % 64, "attention_mask": torch.ones(8, 64).long()}
    bare = llama_half(None)
    inference = plain_forward_peak(lambda: run(bare, tokens))
    half = llama_half(Side(4, taps=below))
    trained: list[nn.Parameter] = [p for name, p in half.named_parameters() if "lora_side" in name]
    client = LocalGradientClient(half, ZerothOrder(trained, module=half), taps)
    rows, basis = [slice(0, 8)], Dense([p.numel() for p in trained])
    with MemoryMeter() as meter, meter.role("client"):
        anchor = client.forward(tokens, rows)
        waiting = meter.live("client")
        z = anchor.z.nbytes
        client.answer(tokens, anchor, torch.ones_like(anchor.z), rows, basis)
    assert waiting == {"recompute": z, "keep": 3 * z}[taps]
    assert meter.peak("client") <= {"recompute": 1.05 * inference, "keep": inference + 2.1 * z}[taps]
