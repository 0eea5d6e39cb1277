from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from hosfl_lightning.split import Lora, LoraHalf, SplitError, add_lora, find_layers, split
from tests.split.tiny_models import tiny_causal_lm, tiny_classifier

LLAMA = Lora(
    client=LoraHalf(r=2, alpha=4, target_modules=["q_proj"]),
    server=LoraHalf(r=3, alpha=9, target_modules=["v_proj", "down_proj"]),
)


def adapted(model: nn.Module) -> dict[str, LoraLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def test_each_half_has_its_own_targets_rank_and_scale() -> None:
    model = tiny_causal_lm("llama")
    peft_model = add_lora(model, 1, LLAMA, head=False, base_model_name_or_path="some/base")
    assert isinstance(peft_model, PeftModel)
    found = {n: (m.r["default"], m.scaling["default"]) for n, m in adapted(model).items()}
    server = [f"model.layers.{i}.{n}" for i in (1, 2, 3) for n in ("self_attn.v_proj", "mlp.down_proj")]
    assert found == {"model.layers.0.self_attn.q_proj": (2, 2.0)} | dict.fromkeys(server, (3, 3.0))
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    client_half, server_half = split(peft_model.get_base_model(), 1)
    assert sum(p.numel() for p in client_half.parameters() if p.requires_grad) == 2 * (32 + 32)
    assert sum(p.requires_grad for p in server_half.parameters()) == 12
    assert peft_model.peft_config["default"].base_model_name_or_path == "some/base"


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        ("all-linear", 7),
        (r"model\.layers\.\d+\.mlp\..*", 3),
        (["self_attn.q_proj"], 1),
    ],
)
def test_targets_may_be_all_linear_or_a_regular_expression(targets: str | list[str], ends: int) -> None:
    model = tiny_causal_lm("llama")
    half = LoraHalf(target_modules=targets)
    add_lora(model, 2, Lora(half, half), head=False)
    assert len(adapted(model)) == 4 * ends


def test_mixture_of_experts_keeps_its_halves_apart() -> None:
    model = tiny_causal_lm("mixtral")
    add_lora(model, 2, Lora(LoraHalf(target_modules=["q_proj"]), LoraHalf(target_modules=["v_proj"])), head=False)
    assert sorted(n[len("model.layers.") :] for n in adapted(model)) == [
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "2.self_attn.v_proj",
        "3.self_attn.v_proj",
    ]


def test_seed_fixes_the_start_and_the_global_state_is_left_alone() -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        model = tiny_causal_lm("llama")
        add_lora(model, 1, LLAMA, head=False, seed=seed)
        return {n: p for n, p in model.named_parameters() if "lora_" in n}

    state = torch.get_rng_state()
    first = start(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = start(0), start(1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert all(torch.equal(first[n], other[n]) == ("lora_B" in n) for n in first)


def test_no_two_layers_start_alike() -> None:
    model = tiny_causal_lm("llama")
    both = LoraHalf(r=2, target_modules=["q_proj"])
    add_lora(model, 2, Lora(client=both, server=both), head=False)
    starts = [p for n, p in model.named_parameters() if "lora_A" in n]
    assert len(starts) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


@pytest.mark.parametrize("client", [LoraHalf(r=3, target_modules="all-linear"), None])
def test_the_server_starts_the_same_whatever_the_client_has(client: LoraHalf | None) -> None:
    def server(lora: Lora) -> list[torch.Tensor]:
        model = tiny_causal_lm("llama")
        add_lora(model, 1, lora, head=False)
        layers = [model.get_submodule(f"model.layers.{i}") for i in range(1, find_layers(model).num_layers)]
        return [p for layer in layers for n, p in layer.named_parameters() if "lora_" in n]

    ours, theirs = server(LLAMA), server(Lora(client=client, server=LLAMA.server))
    assert len(ours) == len(theirs) > 0
    assert all(map(torch.equal, ours, theirs))


def test_lora_is_fp32_on_a_bfloat16_base() -> None:
    model = tiny_causal_lm("llama").to(torch.bfloat16)
    add_lora(model, 1, LLAMA, head=False)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {torch.bfloat16}


@pytest.mark.parametrize(("family", "heads"), [("distilbert", {"pre_classifier", "classifier"}), ("llama", {"score"})])
def test_a_classification_head_is_trained_by_the_server(family: str, heads: set[str]) -> None:
    model = tiny_classifier(family)
    half = LoraHalf(target_modules="all-linear")
    peft_model = add_lora(model, 2, Lora(half, half), head=True)
    client, server = split(peft_model.get_base_model(), 2)
    trained = {n for n, p in server.named_parameters() if p.requires_grad and "lora_" not in n}
    assert {n.split(".")[0] for n in trained} == heads
    assert all("modules_to_save" in n for n in trained)
    assert all("lora_" in n for n, p in client.named_parameters() if p.requires_grad)


def test_a_frozen_classification_head_stays_frozen() -> None:
    model = tiny_classifier("llama")
    add_lora(model, 1, LLAMA, head=False)
    assert not model.score.weight.requires_grad


def test_dropout_is_on_the_server_only() -> None:
    lora = Lora(LLAMA.client, LoraHalf(target_modules=["v_proj"], dropout=0.5))
    model = tiny_causal_lm("llama")
    add_lora(model, 1, lora, head=False)
    kinds = {n: type(m.lora_dropout["default"]) for n, m in adapted(model).items()}
    assert {kind for n, kind in kinds.items() if ".layers.0." in n} == {nn.Identity}
    assert {kind for n, kind in kinds.items() if ".layers.0." not in n} == {nn.Dropout}
    assert not any(m.training for m in model.modules())


def lora_of(**kwargs: Any) -> Lora:
    return Lora(LoraHalf(**{"target_modules": ["q_proj"], **kwargs}), LLAMA.server)


@pytest.mark.parametrize(
    ("lora", "head", "message"),
    [
        (lora_of(dropout=0.1), False, r"lora\.client\.dropout=0\.1: probes"),
        (
            lora_of(target_modules=["q_proj", "qproj"]),
            False,
            r"lora\.client\.target_modules: 'qproj' matches no linear module in layers 0 to 0 of LlamaForCausalLM, "
            r"the client's; there are: mlp\.down_proj, .*self_attn\.q_proj",
        ),
        (Lora(LLAMA.client, LoraHalf(target_modules=r".*\.0\..*")), False, r"lora\.server\.target_modules: .* 1 to 3"),
        (lora_of(), True, r"the head of LlamaForCausalLM cannot be trained: it is tied .* head=False"),
    ],
)
def test_errors_name_the_setting(lora: Lora, head: bool, message: str) -> None:
    model = tiny_causal_lm("llama", tie_word_embeddings=True)
    with pytest.raises(SplitError, match=message):
        add_lora(model, 1, lora, head=head)
    assert not adapted(model)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_what_peft_reads_differently_is_refused() -> None:
    model = tiny_causal_lm("qwen3_moe", mlp_only_layers=[0])
    targets = ["gate_proj", "up_proj"]  # linear in the dense layer 0, but PEFT takes them for the fused experts'
    lora = Lora(LoraHalf(target_modules=targets), LoraHalf(target_modules=["q_proj"]))
    with pytest.raises(SplitError, match=r"lora target_modules: PEFT cannot adapt .*layers\.0\.mlp\.gate_proj"):
        add_lora(model, 1, lora, head=False)


@pytest.mark.parametrize("wrong", [{"r": 0}, {"dropout": 1.0}, {"target_modules": []}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoraHalf(**wrong)
