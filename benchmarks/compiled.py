"""What `model.init_args.compile` is worth: a round and a forward of the client's half, eager over compiled; its price.

    python -m benchmarks.compiled [--cases quickstart small opt] [--rounds 10] [--threads 1]

The parties of a case run in one process and take turns, a round each: the eager model, the compiled one, and one that
is compiled with MKL's matrix products in the place of oneDNN's. Ratios are medians of those of neighbouring rounds. An
eager forward's share of products and attention, which no fusion makes shorter, bounds what MKL's party can reach.
Compiling begins at an empty cache, but for what parties of one shape share.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import threading
from contextlib import redirect_stdout
from functools import partial
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.profiler import profile
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from benchmarks.client_step import seconds
from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.data.tokenization import Example
from hosfl_lightning.models.pretrained import TINY_LM, resolve
from hosfl_lightning.optim import AdamW
from hosfl_lightning.optim.compiled import eager
from hosfl_lightning.run.identity import hardware
from hosfl_lightning.split import Lora, LoraHalf, products, run
from hosfl_lightning.split.compiled import compile_seconds

#: The model, clients, examples of each in a round, tokens, and how the round is simulated.
CASES: dict[str, tuple[str, int, int, int, str]] = {
    "quickstart": ("tiny_lm", 8, 4, 128, "batched"),
    "small": ("tiny_lm", 8, 1, 32, "per_client"),
    "opt": ("opt", 8, 1, 128, "batched"),
}
OPT = OPTConfig(
    vocab_size=8192, hidden_size=768, num_hidden_layers=6, num_attention_heads=12, ffn_dim=3072,
    word_embed_proj_dim=768, max_position_embeddings=256, tie_word_embeddings=False,
)  # fmt: skip
PARTIES = ("eager", "compiled", "compiled, MKL")
#: What of a forward is no elementwise work.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu")


class Turns:
    """Of some threads one is awake; it names the next."""

    def __init__(self, parties: int) -> None:
        self.left, self.now, self.changed = list(range(parties)), 0, threading.Condition()

    def wait(self, party: int) -> None:
        """Until it is this one's turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.now == party)

    def pass_on(self, party: int, last: bool = False) -> None:
        """To the next one; with ``last`` this one never waits again."""
        with self.changed:
            after = [p for p in self.left if p > party] or self.left
            self.now = after[0]
            if last:
                self.left.remove(party)
            self.changed.notify_all()


class Clock(Callback):
    """Seconds of each round; what the others do while they have their turns is not in them."""

    def __init__(self, turns: Turns, party: int) -> None:
        self.turns, self.party, self.seconds, self.compiling = turns, party, list[float](), 0.0

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """The others' rounds come before it, but for the first."""
        if self.seconds:
            self.turns.pass_on(self.party)
            self.turns.wait(self.party)
        self.compiling -= compile_seconds()
        self.began = perf_counter()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """It is over; what follows, such as an eager evaluation, is nobody else's turn."""
        self.seconds.append(perf_counter() - self.began)
        self.compiling += compile_seconds()


class Tokens(FederatedDataModule):
    """Rows of random tokens, all of one length."""

    def __init__(self, clients: int, batch: int, tokens: int) -> None:
        super().__init__(batch_size=batch)
        self.sizes = clients, batch, tokens

    def setup(self, stage: str) -> None:
        """The same for every party."""
        clients, batch, tokens = self.sizes
        draw = torch.Generator().manual_seed(0)
        rows = torch.randint(3, 250, (clients * batch + 1, tokens), generator=draw).tolist()
        examples = [Example(row, list(row)) for row in rows]
        self.validation_set = [examples.pop()]
        self.clients = [examples[k * batch : (k + 1) * batch] for k in range(clients)]


def measure(case: str, parties: tuple[str, ...], rounds: int, threads: int) -> dict[str, Any]:
    """Seconds by party, of every round but the first, and of compiling; and of a client's forward."""
    name, clients, batch, tokens, simulation = CASES[case]
    turns, found, errors = Turns(len(parties)), dict[str, Any](), list[BaseException]()

    def party(number: int) -> None:
        torch.set_num_threads(threads)
        clock = Clock(turns, number)
        turns.wait(number)
        plain = mock.patch.object(products, "has_products", return_value=False)
        try:
            with plain if parties[number].endswith("MKL") else mock.patch.dict({}):
                model = made(name, parties[number] != "eager", root)
            Orchestrator(
                HOSFL(probes=4, client_optimizer=AdamW(lr=1e-3)), max_rounds=rounds + 1, simulation=simulation,  # type: ignore[arg-type]
                val_check_interval=rounds + 1, default_root_dir=f"{root}/{number}", callbacks=[clock],
                enable_progress_bar=False, enable_checkpointing=False,
            ).fit(model, Tokens(clients, batch, tokens))  # fmt: skip
            found[parties[number]] = model, clock.seconds[1:], clock.compiling
        except BaseException as error:  # told by the main thread
            errors.append(error)
        turns.pass_on(number, last=True)

    with tempfile.TemporaryDirectory() as root, redirect_stdout(io.StringIO()):
        at_work = [threading.Thread(target=party, args=(number,)) for number in range(len(parties))]
        for one in at_work:
            one.start()
        for one in at_work:
            one.join()
    if errors:
        raise errors[0]
    ids = torch.randint(3, 250, (batch if simulation == "per_client" else clients * batch, tokens))
    held = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {
        "rounds": {p: found[p][1] for p in parties},
        "compiling": {p: found[p][2] for p in parties},
        "forwards": forwards({p: found[p][0] for p in parties}, held),
        "products": share(found["eager"][0], held),
    }


def made(name: str, compile: bool, root: str) -> SplitCausalLM:
    """A model with LoRA on both halves."""
    lora = Lora(client=LoraHalf(target_modules=["q_proj", "v_proj"]), server=LoraHalf(target_modules="all-linear"))
    if name == "opt":
        name = f"{root}/opt"
        if not os.path.exists(name):
            torch.manual_seed(0)
            OPTForCausalLM(OPT).save_pretrained(name)
            AutoTokenizer.from_pretrained(resolve(TINY_LM)).save_pretrained(name)
    return SplitCausalLM(name, cut=3, lora=lora, compile=compile)


@torch.no_grad()
def forwards(models: dict[str, SplitCausalLM], batch: dict[str, Tensor]) -> dict[str, list[float]]:
    """Seconds of the client's half by party, in turn."""
    times: dict[str, list[float]] = {party: [] for party in models}
    for model in models.values():
        model.eval()
        run(model.client_half, batch)
    for _ in range(15):
        for party, model in models.items():
            times[party].append(seconds(partial(run, model.client_half, batch)))
    return times


@torch.no_grad()
def share(model: SplitCausalLM, batch: dict[str, Tensor]) -> float:
    """Of an eager forward of the client's half: products and attention."""
    with eager(), profile() as seen:
        run(model.client_half, batch)
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    return sum(times.get(one, 0.0) for one in PRODUCTS) / sum(times.values())


def ratio(eager: list[float], other: list[float]) -> float:
    """The median of ``eager / other``, each with the neighbour before it and after it."""
    return statistics.median([a / b for a, b in zip([*eager, *eager[1:]], [*other, *other[:-1]])])


def quick() -> dict[str, float]:
    """One case, from whatever is cached."""
    found = measure("quickstart", PARTIES[:2], rounds=8, threads=1)["rounds"]
    return {"compiled round 8x4x128, eager / compiled": ratio(found["eager"], found["compiled"])}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{hardware(torch.device('cpu'))}, fp32\n")
    print("| case | party | eager round / its | eager forward / its | products' share, eager | compiling |")
    print("|---|---|---|---|---|---|")
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": cache}):
            found = measure(case, PARTIES, arguments.rounds, arguments.threads)
        for party in PARTIES[1:]:
            of = [ratio(found[what]["eager"], found[what][party]) for what in ("rounds", "forwards")]
            cells = [case, party, f"{of[0]:.2f}", f"{of[1]:.2f}", f"{found['products']:.0%}",
                     f"{found['compiling'][party]:.0f} s"]  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
