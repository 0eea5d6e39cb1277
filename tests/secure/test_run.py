"""Runs whose server learns sums alone: the same means, less of single answers, and what cannot be had beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hosfl_client.secure import extra
from hosfl_client.secure.participants import Participants
from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.aggregation import Median, NormClippedMean, TrimmedMean, combine
from hosfl_lightning.algorithms import HOSL, ClientKind, Frozen, MixedHOSFL, SplitFedSGD, TooFewClientsError
from hosfl_lightning.callbacks import RandomSigns
from hosfl_lightning.callbacks.rehearsal import WatchedFleet
from hosfl_lightning.fleet import Fleet
from hosfl_lightning.optim import SGD, Uncompressed
from hosfl_lightning.run.checkpoint import CheckpointError
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.split import Side
from hosfl_lightning.wire import Codecs, MaskedGradients, Message, ProjectedGradients, Update, decode
from tests.random_tokens import RandomTokens
from tests.test_refusals import Faulty

MakeModel, MakeOrchestrator = Callable[..., SplitCausalLM], Callable[..., Orchestrator]
LENGTHS = [[9, 12, 7], [6, 10], [12, 11, 3, 9], [5, 8]]
pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe", "ignore:mu=")


def updates(trainer: Orchestrator) -> list[Update]:
    frames = ReplayLog.read(Path(trainer.log_dir) / "updates.log").frames()
    return [decode(frame, "update") for frame in frames]  # type: ignore[misc]


@contextmanager
def losing(lost: dict[int, tuple[str, int]]) -> Iterator[None]:
    """Of these clients a message of this kind does not come, the so-and-so-many-th and those behind it."""
    take, seen = Fleet.take, dict[int, int]()

    def taken(self: Fleet, request: Any, answer: Any, expected: Any) -> list[Message]:
        kind, first = lost.get(request.client, ("", 0))
        seen[request.client] = seen.get(request.client, 0) + (answer.kind == kind)
        if answer.kind != kind or seen[request.client] < first:
            return take(self, request, answer, expected)
        self.refuse(request.client, "as the test wants it")
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fleet, "take", taken)
        yield


@pytest.mark.parametrize("simulation", ["batched", "per_client"])
def test_the_updates_are_those_of_a_run_in_the_open(
    simulation: str, make_model: MakeModel, make_orchestrator: MakeOrchestrator, sent: list[tuple[Message, int]],
) -> None:  # fmt: skip
    """To fixed point; and no answer crosses but under masks."""
    means = []
    for secure in (False, True):
        sent.clear()
        trainer = make_orchestrator(max_rounds=1, simulation=simulation, secure_aggregation=secure)
        trainer.fit(make_model(), RandomTokens(LENGTHS))
        means.append(updates(trainer))
        assert secure is not any(isinstance(message, ProjectedGradients) for message, _ in sent)
    for one, two in zip(*means, strict=True):
        assert (one.participants, one.weights, one.mu, one.step) == (two.participants, two.weights, two.mu, two.step)
        torch.testing.assert_close(one.coefficients, two.coefficients, rtol=1e-6, atol=2e-7)
    masked = [message.masked for message, _ in sent if isinstance(message, MaskedGradients)]
    assert len(masked) == len(LENGTHS) and len({tuple(one.tolist()) for one in masked}) == len(masked)
    assert trainer.summary["bytes_per_client_round"]["masked_gradients"] > 0
    assert "projected_gradients" not in {message.kind for message, _ in sent}


def test_what_a_client_needs_is_measured_to_the_update(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client makes no secure sum, so it rehearses in the open."""
    heard, tell = list[str](), WatchedFleet.tell
    monkeypatch.setattr(
        WatchedFleet, "tell", lambda self, message, to: (heard.append(message.kind), tell(self, message, to))
    )
    make_orchestrator(max_rounds=1, secure_aggregation=True).fit(make_model(), RandomTokens(LENGTHS))
    assert {*heard} == {"update"}


def test_a_dense_gradient_is_summed_as_well(make_model: MakeModel, make_orchestrator: MakeOrchestrator) -> None:
    means = []
    for secure in (False, True):
        method = HOSFL(estimator="local", compression=Uncompressed(), client_optimizer=SGD(lr=0.1))
        trainer = make_orchestrator(method, max_rounds=1, secure_aggregation=secure)
        trainer.fit(make_model(lora=None, side=Side(client=4)), RandomTokens(LENGTHS))
        means.append(updates(trainer)[0].coefficients)
    assert len(means[0]) > 100 and means[0].any()
    torch.testing.assert_close(*means, rtol=1e-6, atol=2.0**-25)


def test_the_gradient_of_a_head_is_summed_beside_scalars(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, sent: list[tuple[Message, int]]
) -> None:
    """Labels at the client; one client has no loss term, and is in the sum with weight 0."""
    found = []
    for secure in (False, True):
        sent.clear()
        trainer = make_orchestrator(max_rounds=2, secure_aggregation=secure)
        model = make_model(labels="client", lora=replace(make_model().lora, head=1))
        trainer.fit(model, RandomTokens([*LENGTHS, [1, 1]]))
        found.append(updates(trainer))
        assert secure is not any(isinstance(message, ProjectedGradients) for message, _ in sent)
    for one, two in zip(*found, strict=True):
        assert one.basis == two.basis and one.basis["beside"] == 2 and one.weights == two.weights
        assert one.weights[-1] == 0 and len(one.weights) == 5
        torch.testing.assert_close(one.coefficients, two.coefficients, rtol=1e-4, atol=1e-6)
    assert found[1][1].coefficients[2:].any()


@pytest.mark.parametrize(
    ("lost", "participants"),
    [(("secure_keys", 1), [0, 2, 3]), (("secure_shares", 1), [0, 2, 3]), (("masked_gradients", 1), [0, 2, 3]),
     (("secure_shares", 2), [0, 1, 2, 3])],
    ids=["keys", "shares", "masked answer", "revealed shares"],
)  # fmt: skip
def test_who_drops_out_is_not_in_the_sum_once_its_masked_answer_has_come_it_is(
    lost: tuple[str, int], participants: list[int], make_model: MakeModel, make_orchestrator: MakeOrchestrator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    answers: list[ProjectedGradients] = []
    keep = Participants.keep
    monkeypatch.setattr(Participants, "keep", lambda self, answer: (answers.append(answer), keep(self, answer))[1])
    trainer = make_orchestrator(max_rounds=1, secure_aggregation=True)
    with losing({1: lost}), pytest.warns(UserWarning, match="client 1 is refused: as the test wants it"):
        trainer.fit(make_model(), RandomTokens(LENGTHS))
    [update] = updates(trainer)
    plain = combine([one for one in answers if one.client in participants], trainer.server.client_rule)
    assert update.participants == plain.participants == participants and update.weights == plain.weights
    torch.testing.assert_close(update.coefficients, plain.coefficients, rtol=1e-6, atol=2.0**-25)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("secure_keys", "2 client.s. have an answer to sum, and a secure sum of this round needs 3"),
     ("masked_gradients", "2 client.s. have sent a masked answer, and a secure sum of this round needs 3"),
     ("secure_shares", "2 client.s. have shared their secrets, and .* needs 3")],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*as the test wants it")
def test_too_many_drop_outs_fail_the_round(
    kind: str, words: str, make_model: MakeModel, make_orchestrator: MakeOrchestrator
) -> None:
    """Neither half has moved, as with too few clients."""
    model, trainer = make_model(), make_orchestrator(max_rounds=1, secure_aggregation=True)
    start = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    with losing({0: (kind, 1), 2: (kind, 1)}), pytest.raises(TooFewClientsError, match=words):
        trainer.fit(model, RandomTokens(LENGTHS))
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.trained_state().items())
    assert trainer.endpoint.hidden.held == {}, "the clients forget a round that has failed"


@pytest.mark.filterwarnings("ignore:.*as the test wants it")
def test_too_few_revealed_shares_fail_it_as_well(make_model: MakeModel, make_orchestrator: MakeOrchestrator) -> None:
    trainer = make_orchestrator(max_rounds=1, secure_aggregation=True)
    lost = {0: ("secure_shares", 2), 2: ("secure_shares", 2)}
    with losing(lost), pytest.raises(TooFewClientsError, match="4 answers and 2 shares of each secret: it takes 3"):
        trainer.fit(make_model(), RandomTokens(LENGTHS))


def test_an_answer_beyond_fixed_point_is_refused_by_name_and_the_round_goes_on(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator
) -> None:
    trainer = make_orchestrator(Faulty(2, scale=1e12), max_rounds=1, secure_aggregation=True)
    with pytest.warns(UserWarning, match="client 2 is refused: coefficient 0 times its .* loss terms is no number"):
        trainer.fit(make_model(), RandomTokens(LENGTHS))
    assert updates(trainer)[0].participants == [0, 1, 3]


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "median": (lambda: HOSFL(aggregation=Median()), {}, "Median needs every client's own answer"),
    "trimmed": (lambda: HOSFL(aggregation=TrimmedMean()), {}, "TrimmedMean needs"),
    "clipped": (lambda: SplitFedSGD(aggregation=NormClippedMean()), {}, "NormClippedMean needs"),
    "personal": (lambda: HOSFL(personal=True), {}, "with personal: True a client moves what is its own"),
    "hosl": (HOSL, {}, "what the clients of HOSL send is not summed in one basis"),
    "own directions": (lambda: HOSFL(directions="client"), {}, "take HOSFL with directions: shared"),
    "frozen": (Frozen, {}, "what the clients of Frozen send"),
    "mixed": (lambda: MixedHOSFL([ClientKind("first_order", share=1)]), {}, "what the clients of MixedHOSFL send"),
    "codec": (HOSFL, {"codec": Codecs(gradient="int8")}, "travel in fixed point, not in int8"),
    "ranks": (HOSFL, {"devices": 2}, "trainer.devices or trainer.num_nodes asks for several processes"),
    "threshold": (HOSFL, {"secure_threshold": 0.5}, "threshold is 0.5; it must be above 0.5"),
    "two clients": (HOSFL, {"clients_per_round": 2}, r"a round has 2 client\(s\), and a sum of fewer than 3 tells"),
    "a watcher": (HOSFL, {"callbacks": RandomSigns()}, "RandomSigns is told single answers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_more_than_the_sum_is_refused_by_name(
    case: str, make_model: MakeModel, make_orchestrator: MakeOrchestrator, tmp_path: Path
) -> None:
    method, settings, words = REFUSED[case]
    with pytest.raises(ValueError, match=r"trainer\.(secure_|callbacks).*" + words):
        make_orchestrator(method(), secure_aggregation=True, **settings).fit(make_model(), RandomTokens(LENGTHS))
    assert not (tmp_path / "runs").exists(), "before anything is written"


def test_without_the_extra_it_is_named(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=r"needs cryptography; install the extra secure: pip install 'hosfl_lightning"):
        make_orchestrator(secure_aggregation=True).fit(make_model(), RandomTokens(LENGTHS))


def test_a_run_in_the_open_is_another_run(make_model: MakeModel, make_orchestrator: MakeOrchestrator) -> None:
    """Sums are rounded."""
    trainer = make_orchestrator(max_rounds=1, secure_aggregation=True, enable_checkpointing=True)
    trainer.fit(make_model(), RandomTokens(LENGTHS))
    with pytest.raises(CheckpointError, match="secure_aggregation is null, the run was made with true"):
        make_orchestrator(max_rounds=2).fit(make_model(), RandomTokens(LENGTHS), ckpt_path=trainer.log_dir)
