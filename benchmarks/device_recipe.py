"""The halves that `benchmarks.device` exports and the terms of their runs: as examples/device has them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import hosfl_lightning
from benchmarks.device_script import CLIENT, RUN
from hosfl_lightning import HOSFL, SplitCausalLM
from hosfl_lightning.device.data import data_of
from hosfl_lightning.device.export import export_client
from hosfl_lightning.optim import AdamW, Uncompressed
from hosfl_lightning.split import Lora, LoraHalf, Side
from hosfl_lightning.wire import Codecs, encode

KINDS = ("lora", "side")
#: P of `lora`.
PROBES = 4
DATA = {
    "class_path": "hosfl_lightning.data.TextData",
    "init_args": {"files": "", "num_clients": 1, "batch_size": 8, "sequence_length": 128},
}
TINY = Path(hosfl_lightning.__file__).parent / "assets/tiny_lm"


def model(pretrained: str, kind: str) -> SplitCausalLM:
    """The client's half: three layers with LoRA on four of their modules, or with a side adapter."""
    on = ["q_proj", "v_proj", "o_proj", "down_proj"]
    return SplitCausalLM(
        pretrained, cut=3, part="client",
        lora=Lora(
            client=LoraHalf(r=8, alpha=16, target_modules=on) if kind == "lora" else None,
            server=LoraHalf(r=8, alpha=16, target_modules="all-linear"),
        ),
        side=Side(client=16, taps="below") if kind == "side" else None,
    )  # fmt: skip


def llama(folder: Path, hidden: int) -> str:
    """Of four layers, random weights and the tokenizer of tiny_lm; its path."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=4, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, vocab_size=260, max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=256, eos_token_id=257,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    return str(folder)


def export(pretrained: str, kind: str, folder: Path) -> tuple[Path, Path]:
    """A half, and the terms of a run for it as a frame."""
    folder.mkdir()
    made = model(pretrained, kind)
    export_client(made, str(folder / "phone.onnx"), data=data_of(DATA, made))
    algorithm: Any = HOSFL(probes=PROBES, mu=1e-3, client_optimizer=AdamW(lr=0.001, weight_decay=0.0))
    codecs = Codecs("bf16", "int8")
    if kind == "side":
        rule = AdamW(lr=0.003, weight_decay=0.0)
        algorithm = HOSFL(estimator="local", compression=Uncompressed(), client_optimizer=rule)
        codecs = Codecs("bf16", "int8", "int4")
    terms = algorithm.terms(made, 7, codecs, 3)
    (folder / "terms").write_bytes(encode(replace(terms, client=CLIENT, backbone=made.client_fingerprint()), RUN))
    return folder / "phone.onnx", folder / "terms"
