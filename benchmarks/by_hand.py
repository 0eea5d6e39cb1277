"""What a round costs beside one written by hand in plain PyTorch: the same halves, the same work, nothing around it.

    python -m benchmarks.by_hand

By hand a round is loops over tensors that lie ready: forwards of the client half, a forward and backward of the
server's with ``torch.optim.AdamW``, ``P`` forwards with the adapters moved in place along directions of torch's own
generator, ``⟨λ, z⟩`` summed in fp64, and AdamW on the mean of the answers. No message, no check, no record. Between any
two rounds of a run one by hand is timed, so that the ratio is the median of pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.data.tokenization import Example
from hosfl_lightning.optim import AdamW
from hosfl_lightning.run.identity import hardware
from hosfl_lightning.split import Lora, LoraHalf

PROBES, MU, LR = 4, 1e-3, 1e-3
#: Clients, examples of each in a round, tokens; and how the round is simulated.
CASES: dict[str, tuple[int, int, int, str]] = {
    "K=8, 4x128, per_client": (8, 4, 128, "per_client"),
    "K=8, 4x128, batched": (8, 4, 128, "batched"),
    "K=64, 1x32, per_client": (64, 1, 32, "per_client"),
    "K=64, 1x32, batched": (64, 1, 32, "batched"),
    "K=100, 1x32, per_client": (100, 1, 32, "per_client"),
    "K=1, 1x32, per_client": (1, 1, 32, "per_client"),
}
#: Of `quick`, with the repetitions that fit in half a minute.
QUICK = {"K=8, 4x128, per_client": 7, "K=64, 1x32, per_client": 5, "K=8, 4x128, batched": 7}


class Tokens(FederatedDataModule):
    """Random rows, each client's as many as it uses a round."""

    def __init__(self, clients: int, batch: int, tokens: int) -> None:
        super().__init__(batch_size=batch)
        ids = torch.randint(3, 250, (clients, batch, tokens), generator=torch.Generator().manual_seed(0))
        self.ids = ids

    def setup(self, stage: str) -> None:
        """Of every client, and one row to validate on."""
        self.clients = [[Example(row, list(row)) for row in rows] for rows in self.ids.tolist()]
        self.validation_set = [self.clients[0][0]]


class ByHand:
    """A round of HO-SFL on copies of a model's halves, client by client or all in one batch.

    Args:
        model: With LoRA on both halves.
        ids: ``(K, B, S)``, every token a label.
        joint: The clients run as one batch.
    """

    def __init__(self, model: SplitCausalLM, ids: Tensor, joint: bool) -> None:
        self.client, self.server = copy.deepcopy(model.client_half), copy.deepcopy(model.server_half)
        self.batches = [ids.flatten(0, 1)] if joint else list(ids)
        self.rows = len(ids) if joint else 1
        self.theta = [p for n, p in self.client.named_parameters() if "lora_" in n]
        for parameter in self.client.parameters():
            parameter.requires_grad_(False)
        trained = [p for n, p in self.server.named_parameters() if "lora_" in n]
        for parameter in trained:
            parameter.requires_grad_(True)
        self.server_optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
        self.client_optimizer = torch.optim.AdamW(self.theta, lr=LR)
        self.generator = torch.Generator().manual_seed(0)

    def signs(self) -> list[Tensor]:
        """A direction, for each tensor."""
        return [torch.randint(0, 2, p.shape, generator=self.generator).float().mul_(2).sub_(1) for p in self.theta]

    def inner(self, z: Tensor, multiplier: Tensor) -> Tensor:
        """``⟨λ_k, z_k⟩`` of each client of a batch, fp64."""
        return (z.double() * multiplier.double()).view(self.rows, -1).sum(1)

    @torch.no_grad()
    def answer(self, ids: Tensor, mask: Tensor, base: Tensor, multiplier: Tensor, u: list[list[Tensor]]) -> Tensor:
        """Step 4: ``(P, rows)`` projected gradients."""
        saved, values = [p.clone() for p in self.theta], []
        for direction in u:
            torch._foreach_add_(self.theta, direction, alpha=MU)
            values.append((self.inner(self.client(ids, mask), multiplier) - base) / MU)
            torch._foreach_copy_(self.theta, saved)
        return torch.stack(values)

    def round(self) -> float:
        """Steps 2 to 6; the loss."""
        weight = 1 / len(self.batches)
        with torch.no_grad():
            masks = [torch.ones_like(ids) for ids in self.batches]
            zs = [self.client(ids, mask) for ids, mask in zip(self.batches, masks)]
        self.server_optimizer.zero_grad()
        multipliers, total = [], torch.zeros(())
        for ids, mask, z in zip(self.batches, masks, zs):
            logits = self.server(z.requires_grad_(), mask)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            (loss * weight).backward()
            assert z.grad is not None
            multipliers.append(z.grad / weight * self.rows)
            total += loss.detach() * weight
        u = [self.signs() for _ in range(PROBES)]
        answers = [
            self.answer(ids, mask, self.inner(z.detach(), multiplier), multiplier, u)
            for ids, mask, z, multiplier in zip(self.batches, masks, zs, multipliers)
        ]
        mean = torch.cat(answers, dim=1).mean(1) / PROBES
        for i, parameter in enumerate(self.theta):
            parameter.grad = sum((v * one[i] for v, one in zip(mean.float(), u)), torch.zeros(()))
        self.server_optimizer.step()
        self.client_optimizer.step()
        return float(total)


class Beside(Callback):
    """Between two rounds one by hand; the first rounds of both warm up."""

    def __init__(self, by_hand: ByHand) -> None:
        self.by_hand = by_hand
        self.pairs: list[tuple[float, float]] = []
        self.began = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Whatever happened since the last one by hand was the round's."""
        ended = time.perf_counter()
        self.by_hand.round()
        now = time.perf_counter()
        if self.began:
            self.pairs.append((ended - self.began, now - ended))
        self.began = now


def pairs(case: str, rounds: int) -> list[tuple[float, float]]:
    """Seconds of a round and of one by hand right after it."""
    clients, batch, tokens, simulation = CASES[case]
    half = LoraHalf(target_modules=["q_proj", "v_proj"])
    model = SplitCausalLM("tiny_lm", cut=3, lora=Lora(client=half, server=LoraHalf(target_modules="all-linear")))
    data = Tokens(clients, batch, tokens)
    clock = Beside(ByHand(model, data.ids, joint=simulation == "batched"))
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
        Orchestrator(
            HOSFL(probes=PROBES, mu=MU, client_optimizer=AdamW(lr=LR)), max_rounds=rounds + 1,
            simulation=simulation, val_check_interval=rounds + 1, default_root_dir=root, callbacks=[clock],  # type: ignore[arg-type]
            enable_progress_bar=False, enable_checkpointing=False,
        ).fit(model, data)  # fmt: skip
    return clock.pairs


def ratio(found: list[tuple[float, float]]) -> float:
    """The median of pairs."""
    return statistics.median(ours / theirs for ours, theirs in found)


def quick() -> dict[str, float]:
    """Ratios of this module's goals, in half a minute on one thread."""
    torch.set_num_threads(1)
    return {f"{case}, round / by hand": ratio(pairs(case, rounds)) for case, rounds in QUICK.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{hardware(torch.device('cpu'))}, fp32, P = {PROBES}\n")
    print("| case | round | by hand | round / by hand |")
    print("|---|---|---|---|")
    for case in arguments.cases:
        found = pairs(case, arguments.rounds)
        ours, theirs = (1e3 * statistics.median(times) for times in zip(*found))
        print(f"| {case} | {ours:.1f} ms | {theirs:.1f} ms | {ratio(found):.3f} |", flush=True)


if __name__ == "__main__":
    main()
