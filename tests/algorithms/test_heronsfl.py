"""HERON-SFL beside a plain loop; directions on the sphere; scalars in the place of vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hosfl_lightning.algorithms import CSEFSL, HERONSFL, TooFewClientsError
from hosfl_lightning.availability import Trace
from hosfl_lightning.callbacks import PeakMemoryMonitor
from hosfl_lightning.clients import AuxiliaryClient
from hosfl_lightning.clients.auxiliary_endpoint import SphereEndpoint
from hosfl_lightning.memory import plain_forward_peak
from hosfl_lightning.optim import SGD, AdamW, SharedDirections
from hosfl_lightning.optim.sphere import in_order
from hosfl_lightning.rng import Domain, Stream, direction
from hosfl_lightning.run.rebuild import rebuild
from hosfl_lightning.server import Call
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.wire import ProjectedGradients, SmashedData
from tests.algorithms.auxiliary import Reference, WithHead
from tests.algorithms.fake_fleet import LonelyServer
from tests.algorithms.test_csefsl import Unwell, resumed
from tests.algorithms.two_layers import WIDTH, Points, endpoint_of, orchestrator
from tests.random_tokens import RandomTokens
from tests.test_round import MakeModel


def estimate(probes: int, mu: float, shared: bool = False) -> Any:
    """``(1/P) Σ_p (d/μ)(F(θ + μu) − F(θ))u``, u a unit vector of the client's own, in plain PyTorch."""

    @torch.no_grad()
    def gradient(f: Callable[[], Tensor], own: list[Tensor], client: int, round: int, step: int) -> list[Tensor]:
        sizes, base = [p.numel() for p in own], f().double()
        total = torch.zeros(sum(sizes), dtype=torch.float64)
        for p in range(probes):
            stream = Stream(0, Domain.GAUSS16, round, None if shared else client, step * probes + p)
            u = torch.cat([direction(stream, i, 0, n) for i, n in enumerate(sizes)]).double()
            u /= u.norm()
            saved = [tensor.clone() for tensor in own]
            for tensor, part in zip(own, u.split(sizes)):
                tensor += mu * part.view_as(tensor)
            total += len(u) / mu * (f().double() - base) * u / probes
            for tensor, bits in zip(own, saved):
                tensor.copy_(bits)
        return [part.view_as(tensor) for tensor, part in zip(own, total.float().split(sizes))]

    return gradient


@pytest.mark.parametrize("scalars", [False, True], ids=["vectors", "scalars"])
@pytest.mark.parametrize(("local_steps", "upload_every"), [(1, 1), (3, 2)])
def test_equals_a_plain_loop(tmp_path: Path, scalars: bool, local_steps: int, upload_every: int) -> None:
    settings = {"local_steps": local_steps, "upload_every": upload_every}
    algorithm = HERONSFL(2, 0.5, SGD(lr=0.1), scalars=scalars, **settings)
    trainer, model = orchestrator(algorithm, tmp_path), WithHead()
    reference = Reference(model)
    trainer.fit(model, Points())
    reference.run([trainer.sample(r) for r in range(5)], estimate(2, 0.5, scalars), local_steps, upload_every)
    reference.assert_equal(model, trainer, 5e-6)


class TestSphere:
    def test_the_mean_over_many_directions_is_the_gradient(self) -> None:
        model, data = WithHead(), Points()
        data.setup("fit")
        algorithm = HERONSFL(mu=1e-2)
        batch, endpoint = model.prepare(data.client_batch(0, 0)), endpoint_of(algorithm, model)
        [*parameters], client = endpoint.trained.values(), endpoint.client
        for p in parameters:
            p.requires_grad_(True)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(client.objective(batch), parameters)])
        for p in parameters:
            p.requires_grad_(False)
        basis = SharedDirections(0, 0, 600, "gauss16")
        values = client.probe(batch, client.forward(batch)[1], basis, algorithm.mu)
        found = torch.zeros(len(expected))
        starts = torch.tensor([0, *(p.numel() for p in parameters)]).cumsum(0)
        for tensor, piece, part in basis.chunks(parameters, values.float()):
            found[starts[tensor] + piece.start : starts[tensor] + piece.stop] = part
        # Of N directions in R^d the relative error is about √(d/N), here 0.26.
        assert (found - expected).norm() < 0.4 * expected.norm()

    @pytest.mark.parametrize("threads", [1, 2])
    def test_squares_are_summed_in_element_order(self, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
        from hosfl_lightning.optim import sphere

        sizes, stream = [3, 70_001, 5, 300, 40_000], Stream(7, Domain.GAUSS16, 1, 2, 3)
        expected = 0.0
        for tensor, size in enumerate(sizes):
            for u in direction(stream, tensor, 0, size).tolist():
                expected += u * u
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = [sphere.squared_norm(stream, sizes, torch.device("cpu"))]
            monkeypatch.setattr(sphere, "SMALL", 256)
            monkeypatch.setattr(sphere, "CHUNK", 1000)
            monkeypatch.setattr(sphere, "SERIAL", 77)
            found.append(sphere.squared_norm(stream, sizes, torch.device("cpu")))
        finally:
            torch.set_num_threads(before)
        assert found == [expected, expected]

    def test_pieces_are_whole_and_ascending(self) -> None:
        sizes = [3, 70_000, 5, 600_000, 1, 60_000]
        pieces = [piece for run in in_order(sizes) for piece in run]
        assert pieces == sorted(pieces)
        assert [sum(stop - start for t, start, stop in pieces if t == i) for i in range(6)] == sizes


@pytest.mark.parametrize("all_weights", [False, True], ids=["lora", "all weights"])
@torch.no_grad()
def test_a_probe_reaches_all_of_a_copied_head(make_model: MakeModel, all_weights: bool) -> None:
    model, algorithm = make_model(**({"lora": None} if all_weights else {})), HERONSFL(auxiliary_blocks=1)
    client = endpoint_of(algorithm, model).client
    tokens = torch.randint(3, 9, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    for p in client.optimizer.parameters:  # B of LoRA is 0 at the start, so that A does not matter
        p.add_(0.05)
    basis = client.optimizer.basis(0)
    with client.optimizer.perturbed(basis, 0, 0.25):
        found = client.objective(batch)
    for i, p in enumerate(client.optimizer.parameters):
        p.add_(0.25 * direction(basis.streams[0], i, 0, p.numel()).view_as(p))
    assert torch.equal(found, client.objective(batch))


class TestScalars:
    def test_are_the_vectors_of_clients_with_the_same_directions(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ends, own = [], SphereEndpoint.directions
        monkeypatch.setattr(SphereEndpoint, "directions", lambda self, round, client=None: own(self, round))
        for scalars in (True, False):
            algorithm = HERONSFL(3, 0.5, SGD(lr=0.2), local_steps=4, upload_every=2, scalars=scalars)
            model = WithHead()
            trainer = orchestrator(algorithm, tmp_path)
            trainer.fit(model, Points())
            trained = {**trainer.endpoint.trained, "server": model.server_half.layer.weight}
            ends.append([trainer.callback_metrics["train/loss"], *(p.detach().clone() for p in trained.values())])
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def test_travel_in_the_place_of_vectors(self, tmp_path: Path) -> None:
        counts, probes = {}, []
        for scalars in (False, True):
            algorithm = HERONSFL(2, 0.1, SGD(lr=0.1), local_steps=2, scalars=scalars)
            trainer = orchestrator(algorithm, tmp_path, simulation="per_client")
            trainer.fit(WithHead(), Points())
            counts[scalars] = Counter((sent.kind, sent.direction) for sent in trainer.fleet.channel.ledger)
            probes.append(trainer.summary["probes"])
        up, down = ("smashed_data", "up"), ("weights", "down")
        go_on = ("step_request", "down")
        assert counts[False] == {down: 3, up: 6, go_on: 6, ("weights", "up"): 3, ("round_end", "down"): 1}
        # Here a request begins a client's round as well.
        assert counts[True] == {up: 6, go_on: 9, ("projected_gradients", "up"): 3, ("update", "down"): 1}
        assert probes == [2, 2]

    def test_rebuild_the_client_from_the_log(self, tmp_path: Path) -> None:
        """Clients that were away have caught up by the same log."""
        online = Trace([[0, 1, 2, 3], [0, 1, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]])
        algorithm = HERONSFL(2, 0.1, SGD(lr=0.1), local_steps=2, scalars=True)
        trainer = orchestrator(algorithm, tmp_path, logger=True, availability=online)
        model, fresh = WithHead(), WithHead()
        trainer.fit(model, Points())
        assert trainer.summary["catch_up"]
        again = HERONSFL(scalars=True, client_optimizer=SGD(lr=0.1))
        theirs, mine = again.parameters(fresh), trainer.endpoint.trained
        rebuild(fresh, theirs, ReplayLog.read(Path(trainer.log_dir) / "updates.log"), 5, again)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)

    def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(self, tmp_path: Path) -> None:
        def algorithm() -> HERONSFL:
            return HERONSFL(2, 0.1, SGD(lr=0.1), local_steps=2, scalars=True)

        whole = resumed([algorithm()], tmp_path / "none", max_rounds=4)
        stopped = resumed([algorithm(), algorithm()], tmp_path / "stopped")
        for name in ("method", "optimizer_states", "state_dict", "history"):
            assert stopped[name] == whole[name], name

    def test_a_round_that_too_few_answer_leaves_no_trace(self, tmp_path: Path) -> None:
        algorithm = HERONSFL(2, 0.1, SGD(lr=0.1), local_steps=2, scalars=True)
        trainer, model = orchestrator(algorithm, tmp_path, clients_per_round=None, min_clients=4), WithHead()
        reference = Reference(model)
        with pytest.warns(UserWarning, match="client 1 is refused"), pytest.raises(TooFewClientsError):
            trainer.fit(model, Unwell())
        reference.assert_equal(model, trainer, 0.0)
        assert trainer.endpoint.client.optimizer.steps == 0

    @pytest.mark.parametrize("local_steps", [1, 2])
    def test_go_on_without_the_client_that_was_last(self, tmp_path: Path, local_steps: int) -> None:
        """What it leaves undone must not undo the update: the clients share one half in a simulation."""
        algorithm = HERONSFL(2, 0.1, SGD(lr=0.1), local_steps=local_steps, scalars=True)
        trainer = orchestrator(algorithm, tmp_path, clients_per_round=None, logger=True, max_rounds=3)
        model, fresh = WithHead(), WithHead()
        with pytest.warns(UserWarning, match="client 3 is refused"):
            trainer.fit(model, Unwell(client=3))
        assert trainer.run.refused == {3: 3}
        theirs, mine = algorithm.parameters(fresh), trainer.endpoint.trained
        start = {name: p.detach().clone() for name, p in theirs.items()}
        rebuild(fresh, theirs, ReplayLog.read(Path(trainer.log_dir) / "updates.log"), 3, algorithm)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert not any(torch.equal(mine[name], start[name]) for name in mine)

    def test_beyond_all_measure_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        probe = AuxiliaryClient.probe

        def huge(self: AuxiliaryClient, batch: Any, base: Tensor, basis: SharedDirections, mu: float) -> Tensor:
            return probe(self, batch, base, basis, mu) * (1e9 if len(batch["labels"]) == 2 else 1.0)

        algorithm, model = HERONSFL(2, 0.5, SGD(lr=0.1), scalars=True), WithHead()
        reference = Reference(model)
        trainer = orchestrator(algorithm, tmp_path, max_rounds=1, clients_per_round=None)
        monkeypatch.setattr(AuxiliaryClient, "probe", huge)
        with pytest.warns(UserWarning, match=r"client 1 is refused: coefficient 0 is .*, beyond ±1e\+06"):
            trainer.fit(model, Points())
        assert trainer.run.refused == {1: 1}
        reference.run([[0, 2, 3]], estimate(2, 0.5, shared=True))
        for mine, theirs in zip(model.client_half.parameters(), reference.first.parameters()):
            torch.testing.assert_close(mine, theirs, rtol=5e-6, atol=5e-6)

    @pytest.mark.parametrize(
        ("step", "changes", "reason"),
        [(1, {"num_terms": 99}, "it claims 99 loss terms, its labels have 4"),
         (2, {"loss": None}, "it does not say its loss, which nobody else knows")],
    )  # fmt: skip
    def test_of_a_client_that_lies_are_refused(self, step: int, changes: dict[str, Any], reason: str) -> None:
        """Where all smashed data go up the server has seen the labels; the loss is the head's, which stays below."""
        algorithm = HERONSFL(1, client_optimizer=SGD(lr=0.1), local_steps=2, upload_every=step, scalars=True)

        def script(request: Any) -> Any:
            k, local = request.client, getattr(request, "step", 0)
            if local < 2 // step:
                z, labels, mask = torch.ones(2, 1, WIDTH), torch.zeros(2).long(), torch.ones(2, 1, dtype=torch.bool)
                return SmashedData.pack(0, k, z, labels, mask, step=local)
            basis, own = algorithm.basis(0, 0, []).describe(), changes if k == 1 else {}
            answer = ProjectedGradients(0, k, basis, torch.full((2,), 0.1), 4, loss=1.5, num_examples=4)
            return replace(answer, **own)

        lonely = LonelyServer(algorithm, script, WithHead())
        lonely.round(Call(0, [0, 1, 2], [0, 1, 2]))
        assert lonely.fleet.refused == {1: reason}
        assert lonely.recorded[0][0].participants == [0, 2]

    @pytest.mark.parametrize("rule", [SGD(momentum=0.9), SGD(weight_decay=0.1), AdamW()])
    def test_need_plain_sgd(self, rule: Any) -> None:
        with pytest.raises(ValueError, match=r"HERONSFL with scalars=true .* plain SGD only"):
            HERONSFL(client_optimizer=rule, scalars=True)


def test_a_client_needs_the_memory_of_inference(make_model: MakeModel, tmp_path: Path) -> None:
    """Beside a plain evaluation of the loss: the largest leaf, and with scalars a copy of what is trained."""
    above, rule = [], SGD(lr=0.1)
    heron = [HERONSFL(2, 1e-3, rule, local_steps=2, scalars=scalars) for scalars in (False, True)]
    for algorithm in (*heron, CSEFSL(rule, local_steps=2)):
        monitor, data = PeakMemoryMonitor(), RandomTokens([[48] * 8], batch_size=8)
        trainer = orchestrator(algorithm, tmp_path, clients_per_round=1, max_rounds=1, callbacks=[monitor])
        trainer.fit(make_model(), data)
        client = trainer.endpoint.client
        client.half.requires_grad_(False)
        plain_loss = plain_forward_peak(lambda c=client, d=data: c.objective(d.client_batch(0, 0)))
        above.append(monitor.report["client_peak_bytes"] - monitor.report["client_static_bytes"] - plain_loss)
        assert not any(p.grad is not None for p in client.half.parameters())
    assert max(above[:2]) < 0.1 * plain_loss < 0.5 * plain_loss < above[2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"probes": 100, "local_steps": 41}, r"local_steps=41 with probes=100 are 4100 directions .* has 4096"),
        ({"probes": 0}, r"probes must be"),
        ({"mu": 0.0}, r"mu must be"),
        ({"upload_every": 0}, r"upload_every must be >= 1"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HERONSFL(**settings)
