"""Clients whose gradients travel in few bits: the round, its record, its bytes, and where there is nothing to code."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.aggregation import Median, TrimmedMean, combine
from hosfl_lightning.algorithms import (
    CSEFSL,
    FSLSAGE,
    HERONSFL,
    HOSL,
    ZOFL,
    ZOSFL,
    Algorithm,
    FedAvg,
    Frozen,
    SplitFedSGD,
    SplitFedV1,
    SplitFedV2,
    SplitLearning,
)
from hosfl_lightning.clients.split_endpoint import SplitEndpoint
from hosfl_lightning.fleet import Channel
from hosfl_lightning.optim import SGD, Dense, ZerothOrder
from hosfl_lightning.optim.compression import RandomSubset, Uncompressed
from hosfl_lightning.parts import PartError
from hosfl_lightning.run.checkpoint import CheckpointError
from hosfl_lightning.server import RoundWatcher
from hosfl_lightning.server.catch_up import CatchUp
from hosfl_lightning.server.server import uncoded
from hosfl_lightning.split import Lora, LoraHalf, Side
from hosfl_lightning.wire import Codecs, CodedGradient, ProjectedGradients, Update, encode
from tests.algorithms.auxiliary import WithHead
from tests.algorithms.two_layers import Crossing, Points, TwoLayers, orchestrator
from tests.random_tokens import RandomTokens
from tests.recipe_runs import tiny_pretrained
from tests.small_run import SmallRun, contents, plain

INT4 = Codecs(gradient="int4")
MakeModel = Callable[..., SplitCausalLM]
MakeOrchestrator = Callable[..., Orchestrator]


def known(**settings: Any) -> HOSFL:
    """A client that knows its gradient."""
    given = {"compression": Uncompressed(), "client_optimizer": SGD(lr=0.1)} | settings
    return HOSFL(estimator="local", **given)


class GivenEndpoint(SplitEndpoint):
    """Its clients' gradients are given, whatever their z and λ."""

    def _coded(self, answer: ProjectedGradients) -> ProjectedGradients | CodedGradient:
        given = torch.tensor([*map(float, self.terms.settings["gradients"][answer.client].split())])
        assert given.shape == answer.coefficients.shape
        return super()._coded(replace(answer, coefficients=given))


class Given(SplitFedSGD):
    """Its clients are told their gradients.

    Args:
        gradients: (N, d_c).
    """

    endpoint = GivenEndpoint

    def __init__(self, gradients: Tensor) -> None:
        super().__init__(SGD(lr=0.1))
        self.gradients = gradients

    def client_settings(self) -> dict[str, Any]:
        told = [" ".join(map(str, one)) for one in self.gradients.tolist()]  # some are NaN, which no number may be
        return {**super().client_settings(), "gradients": told}


class Known(Callback, RoundWatcher):
    """What the server knows of the gradients that it takes the mean of."""

    def __init__(self) -> None:
        self.answers, self.known = list[ProjectedGradients](), list[ProjectedGradients]()

    def on_answers(self, answers: list[ProjectedGradients]) -> list[ProjectedGradients]:
        self.answers = answers
        return answers

    def on_update(self, update: Update) -> None:
        self.known += [answer for answer in self.answers if answer.client in update.participants]


def gradients(clients: int = 4, size: int = 36) -> Tensor:
    return torch.randn(clients, size, generator=torch.Generator().manual_seed(0))


def rows(trainer: Orchestrator) -> list[dict[str, str]]:
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["comm/up_bytes"]]


class TestBytes:
    @pytest.mark.parametrize(("codec", "bits"), [("int4", 4.125), ("ternary", 1.75)])
    @pytest.mark.parametrize("simulation", ["batched", "per_client"])
    def test_are_the_frames_about_so_many_bits_a_coefficient(
        self, make_orchestrator: MakeOrchestrator, data: RandomTokens, simulation: Any, codec: str, bits: float
    ) -> None:
        """And stand where those of a gradient always stand: beside z and λ, under one name whatever the codec."""
        settings: dict[str, Any] = {"max_rounds": 1, "clients_per_round": 2, "simulation": simulation}
        crossing = Crossing()
        trainer = make_orchestrator(known(), codec=Codecs(gradient=codec), callbacks=[crossing], **settings)
        trainer.fit(SplitCausalLM("tiny_lm", cut=3, lora=Lora(client=None), side=Side(16, server=32)), data)
        frames = {m.kind: [len(encode(n)) for n in crossing.up if n.kind == m.kind] for m in crossing.up}
        assert {kind: len(of_kind) for kind, of_kind in frames.items()} == {"smashed_data": 2, "coded_gradient": 2}
        coefficients = trainer.summary["d_client"]
        assert coefficients == 8192
        for size in frames["coded_gradient"]:
            assert 0 < size - coefficients * bits / 8 < 600
        [row] = rows(trainer)
        assert float(row["comm/projected_gradients_bytes"]) == sum(frames["coded_gradient"])
        assert float(row["comm/up_bytes"]) == sum(map(sum, frames.values()))
        assert not any("coded" in column for column in row)
        means = trainer.summary["bytes_per_client_round"]
        assert means["projected_gradients"] == sum(frames["coded_gradient"]) / 2
        assert sum(means.values()) * 2 == float(row["comm/total_bytes"])

    def test_of_a_part_of_the_coefficients_are_few_as_well(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        sizes = {}
        for codec in ("fp32", "int8", "int4"):
            algorithm = known(compression=RandomSubset(200))
            trainer = make_orchestrator(algorithm, max_rounds=1, codec=Codecs(gradient=codec))
            trainer.fit(make_model(lora=Lora(client=None), side=Side(4)), data)
            sizes[codec] = trainer.summary["bytes_per_client_round"]["projected_gradients"]
        assert sizes["int8"] - sizes["int4"] == 2 * 64
        assert sizes["fp32"] - sizes["int8"] > 3 * 200 - 300  # two whole rows, their scales, a longer header


class TestRound:
    def test_what_no_message_holds_is_no_setting_of_a_client(self, tmp_path: Path) -> None:
        """In one process as well: what runs here would stop on the first client that is elsewhere."""
        method = Given(gradients())
        method.client_settings = lambda: {"gradients": gradients()}  # type: ignore[method-assign]
        with pytest.raises(PartError, match=r"Given: client_settings\.gradients must be a plain value"):
            orchestrator(method, tmp_path).fit(TwoLayers(), Points())

    @pytest.mark.parametrize("codec", ["bf16", "fp16", "int8", "int4"])
    def test_the_server_knows_what_the_codec_leaves_batched_as_one_by_one(self, tmp_path: Path, codec: str) -> None:
        known = []
        for simulation in ("batched", "per_client"):
            settings: dict[str, Any] = {"codec": Codecs(gradient=codec), "max_rounds": 2, "seed": 7}
            watcher = Known()
            trainer = orchestrator(Given(gradients()), tmp_path, simulation=simulation, callbacks=[watcher], **settings)
            trainer.fit(TwoLayers(), Points())
            known.append(watcher.known)
        assert len(known[0]) == 6
        for one, other in zip(*known, strict=True):
            assert plain(vars(one)) == plain(vars(other))
            exact = gradients()[one.client]
            packed = CodedGradient.pack(one.round, one.client, one.basis, exact, one.num_terms, codec, seed=7)
            assert torch.equal(one.coefficients, packed.unpack())
            assert not torch.equal(one.coefficients, exact)

    @pytest.mark.parametrize("kind", ["known", "first order"])
    def test_one_client_alone_gives_the_same_bits_batched_or_not(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, kind: str
    ) -> None:
        ends: dict[tuple[str, str], Any] = {}
        for simulation, codec in [("batched", "int4"), ("per_client", "int4"), ("batched", "fp32")]:
            algorithm = known() if kind == "known" else SplitFedSGD(SGD(lr=0.1))
            settings: dict[str, Any] = {"side": Side(4), "lora": Lora(client=None)} if kind == "known" else {}
            trainer = make_orchestrator(
                algorithm, simulation=simulation, codec=Codecs(gradient=codec), clients_per_round=1
            )
            trainer.fit(model := make_model(**settings), data)
            ends[simulation, codec] = plain(model.trained_state())
        assert ends["batched", "int4"] == ends["per_client", "int4"]
        assert ends["batched", "int4"] != ends["batched", "fp32"]

    def test_the_controls_send_their_gradient_as_it_is(self, tmp_path: Path) -> None:
        """What the codec costs is then in the gap; the frozen one answers nothing."""
        algorithm = SplitFedSGD(SGD(lr=0.1))
        trainer = orchestrator(algorithm, tmp_path, logger=True, codec=INT4, controls=["frozen", "first_order"])
        trainer.fit(TwoLayers(), Points())
        controls = Path(trainer.log_dir) / "controls"
        losses = {name: control["val_loss_last"] for name, control in trainer.summary["controls"].items()}
        exact = orchestrator(SplitFedSGD(SGD(lr=0.1)), tmp_path / "exact")
        exact.fit(TwoLayers(), Points())
        assert losses["first_order"] == exact.summary["val_loss_last"] != trainer.summary["val_loss_last"]
        assert "comm/projected_gradients_bytes" not in (controls / "frozen" / "metrics.csv").read_text()

    def test_a_frozen_client_has_nothing_to_code(self, tmp_path: Path) -> None:
        crossing = Crossing()
        trainer = orchestrator(Frozen(), tmp_path, codec=INT4, max_rounds=1, callbacks=[crossing])
        trainer.fit(TwoLayers(), Points())
        assert {message.kind for message in crossing.up} == {"smashed_data"}

    @pytest.mark.parametrize("simulation", ["batched", "per_client"])
    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (float("nan"), r"coded_gradient: coefficients\.scale has 1 values that are NaN or infinite"),
            (1e9, "coefficient 5 is .*, beyond"),
        ],
    )
    def test_a_client_whose_gradient_cannot_be_used_is_refused_by_name(
        self, tmp_path: Path, simulation: Any, value: float, reason: str
    ) -> None:
        bad = gradients(3)
        bad[1, 5] = value
        settings: dict[str, Any] = {"codec": INT4, "max_rounds": 1, "callbacks": [watcher := Known()]}
        trainer = orchestrator(Given(bad), tmp_path, simulation=simulation, **settings)
        with pytest.warns(UserWarning, match=f"round 0: client 1 is refused: {reason}"):
            trainer.fit(TwoLayers(), Points([6, 6, 6]))
        assert [answer.client for answer in watcher.known] == [0, 2]


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_the_noise_of_the_mean_falls_like_one_over_the_number_of_clients(codec: str) -> None:
    """All have one gradient, so that nothing else differs."""
    exact = gradients(1, 4096)[0]
    optimizer = ZerothOrder([nn.Parameter(torch.zeros(4096))], SGD())
    channel = Channel(serialize=True)

    def variance(clients: int) -> float:
        basis = Dense([4096]).describe()
        sent = [CodedGradient.pack(2, k, basis, exact, 5, codec, seed=3) for k in range(clients)]
        mean = combine([uncoded(channel.up(answer)) for answer in sent], optimizer).coefficients
        return float((mean - exact).square().mean())

    one = variance(1)
    assert one > 0
    for clients in (4, 16, 64):
        assert variance(clients) * clients == pytest.approx(one, rel=0.15)


class Run(SmallRun):
    """With a side adapter at the clients, on every layer."""

    def model(self) -> SplitCausalLM:
        lora = Lora(client=None, server=LoraHalf(r=2, dropout=0.2, target_modules=["o_proj"]))
        pretrained = tiny_pretrained(self.root / "model", "llama", 2)
        return SplitCausalLM(str(pretrained), cut=1, lora=lora, side=Side(4, taps="all"))


@pytest.mark.parametrize("simulation", ["batched", "per_client"])
def test_killed_and_resumed_and_with_absent_clients_it_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulation: Any
) -> None:
    """A client that returns is compared with the others, bit for bit, by the run itself."""

    class Interrupts(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr("tests.small_run.HOSFL", partial(HOSFL, estimator="local", compression=Uncompressed()))
    run = Run(tmp_path, settings={"simulation": simulation, "codec": INT4, "catch_up": CatchUp("replay")})
    summary = run.fit().summary
    assert summary["codec"]["gradient"] == "int4"
    assert summary["catch_up"] == {"replay": 1}
    files = contents(run.folder)
    shutil.rmtree(run.folder)
    with pytest.raises(KeyboardInterrupt):
        run.fit(Interrupts())
    with pytest.raises(CheckpointError, match=r"trainer\.codec\.gradient is fp32, the run was made with int4"):
        run.fit(ckpt_path=run.folder, codec=Codecs())
    run.fit(ckpt_path=run.folder)
    assert contents(run.folder) == files


@pytest.mark.parametrize(
    "kind",
    [CSEFSL, FSLSAGE, HERONSFL, HOSL, ZOFL, ZOSFL, FedAvg, SplitFedV1, SplitFedV2, SplitLearning],
)
def test_it_is_refused_where_no_gradient_travels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Algorithm]
) -> None:
    monkeypatch.setattr(kind, "check", lambda self, module: None)  # some want other models, and say so first
    with pytest.raises(ValueError, match=rf"trainer\.codec\.gradient: .* clients of {kind.__name__} .* leave it out"):
        orchestrator(kind(), tmp_path, logger=True, codec=INT4).fit(WithHead(), Points())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (known(aggregation=Median()), "Median makes most of the update zero; take int4"),
        (known(aggregation=TrimmedMean(0.2)), "TrimmedMean makes most of the update zero"),
        (HOSFL(probes=4), "the 4 numbers that a client sends"),
        (known(compression=RandomSubset(100)), "the 100 numbers that a client sends"),
    ],
    ids=["median", "trimmed mean", "probes", "subset"],
)
def test_ternary_is_refused_where_it_would_do_silent_harm(
    make_orchestrator: MakeOrchestrator, data: RandomTokens, tmp_path: Path, algorithm: Algorithm, words: str
) -> None:
    trainer = make_orchestrator(algorithm, max_rounds=1, codec=Codecs(gradient="ternary"))
    with pytest.raises(ValueError, match=rf"trainer\.codec\.gradient: .*{words}"):
        trainer.fit(SplitCausalLM("tiny_lm", cut=3, lora=Lora(client=None), side=Side(16)), data)
