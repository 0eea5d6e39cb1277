"""What canaries find of the noise, beside the ε that is stated; and what an answer costs with it.

    python benchmarks/privacy_audit.py

An endpoint of scikit-learn's digits answers again and again, with a canary in its minibatch and without; then the same
with the noise divided by 2 and by 4, which must be caught. Of 20,000 answers on each side no bound can be above
log(10,000/5) or so.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch

from hosfl_lightning import HOSFL, Orchestrator
from hosfl_lightning.algorithms import Algorithm, SplitFedSGD
from hosfl_lightning.data import DigitsData
from hosfl_lightning.models import SplitImageClassifier
from hosfl_lightning.networks import ConvNet
from hosfl_lightning.optim import SGD
from hosfl_lightning.privacy import Privacy
from hosfl_lightning.privacy.audit import Canary, audit
from hosfl_lightning.wire import Multiplier, StepRequest

DELTA = 1e-3
#: Level, σ.
ROWS = [("example", 0.7), ("example", 1.0), ("example", 2.0), ("client", 2.0), ("client", 4.0)]


def endpoint_of(privacy: Privacy | None, algorithm: Algorithm, folder: str) -> Any:
    """Of a run of one round, whose clients hold 180 digits each and use 8 a round."""
    network = lambda: ConvNet(channels=1, widths=(8, 16, 32), num_labels=10, image_size=8)  # noqa: E731
    model = SplitImageClassifier(cut=2, num_labels=10, image_size=8, channels=1, network=network)
    trainer = Orchestrator(
        algorithm, max_rounds=1, privacy=privacy, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, DigitsData(num_clients=10, batch_size=8))
    trainer.endpoint.checks = False
    return trainer.endpoint


def milliseconds(endpoint: Any, rounds: int = 50) -> float:
    """Of the processor, for z and an answer to λ."""
    began = time.process_time()
    for round in range(1, rounds + 1):
        [sent] = endpoint.handle([StepRequest(round, 0)])
        z, _, mask = sent.unpack()
        endpoint.handle([Multiplier.pack(round, 0, torch.ones_like(z), mask, "fp32", 0)])
    return (time.process_time() - began) / rounds * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20_000, help="answers with the canary, and without")
    trials = parser.parse_args().trials
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for level, sigma in ROWS:
            privacy = Privacy(level, clip=1.0, noise_multiplier=sigma, delta=DELTA)  # type: ignore[arg-type]
            endpoint, found = endpoint_of(privacy, HOSFL(client_optimizer=SGD()), folder), []
            for part in (1, 2, 4):
                endpoint.privacy.noise_multiplier = sigma / part
                found.append(f"{audit(Canary(endpoint), trials, DELTA):.2f}")
            lines.append(f"| {level} | {sigma} | {privacy.spent(1):.2f} | {' | '.join(found)} |")
        costs = []
        for name, method in (("HOSFL, 8 probes", HOSFL(8)), ("SplitFedSGD", SplitFedSGD())):
            levels = [None, *(Privacy(one, 1.0, 1.0) for one in ("client", "example"))]
            times = [milliseconds(endpoint_of(one, method, folder)) for one in levels]
            costs.append(f"| {name} | {' | '.join(f'{one:.1f}' for one in times)} |")
    print("| level | σ | ε stated, one answer | found | noise / 2 | noise / 4 |\n|---|---|---|---|---|---|")
    print("\n".join(lines))
    print("\n| ms of the processor, z and an answer | without | `client` | `example` |\n|---|---|---|---|")
    print("\n".join(costs))


if __name__ == "__main__":
    main()
