"""What many clients cost: seconds and memory against clients of a round and of a run; and a round beside plain PyTorch.

    python -m benchmarks.many_clients --out docs/results

runs tiny rounds (a Llama of two layers, one example of eight tokens a client) in a process each, and writes
``many_clients.json``, ``.md`` and ``.png``. Seconds are the processor's; bytes are by how much the process's resident
memory grew, at its peak (VmHWM). Without ``--out`` it prints only how long a round of ``tiny_lm`` takes beside the same
forwards, backward and probes' forwards by hand, in the same groups.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.data import IID, FederatedDataModule, TokenRows
from hosfl_lightning.files import write_whole
from hosfl_lightning.models.pretrained import TINY_LM, resolve
from hosfl_lightning.optim import SGD
from hosfl_lightning.run.identity import hardware
from hosfl_lightning.split import Lora, LoraHalf

#: Clients of a round, of a run of 10,000; clients of a run, of which ten are asked.
OF_A_ROUND, OF_A_RUN = (10, 100, 1_000, 10_000), (100, 1_000, 10_000, 100_000)
GROUP, PROBES, TOKENS = 100, 2, 8
QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False}
#: Of `quick`: clients of a run and of a round, and its rounds. Name, and what is measured.
RATIOS = {
    "K = 100 of 1,000, time / by hand": (1_000, 100, 8),
    "K = 1,000 in groups, time / by hand": (1_000, 1_000, 3),
}


class Tokens(FederatedDataModule):
    """One example of random tokens a client, rows of one tensor."""

    def __init__(self, clients: int, tokens: int) -> None:
        super().__init__(batch_size=1)
        self.size = clients, tokens

    def setup(self, stage: str) -> None:
        if len(self.clients):
            return
        ids = torch.randint(3, 250, self.size, generator=torch.Generator().manual_seed(0))
        self.deal(TokenRows(ids), IID(), num_clients=len(ids))
        self.validation_set = [self.clients[0][0]]


class Clock(Callback):
    """Processor seconds until the first round and of each round, and the bytes that both take at their peak."""

    def __init__(self) -> None:
        self.began, self.resident = time.process_time(), forget_peak()
        self.starts: list[float] = []
        self.registered = (0.0, 0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.starts:
            self.registered = (time.process_time() - self.began, memory("VmHWM") - self.resident)
            self.resident = forget_peak()
        self.starts.append(time.process_time())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.peak = memory("VmHWM") - self.resident

    def row(self) -> dict[str, float]:
        """What was measured."""
        seconds, size = self.registered
        rounds = [b - a for a, b in pairwise(self.starts)][1:]
        return {"registration_seconds": seconds, "registration_bytes": size, "round_seconds": statistics.median(rounds),
                "round_bytes": self.peak}  # fmt: skip


def memory(what: str) -> int:
    """A figure of ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def forget_peak() -> int:
    """The peak begins anew, at these bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def tiny(folder: str) -> str:
    """A random-init Llama of two layers, with the byte tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve(TINY_LM)).save_pretrained(folder)
    return folder


def lora() -> Lora:
    """As most recipes have it."""
    return Lora(client=LoraHalf(target_modules=["q_proj", "v_proj"]), server=LoraHalf(target_modules="all-linear"))


def orchestrator(clients: int, rounds: int, root: str, group: Any, callback: Callback) -> Orchestrator:
    """Of so many clients a round."""
    return Orchestrator(
        HOSFL(probes=PROBES, client_optimizer=SGD(lr=1e-4)), max_rounds=rounds, clients_per_round=clients,
        group_size=group, val_check_interval=rounds, log_every_n_steps=rounds, default_root_dir=root,
        callbacks=[callback], **QUIET,
    )  # fmt: skip


def cost(model: str, clients: int, asked: int, group: int | None, rounds: int) -> dict[str, float]:
    """One run."""
    with tempfile.TemporaryDirectory() as root:
        clock = Clock()
        runner = orchestrator(asked, rounds, root, group or asked, clock)
        runner.fit(SplitCausalLM(model, cut=1, lora=lora()), Tokens(clients, TOKENS))
    return clock.row()


def apart(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The same in a process of its own, whose memory nothing has grown before."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with open(os.devnull, "w") as quiet:
            os.dup2(quiet.fileno(), 1)
        try:
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if not said:
        raise RuntimeError("a run has ended without figures: see its message")
    return json.loads(said)


def sweep(rounds: int, of_a_round: Sequence[int], of_a_run: Sequence[int]) -> dict[str, list[dict[str, float]]]:
    """All runs, by what is varied."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny(folder)

        def row(clients: int, asked: int, group: int | None) -> dict[str, float]:
            found = apart(lambda: cost(model, clients, asked, group, rounds))
            print(f"{asked:,} of {clients:,}: {found}", flush=True)
            return {"clients": clients, "asked": asked, **found}

        largest = max(of_a_round)
        return {
            "in groups": [row(largest, asked, GROUP) for asked in of_a_round],
            "one batch": [row(largest, asked, None) for asked in of_a_round],
            "of a run": [row(clients, min(of_a_round), None) for clients in of_a_run],
        }


class Beside(Callback):
    """After each round the same by hand on its batches: forwards, backward and the probes' forwards, group by group."""

    def __init__(self) -> None:
        self.ratios: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.began = time.process_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        ours = time.process_time() - self.began
        size = trainer.server.group_size or len(batch.clients)
        groups = [batch.clients[first : first + size] for first in range(0, len(batch.clients), size)]
        batches = [trainer.endpoint.data(group, batch_idx).batch for group in groups]
        began = time.process_time()
        with torch.enable_grad():
            by_hand(pl_module, batches)
        if batch_idx:  # the first makes what later ones find
            self.ratios.append(ours / (time.process_time() - began))


def by_hand(model: SplitCausalLM, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """HO-SFL's round in plain PyTorch, but for the perturbation and the updates."""
    for parameter in model.server_parameters.values():
        parameter.grad = None
    counts = [model.count(batch["labels"]) for batch in batches]
    values = torch.zeros(PROBES)
    for batch, count in zip(batches, counts):
        given = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            z = model.client_half(*given)
        z.requires_grad_()
        loss = model.loss(model.server_half(z, given[1]), batch["labels"]) * (count / sum(counts))
        loss.backward()
        with torch.no_grad():
            for probe in range(PROBES):
                values[probe] += ((model.client_half(*given) - z) * z.grad).sum()
    return values


def quick() -> dict[str, float]:
    """How long a round takes beside the same by hand: medians of the rounds' ratios."""
    torch.set_num_threads(1)
    found = {}
    for name, (clients, asked, rounds) in RATIOS.items():
        beside = Beside()
        with tempfile.TemporaryDirectory() as root:
            runner = orchestrator(asked, rounds, root, GROUP if asked > GROUP else "auto", beside)
            runner.fit(SplitCausalLM("tiny_lm", cut=3, lora=lora()), Tokens(clients, 32))
        found[name] = statistics.median(beside.ratios)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, the picture and the figures."""
    from benchmarks.many_clients_page import page, picture

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the page")
    parser.add_argument("--rounds", type=int, default=5, help="of a run")
    parser.add_argument("--of-a-round", type=int, nargs="+", default=OF_A_ROUND)
    parser.add_argument("--of-a-run", type=int, nargs="+", default=OF_A_RUN)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.out is None:
        print(json.dumps(quick(), indent=1))
        return
    found = {"date": date.today().isoformat(), "machine": hardware(torch.device("cpu")), "rounds": given.rounds,
             **sweep(given.rounds, given.of_a_round, given.of_a_run), "ratios": quick()}  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    for name, text in (("json", json.dumps(found, indent=1) + "\n"), ("md", page(found))):
        data = text.encode()
        write_whole(given.out / f"many_clients.{name}", lambda file, data=data: file.write(data))  # type: ignore[misc]
    picture(found).savefig(given.out / "many_clients.png")


if __name__ == "__main__":
    main()
