"""A tiny Llama and its byte-level tokenizer in one GGUF file, as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.split.tiny_models import LAYERS, tiny_causal_lm

gguf = pytest.importorskip("gguf", reason="reading GGUF files needs gguf: pip install 'hosfl_lightning[gguf]'")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), "Ġt", "he", "Ġthe"]
MERGES = ["Ġ t", "h e", "Ġt he"]
TEMPLATE = "{% for message in messages %}{{ message['content'] + '<|im_end|>' }}{% endfor %}"
HEADS, KV_HEADS, WIDTH = 4, 2, 32
#: Of llama.cpp for Hugging Face's, in one layer.
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path: Path, seed: int = 0, template: str = TEMPLATE) -> PreTrainedModel:
    """Write the file, its matrices in blocks of eight bits; returns the model with the weights that it holds."""
    model = tiny_causal_lm("llama", vocab_size=len(TOKENS), intermediate_size=64, tie_word_embeddings=True, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, template)
    for name, parameter in model.named_parameters():
        parameter.copy_(_add(writer, _name(name), parameter))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """The same model as an ordinary checkpoint."""
    model.save_pretrained(folder)
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is type(model)
    return folder


def _describe(writer: gguf.GGUFWriter, template: str) -> None:
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(template)


def _name(name: str) -> str:
    around = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in around:
        return around[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def _add(writer: gguf.GGUFWriter, name: str, parameter: Tensor) -> Tensor:
    """What comes back of a tensor that is written: of a matrix, what its blocks hold."""
    if parameter.ndim == 1:
        writer.add_tensor(name, parameter.numpy())
        return parameter
    kind = gguf.GGMLQuantizationType.Q8_0
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
    blocks = gguf.quants.quantize(_paired(parameter, heads).contiguous().numpy(), kind)
    writer.add_tensor(name, blocks, raw_dtype=kind)
    return _paired(torch.from_numpy(gguf.quants.dequantize(blocks, kind)), heads, back=True)


def _paired(weight: Tensor, heads: int | None, back: bool = False) -> Tensor:
    """Rows as llama.cpp's rotary embedding pairs them, neighbours and not halves of a head; or back."""
    if heads is None:
        return weight
    shape = (heads, -1, 2, weight.shape[1]) if back else (heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return weight.reshape(*shape).swapaxes(1, 2).reshape(weight.shape)
