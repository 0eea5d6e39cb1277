"""What a forward-only client pays over plain forwards: time over (P + 1) of them, peak memory over one.

    python benchmarks/client_step.py

An OPT-shaped random-init model (hidden 256, 8 layers, 4 heads, ffn 1024, vocab 8192), cut 2, batch 8 x 128. Time is the
median of the paired ratios, forward, answer and update against P + 1 plain no-grad forwards run right after it; peaks
are those of ``memory.MemoryMeter``, parameters and optimizer state included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from hosfl_lightning.clients import ForwardOnlyClient
from hosfl_lightning.memory import MemoryMeter, plain_forward_peak, storage_bytes
from hosfl_lightning.optim import SGD, AdamW, UpdateRule, ZerothOrder
from hosfl_lightning.run.identity import hardware
from hosfl_lightning.split import Lora, LoraHalf, add_lora, run, split

CUT = 2


def client(full: bool, rule: UpdateRule, probes: int) -> ForwardOnlyClient:
    """The client half, trained by LoRA on q_proj and v_proj or in full."""
    config = OPTConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, ffn_dim=1024,
        word_embed_proj_dim=256, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    whole = OPTForCausalLM(config).eval()
    if not full:
        whole = add_lora(whole, CUT, Lora(LoraHalf(), LoraHalf()), head=False).get_base_model()
    half, _ = split(whole, CUT, check=False)
    trained = [(n, p) for n, p in half.named_parameters() if p.requires_grad]
    return ForwardOnlyClient(half, ZerothOrder(trained, rule, module=half, probes=probes))


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def step(who: ForwardOnlyClient, batch: dict[str, Tensor], rows: list[slice], round: int) -> None:
    """A client's part of one round."""
    anchor, basis = who.forward(batch, rows), who.optimizer.basis(round)
    values = who.answer(batch, anchor, torch.full_like(anchor.z, 1e-3), rows, basis)
    who.optimizer.record(values[0], basis)
    who.optimizer.step()


def peaks(who: ForwardOnlyClient, batch: dict[str, Tensor], rows: list[slice]) -> tuple[int, int]:
    """Bytes of a plain forward, and of a client's part of one round, both with what it always holds."""
    static = storage_bytes([*who.half.parameters(), *who.half.buffers()])
    forward = plain_forward_peak(lambda: run(who.half, batch))
    step(who, batch, rows, 0)  # so that the optimizer's state is there while the next one is measured
    state = storage_bytes(moment for slots in who.optimizer.state.values() for moment in slots.values())
    with MemoryMeter() as meter, meter.role("client"):
        step(who, batch, rows, 0)
    return static + forward, static + state + meter.peak("client")


def forwards(who: ForwardOnlyClient, batch: dict[str, Tensor], rows: list[slice], times: int) -> None:
    """Plain no-grad forwards."""
    for _ in range(times):
        who.forward(batch, rows)


def row(full: bool, rule: UpdateRule, probes: int, batch: dict[str, Tensor], repeats: int) -> str:
    """Measure one client; a row of the table."""
    who, rows = client(full, rule, probes), [slice(0, len(batch["input_ids"]))]
    forward_bytes, peak_bytes = peaks(who, batch, rows)
    plain, ratios = [], []
    for repeat in range(repeats + 1):  # one to warm up
        ours = seconds(partial(step, who, batch, rows, repeat))
        plain.append(seconds(partial(forwards, who, batch, rows, probes + 1)))
        ratios.append(ours / plain[-1])
    forward_ms, ratio = 1e3 * statistics.median(plain[1:]) / (probes + 1), statistics.median(ratios[1:])
    return (
        f"| {'full' if full else 'LoRA'} | {type(rule).__name__} | {probes} | {forward_ms:.0f} ms | {ratio:.2f} "
        f"| {forward_bytes / 2**20:.1f} MiB | {peak_bytes / forward_bytes:.3f} |"
    )


def minibatch() -> dict[str, Tensor]:
    """8 x 128 tokens."""
    ids = torch.randint(0, 8192, (8, 128), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    batch = minibatch()
    print(f"{hardware(torch.device('cpu'))}, fp32\n")
    print("| client | rule | P | plain forward | time / (P + 1) forwards | forward's peak | client's peak / it |")
    print("|---|---|---|---|---|---|---|")
    for full in (False, True):
        for rule in (SGD(lr=1e-4), AdamW(lr=1e-4)):
            for probes in (1, 4, 16):
                print(row(full, rule, probes, batch, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
