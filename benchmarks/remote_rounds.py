"""A recipe with its clients as processes, by the commands themselves, beside the same run in one process."""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.remote_children import Child, Family, Talk
from benchmarks.remote_peers import free_port
from benchmarks.remote_proxy import proxy
from benchmarks.remote_stub import Stage
from hosfl_lightning.cli import main as hosfl

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny_lm" / "hosfl_lora.yaml"
CLIENTS = 8


@dataclass(frozen=True)
class Place:
    """Which cores a run may use, and the threads of torch in each of its processes.

    Attributes:
        words: For people.
        cores: For all processes of the run together.
        whole: Threads of a process that computes while the others wait: the run in one process, and the server.
        client: Threads of each client's.
    """

    words: str
    cores: set[int]
    whole: int
    client: int


def command(arguments: list[str], _: Talk) -> None:
    """``hosfl`` in a process that has imported it."""
    hosfl(arguments)


def local(folder: Path, rounds: int, place: Place) -> list[float]:
    """Seconds of each round but the first, in one process."""
    folder.mkdir()
    with Family(folder) as family:
        arguments = [
            "fit",
            *_settings(rounds),
            f"--trainer.default_root_dir={folder}",
            "--trainer.simulation=per_client",
        ]
        family.born(partial(command, arguments), "fit", threads=place.whole, cores=place.cores).end()
    [metrics] = folder.rglob("metrics.csv")
    return _column(metrics, "time/round_seconds")[1:]


def remote(folder: Path, rounds: int, place: Place, secure: bool = False, counted: bool = False) -> dict[str, Any]:
    """The same with a server and clients: seconds of each round but the first; bytes at the sockets, if counted."""
    stage = Stage.built(folder, CLIENTS, secure, (1, 1, 1))
    port, recipe = free_port(), yaml.safe_load(RECIPE.read_text())
    (folder / "client.yaml").write_text(yaml.safe_dump({name: recipe[name] for name in ("model", "data")}))
    with Family(folder) as family:
        server = family.born(partial(command, _serve(stage, rounds, port)), "serve", threads=place.whole,
                             cores=place.cores)  # fmt: skip
        between = family.born(partial(proxy, port), "proxy", cores=place.cores) if counted else None
        called = between.answer()["port"] if between else port
        clients = [_join(family, stage, name, called, place) for name in stage.names]
        for child in (server, *clients):
            child.end()
        sockets = between.ask() if between else None
    metrics = folder / "run" / "metrics.csv"
    return {
        "seconds": _column(metrics, "time/round_seconds")[1:], "ledger": _column(metrics, "comm/total_bytes")[-1],
        "sockets": sockets,
    }  # fmt: skip


def compare(folder: Path, rounds: int, repeats: int, place: Place) -> dict[str, Any]:
    """Seconds of a round in one process and with clients, in turn."""
    here: list[float] = []
    there: list[float] = []
    folder.mkdir()
    for repeat in range(repeats):
        here += local(folder / f"local_{repeat}", rounds, place)
        there += remote(folder / f"remote_{repeat}", rounds, place)["seconds"]
    return {
        "place": place.words, "rounds": len(here),
        **{name: {"one_process": take(here), "remote": take(there)}
           for name, take in (("median", statistics.median), ("minimum", min))},
    }  # fmt: skip


def counted(folder: Path, rounds: int, secure: bool, place: Place) -> dict[str, Any]:
    """Bytes at the sockets, of all clients and from the first connection to the last, and those of the ledger."""
    found = remote(folder, rounds, place, secure, counted=True)
    return {
        "link": "mTLS" if secure else "plain", "rounds": rounds, "ledger": found["ledger"], "sockets": found["sockets"]
    }  # fmt: skip


def _settings(rounds: int) -> list[str]:
    return [
        f"--config={RECIPE}", f"--trainer.max_rounds={rounds}", f"--trainer.val_check_interval={rounds}",
        "--trainer.controls=[]", "--trainer.enable_progress_bar=false",
        "--data.validation_bytes_per_client=512",  # validation is not timed
    ]  # fmt: skip


def _serve(stage: Stage, rounds: int, port: int) -> list[str]:
    link = [f"--certs={stage.folder / 'server'}"] if stage.secure else ["--insecure=true"]
    return ["serve", *_settings(rounds), *link, f"--listen=127.0.0.1:{port}", f"--run={stage.folder / 'run'}",
            f"--clients={stage.folder / 'clients.yaml'}", f"--quorum={CLIENTS}"]  # fmt: skip


def _join(family: Family, stage: Stage, name: str, port: int, place: Place) -> Child:
    link = [f"--certs={stage.folder / name}"] if stage.secure else ["--insecure=true", f"--name={name}"]
    arguments = ["join", f"--config={stage.folder / 'client.yaml'}", f"--server=127.0.0.1:{port}", *link,
                 f"--state={stage.folder / 'state' / name}"]  # fmt: skip
    return family.born(partial(command, arguments), f"join_{name}", threads=place.client, cores=place.cores)


def _column(metrics: Path, name: str) -> list[float]:
    return [float(row[name]) for row in csv.DictReader(metrics.read_text().splitlines()) if row.get(name)]
