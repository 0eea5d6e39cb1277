"""The rounds of a run, with Trainer's hooks around them."""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch.trainer.states import RunningStage, TrainerStatus
from torch import Tensor

from hosfl_lightning.callbacks.round_callback import RoundCallback
from hosfl_lightning.run.divergence import Halves, diverged, diverged_half, not_finite
from hosfl_lightning.run.evaluation import run_evaluation
from hosfl_lightning.run.face import TrainerFace
from hosfl_lightning.run.held_out import validate_on_clients, validate_only_on_clients
from hosfl_lightning.run.result import Evaluation, RunResult
from hosfl_lightning.server import Call, Outcome, TooFewClientsError
from hosfl_lightning.server.contract import sound
from hosfl_lightning.split.compiled import compile_seconds
from hosfl_lightning.wire import NonFiniteError, RoundEnd

#: How often a round is tried before the run stops.
MAX_ATTEMPTS = 10
#: The same with clients on other machines, which come and go: all that messages can number.
MOST_ATTEMPTS = 4096


class RoundLoop:
    """Round after round, from where the run is to its end.

    Args:
        trainer: Whose training is set up.
    """

    def __init__(self, trainer: TrainerFace) -> None:
        self.trainer, self.run, self.settings = trainer, trainer.run, trainer.settings
        self.halves = Halves(trainer)
        trainer.server.watchers = [*trainer.server.watchers, self.halves]
        self.waited = 0.0  # for clients, in the present round
        self.compiling = compile_seconds() if trainer.lightning_module.compiles else 0.0

    def train(self) -> RunResult:
        """From ``on_train_start`` to ``on_fit_end``."""
        trainer, run = self.trainer, self.run
        if run.result is None:
            trainer.narrate("validating before round 1")  # a line of its own: the bar begins after it
        trainer.call("on_train_start")
        if run.global_step:
            self.trainer.row.drop()  # what is measured at a start stands in the run's first row
        self.number()
        if run.result is None:
            first = self.validate()
            run.result = RunResult(first, first)
        result = run.result
        self.end_round()
        if trainer.announces and trainer.is_global_zero and run.global_step >= self.settings.max_rounds:
            print(f"nothing left to do: {run.global_step} rounds are done, trainer.max_rounds is "
                  f"{self.settings.max_rounds}; raise it to go on", flush=True)  # fmt: skip
        trainer.call("on_train_epoch_start")
        while run.global_step < self.settings.max_rounds and not run.should_stop:
            result.seconds.append(self.round(run.global_step))
            due = run.global_step % self.settings.val_check_interval == 0
            if due or trainer.is_last_batch or run.should_stop:
                result.last = self.validate()
                self.halves.warn(run.global_step)
            self.end_round()
        if result.last.round < run.global_step:  # resumed at its end by a recipe with fewer rounds
            result.last = self.validate()
            self.trainer.row.drop()
        trainer.state.status = TrainerStatus.FINISHED
        for hook in ("on_train_epoch_end", "on_train_end", "on_fit_end"):
            trainer.call(hook)
        self.end_round()
        return result

    def round(self, round: int) -> float:
        """One round; its seconds."""
        trainer, run = self.trainer, self.run
        began, self.waited = time.perf_counter(), 0.0
        trainer.state.stage = RunningStage.TRAINING
        trainer.fleet.channel.clear()
        refused = run.refused.total()
        call = self.call(round)
        trainer.call("on_train_batch_start", batch=call, batch_idx=round)
        call, outcome = self.attempt(call)
        run.global_step = round + 1
        self.number()
        module = trainer.lightning_module
        if outcome.loss is not None:
            module.log("train/loss", outcome.loss)
        module.log("client/refused", run.refused.total() - refused)
        seconds = time.perf_counter() - began - self.waited
        module.log("time/round_seconds", seconds)
        for name, value in trainer.fleet.figures().items():
            module.log(f"fleet/{name}", value)
        outputs = {"loss": outcome.loss, "num_examples": outcome.num_examples}
        trainer.call("on_train_batch_end", outputs=outputs, batch=call, batch_idx=round)
        if module.compiles:
            self.say_compiled(round)
        return seconds

    def say_compiled(self, round: int) -> None:
        """What of a round was compiling: of the first one, and of those with new shapes."""
        began, self.compiling = self.compiling, compile_seconds()
        if self.compiling > began and self.trainer.announces and self.trainer.is_global_zero:
            print(f"round {round + 1}: {self.compiling - began:.1f} s of it for compiling (model.init_args.compile)",
                  flush=True)  # fmt: skip

    def number(self) -> None:
        """For ``{round}`` in the names of files; in a row it stands anyway."""
        self.trainer.callback_metrics["round"] = torch.tensor(self.run.global_step)

    def call(self, round: int, attempt: int = 0) -> Call:
        """Who is asked; who is online is brought up to date before."""
        trainer, history = self.trainer, self.run.history
        assert history is not None
        self.waited += trainer.fleet.gather_quorum(round, trainer.sample_size)
        online = trainer.clients_online(round, attempt)
        history.attend(round, online, trainer.datamodule.num_clients, attempt)
        return Call(round, trainer.sample(round, attempt), online, attempt)

    def attempt(self, call: Call) -> tuple[Call, Outcome]:
        """The round as it succeeds; one that too few answer is repeated, or ends the run."""
        round, most = call.round, MAX_ATTEMPTS if self.trainer.fleet.simulated else MOST_ATTEMPTS
        attempts = range(most if self.settings.on_too_few == "repeat" else 1)
        if (follows := self.trainer.follows) is not None:
            attempts = range(follows[round], follows[round] + 1)
        for attempt in attempts:
            call = self.call(round, attempt) if attempt else call
            outcome, reason = self.tried(call)
            refused = self.count_refused()
            if outcome is not None:
                self.check_loss(round, outcome)
                self.run.attempts.append(attempt)
                return call, outcome
            self.check_halves(call, refused, attempt + 1 == min(len(attempts), MAX_ATTEMPTS))
        path = Path(self.trainer.log_dir) / "checkpoints" / "stopped.ckpt"
        self.trainer.saving.save(str(path), {})
        remedy = "lower trainer.min_clients" + (" or set trainer.on_too_few: repeat" if len(attempts) == 1 else "")
        raise TooFewClientsError(
            f"round {round}: {reason}, tried {len(attempts)} time(s); {remedy}, and go on from the state before the "
            f"round with --ckpt_path {path}"
        )

    def tried(self, call: Call) -> tuple[Outcome | None, str]:
        """One attempt: what came of it, or why too few answered. The clients forget one that has failed."""
        trainer = self.trainer
        server, fleet = trainer.server, trainer.fleet
        server.call = call
        fleet.assemble(call.clients)
        try:
            server.require(len(call.clients))
            outcome = sound(trainer.algorithm.name, trainer.algorithm.server_round(server, fleet, call))
        except TooFewClientsError as error:
            fleet.tell(RoundEnd(call.round, [], call.attempt), call.clients)
            for callback in trainer.callbacks:
                if isinstance(callback, RoundCallback):
                    callback.forget()
            return None, str(error)
        except NonFiniteError as error:
            fleet.abandon()  # what the server was about to send
            half = diverged_half(trainer, self.halves, [], {}) or self.halves.blamed("server")
            evidence = f"{error}{self.halves.grown(half)}"
            raise diverged(trainer, half, call.round, evidence) from error
        except BaseException:
            fleet.abandon()
            raise
        trainer.algorithm.end_round(server)
        return outcome, ""

    def check_halves(self, call: Call, refused: dict[int, str], last: bool) -> None:
        """Of an attempt that failed: a half that has diverged does so at every attempt.

        Raises:
            DivergedError: One has.
        """
        half = diverged_half(self.trainer, self.halves, call.clients, refused)
        broken = half and (last or not_finite(self.trainer.lightning_module.trained_state().values()))
        if half is not None and broken:  # where all is finite, other clients may have better answers
            reasons = [f"client {client}: {reason}" for client, reason in refused.items()]
            evidence = reasons[0] + self.halves.grown(half) if reasons else "NaN or infinity in its weights"
            raise diverged(self.trainer, half, call.round, evidence)

    def check_loss(self, round: int, outcome: Outcome) -> None:
        """Whether it is a number. A control's may be none: the run itself is told of by then.

        Raises:
            DivergedError: It is not.
        """
        if self.trainer.follows is None and outcome.loss is not None and not math.isfinite(float(outcome.loss)):
            half = self.halves.blamed("server")
            evidence = f"train/loss is {float(outcome.loss)}{self.halves.grown(half)}"
            raise diverged(self.trainer, half, round, evidence)

    def count_refused(self) -> dict[int, str]:
        """Some refusals only the process of the client knows, others all do."""
        fleet, run = self.trainer.fleet, self.run
        told = dict(sorted(entry for part in fleet.processes.share([*fleet.refused.items()]) for entry in part))
        fleet.refused.clear()
        run.refused.update(told.keys())
        for client, reason in told.items() if self.trainer.is_global_zero else ():
            warnings.warn(f"round {run.global_step}: client {client} is refused: {reason}", stacklevel=2)
        return told

    def validate(self) -> Evaluation:
        """Both halves on the validation data."""
        trainer = self.trainer
        where = trainer.serving.validate if trainer.serving is not None else "server"
        if where == "clients":
            return validate_only_on_clients(trainer)
        if where == "both":
            validate_on_clients(trainer, "val_clients/")
        losses = run_evaluation(trainer, "validation")
        trainer.has_validated = True
        trainer.state.stage = RunningStage.TRAINING
        metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
        if "val/loss" not in metrics:
            raise ValueError(f"{type(trainer.lightning_module).__name__} must log 'val/loss' in its validation")
        return Evaluation(metrics, [float(loss) for loss in losses if isinstance(loss, Tensor)], self.run.global_step)

    def end_round(self) -> None:
        """The row of metrics, then the files."""
        self.trainer.row.flush()
        self.trainer.saving.end_round()
