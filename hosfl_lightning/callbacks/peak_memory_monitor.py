"""PeakMemoryMonitor: what one client needs, beside a plain forward of the same batch, and what the server needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.clients import Client, Cohort
from hosfl_lightning.memory import MemoryMeter, plain_forward_peak
from hosfl_lightning.optim import Basis
from hosfl_lightning.servers.server import loss_of


class PeakMemoryMonitor(Callback):
    """Measures the memory of each role once, before the first round, on *one* client's batch.

    Static bytes (parameters, buffers, optimizer state) are exact sums; working bytes are the peak of live tensor
    storage during the real steps, followed operation by operation. The steps run on the real client and everything is
    put back, so measured and unmeasured runs are the same run. On CUDA the allocator's own peak is logged as well.

    | logged key | meaning | unit |
    |---|---|---|
    | ``memory/client_static_bytes`` | client parameters, buffers, optimizer state | bytes |
    | ``memory/client_forward_bytes`` | parameters, buffers + a plain no-grad forward: inference | bytes |
    | ``memory/client_peak_bytes`` | static + the highest of forward, answer to λ, update | bytes |
    | ``memory/client_waiting_bytes`` | held while waiting for λ, beside the static bytes and the batch | bytes |
    | ``memory/server_static_bytes`` | server parameters and buffers | bytes |
    | ``memory/server_peak_bytes`` | static + forward and backward of one client's smashed data | bytes |
    | ``memory/cuda_peak_bytes`` | ``torch.cuda.max_memory_allocated`` of the round, joint batch | bytes |
    """

    def __init__(self) -> None:
        self.report: dict[str, int] = {}

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure, then log once."""
        client_id = next(iter(trainer.sample(0)), 0)
        cohort = Cohort.join([client_id], [trainer.datamodule.client_batch(client_id, 0)], pl_module.count)
        batch = trainer.to_device(cohort.batch)
        with trainer.fabric.autocast():
            self.report = measure_client(trainer.algorithm.client, trainer.algorithm.basis(0), batch, cohort)
            self.report |= measure_server(pl_module, batch)
        for name, value in self.report.items():
            pl_module.log(f"memory/{name}", value)

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A round's peak begins at its start."""
        if trainer.fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.fabric.device)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The allocator's peak, where there is one."""
        if trainer.fabric.device.type == "cuda":
            pl_module.log("memory/cuda_peak_bytes", torch.cuda.max_memory_allocated(trainer.fabric.device))


def measure_client(client: Client, basis: Basis | None, batch: dict[str, Tensor], cohort: Cohort) -> dict[str, int]:
    """Inference, then the client's own steps on the same batch; parameters and optimizer end as they were."""
    static = storage_bytes([*client.half.parameters(), *client.half.buffers()])
    forward = plain_forward_peak(lambda: client.half(batch["input_ids"], batch["attention_mask"]))
    with undone(client):
        round_of(client, basis, batch, cohort)  # so that the optimizer's state is there while the next one is measured
        state = storage_bytes(t for s in client.optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        with MemoryMeter() as meter, meter.role("client"):
            waiting = round_of(client, basis, batch, cohort, lambda: meter.live("client"))
            peak = meter.peak("client")
    return {
        "client_static_bytes": static + state,
        "client_forward_bytes": static + forward,
        "client_peak_bytes": static + state + peak,
        "client_waiting_bytes": waiting,
    }


def round_of(
    client: Client, basis: Basis | None, batch: dict[str, Tensor], cohort: Cohort, waiting: Callable[[], int] = int
) -> int:
    """The client's steps of one round, with a made-up λ; returns what ``waiting`` says before λ comes."""
    anchor = client.forward(batch, cohort.rows)
    held = waiting()
    if basis is not None:
        values = client.answer(batch, anchor, torch.full_like(anchor.z, 1e-3), cohort.rows, basis)
        client.optimizer.record(values[0], basis)
        client.optimizer.step()
    return held


def measure_server(module: Any, batch: dict[str, Tensor]) -> dict[str, int]:
    """Forward and backward of one client's smashed data; gradients are dropped again."""
    static = storage_bytes([*module.server_half.parameters(), *module.server_half.buffers()])
    with torch.no_grad():
        z = module.client_half(batch["input_ids"], batch["attention_mask"])
    z.requires_grad_()
    with torch.enable_grad(), MemoryMeter() as meter, meter.role("server"):
        smashed = {"z": z, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
        torch.autograd.backward(loss_of(module.training_step(smashed, 0)))
        peak = meter.peak("server")
    for parameter in module.server_half.parameters():
        parameter.grad = None
    return {"server_static_bytes": static, "server_peak_bytes": static + peak}


@contextmanager
def undone(client: Client) -> Iterator[None]:
    """Whatever happens inside, the client's parameters and optimizer end as they were."""
    optimizer = client.optimizer
    saved = [p.detach().clone() for p in optimizer.parameters]
    state = copy.deepcopy(optimizer.state_dict())
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, bits in zip(optimizer.parameters, saved):
                parameter.copy_(bits)
        optimizer.load_state_dict(state)


def storage_bytes(tensors: Any) -> int:
    """Bytes of the tensors' storages, a shared one once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
