"""`ZerothOrderTraining` in a ``lightning.Trainer`` against MeZO's own step: time and peak memory, side by side.

    python -m benchmarks.mezo

An OPT-shaped random-init model (hidden 256, 8 layers, 4 heads, ffn 1024, vocab 8192, tied), fp32, SGD. MeZO's step is
Algorithm 1 of the paper (arXiv 2305.17333), its three functions written in place and in as few passes as PyTorch has.
In a batch of the Trainer ours is measured, then MeZO steps a twin on that batch. "Step" is what the callback does: the
module's ``training_step`` at both sides, with its ``self.log``, the update, and what the callback logs. "Batch" is all
from ``on_train_batch_start`` to ``on_train_batch_end``: Trainer's own loop, closures and hooks come in, the data loader
does not. Seconds are the processor's, ratios the medians of pairs; peaks are those of ``memory.MemoryMeter`` over a
batch, parameters included.
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
from typing import Any, NamedTuple

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


class Row(NamedTuple):
    """Of the table."""

    full: bool
    shape: str
    estimator: str

    def __str__(self) -> str:
        return f"{'full' if self.full else 'LoRA'}, {self.estimator}, {self.shape}"


ROWS = [Row(*one) for one in product((True, False), SHAPES, ("central", "forward"))]
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "inference_mode": False, "max_epochs": 1,
}  # fmt: skip


class Language(L.LightningModule):
    """A causal language model as users write it, which knows nothing of zeroth order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=LR)


def opt_shaped(full: bool) -> nn.Module:
    """Of random weights, trained in full or by LoRA."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, ffn_dim=1024,
        word_embed_proj_dim=256, max_position_embeddings=512, dropout=0.0,
    )  # fmt: skip
    whole, half = OPTForCausalLM(config), LoraHalf()
    return whole if full else add_lora(whole, 4, Lora(half, half), head=False).get_base_model()


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


class Measured(ZerothOrderTraining):
    """Adds up what its own parts take of a batch."""

    alone = 0.0

    def _training_step(self, *args: Any) -> Any:
        with Seconds() as seconds:
            output = super()._training_step(*args)
        self.alone = seconds.value
        return output

    def on_before_optimizer_step(self, *args: Any) -> None:
        with Seconds() as seconds:
            super().on_before_optimizer_step(*args)
        self.alone += seconds.value

    def on_train_batch_end(self, *args: Any) -> None:
        with Seconds() as seconds:
            super().on_train_batch_end(*args)
        self.alone += seconds.value


class Beside(Callback):
    """Measures each batch of the Trainer, then MeZO's step on the same batch. Last of the callbacks."""

    def __init__(self, measure: Callable[[], Any], ours: Measured, other: MeZO) -> None:
        self.measure, self.ours, self.other = measure, ours, other
        self.found: list[tuple[float, float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.whole = self.measure()
        self.whole.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, _: Any, batch: Any, *__: Any
    ) -> None:
        self.whole.__exit__(None, None, None)
        with (theirs := self.measure()):
            self.other.step(batch)
        self.found.append((self.ours.alone, self.whole.value, theirs.value))


class Seconds:
    """Of the processor: other work on the machine counts little."""

    def __enter__(self) -> Seconds:
        self.began = time.process_time()
        return self

    def __exit__(self, *_: Any) -> None:
        self.value = time.process_time() - self.began


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


def batches(measure: Callable[[], Any], row: Row, probes: int, count: int) -> list[tuple[float, float, float]]:
    """(step, batch, MeZO's) of all but the first batch, which checks that training_step repeats itself."""
    module, other = Language(opt_shaped(row.full)), MeZO(opt_shaped(row.full), probes)
    if measure is Bytes:  # the meter does not see into what inference mode keeps whole, as the loss
        other.without_grad = torch.no_grad
    ids = torch.randint(0, VOCABULARY, SHAPES[row.shape], generator=torch.Generator().manual_seed(0))
    ours = Measured(SGD(lr=LR), probes=probes, mu=MU, estimator=row.estimator)
    beside = Beside(measure, ours, other)
    same: Any = [ids] * (count + 1)
    with unsaid():
        L.Trainer(**QUIET, callbacks=[ours, beside]).fit(module, DataLoader(same, batch_size=None))
    return beside.found[1:]


def time_ratios(row: Row, probes: int, count: int) -> tuple[float, float, float]:
    """Seconds of MeZO's step, and our step and batch over it."""
    found = batches(Seconds, row, probes, count)
    step, batch = (statistics.median(one[i] / one[2] for one in found) for i in (0, 1))
    return statistics.median(one[2] for one in found), step, batch


def memory_ratio(row: Row, probes: int) -> tuple[float, float]:
    """Peak bytes of MeZO's step, and ours over it, both with the parameters."""
    held = storage_bytes(opt_shaped(row.full).parameters())
    _, ours, theirs = batches(Bytes, row, probes, 1)[0]
    return held + theirs, (held + ours) / (held + theirs)


def quick(count: int = 3) -> dict[str, float]:
    """The ratios, one probe; the peak does not depend on the estimator."""
    found: dict[str, float] = {}
    for row in ROWS:
        _, step, batch = time_ratios(row, 1, count)
        found |= {f"{row}, time / MeZO's step": step, f"{row}, batch of Trainer / MeZO's step": batch}
        if row.estimator == "central":
            found[f"{row}, memory / MeZO's"] = memory_ratio(row, 1)[1]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--probes", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{hardware(torch.device('cpu'))}, fp32\n")
    print("| trained, estimator, shape | P | MeZO's step | our step / it | our batch / it | MeZO's peak | ours / it |")
    print("|---|---|---|---|---|---|---|")
    for probes, row in product(arguments.probes, ROWS):
        seconds, step, batch = time_ratios(row, probes, arguments.repeats)
        peak, share = memory_ratio(row, probes)
        print(f"| {row} | {probes} | {1e3 * seconds:.0f} ms | {step:.3f} | {batch:.3f} | {peak / 2**20:.1f} MiB "
              f"| {share:.3f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
