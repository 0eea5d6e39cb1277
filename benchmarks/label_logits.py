"""What logits cost the server: at labelled positions alone against all positions, memory and time.

    python -m benchmarks.label_logits

A Gemma-3-shaped server half with random weights (hidden 640, one layer, 262,144 words, tied head): its forward and its
backward to z, by the processor's seconds and by the peak of `MemoryMeter` beyond parameters. The head's share is that
peak less the one of the same half with the mean of the last hidden state as its loss. A prompt has one label a row; of
a text every position has one. The plain way, logits at every position, is left out where they would be over 2 GiB.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from hosfl_lightning.memory import MemoryMeter
from hosfl_lightning.models.causal_lm import losses
from hosfl_lightning.run.identity import hardware
from hosfl_lightning.split import ServerHalf, split
from hosfl_lightning.split.closed_form import IGNORE
from hosfl_lightning.split.labelled import read_labelled

WORDS, HIDDEN = 262_144, 640
SHAPES = [(12, 114, "prompt"), (32, 128, "prompt"), (4, 114, "text"), (32, 128, "text")]
#: Of logits that the plain way may make.
MOST = 2 << 30


def server_half() -> ServerHalf:
    """One layer of Gemma-3-270M, its head, and nothing that is trained."""
    config = Gemma3TextConfig(
        vocab_size=WORDS, hidden_size=HIDDEN, num_hidden_layers=2, intermediate_size=2048, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, max_position_embeddings=256,
    )  # fmt: skip
    whole = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    return split(whole, 1, check=False)[1]


def backbone(half: ServerHalf, z: Tensor, targets: Tensor) -> Tensor:
    """A loss without the head."""
    first = torch.full_like(targets, IGNORE)
    first[0, 0] = 0
    return read_labelled(half, z, None, first, lambda logits, _: logits[:, :1]).mean()


def every_position(half: ServerHalf, z: Tensor, targets: Tensor) -> Tensor:
    """The plain way."""
    return losses(half(z, None).flatten(0, 1), targets.flatten())[targets.flatten() != IGNORE].mean()


def labelled(half: ServerHalf, z: Tensor, targets: Tensor) -> Tensor:
    """As `SplitCausalLM` trains."""
    return read_labelled(half, z, None, targets, losses).mean()


def cost(half: ServerHalf, z: Tensor, targets: Tensor, loss: Callable[..., Tensor]) -> tuple[float, float, float]:
    """Loss, the processor's seconds of a forward and a backward, and the peak in MiB beyond parameters."""
    began = time.process_time()
    value = loss(half, z, targets)
    torch.autograd.grad(value, z)
    seconds = time.process_time() - began
    found = float(value.detach())
    del value
    meter = MemoryMeter()
    meter.adopt("held", [*half.parameters(), *half.buffers(), z, targets])
    with meter, meter.role("step"):
        torch.autograd.grad(loss(half, z, targets), z)
    return found, seconds, meter.peak("step") / 2**20


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    half = server_half()
    print(f"{hardware(torch.device('cpu'))}, one thread\n")
    print("| batch | labels | way | loss | seconds | peak, MiB | of the head |\n|---|---|---|---|---|---|---|")
    for batch, length, kind in SHAPES:
        z = torch.randn(batch, length, HIDDEN, requires_grad=True)
        targets = torch.randint(0, WORDS, (batch, length))
        if kind == "prompt":
            targets[:, :-1] = IGNORE
        _, _, least = cost(half, z, targets, backbone)
        ways = {"labelled, in pieces": labelled, "all positions": every_position}
        for name, way in ways.items():
            if way is every_position and 4 * batch * length * WORDS > MOST:
                continue
            value, seconds, peak = cost(half, z, targets, way)
            shape, count = f"{batch} x {length}", int((targets != IGNORE).sum())
            figures = f"{value:.6f} | {seconds:.1f} | {peak:,.0f} | {peak - least:,.0f}"
            print(f"| {shape} | {kind}, {count:,} | {name} | {figures} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
