"""What a forward-only client pays over plain forwards: time over (P + 1) of them, peak memory over one.

    python benchmarks/client_step.py

A random OPT-shaped model (hidden 256, 8 layers, 4 heads, ffn 1024, vocab 8192), cut 2, 8 x 128 and 1 x 32 tokens.
Time is the median of the paired ratios, forward, answer and update against P + 1 plain no-grad forwards run right after
it; peaks are those of ``memory.MemoryMeter``, parameters and optimizer state included. Below a table, for LoRA, what no
batch of probes can beat: a step written by hand, and a forward on the rows and one on P copies of them, nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from hosfl_lightning.clients import ForwardOnlyClient
from hosfl_lightning.clients.batched_probes import Size
from hosfl_lightning.memory import MemoryMeter, plain_forward_peak, storage_bytes
from hosfl_lightning.optim import SGD, AdamW, UpdateRule, ZerothOrder
from hosfl_lightning.run.identity import hardware
from hosfl_lightning.split import Lora, LoraHalf, add_lora, run, split

CUT = 2


SHAPES = ((8, 128), (1, 32))
PROBES = 4


def client(full: bool, rule: UpdateRule, probes: int, probe_batch: Size = 1) -> ForwardOnlyClient:
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
    return ForwardOnlyClient(half, ZerothOrder(trained, rule, module=half, probes=probes), probe_batch)


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


class ByHand:
    """P probes of LoRA as one forward on P copies of the rows, as one would write it for this one model.

    Signs come from torch's generator, are kept from the probes to the update, and θ is that of all leaves in one run of
    memory; nothing is checked, and nothing is encoded.
    """

    def __init__(self, who: ForwardOnlyClient) -> None:
        self.half = who.half
        self.leaves = [part for part in who.half.modules() if isinstance(part, nn.Linear) and _is_lora(part, who)]
        self.shapes = [leaf.weight.shape for leaf in self.leaves]
        self.flat = torch.cat([leaf.weight.detach().flatten() for leaf in self.leaves])
        for leaf, flat, shape in zip(self.leaves, self.flat.split([s.numel() for s in self.shapes]), self.shapes):
            leaf.weight.data = flat.view(shape)

    def step(self, batch: dict[str, Tensor], probes: int = PROBES, mu: float = 1e-3, lr: float = 1e-4) -> None:
        """A client's part of one round, with SGD."""
        z = run(self.half, batch)
        multiplier = torch.full_like(z, 1e-3)
        u = torch.randint(2, (probes, len(self.flat)), dtype=torch.float32).mul_(2).sub_(1)
        sizes = [shape.numel() for shape in self.shapes]
        for leaf, moved, shape in zip(self.leaves, (self.flat + mu * u).split(sizes, 1), self.shapes):
            vars(leaf)["forward"] = partial(_product, moved.view(probes, *shape).transpose(1, 2))
        moved_z = run(self.half, {name: tensor.repeat(probes, 1) for name, tensor in batch.items()})
        for leaf in self.leaves:
            del vars(leaf)["forward"]
        changes = (moved_z.view(probes, *z.shape) - z).mul_(multiplier).flatten(1).sum(1, dtype=torch.float64)
        self.flat.addmv_(u.T, changes.float(), alpha=-lr / probes / mu)


def _is_lora(part: nn.Linear, who: ForwardOnlyClient) -> bool:
    return any(part.weight is parameter for parameter in who.optimizer.parameters)


def _product(weights: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(x.reshape(len(weights), -1, x.shape[-1]), weights).view(*x.shape[:-1], -1)


def copies(who: ForwardOnlyClient, batch: dict[str, Tensor]) -> None:
    """The arithmetic of a step alone: a forward on the rows, and one on P copies of them, as if nothing were moved."""
    run(who.half, batch)
    run(who.half, {name: tensor.repeat(PROBES, 1) for name, tensor in batch.items()})


def ratios(work: Callable[[int], object], plain: Callable[[], object], repeats: int) -> tuple[float, float]:
    """The median of paired ratios of time, and the median seconds of ``plain``; one more to warm up."""
    times = [(seconds(partial(work, repeat)), seconds(plain)) for repeat in range(repeats + 1)][1:]
    return statistics.median(ours / theirs for ours, theirs in times), statistics.median(theirs for _, theirs in times)


def row(full: bool, rule: UpdateRule, probes: int, size: Size, batch: dict[str, Tensor], repeats: int) -> str:
    """Measure one client; a row of the table."""
    who, rows = client(full, rule, probes, size), [slice(0, len(batch["input_ids"]))]
    forward_bytes, peak_bytes = peaks(who, batch, rows)
    plain = partial(forwards, who, batch, rows, probes + 1)
    ratio, plain_seconds = ratios(partial(step, who, batch, rows), plain, repeats)
    return (
        f"| {'full' if full else 'LoRA'}, {type(rule).__name__} | {probes} | {size} "
        f"| {1e3 * plain_seconds / (probes + 1):.1f} ms | {ratio:.2f} "
        f"| {forward_bytes / 2**20:.1f} MiB | {peak_bytes / forward_bytes:.3f} |"
    )


@torch.no_grad()
def bounds(batch: dict[str, Tensor], repeats: int) -> tuple[float, float]:
    """Of ``P`` probes over P + 1 plain forwards: a step by hand, and the arithmetic alone."""
    who, rows = client(False, SGD(lr=1e-4), PROBES), [slice(0, len(batch["input_ids"]))]
    plain, by_hand = partial(forwards, who, batch, rows, PROBES + 1), ByHand(who)
    return (
        ratios(lambda _: by_hand.step(batch), plain, repeats)[0],
        ratios(lambda _: copies(who, batch), plain, repeats)[0],
    )


def minibatch(examples: int = 8, tokens: int = 128) -> dict[str, Tensor]:
    """Tokens, none of them padding."""
    ids = torch.randint(0, 8192, (examples, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def quick(repeats: int = 9) -> dict[str, float]:
    """Time over P + 1 plain forwards, P = 4, SGD, probe_batch: auto."""
    torch.manual_seed(0)
    found = {}
    for full, (examples, tokens) in ((False, (8, 128)), (False, (1, 32)), (True, (8, 128))):
        who, batch, rows = client(full, SGD(lr=1e-4), PROBES, "auto"), minibatch(examples, tokens), [slice(0, examples)]
        plain = partial(forwards, who, batch, rows, PROBES + 1)
        name = f"{'full' if full else 'LoRA'} {examples}x{tokens}, time / (P+1) forwards"
        found[name] = ratios(partial(step, who, batch, rows), plain, repeats * (4 if examples == 1 else 1))[0]
    by_hand, arithmetic = bounds(minibatch(1, 32), 4 * repeats)
    return found | {
        "LoRA 1x32 by hand, time / (P+1) forwards": by_hand,
        "LoRA 1x32 roofline, time / (P+1) forwards": arithmetic,
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{hardware(torch.device('cpu'))}, fp32")
    for examples, tokens in SHAPES:
        batch = minibatch(examples, tokens)
        print(f"\n{examples} x {tokens}\n")
        print("| client | P | probe_batch | plain forward | time / (P + 1) forwards | its peak | client's peak / it |")
        print("|---|---|---|---|---|---|---|")
        for full, rule, probes in product((True, False), (SGD(lr=1e-4), AdamW(lr=1e-4)), (1, PROBES, 16)):
            sizes: tuple[Size, ...] = (1,) if full or probes == 1 else (1, "auto", probes)
            for size in sizes:
                print(row(full, rule, probes, size, batch, arguments.repeats), flush=True)
        by_hand, arithmetic = bounds(batch, arguments.repeats)
        print(f"\nLoRA, P = {PROBES}: by hand {by_hand:.2f}; copies of the rows and nothing else {arithmetic:.2f}")


if __name__ == "__main__":
    main()
