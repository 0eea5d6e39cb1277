"""Auxiliary heads: what they compute, what is their own, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hosfl_lightning import SplitCausalLM
from hosfl_lightning.algorithms import CSEFSL, HERONSFL
from hosfl_lightning.split import Lora, LoraHalf, SplitError, add_lora, copied_head, linear_head, split
from tests.algorithms.two_layers import Points, TwoLayers, orchestrator
from tests.split.tiny_models import CAUSAL, DECODER_CLASSIFIERS, ENCODERS, LAYERS, tiny_causal_lm, tiny_classifier

CUT = 1
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{f: lambda f=f: tiny_causal_lm(f) for f in CAUSAL},
    **{f: lambda f=f: tiny_classifier(f) for f in ENCODERS},
    **{f"{f}_classifier": lambda f=f: tiny_classifier(f) for f in DECODER_CLASSIFIERS},
}


def smashed(seed: int = 0) -> tuple[Tensor, Tensor]:
    z = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return z * mask[..., None], mask


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_all_blocks_of_the_server_make_the_server(name: str) -> None:
    _, server = split(MODELS[name](), CUT, check=False)
    head, given = copied_head(server, LAYERS - CUT), smashed()
    assert torch.equal(head(*given), server(*given))
    short = copied_head(server, 1)(*given)
    assert short.shape == server(*given).shape
    assert not torch.equal(short, server(*given))


def llama(model: PreTrainedModel, blocks: int, z: Tensor) -> Tensor:
    short = copy.deepcopy(model)
    short.model.layers = short.model.layers[CUT : CUT + blocks]
    short.config.num_hidden_layers = blocks
    return short(inputs_embeds=z, use_cache=False).logits


def gpt2(model: PreTrainedModel, blocks: int, z: Tensor) -> Tensor:
    for layer in model.transformer.h[CUT : CUT + blocks]:
        z = layer(z)
    return model.lm_head(model.transformer.ln_f(z))


def bert(model: PreTrainedModel, blocks: int, z: Tensor) -> Tensor:
    for layer in model.bert.encoder.layer[CUT : CUT + blocks]:
        z = layer(z)
    return model.classifier(model.bert.pooler(z))


@pytest.mark.parametrize("reference", [llama, gpt2, bert])
@pytest.mark.parametrize("blocks", [0, 1, 2])
@torch.no_grad()
def test_blocks_are_the_first_of_the_server(
    reference: Callable[[PreTrainedModel, int, Tensor], Tensor], blocks: int
) -> None:
    model = MODELS[reference.__name__]()
    _, server = split(model, CUT, check=False)
    z, _ = smashed()
    torch.testing.assert_close(copied_head(server, blocks)(z), reference(model, blocks, z))


@pytest.fixture(params=["lora", "all weights", "classifier"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    if request.param == "all weights":
        return tiny_causal_lm("llama").requires_grad_(True)
    lora = Lora(server=LoraHalf(r=3, target_modules="all-linear", dropout=0.5))
    if request.param == "lora":
        return add_lora(tiny_causal_lm("llama"), CUT, lora, head=False).get_base_model()
    lora.client.target_modules = lora.server.target_modules = ["query"]
    return add_lora(tiny_classifier("bert"), CUT, lora, head=True).get_base_model()


class TestWhatIsItsOwn:
    def test_what_the_server_trains_is_copied_and_the_rest_is_shared(self, model: PreTrainedModel) -> None:
        _, server = split(model, CUT, check=False)
        head = copied_head(server, 1)
        theirs, mine = dict(server.named_parameters()), dict(head.named_parameters())
        assert mine.keys() < theirs.keys()
        for name, parameter in mine.items():
            assert parameter.requires_grad == theirs[name].requires_grad
            assert torch.equal(parameter, theirs[name])
            assert (parameter is theirs[name]) == (not parameter.requires_grad), name
        assert any(p.requires_grad for p in mine.values())

    def test_each_moves_alone(self, model: PreTrainedModel) -> None:
        _, server = split(model, CUT, check=False)
        head, given = copied_head(server, LAYERS - CUT), smashed()
        before = server(*given).detach()
        with torch.no_grad():
            for parameter in head.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        assert torch.equal(server(*given), before)
        assert not torch.equal(head(*given), before)

    def test_the_gradient_reaches_all_of_it_and_nothing_of_the_server(self, model: PreTrainedModel) -> None:
        _, server = split(model, CUT, check=False)
        head = copied_head(server, 1)
        with torch.no_grad():  # B of LoRA is 0 at the start, and with it the gradient of A
            for parameter in head.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        head(*smashed()).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in head.parameters() if p.requires_grad)
        assert all(p.grad is None for p in server.parameters())


def test_the_servers_dropout_is_not_the_heads() -> None:
    lora = Lora(server=LoraHalf(r=2, dropout=0.5))
    model = SplitCausalLM("tiny_lm", cut=2, lora=lora).eval()
    head = model.auxiliary_head(1)
    with model.dropout_active():
        assert any(m.training for m in model.server_half.modules())
        assert not any(m.training for m in head.modules())


@pytest.mark.parametrize("blocks", [-1, LAYERS - CUT + 1])
def test_more_blocks_than_the_server_has_are_refused(blocks: int) -> None:
    _, server = split(tiny_causal_lm("llama"), CUT, check=False)
    with pytest.raises(
        SplitError, match=rf"auxiliary_blocks={blocks} is out of range.* 3 of the 4 .*set it to 0 \.\. 3"
    ):
        copied_head(server, blocks)


class TestLinearHead:
    def test_is_linear_in_the_mean_over_positions(self) -> None:
        head, (z, mask) = linear_head(32, 3, 0), smashed()
        expected = z.sum(1) / 6 @ head.linear.weight.T + head.linear.bias
        torch.testing.assert_close(head(z, mask), expected)

    def test_starts_under_its_seed_and_leaves_the_global_state_alone(self) -> None:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        first, again, other = (linear_head(4, 3, 0, seed).linear.weight for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), before)

    def test_takes_z_of_a_narrower_dtype(self) -> None:
        assert linear_head(4, 3, 0)(torch.ones(2, 1, 4, dtype=torch.bfloat16)).dtype == torch.float32

    def test_copied_layers_are_refused(self) -> None:
        with pytest.raises(SplitError, match=r"auxiliary_blocks=2, but .* set it to 0"):
            linear_head(4, 3, 2)


class TestARun:
    def test_a_model_without_a_head_is_refused_before_a_folder_is_made(self, tmp_path: Path) -> None:
        trainer = orchestrator(HERONSFL(), tmp_path / "runs", logger=True)
        with pytest.raises(SplitError, match=r"TwoLayers has no auxiliary head.*SplitFedV2.*override auxiliary_head"):
            trainer.fit(TwoLayers(), Points())
        assert not (tmp_path / "runs").exists()

    def test_so_are_too_many_blocks(self, tmp_path: Path) -> None:
        trainer = orchestrator(CSEFSL(auxiliary_blocks=9), tmp_path / "runs", logger=True)
        with pytest.raises(SplitError, match="auxiliary_blocks=9"):
            trainer.fit(SplitCausalLM("tiny_lm", cut=2, lora=Lora()), Points())
        assert not (tmp_path / "runs").exists()
