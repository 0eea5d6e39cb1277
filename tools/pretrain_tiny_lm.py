"""Pretrain the embedded byte-level language model on the standard library's own text.

One command, no download, no accelerator::

    python tools/pretrain_tiny_lm.py --minutes 65 --threads 2

The corpus (``tiny_lm_corpus``) is what every Python has: the sources and docstrings of its standard library. The loss
is the mean cross entropy of the next byte, in nats per byte; an untrained model starts at log(260) = 5.56. A killed run
goes on from its last saved state when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_lm_corpus import EOS, Corpus, build_corpus
from tokenizers import decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, VOCAB_SIZE, MAX_POSITION = 256, 260, 512
PROSE_SHARE = 0.5
TOKENS_PER_STEP = 2048
# (share of the budget already spent, context): short contexts first, they cost less and teach spelling and syntax.
CONTEXTS = ((0.0, 128), (0.7, 256), (0.92, MAX_POSITION))
ASSET = Path(__file__).resolve().parents[1] / "hosfl_lightning" / "assets" / "tiny_lm"
SAVE_SECONDS = 120.0
STATE = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
CARD = """---
license: apache-2.0
language: [en]
pipeline_tag: text-generation
---

# tiny_lm

A byte-level causal language model of Llama architecture, {parameters:,} parameters, for trying out fine-tuning without
a model hub. It spells, indents and imitates the tone of Python documentation; it knows nothing.

- One token per byte (id = byte value), `<|pad|>` 256, `<|eos|>` 257 between documents, no BOS; at most 512 positions.
- Weights are stored in fp16 and load as fp32 (`"dtype": "float32"` in `config.json`).
- Text: sources of the standard library of Python {python} (PSF license), and once more their docstrings, comment
  blocks and long strings; no tests, no installed packages. One file in twenty is held out.
- Loss on held-out files: {source} nats per byte of source, {prose} of prose, with the weights as stored, in windows of
  256 bytes; a uniform guess has 5.56.
- Made by `python tools/pretrain_tiny_lm.py` in {seconds:,.0f} s on {threads} CPU thread(s): {steps:,} steps of AdamW,
  {tokens_seen:,} bytes seen. The budget is wall-clock time, so another machine gives another model. Everything that
  was recorded, the SHA-256 of the corpus included, is in `training.json`.
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, id = byte value; no merges, so any UTF-8 text comes back as it went in."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(unprintable)}
    vocabulary = {character: byte for byte, character in characters.items()} | {"<|pad|>": PAD, "<|eos|>": EOS}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|eos|>",
        model_max_length=MAX_POSITION,
        clean_up_tokenization_spaces=False,
    )


def build_model(hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A Llama with four heads and tied embeddings: 1.2 M parameters at ``hidden`` 128 and six layers."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITION,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def windows(stream: np.ndarray, starts: np.ndarray, context: int) -> torch.Tensor:
    """Rows of ``context + 1`` bytes, shape (len(starts), context + 1), int64."""
    return torch.from_numpy(stream[starts[:, None] + np.arange(context + 1)].astype(np.int64))


def batch(corpus: Corpus, context: int, seed: int, step: int) -> torch.Tensor:
    """The batch of one step: a function of (seed, step), so that a resumed run reads on where it stopped."""
    generator = np.random.default_rng([seed, step])
    rows = TOKENS_PER_STEP // context
    prose = int(rows * PROSE_SHARE)
    pairs = ((corpus.prose, prose), (corpus.source, rows - prose))
    parts = [windows(s, generator.integers(0, len(s) - context, n), context) for s, n in pairs]
    return torch.cat(parts)


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean nats per byte of every next byte in ``rows``, shape (rows, context + 1)."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def save_state(path: Path, model: torch.nn.Module, optimizer: Optimizer, progress: dict[str, Any]) -> None:
    """Parameters, both AdamW moments and the progress in one file, which replaces its predecessor in one step."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for moment in MOMENTS:
            tensors[f"{moment}:{name}"] = optimizer.state[parameter][moment]
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"progress": json.dumps(progress)})
    os.replace(temporary, path)


def load_state(path: Path, model: torch.nn.Module, optimizer: Optimizer, run: list[Any]) -> dict[str, Any]:
    """The inverse of :func:`save_state`; returns the progress.

    Raises:
        ValueError: if the state is that of another ``run`` (corpus, seed, learning rate, size).
    """
    with safe_open(path, "pt") as file, torch.no_grad():
        progress: dict[str, Any] = json.loads(file.metadata()["progress"])
        if progress["run"] != run:
            raise ValueError(f"--out: {path} belongs to a run with other settings; delete it or give another folder")
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(name))
            moments = {moment: file.get_tensor(f"{moment}:{name}") for moment in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(progress["step"])), **moments}
    return progress


def build_optimizer(model: torch.nn.Module, lr: float) -> Optimizer:
    """AdamW that spares the norms' gains from weight decay."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def update(model: torch.nn.Module, optimizer: Optimizer, rows: torch.Tensor, lr: float, precision: str) -> torch.Tensor:
    """One step of AdamW on ``rows``; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = loss_of(model, rows)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train(model: LlamaForCausalLM, corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Warm-up, then a cosine to zero over the budget (steps or seconds); returns steps, tokens and seconds."""
    # In bf16 the fused attention's CPU backward alone would take 40 % of a step.
    model.set_attn_implementation("eager")
    optimizer = build_optimizer(model, args.lr)
    state = args.out / STATE
    run = [corpus.sha256, args.seed, args.lr, args.hidden, args.layers]
    progress: dict[str, Any] = {"run": run, "step": 0, "tokens": 0, "seconds": 0.0}
    if state.exists():
        progress = load_state(state, model, optimizer, run)
    began = saved = time.monotonic()
    earlier = progress["seconds"]
    bar = tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}", mininterval=2.0)
    while (spent := progress["step"] / args.steps if args.steps else progress["seconds"] / (60 * args.minutes)) < 1:
        context = [length for start, length in CONTEXTS if spent >= start][-1]
        rows = batch(corpus, context, args.seed, progress["step"])
        lr = args.lr * min(1.0, spent / 0.02 + 0.01) * 0.5 * (1 + math.cos(math.pi * spent))
        loss = update(model, optimizer, rows, lr, args.precision)
        now = time.monotonic()
        progress |= {"step": progress["step"] + 1, "tokens": progress["tokens"] + TOKENS_PER_STEP}
        progress["seconds"] = earlier + now - began
        bar.update(100 * spent - bar.n)
        if progress["step"] % 20 == 0:
            bar.set_postfix(step=progress["step"], context=context, loss=f"{loss.item():.3f}", refresh=False)
        if now - saved > SAVE_SECONDS:
            save_state(state, model, optimizer, progress)
            saved = now
    bar.close()
    return progress


def export(model: LlamaForCausalLM, out: Path) -> None:
    """Weights in fp16, a configuration that loads them as fp32, and the tokenizer."""
    tensors = {name: parameter.detach().half() for name, parameter in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = "float32"
    model.config.save_pretrained(out)
    build_tokenizer().save_pretrained(out)


@torch.no_grad()
def heldout_losses(folder: Path, corpus: Corpus, context: int = 256, rows: int = 128) -> dict[str, float]:
    """Mean nats per byte over evenly spaced windows of each held-out stream, with the weights as they were stored."""
    model = LlamaForCausalLM.from_pretrained(folder)
    losses = {}
    for kind, stream in (("source", corpus.heldout_source), ("prose", corpus.heldout_prose)):
        starts = np.linspace(0, len(stream) - context - 1, rows).astype(np.int64)
        parts = [windows(stream, part, context) for part in np.split(starts, 8)]
        losses[kind] = round(sum(loss_of(model, part).item() for part in parts) / len(parts), 4)
    return losses


def model_card(record: dict[str, Any], parameters: int) -> str:
    """The README of the model's folder, filled in from what ``training.json`` records."""
    return CARD.format(parameters=parameters, **record["heldout_nats_per_byte"], **record)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; a budget that is not positive is an error of usage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSET, help="folder of the finished model and of the running state")
    parser.add_argument("--minutes", type=float, default=65.0, help="wall-clock budget of the training loop")
    parser.add_argument("--steps", type=int, default=0, help="budget in steps; overrules --minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size, a multiple of 16")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    args = parser.parse_args(arguments)
    if args.steps < 0 or (args.steps == 0 and args.minutes <= 0):
        parser.error("--minutes or --steps must be above zero")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train, export, measure the exported model and write down how it was made."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus(args.stdlib)
    print(f"corpus: {len(corpus.source)} bytes of source, {len(corpus.prose)} of prose, SHA-256 {corpus.sha256}")
    model = build_model(args.hidden, args.layers, args.seed)
    progress = train(model, corpus, args)
    export(model, args.out)
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus_sha256": corpus.sha256,
        "corpus_bytes": {"source": len(corpus.source), "prose": len(corpus.prose)},
        "seed": args.seed,
        "threads": args.threads,
        "precision": args.precision,
        "peak_learning_rate": args.lr,
        "steps": progress["step"],
        "tokens_seen": progress["tokens"],
        "seconds": round(progress["seconds"], 1),
        "heldout_nats_per_byte": heldout_losses(args.out, corpus),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.out / "README.md").write_text(model_card(record, sum(p.numel() for p in model.parameters())))
    (args.out / STATE).unlink(missing_ok=True)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
