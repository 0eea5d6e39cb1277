"""Tiny random-init models of every family that must split exactly. Built from configs only: no hub, no files."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

LAYERS = 4
VOCAB = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"moe_intermediate_size": 24}
_GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
_TYPES = {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2), "sliding_window": 3}

# model_type: what differs from the common settings.
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 3},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, **_TYPES},
    "gemma3_text": {"head_dim": 8, **_TYPES},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "starcoder2": {},
    "stablelm": {},
    "cohere": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, **_MOE},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": _GPT2,
    "falcon": {"alibi": False},
    "bloom": {"n_layer": LAYERS, "n_head": 4},
    "gpt_neox": {},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "bos_token_id": 0},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": 4},
    "electra": {"embedding_size": 16},
    "modernbert": {
        "global_attn_every_n_layers": 2, "local_attention": 4, "classifier_pooling": "mean", "cls_token_id": 1,
        "sep_token_id": 2,
    },
    # As DeBERTa-v3: relative positions only, their embeddings normed and given to every layer.
    "deberta-v2": {
        "relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0,
        "max_relative_positions": -1, "pooler_hidden_size": 32,
    },
    "mpnet": {"pad_token_id": 1},
}  # fmt: skip
DECODER_CLASSIFIERS: dict[str, dict[str, Any]] = {k: CAUSAL[k] for k in ("llama", "qwen2", "opt", "gpt2")}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Config of a tiny model: 4 layers, hidden size 32, vocabulary 64."""
    settings = {**_COMMON, **CAUSAL.get(family, {}), **ENCODERS.get(family, {}), **overrides}
    return transformers.AutoConfig.for_model(family, **settings)


def tiny_model(family: str, auto: Any, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random model in eval mode, frozen. Norms and biases are random too, or a skipped one would not show."""
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = auto.from_config(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def tiny_causal_lm(family: str, **overrides: Any) -> PreTrainedModel:
    """A tiny causal LM of that family (a key of ``CAUSAL``)."""
    return tiny_model(family, transformers.AutoModelForCausalLM, **overrides)


def tiny_classifier(family: str, **overrides: Any) -> PreTrainedModel:
    """A tiny sequence classifier with three classes (a key of ``ENCODERS`` or ``DECODER_CLASSIFIERS``)."""
    settings = {"num_labels": 3, **overrides}
    return tiny_model(family, transformers.AutoModelForSequenceClassification, **settings)
