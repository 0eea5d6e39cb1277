"""`ZerothOrderTraining` in a ``lightning.Trainer`` against MeZO's own step: time and peak memory, side by side.

    python -m benchmarks.mezo

An OPT-shaped random-init model (hidden 256, 8 layers, 4 heads, ffn 1024, vocab 8192, tied), fp32, SGD. MeZO's step is
Algorithm 1 of the paper (arXiv 2305.17333), its three functions written in place and in as few passes as PyTorch has.
A batch of ours runs from the Trainer's ``on_train_batch_start`` to its ``on_train_batch_end``, hooks, ``self.log`` and
optimizer loop included, the data loader not; then MeZO steps a twin on that batch. Figures are medians of the paired
ratios; peaks are those of ``memory.MemoryMeter``, parameters included.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import OPTConfig, OPTForCausalLM

from hosfl_lightning.callbacks import ZerothOrderTraining
from hosfl_lightning.memory import MemoryMeter, storage_bytes
from hosfl_lightning.optim import SGD
from hosfl_lightning.run.identity import hardware
from hosfl_lightning.split import Lora, LoraHalf, add_lora

MU, LR, VOCABULARY = 1e-3, 1e-6, 8192
SHAPES = {"8x128": (8, 128), "2x512": (2, 512)}
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "inference_mode": False, "max_epochs": 1,
}  # fmt: skip


class Language(L.LightningModule):
    """A causal language model as users write it, which knows nothing of zeroth order."""

    def __init__(self, full: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = OPTConfig(
            vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, ffn_dim=1024,
            word_embed_proj_dim=256, max_position_embeddings=512, dropout=0.0,
        )  # fmt: skip
        whole = OPTForCausalLM(config)
        half = LoraHalf()
        self.model = whole if full else add_lora(whole, 4, Lora(half, half), head=False).get_base_model()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=LR)


class MeZO:
    """Algorithm 1, and with several probes its n-SPSA: ``z`` is drawn again from its seed wherever it is needed."""

    def __init__(self, model: nn.Module, probes: int) -> None:
        self.model, self.probes = model.eval(), probes
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.seeds = iter(range(1 << 30))
        self.without_grad: Callable[[], Any] = torch.inference_mode

    @torch.no_grad()
    def perturb(self, seed: int, scale: float) -> None:
        """``θ ← θ + scale · z``."""
        torch.manual_seed(seed)
        for parameter in self.trained:
            parameter.add_(torch.randn_like(parameter), alpha=scale)

    def forward(self, batch: Tensor) -> Tensor:
        """The loss at θ as it is now."""
        with self.without_grad():
            loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def step(self, batch: Tensor) -> None:
        """Two forwards a probe, ``θ`` restored by subtraction, then ``θ ← θ − η · g · z``."""
        found = []
        for _ in range(self.probes):
            seed = next(self.seeds)
            self.perturb(seed, MU)
            plus = self.forward(batch)
            self.perturb(seed, -2 * MU)
            minus = self.forward(batch)
            self.perturb(seed, MU)
            found.append((seed, ((plus - minus) / (2 * MU)).item()))
        for seed, gradient in found:  # the update is a perturbation by −η · g
            self.perturb(seed, -LR * gradient / self.probes)


class Beside(Callback):
    """Measures each batch of the Trainer, then MeZO's step on the same batch. Last of the callbacks."""

    def __init__(self, measure: Callable[[], Any], other: MeZO) -> None:
        self.measure, self.other = measure, other
        self.pairs: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.ours = self.measure()
        self.ours.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, _: Any, batch: Any, *__: Any
    ) -> None:
        self.ours.__exit__(None, None, None)
        with (theirs := self.measure()):
            self.other.step(batch)
        self.pairs.append((self.ours.value, theirs.value))


class Seconds:
    """Wall time."""

    def __enter__(self) -> Seconds:
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.value = time.perf_counter() - self.began


class Bytes:
    """Peak of what is made meanwhile."""

    def __enter__(self) -> Bytes:
        self.meter = MemoryMeter()
        self.meter.__enter__()
        self.role = self.meter.role("step")
        self.role.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self.role.__exit__(None, None, None)
        self.meter.__exit__(None, None, None)
        self.value = self.meter.peak("step")


@contextmanager
def unsaid() -> Iterator[None]:
    """Without the Trainer's advice on workers and loggers."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pairs(measure: Callable[[], Any], full: bool, estimator: str, shape: str, probes: int, batches: int) -> list[Any]:
    """(ours, MeZO's) of all batches but the first, which checks that training_step repeats itself."""
    module, twin = Language(full), Language(full)
    ids = torch.randint(0, VOCABULARY, SHAPES[shape], generator=torch.Generator().manual_seed(0))
    beside = Beside(measure, MeZO(twin.model, probes))
    if measure is Bytes:  # the meter does not see into what inference mode keeps whole, as the loss
        beside.other.without_grad = torch.no_grad
    order = ZerothOrderTraining(SGD(lr=LR), probes=probes, mu=MU, estimator=estimator)
    with unsaid():
        batch_after_batch: Any = [ids] * (batches + 1)
        data: DataLoader[Any] = DataLoader(batch_after_batch, batch_size=None)
        L.Trainer(**QUIET, callbacks=[order, beside]).fit(module, data)
    return beside.pairs[1:]


def time_ratio(full: bool, estimator: str, shape: str, probes: int, batches: int) -> tuple[float, float]:
    """Seconds of MeZO's step, and ours over it."""
    found = pairs(Seconds, full, estimator, shape, probes, batches)
    return statistics.median(b for _, b in found), statistics.median(a / b for a, b in found)


def memory_ratio(full: bool, estimator: str, shape: str, probes: int) -> tuple[float, float]:
    """Peak bytes of MeZO's step, and ours over it, both with the parameters."""
    held = storage_bytes(Language(full).parameters())
    ours, theirs = pairs(Bytes, full, estimator, shape, probes, 1)[0]
    return held + theirs, (held + ours) / (held + theirs)


def name(full: bool, estimator: str, shape: str) -> str:
    """Of a ratio."""
    return f"{'full' if full else 'LoRA'}, {estimator}, {shape}"


def quick(batches: int = 5) -> dict[str, float]:
    """The ratios of issue and goal, one probe."""
    found = {}
    for full, shape, estimator in product((True, False), SHAPES, ("central", "forward")):
        row = name(full, estimator, shape)
        found[f"MeZO, {row}, time"] = time_ratio(full, estimator, shape, 1, batches)[1]
        found[f"MeZO, {row}, memory"] = memory_ratio(full, estimator, shape, 1)[1]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--probes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{hardware(torch.device('cpu'))}, fp32\n")
    print("| trained, estimator, shape | P | MeZO's step | ours / it | MeZO's peak | ours / it |")
    print("|---|---|---|---|---|---|")
    for probes, full, shape, estimator in product(arguments.probes, (True, False), SHAPES, ("central", "forward")):
        seconds, ratio = time_ratio(full, estimator, shape, probes, arguments.repeats)
        peak, share = memory_ratio(full, estimator, shape, probes)
        print(f"| {name(full, estimator, shape)} | {probes} | {1e3 * seconds:.0f} ms | {ratio:.2f} "
              f"| {peak / 2**20:.1f} MiB | {share:.3f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
