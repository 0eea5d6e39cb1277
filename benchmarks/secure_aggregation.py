"""What a secure sum costs: bytes and CPU milliseconds a round, of a client and of the server.

    python benchmarks/secure_aggregation.py --out docs/results/secure_aggregation/figures.json

The conversation of `hosfl_lightning.server.secure_sum.SecureSum` over encoded frames, in one process and one thread;
what a client computes to have an answer at all is left out. Times are CPU times, medians of the repeats. Of a round
with drop-outs a tenth of the clients, one at least, share their secrets and then send no masked answer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hosfl_client.secure.participants import Participants
from hosfl_lightning.aggregation import combine
from hosfl_lightning.optim import Dense
from hosfl_lightning.run.identity import hardware
from hosfl_lightning.server import Call
from hosfl_lightning.server.secure_sum import SecureSum
from hosfl_lightning.wire import MaskedGradients, ProjectedGradients, SecureKeys, decode, encode, encoded_size

CLIENTS, SIZES = (8, 64), (2, 32, 8192)
COLUMNS = ("clients", "numbers", "drop-outs", "up / open", "down", "client ms", "server ms")


class Clients:
    """A fleet of clients that have their answers, and the ledger of what it costs.

    Args:
        answers: By client.
        lost: Those who send no masked answer.
    """

    def __init__(self, answers: Mapping[int, ProjectedGradients], lost: Sequence[int]) -> None:
        self.answers, self.lost = answers, lost
        self.clients = Participants(torch.from_numpy)
        self.bytes = {"up": 0, "down": 0}
        self.seconds = 0.0

    def ask(self, requests: Mapping[int, Any], *expected: type) -> list[Any]:
        """As `hosfl_lightning.fleet.Fleet.ask`."""
        found = []
        for client, request in requests.items():
            if MaskedGradients in expected and client in self.lost:
                continue
            down = b"" if SecureKeys in expected else encode(request)  # λ travels in the open as well
            began = time.process_time()
            answer: Any = self.clients.respond(decode(down)) if down else self.clients.keep(self.answers[client])  # type: ignore[arg-type]
            up = encode(answer)
            self.seconds += time.process_time() - began
            self.bytes["up"] += len(up)
            self.bytes["down"] += len(down)
            found.append(decode(up))
        return found

    def refuse(self, client: int, reason: str) -> None:
        """As `hosfl_lightning.fleet.Fleet.refuse`: here nobody is."""
        raise AssertionError(reason)


def answers_of(clients: int, size: int) -> dict[int, ProjectedGradients]:
    """Of a round in a dense basis."""
    generator, basis = torch.Generator().manual_seed(0), Dense([size]).describe()
    return {k: ProjectedGradients(0, k, basis, torch.randn(size, generator=generator), 100 + k) for k in range(clients)}


def measure(clients: int, size: int, dropped: int) -> dict[str, float]:
    """One round."""
    answers = answers_of(clients, size)
    fleet = Clients(answers, range(1, 1 + dropped))
    server: Any = SimpleNamespace(
        call=Call(0, [*answers], [*answers]), secure_threshold=2 / 3, basis=lambda round: Dense([size]),
        honest=lambda answer, inbox: True, require=lambda count: None,
    )  # fmt: skip
    began = time.process_time()
    heard, mean = SecureSum(server, fleet).mean(fleet.ask(answers, SecureKeys), None)  # type: ignore[arg-type]
    seconds = time.process_time() - began
    rule: Any = SimpleNamespace(steps=0, prescription={})
    plain = combine([answers[k] for k in heard], rule).coefficients
    torch.testing.assert_close(mean, plain, rtol=1e-6, atol=2.0**-25)
    return {
        "up_bytes": fleet.bytes["up"] / clients,
        "down_bytes": fleet.bytes["down"] / clients,
        "open_bytes": sum(map(encoded_size, answers.values())) / clients,
        "client_ms": 1e3 * fleet.seconds / clients,
        "server_ms": 1e3 * (seconds - fleet.seconds),
    }


def row(figures: Mapping[str, Any]) -> str:
    """A line of the table."""
    return " | ".join([
        f"{figures['clients']}", f"{figures['numbers']:,}", f"{figures['dropped']}",
        f"{figures['up_bytes']:,.0f} / {figures['open_bytes']:,.0f}", f"{figures['down_bytes']:,.0f}",
        f"{figures['client_ms']:.1f}", f"{figures['server_ms']:,.0f}",
    ])  # fmt: skip


def main() -> None:
    """Print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(hardware(torch.device("cpu")), "| " + " | ".join(COLUMNS) + " |", sep="\n", flush=True)
    for clients in CLIENTS:
        for size in SIZES:
            for dropped in (0, max(1, round(clients / 10))):
                runs = [measure(clients, size, dropped) for _ in range(arguments.repeats)]
                medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
                rows.append({"clients": clients, "numbers": size, "dropped": dropped, **medians})
                print(f"| {row(rows[-1])} |", flush=True)
    if arguments.out is not None:
        made = {"hardware": hardware(torch.device("cpu")), "date": time.strftime("%Y-%m-%d"), "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
