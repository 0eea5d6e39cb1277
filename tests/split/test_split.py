from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hosfl_lightning.split import ClientHalf, ServerHalf, SplitError, check_tied_head, find_layers, split
from hosfl_lightning.split.structure import Skip
from tests.split.tiny_models import (
    CAUSAL,
    DECODER_CLASSIFIERS,
    ENCODERS,
    LAYERS,
    tiny_causal_lm,
    tiny_classifier,
    tiny_config,
)

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{f: lambda f=f: tiny_causal_lm(f) for f in CAUSAL},
    "opt_projected": lambda: tiny_causal_lm("opt", word_embed_proj_dim=16),
    "falcon_alibi": lambda: tiny_causal_lm("falcon", alibi=True),
    "llama_tied": lambda: tiny_causal_lm("llama", tie_word_embeddings=True),
    "llama_eager": lambda: tiny_causal_lm("llama", attn_implementation="eager"),
    **{f: lambda f=f: tiny_classifier(f) for f in ENCODERS},
    **{f"{f}_classifier": lambda f=f: tiny_classifier(f) for f in DECODER_CLASSIFIERS},
}
EXPERTS = ("mixtral", "qwen3_moe")
PADDINGS = ("none", "right", "left")
get = cache(lambda name: MODELS[name]())


def batch(model: PreTrainedModel, padding: str) -> tuple[Tensor, Tensor | None]:
    """Three rows of seven tokens; the second has three of padding, the third one."""
    pad = model.config.pad_token_id
    tokens = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))
    if padding == "none":
        return tokens, None
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = mask[2, :1] = 0
    mask = mask if padding == "left" else mask.flip(1)
    return tokens.masked_fill(mask == 0, pad), mask


def logits_of(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None) -> Tensor:
    return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits


def tied_names(model: PreTrainedModel) -> set[str]:
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    return {n for n, p in model.named_parameters(remove_duplicate=False) if tied and p is head.weight}


def shared_names(model: PreTrainedModel) -> set[str]:
    """Of the parameters that every layer is given."""
    marks = {"deberta-v2": ("encoder.rel_embeddings.", "encoder.LayerNorm."), "mpnet": ("relative_attention_bias.",)}
    mine = marks.get(model.config.model_type, ())
    return {n for n, _ in model.named_parameters() if any(mark in n for mark in mine)}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_halves_equal_the_whole_bit_for_bit(name: str, padding: str) -> None:
    model = get(name)
    tokens, mask = batch(model, padding)
    with torch.no_grad():
        whole = logits_of(model, tokens, mask)
        assert whole.isfinite().all()
        for cut in range(1, LAYERS):
            client, server = split(model, cut, check=False)
            z = client(tokens, mask)
            assert z.shape == (3, 7, 32)
            assert torch.equal(server(z, mask), whole)
        assert torch.equal(logits_of(model, tokens, mask), whole), "the whole model changed"


# Most encoder classifiers read their first position, so only its right padding is idle.
@pytest.mark.parametrize(
    ("name", "padding"), [(n, p) for n in MODELS for p in PADDINGS[1:] if not (n in ENCODERS and p == "left")]
)
def test_smashed_data_at_padding_do_not_matter(name: str, padding: str) -> None:
    model = get(name)
    tokens, mask = batch(model, padding)
    client, server = split(model, 2, check=False)
    with torch.no_grad():
        z = client(tokens, mask)
        zeroed = z * mask[..., None]
        before, after = server(z, mask), server(zeroed, mask)
    if before.ndim == 3:
        before, after = before[mask.bool()], after[mask.bool()]
    # An expert sees another number of rows, and matrix kernels round by the number of rows.
    tolerance = 1e-6 if name in EXPERTS else 0.0
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_the_backward_of_the_whole(name: str) -> None:
    model = copy.deepcopy(get(name)).requires_grad_(True)
    for frozen in {*tied_names(model), *shared_names(model)}:
        model.get_parameter(frozen).requires_grad_(False)
    tokens, mask = batch(model, "right")
    client, server = split(model, 2, check=False)
    states: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor]) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)
        states[-1].retain_grad()

    hook = model.get_submodule(f"{find_layers(model).path}.1").register_forward_hook(keep)
    whole = logits_of(model, tokens, mask)
    hook.remove()
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(2))
    (whole * weights).sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    with torch.no_grad():
        smashed = client(tokens, mask)
    z = smashed.requires_grad_()
    (server(z, mask) * weights).sum().backward()
    assert z.grad is not None
    assert torch.equal(z.grad, states[0].grad), "the multiplier"
    assert not any(p.grad is not None for n, p in client.named_parameters())
    client(tokens, mask).backward(z.grad)
    actual = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", MODELS)
def test_halves_share_the_parameters_of_the_whole_and_none_with_each_other(name: str) -> None:
    model = get(name)
    whole = dict(model.named_parameters(remove_duplicate=False))
    client, server = split(model, 2, check=False)
    held = [dict(half.named_parameters(remove_duplicate=False)) for half in (client, server)]
    for half in held:
        assert all(p is whole[n] for n, p in half.items())
    tied, shared = tied_names(model), shared_names(model)
    assert held[0].keys() & held[1].keys() == shared
    both = {id(p) for p in held[0].values()} & {id(p) for p in held[1].values()}
    assert both == {id(whole[n]) for n in tied | shared}
    pooler = {n for n in whole if ".pooler." in n and n not in held[1]}
    assert held[0].keys() | held[1].keys() == whole.keys() - pooler
    embeddings = {n for n, m in server.named_modules() if isinstance(m, nn.Embedding)}
    assert embeddings == {n.rpartition(".")[0] for n in shared if "LayerNorm" not in n}


def test_a_layer_keeps_its_number() -> None:
    client, server = split(get("opt"), 1)
    assert list(client.layers) == [0]
    assert list(server.layers) == [1, 2, 3]
    assert find_layers(get("opt")) == client.layer_path
    assert client.layer_path.path == "model.decoder.layers"
    assert client.hidden_size == server.hidden_size == 32


def test_classifier_without_padding_token_pools_by_the_mask() -> None:
    model = tiny_classifier("llama", pad_token_id=None)
    client, server = split(model, 2)
    assert model.config.pad_token_id is None
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = logits_of(model, tokens[:, :3], None)
        mask = torch.tensor([[1, 1, 1, 0]])
        torch.testing.assert_close(server(client(tokens, mask), mask), expected)


def test_split_leaves_the_random_state_the_modes_and_the_hooks_alone() -> None:
    model = tiny_causal_lm("gpt2").train()
    model.transformer.h[1].eval()
    modes = {n: m.training for n, m in model.named_modules()}
    hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()}
    state = torch.get_rng_state()
    client, server = split(model, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()} == hooks
    assert client.training
    assert server.training
    assert not client.layers[1].training


def test_halves_have_their_own_rotary_tables_and_copy_deeply() -> None:
    model = tiny_causal_lm("llama")
    client, server = split(model, 2)
    client.get_submodule("model.rotary_emb").to(torch.float64)
    assert server.get_buffer("model.rotary_emb.inv_freq").dtype == torch.float32
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    tokens, mask = batch(model, "left")
    with torch.no_grad():
        z = tiny_causal_lm("llama").model.embed_tokens(tokens)
        expected = server(z, mask)
        twin = copy.deepcopy(server)
        for parameter in server.parameters():
            parameter.zero_()
        assert torch.equal(twin(z, mask), expected)


def test_works_in_bfloat16() -> None:
    split(tiny_causal_lm("gemma2").to(torch.bfloat16), 2)


@pytest.mark.parametrize("cut", [0, 4, -1, True, 1.5, None])
def test_cut_out_of_range(cut: object) -> None:
    with pytest.raises(SplitError, match=r"cut=.* is out of range: LlamaForCausalLM has 4 layers, .* from 1 to 3"):
        split(get("llama"), cut)  # type: ignore[arg-type]


def test_tied_head_must_be_frozen() -> None:
    model = tiny_causal_lm("llama", tie_word_embeddings=True)
    split(model, 2)
    model.requires_grad_(True)
    with pytest.raises(SplitError, match=r"model.embed_tokens.weight is both .* LlamaForCausalLM .* freeze it"):
        split(model, 2)
    check_tied_head(tiny_causal_lm("llama").requires_grad_(True))


@pytest.mark.parametrize("name", ["deberta-v2", "mpnet"])
def test_what_every_layer_is_given_must_be_frozen(name: str) -> None:
    model = copy.deepcopy(get(name))
    first = sorted(shared_names(model))[0]
    flags = [p.requires_grad for p in model.parameters()]
    split(model, 2)
    assert [p.requires_grad for p in model.parameters()] == flags
    model.get_parameter(first).requires_grad_(True)
    with pytest.raises(SplitError, match=rf"{first} is read by the layers of both halves of .* freeze it .* as LoRA"):
        split(model, 2)


def test_what_runs_between_the_layers_is_named() -> None:
    with pytest.raises(SplitError, match=r"DebertaV2.*cannot be split: deberta\.encoder\.conv runs between its layers"):
        split(tiny_classifier("deberta-v2", conv_kernel_size=3), 2)


def test_a_layer_that_is_skipped_answers_as_it_would_and_holds_nothing_of_it() -> None:
    layer = nn.Linear(2, 2)
    layer.kind, layer.cache, layer.sub, layer.none = "sliding", torch.ones(3), nn.Linear(2, 2), None  # type: ignore[assignment]
    layer.register_module("nothing", None)
    skip = Skip((None, 7), layer)
    assert (skip.kind, skip.none, skip.nothing, skip.sub is None) == ("sliding", None, None, False)
    assert not list(skip.parameters())
    assert not any(isinstance(value, Tensor) for value in vars(skip).values())
    z = torch.ones(1)
    assert skip(z, 1, mask=2) == (z, None, 7)
    assert Skip(None)(z) is z


class SkipsTheCut(LlamaModel):
    """Adds the embeddings at the end, past the cut, of batches with so many rows, and draws random numbers."""

    rows = range(99)

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: object) -> object:
        torch.rand(2)
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = super().forward(inputs_embeds=embeddings, **kwargs).last_hidden_state
        past = embeddings if len(hidden) in self.rows else 0
        return SimpleNamespace(last_hidden_state=hidden + past, past_key_values=None)


class SkippingForCausalLM(LlamaForCausalLM):
    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.model = SkipsTheCut(config)

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: object) -> object:
        kwargs = {k: v for k, v in kwargs.items() if k in ("attention_mask", "use_cache")}
        hidden = self.model(input_ids, inputs_embeds=inputs_embeds, **kwargs).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden))


class SharedBiasForCausalLM(LlamaForCausalLM):
    """A parameter of the backbone itself, which both halves would hold."""

    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.model.register_parameter("bias", nn.Parameter(torch.zeros(4)))


def test_other_architectures_are_probed_and_refused_by_name() -> None:
    state = torch.get_rng_state()
    with pytest.raises(SplitError, match="SkippingForCausalLM cannot be split: whole and halves differ on a batch"):
        split(toy(SkippingForCausalLM), 2)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(SplitError, match=r"SharedBiasForCausalLM cannot be split: both halves would need model\.bias"):
        split(toy(SharedBiasForCausalLM), 2)
    with pytest.raises(SplitError, match="Gemma3nForCausalLM cannot be split: its forward fails"):
        split(tiny_gemma3n(), 2)
    with pytest.raises(SplitError, match="T5ForConditionalGeneration cannot be split: an encoder-decoder"):
        split(T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=2)), 1)
    with pytest.raises(SplitError, match="LlamaModel cannot be split: it has no head"):
        split(LlamaModel(tiny_config("llama")), 2)
    with pytest.raises(SplitError, match="AlbertForSequenceClassification cannot be split: found no list"):
        split(tiny_classifier("albert"), 2)
    with pytest.raises(SplitError, match="Linear is not a transformers model"):
        split(nn.Linear(2, 2), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_check_at_set_up_has_batches_of_several_sizes(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SkipsTheCut, "rows", [rows])
    with pytest.raises(SplitError, match="SkippingForCausalLM cannot be split: whole and halves differ on a batch"):
        split(toy(SkippingForCausalLM), 2)


def toy(kind: type[PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        return kind(tiny_config("llama")).eval()


def tiny_gemma3n() -> PreTrainedModel:
    config = tiny_config(
        "gemma3n_text",
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        altup_num_inputs=2,
        layer_types=["full_attention"] * LAYERS,
        activation_sparsity_pattern=[0.0] * LAYERS,
        head_dim=8,
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def test_a_replaced_forward_is_refused() -> None:
    model = tiny_causal_lm("llama")
    model.model.forward = model.model.forward
    with pytest.raises(SplitError, match="LlamaForCausalLM cannot be split: its forward was replaced"):
        split(model, 2)
    for compiled in ("", "model"):
        model = tiny_causal_lm("llama")
        model.get_submodule(compiled).compile(backend="eager")
        with pytest.raises(SplitError, match=r"LlamaForCausalLM .* its forward was replaced.*uncompiled"):
            split(model, 2)


def test_a_failing_forward_leaves_nothing_behind() -> None:
    client, server = split(get("llama"), 2)
    with pytest.raises(RuntimeError):
        server(torch.zeros(1, 3, 5))
    with pytest.raises(IndexError):
        client(torch.full((1, 3), 1000))
    assert isinstance(client, ClientHalf)
    assert isinstance(server, ServerHalf)
    assert not any(getattr(m, "smashed", None) is not None for half in (client, server) for m in half.modules())
