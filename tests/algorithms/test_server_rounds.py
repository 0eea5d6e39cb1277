"""The server's part of a round, with no client anywhere: whom it asks, what it refuses, and what it leaves behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hosfl_lightning.algorithms import HOSFL, HOSL, Algorithm, FedAvg, SplitFedV2, TooFewClientsError
from hosfl_lightning.optim import SGD, AdamW
from hosfl_lightning.server import Call
from hosfl_lightning.wire import (
    Message,
    Multiplier,
    ProbedData,
    ProbeRequest,
    ProjectedGradients,
    RoundEnd,
    SmashedData,
    StepRequest,
    Update,
    Weights,
)
from tests.algorithms.fake_fleet import LonelyServer, Script, adamw
from tests.algorithms.plain_probes import expanded
from tests.algorithms.two_layers import CLASSES, WIDTH, TwoLayers, plain

#: Of six clients five are there, and four are asked.
CALL = Call(round=4, clients=[0, 1, 3, 5], online=[0, 1, 2, 3, 5], attempt=2)
#: As many examples, and so loss terms.
TERMS = {0: 2, 1: 3, 3: 1, 5: 4}
PROBES, MU, LR = 2, 2**-6, 0.2
MASK = {k: torch.ones(n, 1, dtype=torch.bool) for k, n in TERMS.items()}


def drawn(client: int, *shape: int, number: int = 0) -> Tensor:
    """Numbers of a client."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 * client + number))


def z(client: int, number: int = 0) -> Tensor:
    return drawn(client, TERMS[client], 1, WIDTH, number=number)


def labels(client: int) -> Tensor:
    return torch.arange(TERMS[client]) % CLASSES


def smashed(request: Any, step: int = 0) -> SmashedData:
    k = request.client
    return SmashedData.pack(request.round, k, z(k, step), labels(k), MASK[k], step=step, attempt=request.attempt)


def instead(script: Script, client: int, kind: type[Message], change: Callable[[Any], Message | None]) -> Script:
    """The same clients, but that the answers of a kind of one of them are others."""

    def otherwise(request: Any) -> Message | None:
        answer: Any = script(request)
        return change(answer) if isinstance(answer, kind) and answer.client == client else answer

    return otherwise


def silent(answer: Message) -> None:
    """It is not sent."""


# ---- HO-SFL


def projecting(request: StepRequest | Multiplier) -> Message:
    """z up, λ down, scalars up."""
    if isinstance(request, StepRequest):
        return smashed(request)
    basis = {"kind": "shared_directions", "probes": PROBES, "distribution": "rademacher"}
    k = request.client
    return ProjectedGradients(request.round, k, basis, drawn(k, PROBES, number=9), TERMS[k], request.attempt)


def hosfl(script: Script = projecting, joint: bool = True, **settings: Any) -> LonelyServer:
    algorithm = HOSFL(PROBES, MU, client_optimizer=SGD(lr=LR, momentum=0.9))
    return LonelyServer(algorithm, script, joint=joint, **settings)


joint_or_not = pytest.mark.parametrize("joint", [True, False])


class TestHOSFL:
    @joint_or_not
    def test_exactly_the_clients_of_the_call_are_asked_to_begin(self, joint: bool) -> None:
        lonely = hosfl(joint=joint)
        lonely.round(CALL)
        first = lonely.fleet.asked[0]
        assert list(first) == CALL.clients
        for client, request in first.items():
            assert vars(request) == vars(StepRequest(CALL.round, client, CALL.attempt))

    @joint_or_not
    def test_each_client_that_is_admitted_is_sent_its_multiplier_and_no_other_is(self, joint: bool) -> None:
        """The gradient of its own mean loss, whatever the others' weights."""

        def narrow(message: SmashedData) -> SmashedData:
            few = z(1)[..., 1:]
            return SmashedData.pack(message.round, 1, few, labels(1), MASK[1], attempt=message.attempt)

        lonely = hosfl(instead(instead(projecting, 3, SmashedData, silent), 1, SmashedData, narrow), joint)
        _, second = plain(lonely.model)
        lonely.round(CALL)
        _, multipliers = lonely.fleet.asked
        assert list(multipliers) == [0, 5]
        assert lonely.fleet.refused == {
            1: f"its smashed data have {WIDTH - 1} columns, the cut has {WIDTH}", 3: "it does not answer",
        }  # fmt: skip
        for client, message in multipliers.items():
            assert isinstance(message, Multiplier)
            assert (message.round, message.client, message.attempt) == (CALL.round, client, CALL.attempt)
            own = z(client).requires_grad_()
            F.cross_entropy(second(own[:, 0]), labels(client)).backward()
            torch.testing.assert_close(message.unpack(MASK[client]), own.grad, rtol=1e-5, atol=1e-7)

    def test_the_update_is_on_record_before_it_is_told_and_before_anything_moves(self) -> None:
        lonely = hosfl()
        start = lonely.state()
        lonely.round(CALL)
        events = lonely.events
        assert sorted(events) == ["ask multiplier", "ask step_request", "record", "step", "tell update"]
        assert events.index("record") < min(events.index("tell update"), events.index("step"))
        [(update, then)] = lonely.recorded
        assert then == start
        [(told, receivers)] = lonely.fleet.told
        assert isinstance(told, Update)
        assert torch.equal(told.coefficients, update.coefficients)
        assert receivers == CALL.online

    @joint_or_not
    def test_both_halves_move_as_in_plain_pytorch(self, joint: bool) -> None:
        lonely = hosfl(joint=joint)
        first, second = plain(lonely.model)
        outcome = lonely.round(CALL)
        w = {k: n / sum(TERMS.values()) for k, n in TERMS.items()}
        theirs, optimizer = list(first.parameters()), adamw(second.parameters())
        loss = sum(w[k] * F.cross_entropy(second(z(k)[:, 0]), labels(k)) for k in TERMS)
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
        mean = sum(w[k] * drawn(k, PROBES, number=9) for k in TERMS)
        assert isinstance(mean, Tensor)
        gradient = expanded(theirs, list(mean), CALL.round)
        with torch.no_grad():
            for p, g in zip(theirs, gradient):
                p -= LR * g
        mine = [*lonely.model.client_half.layer.parameters(), *lonely.model.server_half.layer.parameters()]
        for a, b in zip(mine, [*theirs, *second.parameters()], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(outcome.loss, loss.detach(), rtol=1e-6, atol=1e-6)
        assert outcome.num_examples == sum(TERMS.values())

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"num_terms": 4}, "it claims 4 loss terms, its labels have 3"),
            ({"num_terms": 0}, "it claims 0 loss terms, its labels have 3"),
            ({"coefficients": torch.tensor([1.0, torch.nan])}, ".*coefficients has 1 values that are NaN or infinite"),
            ({"coefficients": torch.tensor([torch.inf, 1.0])}, ".*coefficients has 1 values that are NaN or infinite"),
            ({"coefficients": torch.tensor([1.0, -2e6])}, r"coefficient 1 is -2e\+06, beyond ±1e\+06"),
            ({"coefficients": torch.ones(PROBES + 1)}, "it sent .* coefficients, the round has .*"),
            (
                {"basis": {"kind": "dense"}},
                "its answer is in the basis .*dense.*, the round's is .*rademacher.*",
            ),
            (
                {"basis": {"kind": "shared_directions", "probes": PROBES, "distribution": "gauss16"}},
                "its answer is in the basis .*gauss16.*, the round's is .*rademacher.*",
            ),
            ({"round": CALL.round - 1}, ".*round 3.*"),
            ({"attempt": CALL.attempt - 1}, "its answer is for attempt 1 of the round, this is attempt 2"),
            ({"client": 2}, ".*client 2.*"),
        ],
        ids=lambda value: "" if isinstance(value, str) else "-".join(value),
    )
    def test_an_answer_that_cannot_be_used_is_refused_by_name_and_the_others_go_on(
        self, changes: dict[str, Any], reason: str
    ) -> None:
        lonely = hosfl(instead(projecting, 1, ProjectedGradients, lambda answer: replace(answer, **changes)))
        lonely.round(CALL)
        assert list(lonely.fleet.refused) == [1]
        assert re.fullmatch(reason, lonely.fleet.refused[1])
        [(update, _)] = lonely.recorded
        assert update.participants == [0, 3, 5]
        assert update.weights == [2 / 7, 1 / 7, 4 / 7]
        mean = sum(w * drawn(k, PROBES, number=9) for k, w in zip(update.participants, update.weights))
        torch.testing.assert_close(update.coefficients, mean, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"round": CALL.round - 1}, "its answer is for round 3, this is round 4"),
            ({"attempt": CALL.attempt - 1}, "its answer is for attempt 1 of the round, this is attempt 2"),
            ({"client": 2}, "it answers for client 2"),
        ],
        ids=lambda value: "" if isinstance(value, str) else "-".join(value),
    )
    def test_z_that_comes_late_or_in_another_name_is_refused(self, changes: dict[str, Any], reason: str) -> None:
        lonely = hosfl(instead(projecting, 1, SmashedData, lambda answer: replace(answer, **changes)))
        lonely.round(CALL)
        assert lonely.fleet.refused == {1: reason}
        assert list(lonely.fleet.asked[1]) == [0, 3, 5]

    @pytest.mark.parametrize("kind", [SmashedData, ProjectedGradients])
    @joint_or_not
    def test_too_few_leave_both_halves_untouched(self, kind: type[Message], joint: bool) -> None:
        """In the second round: there are moments by then."""
        lonely = hosfl(joint=joint, min_clients=3)
        lonely.round(CALL)
        before, recorded, told = lonely.state(), list(lonely.recorded), list(lonely.fleet.told)
        lonely.fleet.script = instead(instead(projecting, 3, kind, silent), 0, kind, silent)
        with pytest.raises(TooFewClientsError, match=r"2 valid answer\(s\) .*trainer\.min_clients is 3"):
            lonely.round(replace(CALL, round=5))
        assert lonely.fleet.refused == {0: "it does not answer", 3: "it does not answer"}
        assert lonely.state() == before
        assert lonely.recorded == recorded
        assert lonely.fleet.told == told

    def test_a_client_without_a_loss_term_makes_no_quorum(self) -> None:
        """Of examples whose labels do not count; it may answer all the same."""

        def none(message: SmashedData) -> SmashedData:
            blank = torch.full((TERMS[3], 1), -100)
            return SmashedData.pack(message.round, 3, z(3), blank, MASK[3], attempt=message.attempt)

        class PerToken(TwoLayers):
            def count(self, labels: Tensor) -> int:
                return int((labels != -100).sum())

            def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
                return super().loss(logits, labels.reshape(-1))

        def tokens(request: Any) -> Message:
            answer = projecting(request)
            return replace(answer, labels_per_token=True) if isinstance(answer, SmashedData) else answer

        silenced = instead(tokens, 3, SmashedData, none)
        told = instead(silenced, 3, ProjectedGradients, lambda answer: replace(answer, num_terms=0))
        lonely = hosfl(told, model=PerToken(adamw), min_clients=3)
        lonely.round(CALL)
        [(update, _)] = lonely.recorded
        assert dict(zip(update.participants, update.weights)) == {0: 2 / 9, 1: 3 / 9, 3: 0.0, 5: 4 / 9}
        strict = hosfl(told, model=PerToken(adamw), min_clients=4)
        with pytest.raises(TooFewClientsError, match=r"3 valid answer\(s\)"):
            strict.round(CALL)
        assert len(strict.fleet.asked) == 1  # for z: nobody computes an answer in vain
        late = hosfl(instead(told, 0, ProjectedGradients, silent), model=PerToken(adamw), min_clients=3)
        with pytest.raises(TooFewClientsError, match=r"2 valid answer\(s\)"):
            late.round(CALL)
        assert len(late.fleet.asked) == 2


# ---- HOSL


def probed(request: StepRequest | ProbeRequest) -> Message:
    """z up, and z of every side of every probe that is asked for."""
    if isinstance(request, StepRequest):
        return smashed(request)
    k, number = request.client, 1 + 2 * request.probe + request.side
    return ProbedData.pack(
        request.round, k, request.probe, request.side, z(k, number), MASK[k], attempt=request.attempt
    )  # fmt: skip


def hosl(script: Script, **settings: Any) -> LonelyServer:
    return LonelyServer(HOSL(3, MU, client_optimizer=SGD(lr=LR)), script, **settings)


class TestHOSL:
    def test_both_sides_of_one_probe_after_the_other_are_asked_of_everybody(self) -> None:
        lonely = hosl(probed)
        _, second = plain(lonely.model)
        lonely.round(CALL)
        first, *probes = lonely.fleet.asked
        assert list(first) == CALL.clients
        assert all(isinstance(request, StepRequest) for request in first.values())
        places = [(probe, side) for probe in range(3) for side in (0, 1)]
        for requests, (probe, side) in zip(probes, places, strict=True):
            assert list(requests) == CALL.clients
            for client, request in requests.items():
                assert vars(request) == vars(ProbeRequest(CALL.round, client, probe, side, CALL.attempt))
        assert lonely.events == ["ask step_request", *["ask probe_request"] * 6, "record", "step", "tell update"]
        # The loss at one side less that at the other, by the θ_s that z was sent to.
        [(update, _)] = lonely.recorded
        expected = torch.zeros(3)
        for k, n in TERMS.items():
            with torch.no_grad():
                sides = [F.cross_entropy(second(z(k, 1 + i)[:, 0]), labels(k)) for i in range(6)]
            expected += n / sum(TERMS.values()) * torch.stack(sides).view(3, 2).diff(dim=1)[:, 0].neg() / (2 * MU)
        torch.testing.assert_close(update.coefficients, expected, rtol=1e-4, atol=1e-4)

    def test_a_client_that_fails_at_a_probe_is_asked_for_no_more_and_does_not_count(self) -> None:
        def script(request: Any) -> Message | None:
            late = isinstance(request, ProbeRequest) and (request.probe, request.side) == (1, 0)
            return None if late and request.client == 1 else probed(request)

        lonely = hosl(script)
        lonely.round(CALL)
        without = [0, 3, 5]
        assert [list(requests) for requests in lonely.fleet.asked] == [CALL.clients] * 4 + [without] * 3
        [(update, _)] = lonely.recorded
        assert update.participants == without
        assert lonely.fleet.refused == {1: "it does not answer"}

    def test_too_few_at_the_last_probe_leave_both_halves_untouched(self) -> None:
        def script(request: Any) -> Message | None:
            late = isinstance(request, ProbeRequest) and (request.probe, request.side) == (2, 1)
            return None if late and request.client == 1 else probed(request)

        lonely = hosl(script, min_clients=4)
        start = lonely.state()
        with pytest.raises(TooFewClientsError):
            lonely.round(CALL)
        assert lonely.state() == start
        assert not lonely.recorded
        assert not lonely.fleet.told


# ---- FedAvg and SplitFedV2

#: Local steps.
STEPS = 2


class Training:
    """Clients that send weights of their own making, after z at every local step where there is a cut.

    Args:
        cut: Whether there is.
    """

    def __init__(self, cut: bool) -> None:
        self.cut = cut
        self.shapes: dict[str, Tensor] = {}
        self.stepping: list[int] = []  # the local steps of the client under way

    def __call__(self, request: Any) -> Message:
        if isinstance(request, Weights):
            self.shapes, self.stepping = request.tensors, list(range(STEPS))
        if self.cut and self.stepping:
            return smashed(request, self.stepping.pop(0))
        k = request.client
        loss = None if self.cut else float(k)
        return Weights(
            request.round, k, self.trained(k), STEPS * TERMS[k], request.attempt, loss=loss,
            num_examples=STEPS * TERMS[k],
        )  # fmt: skip

    def trained(self, client: int) -> dict[str, Tensor]:
        return {name: drawn(client, *t.shape, number=50 + i) for i, (name, t) in enumerate(self.shapes.items())}


METHODS: list[type[Algorithm]] = [FedAvg, SplitFedV2]
each_method = pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)


def local(kind: type[Any], script: Script | None = None, **settings: Any) -> LonelyServer:
    algorithm = kind(AdamW(lr=0.03), local_steps=STEPS)
    model = TwoLayers(adamw, client_holds="whole")
    return LonelyServer(algorithm, script or Training(kind is SplitFedV2), model, **settings)


class TestLocalTraining:
    @each_method
    def test_one_client_after_the_other_begins_with_the_shared_weights(self, kind: type[Any]) -> None:
        lonely = local(kind)
        shared = {name: p.detach().clone() for name, p in lonely.replica.trained.items()}
        lonely.round(CALL)
        asked = [(client, request) for [(client, request)] in (one.items() for one in lonely.fleet.asked)]
        a_client = [Weights, *[Multiplier] * (STEPS if kind is SplitFedV2 else 0)]
        assert [client for client, _ in asked] == [k for k in CALL.clients for _ in a_client]
        assert [type(request) for _, request in asked] == len(CALL.clients) * a_client
        for client, request in asked:
            assert (request.round, request.client, request.attempt) == (CALL.round, client, CALL.attempt)
            if isinstance(request, Weights):
                assert request.rule == lonely.replica.optimizer.prescription
                assert request.tensors.keys() == shared.keys()
                assert all(torch.equal(request.tensors[name], shared[name]) for name in shared)
        assert lonely.events.count("step") == (STEPS * len(CALL.clients) if kind is SplitFedV2 else 0)

    @each_method
    def test_the_end_of_the_round_names_those_who_count_and_the_replica_is_their_mean(self, kind: type[Any]) -> None:
        """Client 1 sends a tensor less."""

        def less(answer: Weights) -> Weights:
            return replace(answer, tensors=dict(list(answer.tensors.items())[1:]))

        training = Training(kind is SplitFedV2)
        lonely = local(kind, instead(training, 1, Weights, less))
        start = lonely.replica.vector()
        lonely.round(CALL)
        [(end, receivers)] = lonely.fleet.told
        assert vars(end) == vars(RoundEnd(CALL.round, [0, 3, 5], CALL.attempt))
        assert receivers == CALL.clients
        assert lonely.events[-1] == "tell round_end"
        assert list(lonely.fleet.refused) == [1]
        assert re.search(r"its weights have .* of shape None, the run's is", lonely.fleet.refused[1])
        w = {0: 2 / 7, 3: 1 / 7, 5: 4 / 7}
        vectors = {k: torch.cat([training.trained(k)[name].flatten() for name in lonely.replica.trained]) for k in w}
        mean = start + sum(w[k] * (vectors[k] - start) for k in w)
        torch.testing.assert_close(lonely.replica.vector(), mean, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("kind", "changes", "reason"),
        [
            (SplitFedV2, {"num_terms": 10**9}, f"it claims {10**9} loss terms, its labels have {STEPS * TERMS[1]}"),
            (SplitFedV2, {"num_terms": 0}, f"it claims 0 loss terms, its labels have {STEPS * TERMS[1]}"),
            (FedAvg, {"loss": None}, "it does not say its loss, which nobody else knows"),
        ],
    )
    def test_a_claim_that_cannot_be_believed_is_refused(
        self, kind: type[Any], changes: dict[str, Any], reason: str
    ) -> None:
        lonely = local(kind, instead(Training(kind is SplitFedV2), 1, Weights, lambda one: replace(one, **changes)))
        lonely.round(CALL)
        assert lonely.fleet.refused == {1: reason}
        [(end, _)] = lonely.fleet.told
        assert end.counted == [0, 3, 5]

    def test_smashed_data_without_end_are_refused(self) -> None:
        """Or a client could hold the server for ever, and teach it at every step."""

        class Tireless(Training):
            def __call__(self, request: Any) -> Message:
                if isinstance(request, Weights):
                    self.asked = 0
                elif request.client == 1:
                    self.asked += 1
                    return smashed(request, self.asked)
                return super().__call__(request)

        lonely = local(SplitFedV2, Tireless(cut=True))
        lonely.round(CALL)
        assert lonely.fleet.refused == {1: f"it sent smashed data of local step {STEPS}, for which none are due"}
        assert [list(one) for one in lonely.fleet.asked].count([1]) == 1 + STEPS

    @each_method
    def test_a_round_that_fails_puts_the_replica_and_the_server_back(self, kind: type[Any]) -> None:
        """In the second round: there are moments by then, and the server has learned from three clients."""
        training, seen = Training(kind is SplitFedV2), list[Any]()
        lonely = local(kind, training, min_clients=4)
        lonely.round(CALL)
        before, told = lonely.state(), list(lonely.fleet.told)

        def moving(request: Any) -> Message | None:
            with torch.no_grad():  # in a simulation a client is in the replica's place
                for p in lonely.replica.trained.values():
                    p += 1
            if request.client == 5:
                seen.append([lonely.client_state(), lonely.server_state()])
                return None
            return training(request)

        lonely.fleet.script = moving
        with pytest.raises(TooFewClientsError, match=r"3 valid answer\(s\) .*trainer\.min_clients is 4"):
            lonely.round(replace(CALL, round=5))
        [(client, server)] = seen
        assert client != before[0]
        assert server != before[1]  # by steps, or because the clients of FedAvg hold that half, too
        assert lonely.state() == before
        assert lonely.fleet.told == told

    @each_method
    def test_a_round_that_breaks_off_puts_them_back_as_well(self, kind: type[Any]) -> None:
        training = Training(kind is SplitFedV2)
        lonely = local(kind, training)
        lonely.round(CALL)
        before, told = lonely.state(), list(lonely.fleet.told)

        def breaking(request: Any) -> Message:
            with torch.no_grad():
                for p in lonely.replica.trained.values():
                    p += 1
            if request.client == 5:
                raise KeyboardInterrupt
            return training(request)

        lonely.fleet.script = breaking
        with pytest.raises(KeyboardInterrupt):
            lonely.round(replace(CALL, round=5))
        assert lonely.state() == before
        assert lonely.fleet.told == told
