"""HO-SFL with every estimator and compression, in whole runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.aggregation.update import recorded
from hosfl_lightning.algorithms import Frozen, SplitFedSGD
from hosfl_lightning.availability import Trace
from hosfl_lightning.clients import FirstOrderClient
from hosfl_lightning.clients.catch_up import client_state
from hosfl_lightning.clients.split_endpoint import SplitEndpoint
from hosfl_lightning.fleet import Absentees
from hosfl_lightning.optim import SGD, AdamW, EstimatorError, RandomProjections, RandomSubset, Uncompressed, basis_of
from hosfl_lightning.run.checkpoint import CheckpointError, callback_states
from hosfl_lightning.run.rebuild import rebuild
from hosfl_lightning.run.training import collect
from hosfl_lightning.server.catch_up import CatchUp
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.split import Lora, LoraHalf, Side
from tests.conftest import Joined
from tests.faults import count_writes
from tests.random_tokens import RandomTokens
from tests.recipe_runs import tiny_pretrained
from tests.small_run import SmallRun, contents, halved, plain

MakeModel = Callable[..., SplitCausalLM]
MakeOrchestrator = Callable[..., Orchestrator]
State = dict[str, Tensor]

LORA = LoraHalf(r=2, target_modules=["v_proj"])
SERVER = LoraHalf(r=2, target_modules=["o_proj"])
SIDE: dict[str, Any] = {"cut": 3, "lora": Lora(client=None, server=SERVER), "side": Side(4, server=4)}
BESIDE = SIDE | {"lora": Lora(client=LORA, server=SERVER)}
PLAIN: dict[str, Any] = {"cut": 3, "lora": Lora(client=LORA, server=SERVER)}
#: Settings of the method and of the model.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "jvp": ({"estimator": "jvp", "probes": 3}, PLAIN),
    "dense": ({"estimator": "local", "compression": Uncompressed()}, SIDE),
    "dense, kept taps": ({"estimator": "local", "compression": Uncompressed(), "taps": "keep"}, SIDE),
    "projections": ({"estimator": "local", "compression": RandomProjections(16, "gauss16")}, SIDE),
    "subset": ({"estimator": "local", "compression": RandomSubset(48)}, SIDE),
    "directions": ({"estimator": "local", "probes": 3}, SIDE),
    "beside LoRA": ({"estimator": "local", "probes": 3, "mu": 2**-7}, BESIDE),
}
every_method = pytest.mark.parametrize("method", METHODS)
some_methods = pytest.mark.parametrize("method", ["jvp", "dense", "subset", "beside LoRA"])

pytestmark = pytest.mark.filterwarnings("error:mu=", "ignore:the two sides of a probe", "ignore:probes=3")


def hosfl(method: str, kind: type[HOSFL] = HOSFL, **settings: Any) -> HOSFL:
    return kind(**({"client_optimizer": SGD(lr=0.1), **METHODS[method][0]} | settings))


def fit(make: MakeOrchestrator, model: SplitCausalLM, data: RandomTokens, **settings: Any) -> State:
    make(**settings).fit(model, data)
    return {name: tensor.clone() for name, tensor in model.trained_state().items()}


def assert_close(a: State, b: State, tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def same_bits(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class BackpropEndpoint(SplitEndpoint):
    """A client that has its whole gradient, and answers in the basis of the other's."""

    def make_client(self, half: nn.Module) -> FirstOrderClient:
        return FirstOrderClient(half, super().make_client(half).optimizer)


class ByBackprop(HOSFL):
    """The same rounds by such clients."""

    endpoint = BackpropEndpoint


class TestARound:
    @every_method
    def test_the_update_is_that_of_the_true_gradient_in_the_basis(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, method: str
    ) -> None:
        model = METHODS[method][1]
        start = {name: tensor.clone() for name, tensor in make_model(**model).trained_state().items()}
        got, exact = (
            fit(make_orchestrator, make_model(**model), data, algorithm=hosfl(method, kind, mu=2**-14), max_rounds=2)
            for kind in (HOSFL, ByBackprop)
        )
        # LoRA beside a side adapter is probed by differences.
        assert_close(got, exact, 1e-3 if method == "beside LoRA" else 2e-6)
        moved = [name for name in start if (got[name] - start[name]).abs().max() > 1e-4]
        assert any("lora_side" in name for name in moved) == ("side" in model)
        assert any("client_half" in name for name in moved)
        assert any("server_half" in name for name in moved)

    def test_all_of_the_gradient_is_first_order_training_without_backprop(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        model = make_model(**SIDE)
        everything = RandomSubset(sum(p.numel() for p in model.client_parameters.values()))
        expected = fit(make_orchestrator, model, data, algorithm=SplitFedSGD(SGD(lr=0.1)))
        for compression in (Uncompressed(), everything):
            algorithm = hosfl("dense", compression=compression)
            assert_close(fit(make_orchestrator, make_model(**SIDE), data, algorithm=algorithm), expected, 2e-6)

    @some_methods
    def test_batched_is_per_client_and_unequal_clients_are_their_joined_batch(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, method: str
    ) -> None:
        def trained(of: RandomTokens, simulation: str) -> State:
            model = make_model(**METHODS[method][1])
            return fit(make_orchestrator, model, of, algorithm=hosfl(method), simulation=simulation, max_rounds=2)

        batched = trained(data, "batched")
        # A difference divides the rounding of z by μ.
        tolerance = 5e-5 if method == "beside LoRA" else 2e-6
        assert_close(trained(data, "per_client"), batched, tolerance)
        assert_close(trained(Joined(data), "batched"), batched, tolerance)

    @pytest.mark.parametrize("method", ["dense", "directions", "beside LoRA"])
    def test_a_probe_is_checked_where_there_is_one(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, method: str,
        recwarn: pytest.WarningsRecorder,
    ) -> None:  # fmt: skip
        """A μ that no fp32 sees is warned about where it is used."""
        trainer = make_orchestrator(hosfl(method, mu=1e-12), max_rounds=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.filters", [("always", None, UserWarning, None, 0)])
            trainer.fit(make_model(**METHODS[method][1]), data)
        assert any("mu=1e-12 changes only" in str(w.message) for w in recwarn) == (method == "beside LoRA")


@pytest.mark.parametrize(("settings", "said"), [({"probes": 5}, True), ({"probes": 6}, False), ({}, False)])
def test_so_few_numbers_of_a_known_gradient_are_warned_about(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, settings: dict[str, Any],
    said: bool, recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    """Under 1 % of 512; what a compression sends was chosen."""
    settings = settings or {"compression": RandomSubset(2)}
    trainer = make_orchestrator(HOSFL(estimator="local", **settings), max_rounds=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [("always", None, UserWarning, None, 0)])
        trainer.fit(make_model(**SIDE), data)
    found = [str(w.message) for w in recwarn if "probes=5: so many numbers travel of the 512" in str(w.message)]
    assert len(found) == said


@dataclass
class Run(SmallRun):
    """Four rounds of two clients with a side adapter; dropout, schedules, an absent client."""

    method: str = "dense"
    of_method: dict[str, Any] | None = None

    def model(self) -> SplitCausalLM:
        server = LoraHalf(r=2, dropout=0.2, target_modules=["o_proj"])
        client = LORA if METHODS[self.method][1]["lora"].client is not None else None
        side = Side(4) if "side" in METHODS[self.method][1] else None
        pretrained = str(tiny_pretrained(self.root / "model", "llama", 3))
        return SplitCausalLM(pretrained, cut=2, lora=Lora(client=client, server=server), side=side)

    def trainer(self, *callbacks: Callback, **settings: Any) -> Orchestrator:
        trainer = super().trainer(*callbacks, **settings)
        given = {"client_optimizer": AdamW(lr=1e-2), "client_scheduler": halved, **(self.of_method or {})}
        trainer.algorithm = hosfl(self.method, **given)
        return trainer


class StopsBefore(Callback):
    """As ctrl-C would."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.round:
            raise KeyboardInterrupt


def held(trainer: Orchestrator) -> Any:
    """All that a run hands on to its next round."""
    tensors, callbacks = trainer.lightning_module.trained_state(), callback_states(trainer.callbacks)
    return plain({**collect(trainer), "state_dict": tensors, "callbacks": callbacks})


@some_methods
def test_interrupted_and_resumed_it_is_never_interrupted(tmp_path: Path, method: str) -> None:
    run = Run(tmp_path, method=method)
    with count_writes():  # without waiting for the disk
        expected, files = held(run.fit()), contents(run.folder)
        shutil.rmtree(run.folder)
        with pytest.raises(KeyboardInterrupt):
            run.fit(StopsBefore(3))
        if method in ("dense", "subset"):
            other = {"compression": RandomSubset(47)} if method == "subset" else {"taps": "keep"}
            with pytest.raises(CheckpointError, match="taps" if method == "dense" else "compression.count"):
                Run(tmp_path, method=method, of_method=other).fit(ckpt_path=run.folder)
        assert held(run.fit(ckpt_path=run.folder)) == expected
    assert contents(run.folder) == files


#: Client 0 never leaves; 1 misses rounds 0 to 2; 2 misses rounds 1 to 3.
COMINGS = [[0, 2], [0], [0], [0, 1], [0, 1, 2]]


@every_method
def test_a_client_that_was_away_returns_bit_for_bit_and_the_log_gives_it_alone(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:  # fmt: skip
    seen: list[tuple[int, State, State]] = []
    compare = Absentees._compare

    def keeping(self: Any, replica: Any, who: str) -> None:
        seen.append((replica.steps, client_state(replica), client_state(self.optimizer, copy=True)))
        compare(self, replica, who)

    monkeypatch.setattr(Absentees, "_compare", keeping)
    data, model = RandomTokens([[6, 5], [4, 6], [5, 5]], batch_size=2), METHODS[method][1]
    algorithm = hosfl(method, client_optimizer=AdamW(lr=1e-2, weight_decay=0.1), client_scheduler=halved)
    settings: dict[str, Any] = {"availability": Trace(COMINGS), "catch_up": CatchUp("replay")}
    trainer = make_orchestrator(algorithm, max_rounds=len(COMINGS), val_check_interval=9, **settings)
    trainer.fit(make_model(**model), data)
    assert [steps for steps, *_ in seen] == [3, 4]
    assert all(same_bits(own, others) for _, own, others in seen)
    assert trainer.summary["catch_up"] == {"replay": 2}
    log = ReplayLog.read(Path(trainer.log_dir) / "updates.log")
    updates = [recorded(frame, trainer.fleet.channel.run_id) for frame in log.frames()]
    kinds = {"dense": "dense", "dense, kept taps": "dense", "subset": "coordinates"}
    assert {update.basis["kind"] for update in updates} == {kinds.get(method, "shared_directions")}
    # A smoothing length is named where something was probed by differences.
    assert {update.mu for update in updates} == {2**-7 if method == "beside LoRA" else None}
    parameters = trainer.endpoint.client.optimizer.parameters
    for update in updates:  # what the answers were measured in is what everybody applies, and what the server expects
        sizes, round = [p.numel() for p in parameters], update.round
        bases = [trainer.endpoint.basis(round), basis_of(update.basis, trainer.seed, round, sizes)]
        bases.append(algorithm.basis(trainer.seed, round, sizes))
        measured, *others = ([piece for *_, piece in b.chunks(parameters, update.coefficients)] for b in bases)
        assert all(len(pieces) == len(measured) and all(map(torch.equal, measured, pieces)) for pieces in others)
    fresh, same = make_model(**model), hosfl(method, client_optimizer=AdamW())
    again = rebuild(fresh, same.parameters(fresh), log, len(COMINGS), same)
    assert same_bits(client_state(again), client_state(trainer.endpoint.client.optimizer))


class TestRefused:
    """At setup: before a run folder is made."""

    @pytest.mark.parametrize(
        ("method", "model", "message"),
        [
            ("directions", PLAIN, r"estimator: local is the exact gradient of a side adapter.*model\.init_args\.side"),
            ("dense", {**SIDE, "side": Side(0, server=4)}, "estimator: local is the exact gradient of a side adapter"),
            ("subset", BESIDE, r"no gradient of .*v_proj.*compression=RandomSubset.*lora\.client: null"),
        ],
    )
    def test_a_model_that_the_estimator_cannot_serve(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, tmp_path: Path,
        method: str, model: dict[str, Any], message: str,
    ) -> None:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make_orchestrator(hosfl(method)).fit(make_model(**model), data)
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize("compression", [RandomProjections(1000), RandomSubset(1000)])
    def test_more_numbers_than_the_client_trains(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, tmp_path: Path,
        compression: Any,
    ) -> None:  # fmt: skip
        with pytest.raises(ValueError, match=r"compression.count=1000: the client trains 512 values"):
            make_orchestrator(hosfl("dense", compression=compression)).fit(make_model(**SIDE), data)
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize("algorithm", [HOSFL(), SplitFedSGD()], ids=lambda a: a.name)
    def test_a_client_with_nothing_to_train(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, tmp_path: Path,
        algorithm: Any,
    ) -> None:  # fmt: skip
        model = make_model(lora=Lora(client=None, server=SERVER))
        says = r"lora\.client: null and no side adapter.*set lora\.client, side or client_parameters"
        with pytest.raises(ValueError, match=says):
            make_orchestrator(algorithm).fit(model, data)
        assert not (tmp_path / "runs").exists()
        make_orchestrator(Frozen(), max_rounds=1).fit(model, data)
        assert (tmp_path / "runs").exists()

    def test_taps_that_are_neither(self) -> None:
        with pytest.raises(ValueError, match="taps must be one of recompute, keep, got 'recompte'"):
            HOSFL(estimator="local", taps="recompte")  # type: ignore[arg-type]

    @pytest.mark.parametrize("estimator", ["forward", "central", "jvp"])
    def test_compression_of_what_is_measured(self, estimator: str) -> None:
        with pytest.raises(ValueError, match=f"compression=RandomSubset is for .* estimator: {estimator} measures"):
            HOSFL(estimator=estimator, compression=RandomSubset(8))

    def test_an_operation_without_a_forward_derivative_before_the_first_round(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        class Cubed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x**3

        class Activation(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return Cubed.apply(x)

        model, trainer = make_model(**PLAIN), make_orchestrator(hosfl("jvp"))
        for layer in model.client_half.layers.values():
            layer.mlp.act_fn = Activation()
        with pytest.raises(EstimatorError, match=r"one has none \(You must implement the jvp.*set estimator: central"):
            trainer.fit(model, data)
        assert trainer.global_step == 0
