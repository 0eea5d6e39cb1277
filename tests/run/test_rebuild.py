"""The client half from the base model and the update log alone: in the library and by ``hosfl replay``."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import Tensor

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM, cli
from hosfl_lightning.algorithms import HERONSFL, HOSL, ZOFL, ZOSFL, Algorithm
from hosfl_lightning.clients.catch_up import client_state
from hosfl_lightning.optim import SGD, AdamW
from hosfl_lightning.run.checkpoint import load, save
from hosfl_lightning.run.rebuild import RebuildError, rebuild
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.wire import RULES
from tests.algorithms.auxiliary import WithHead
from tests.algorithms.two_layers import Points, TwoLayers, orchestrator
from tests.random_tokens import RandomTokens
from tests.recipe_runs import ROOT, Finished, command_line, hosfl, small

MakeModel = Callable[..., SplitCausalLM]
MakeOrchestrator = Callable[..., Orchestrator]
TEXT = ROOT / "recipes" / "stories260k" / "shakespeare_hosfl_lora.yaml"
ROUNDS = 3


class Remembers(Callback):
    """θ_c and moments before the first and after every round."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not batch_idx:
            self._keep(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._keep(trainer)

    def _keep(self, trainer: Any) -> None:
        self.states.append(client_state(trainer.endpoint.client.optimizer, copy=True))


def halved(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class TestRebuild:
    @pytest.mark.filterwarnings("ignore:mu=", "ignore:the two sides of a probe")
    @pytest.mark.parametrize(
        ("precision", "rule", "lora"),
        [("32-true", AdamW(lr=1e-2, weight_decay=0.1), True), ("bf16-true", SGD(lr=0.1, momentum=0.9), False)],
    )
    def test_gives_every_round_bit_for_bit(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, tmp_path: Path,
        precision: str, rule: Any, lora: bool,
    ) -> None:  # fmt: skip
        settings = {} if lora else {"lora": None}
        remembers = Remembers()
        algorithm = HOSFL(2, 2**-7, client_optimizer=rule, client_scheduler=halved, distribution="gauss16")
        run = make_orchestrator(algorithm, precision=precision, callbacks=[remembers], max_rounds=ROUNDS)
        run.fit(make_model(**settings), data)
        log = ReplayLog.read(Path(run.log_dir) / "updates.log")
        assert not same(remembers.states[0], remembers.states[1])
        for round, state in enumerate(remembers.states):
            model = make_model(**settings)
            replayer = make_orchestrator(algorithm, precision=precision)
            replayer.replay(model, None, run.log_dir, str(tmp_path / f"{round}"), to=round)
            written = load_file(tmp_path / f"{round}" / "client_half.safetensors")
            thetas = [t for name, t in state.items() if name.endswith(".theta")]
            assert same(written, dict(zip(model.client_parameters, thetas, strict=True)))
        if precision == "32-true":
            model, fresh = make_model(), HOSFL(client_optimizer=type(rule)())
            optimizer = rebuild(model, fresh.parameters(model), log, ROUNDS, fresh)
            assert same(client_state(optimizer), remembers.states[-1])
            assert optimizer.steps == ROUNDS

    def test_a_round_costs_bytes(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        """Whatever the model's size: what grows are the P scalars and the K names with their weights."""
        sizes = {}
        for probes in (2, 18):
            trainer = make_orchestrator(HOSFL(probes, client_optimizer=SGD(lr=0.1)), max_rounds=1)
            trainer.fit(make_model(), data)
            [frame] = ReplayLog.read(Path(trainer.log_dir) / "updates.log").frames()
            sizes[probes] = len(frame)
        assert sizes[2] < 600
        assert 0 <= sizes[18] - sizes[2] - 4 * 16 <= 8

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"cut": 3}, "other trainable tensors"),
            ({"seed": 5}, "started from other values"),
        ],
    )
    def test_another_model_is_refused(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, other: dict[str, Any],
        message: str,
    ) -> None:  # fmt: skip
        trainer = make_orchestrator(max_rounds=1)
        trainer.fit(make_model(), data)
        log = ReplayLog.read(Path(trainer.log_dir) / "updates.log")
        with pytest.raises(RebuildError, match=message):
            rebuild(another := make_model(**other), another.client_parameters, log, 1, HOSFL())
        changed = make_model()
        next(p for p in changed.server_half.parameters() if not p.requires_grad).data.add_(0.5)
        with pytest.raises(RebuildError, match="backbone has other weights"):
            rebuild(changed, changed.client_parameters, log, 1, HOSFL())
        assert log.starts[0].pop("rules") == RULES
        with pytest.raises(RebuildError, match=r"by the rules before hosfl-rules/1.*the version that wrote it"):
            rebuild(another := make_model(), another.client_parameters, log, 1, HOSFL())


@pytest.mark.parametrize(
    ("algorithm", "holds"),
    [
        (HOSL(2, client_optimizer=AdamW(lr=0.05)), "half"),
        (ZOSFL(2, client_optimizer=AdamW(lr=0.05)), "half"),
        (ZOFL(2, client_optimizer=AdamW(lr=0.05)), "whole"),
        (ZOFL(2, client_optimizer=SGD(lr=0.2), local_steps=3), "whole"),
    ],
    ids=["hosl", "zosfl", "zofl", "zofl-walks"],
)
def test_what_the_clients_hold_whatever_the_method(
    algorithm: Algorithm, holds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"logger": True, "enable_checkpointing": True}
    trainer, model = orchestrator(algorithm, tmp_path / "runs", **settings), TwoLayers(client_holds="whole")
    trainer.fit(model, Points())
    fresh = orchestrator(algorithm, tmp_path / "others")
    fresh.replay(TwoLayers(client_holds="whole"), None, trainer.log_dir, str(tmp_path / "out"))
    assert f"client {holds} after 5 rounds" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert (report["equal_to"], report["differs_from"]) == (["last.ckpt"], [])
    written = load_file(tmp_path / "out" / f"client_{holds}.safetensors")
    state = model.trained_state()
    if holds == "half":
        state = {n.removeprefix("client_half."): t for n, t in state.items() if n.startswith("client_half.")}
    assert same(written, state)


@pytest.mark.parametrize("half", ["client_half", "server_half"])
def test_a_whole_model_that_the_log_does_not_lead_to(half: str, tmp_path: Path) -> None:
    trainer = orchestrator(ZOFL(), tmp_path / "runs", logger=True, enable_checkpointing=True)
    trainer.fit(TwoLayers(client_holds="whole"), Points())
    path = Path(trainer.log_dir) / "checkpoints" / "last.ckpt"
    checkpoint = load(path)
    next(t for name, t in checkpoint["state_dict"].items() if name.startswith(half)).view(-1)[0] += 1e-3
    save(checkpoint, path)
    with pytest.raises(RebuildError, match=r"the client whole that the log of .* gives differs from last.ckpt"):
        trainer.replay(TwoLayers(client_holds="whole"), None, trainer.log_dir, str(tmp_path / "out"))


@pytest.mark.parametrize("weights_only", [False, True])
def test_an_auxiliary_head_that_the_log_does_not_lead_to(weights_only: bool, tmp_path: Path) -> None:
    """It is in no checkpoint of weights alone, which is compared without."""
    algorithm = HERONSFL(client_optimizer=SGD(lr=0.1), scalars=True)
    trainer = orchestrator(algorithm, tmp_path / "runs", logger=True, enable_checkpointing=True)
    trainer.fit(WithHead(), Points())
    replay = partial(trainer.replay, datamodule=None, run=trainer.log_dir, out=str(tmp_path / "out"))
    replay(WithHead())
    assert json.loads((tmp_path / "out" / "replay.json").read_text())["equal_to"] == ["last.ckpt"]
    path = Path(trainer.log_dir) / "checkpoints" / "last.ckpt"
    checkpoint = load(path)
    checkpoint["method"]["auxiliary"]["auxiliary.linear.weight"][0, 0] += 1e-3
    if weights_only:
        del checkpoint["method"]
    save(checkpoint, path)
    with nullcontext() if weights_only else pytest.raises(RebuildError, match=r"differs from last.ckpt"):
        replay(WithHead())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("replayed")
    away = ["--trainer.availability=hosfl_lightning.availability.Probability", "--trainer.availability.p=0.6"]
    choices = ["--trainer.catch_up.policy=replay", "--trainer.on_too_few=repeat", "--trainer.min_clients=2"]
    arguments = [*small(TEXT, root), f"--trainer.max_rounds={ROUNDS}", "--trainer.controls=[]", *away, *choices]
    return Finished(hosfl("fit", f"--config={TEXT}", *arguments), root)


class TestCommand:
    def test_equals_the_checkpoint_and_says_so(
        self, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        capsys.readouterr()
        hosfl("replay", "--run", str(finished.folder), "--to", str(ROUNDS), "--out", str(tmp_path))
        report = json.loads((tmp_path / "replay.json").read_text())
        frames = list(ReplayLog.read(finished.folder / "updates.log").frames())
        assert capsys.readouterr().out.splitlines() == [
            f"client half after {ROUNDS} rounds, from {sum(map(len, frames)):,} bytes of log, written to {tmp_path}",
            "equal to last.ckpt, bit for bit",
        ]
        assert (report["round"], report["equal_to"], report["differs_from"]) == (ROUNDS, ["last.ckpt"], [])
        assert report["run_id"] == json.loads((finished.folder / "run.json").read_text())["run_id"]
        held = load(finished.folder / "checkpoints" / "last.ckpt")["state_dict"]
        mine = {n.removeprefix("client_half."): t for n, t in held.items() if n.startswith("client_half.")}
        assert same(load_file(tmp_path / "client_half.safetensors"), mine)

    def test_whatever_clients_came_and_went(self, finished: Finished) -> None:
        summary = json.loads((finished.folder / "summary.json").read_text())
        assert summary["catch_up"]["replay"] >= 1

    def test_a_round_without_a_checkpoint_and_all_of_them(
        self, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hosfl("replay", f"--run={finished.folder}", "--to=1", f"--out={tmp_path / 'one'}")
        assert "checkpoint" not in capsys.readouterr().out
        hosfl("replay", f"--run={finished.folder}", f"--out={tmp_path / 'all'}")
        one, everything = (load_file(tmp_path / name / "client_half.safetensors") for name in ("one", "all"))
        assert one.keys() == everything.keys()
        assert not same(one, everything)

    def test_a_checkpoint_that_the_log_does_not_lead_to(
        self, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = finished.copy(tmp_path / "run")
        checkpoint = load(run / "checkpoints" / "last.ckpt")
        next(t for name, t in checkpoint["state_dict"].items() if name.startswith("client")).view(-1)[0] += 1e-3
        save(checkpoint, run / "checkpoints" / "last.ckpt")
        line = self.error(capsys, f"--run={run}", f"--out={tmp_path / 'out'}")
        assert line == f"the client half that the log of {run} gives differs from last.ckpt"
        assert json.loads((tmp_path / "out" / "replay.json").read_text())["differs_from"] == ["last.ckpt"]

    def test_files_that_are_no_checkpoints_of_the_run(self, finished: Finished, tmp_path: Path) -> None:
        run = finished.copy(tmp_path / "run")
        (run / "checkpoints" / "torn.ckpt").write_bytes((run / "checkpoints" / "last.ckpt").read_bytes()[:-100])
        with pytest.warns(UserWarning, match=r"torn.ckpt' is not a whole.*; it is passed over"):
            hosfl("replay", f"--run={run}", f"--out={tmp_path / 'out'}")
        other = load(run / "checkpoints" / "last.ckpt") | {"state_dict": {"client_half.other": torch.ones(1)}}
        save(other, run / "checkpoints" / "torn.ckpt")
        with pytest.raises(RuntimeError, match="exit code 2"):
            hosfl("replay", f"--run={run}", f"--out={tmp_path / 'out'}")
        report = json.loads((tmp_path / "out" / "replay.json").read_text())
        assert (report["equal_to"], report["differs_from"]) == (["last.ckpt"], ["torn.ckpt"])

    def test_bad_requests_get_one_line(
        self, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run, out = f"--run={finished.folder}", f"--out={tmp_path / 'out'}"
        log = finished.folder / "updates.log"
        assert self.error(capsys, run, out, "--to=9") == (
            f"--to must be between 0 and {ROUNDS}, the rounds on record in {log}; got 9"
        )
        assert "other trainable tensors" in self.error(capsys, run, out, "--model.init_args.lora.client.r=3")
        sgd = "--trainer.algorithm.init_args.client_optimizer=hosfl_lightning.optim.SGD"
        assert "is for the rule AdamW, the client's optimizer is SGD" in self.error(capsys, run, out, sgd)
        assert self.error(capsys, f"--run={tmp_path}", out) == (
            f"--run: {tmp_path} is no run folder: there is no config.yaml in it"
        )
        assert "--run" in self.error(capsys, out)
        assert not (tmp_path / "out").exists()

    def test_a_damaged_log_gets_one_line(
        self, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run, out = finished.copy(tmp_path / "run"), f"--out={tmp_path / 'out'}"
        log = run / "updates.log"
        data = bytearray(log.read_bytes())
        data[-100] ^= 1
        log.write_bytes(data)
        assert self.error(capsys, f"--run={run}", out) == (
            f"{log}: entry {ROUNDS}, of round {ROUNDS - 1}, is not as it was written; put back a sound copy of the file"
        )
        log.unlink()
        assert "no replay log" in self.error(capsys, f"--run={run}", out)
        assert not (tmp_path / "out").exists()

    @staticmethod
    def error(capsys: pytest.CaptureFixture[str], *args: str) -> str:
        capsys.readouterr()
        with command_line(), pytest.raises(SystemExit) as end:
            cli.main(["replay", *args])
        assert end.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        return line.removeprefix("hosfl: error: ")
