"""Labels, head and loss at the clients: the rounds are those of the two-way split, and what travels tells no label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from hosfl_lightning import HOSFL, SplitSequenceClassifier
from hosfl_lightning.advise.command import Advisor
from hosfl_lightning.algorithms import HOSL, Algorithm, FedAvg, Frozen, MixedHOSFL, SplitFedSGD, TooFewClientsError
from hosfl_lightning.algorithms.mixed import ClientKind
from hosfl_lightning.availability import Trace
from hosfl_lightning.clients import Endpoint, EndpointError, SplitEndpoint, TermsError
from hosfl_lightning.data.tokenization import Example
from hosfl_lightning.optim import SGD, Uncompressed
from hosfl_lightning.split import Lora, LoraHalf, Side
from hosfl_lightning.wire import (
    Codecs,
    HeldOutRequest,
    Message,
    MiddleOutput,
    Multiplier,
    OutputMultiplier,
    ProjectedGradients,
    UnlabelledData,
    Update,
    encode,
)
from tests.conftest import RandomTokens, sgd
from tests.recipe_runs import tiny_pretrained

pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe")  # μ is large, so that 1/μ magnifies nothing

Make = Callable[..., Any]
Sent = list[tuple[Message, int]]
RULE = {"client_optimizer": SGD(lr=0.1)}
SIDE = {"side": Side(client=4), "lora": Lora(client=None, server=LoraHalf(r=4, target_modules="all-linear"))}
#: Client 2 has no loss term: its texts are of one token.
LENGTHS = [[9, 12, 7], [6, 10], [1, 1]]
METHODS: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "forward": (HOSFL(2, 0.5, **RULE), {}),
    "central": (HOSFL(2, 0.5, "central", **RULE), {}),
    "jvp": (HOSFL(2, 0.5, "jvp", **RULE), {}),
    "local": (HOSFL(estimator="local", compression=Uncompressed(), **RULE), SIDE),
    "first order": (SplitFedSGD(**RULE), {}),
    "frozen": (Frozen(**RULE), {}),
}


def trained(model: Any) -> dict[str, Tensor]:
    """By the names that the two-way split has for them."""
    return {name.replace("client_half.client_head.", "server_half."): t.clone()
            for name, t in model.trained_state().items()}  # fmt: skip


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def of(sent: Sent, kind: type[Message]) -> list[Any]:
    return [message for message, _ in sent if isinstance(message, kind)]


@pytest.fixture
def fit(make_model: Make, make_orchestrator: Make, sent: Sent) -> Make:
    """A run; its loss of the last round, what is trained, and what was sent."""

    def run(algorithm: Algorithm, labels: str, model: dict[str, Any] | None = None, **settings: Any) -> Any:
        sent.clear()
        trainer = make_orchestrator(algorithm, logger=False, **{"max_rounds": 2, **settings})
        made = make_model(labels=labels, **model or {})
        trainer.fit(made, RandomTokens(LENGTHS))
        return trainer.callback_metrics.get("train/loss"), trained(made), [*sent]

    return run


@pytest.mark.parametrize("name", METHODS)
def test_the_rounds_are_those_of_the_two_way_split(name: str, fit: Make) -> None:
    """Loss, λ and both halves, of clients of unequal length and one without a loss term; batched and one by one."""
    algorithm, model = METHODS[name]
    loss, halves, said = fit(algorithm, "server", model)
    for simulation in ("batched",) if name in ("central", "jvp") else ("batched", "per_client"):
        mine, own, messages = fit(algorithm, "client", model, simulation=simulation)
        torch.testing.assert_close(mine, loss, rtol=1e-5, atol=1e-6)
        close(own, halves)
        for one, other in zip(of(messages, Multiplier), of(said, Multiplier), strict=True):
            torch.testing.assert_close(one.multiplier.restore(), other.multiplier.restore(), rtol=1e-4, atol=1e-7)
        assert {m.client for m in of(messages, MiddleOutput)} == {0, 1}  # nothing to be told to the other


def test_nothing_that_travels_holds_ids_or_labels(fit: Make, data: RandomTokens) -> None:
    """Every field of every message of a run is one of these, and no frame holds a client's ids in any width."""
    *_, sent = fit(METHODS["forward"][0], "client", simulation="per_client")
    allowed = {
        "step_request": {"round", "client", "attempt", "step", "rule"},
        "unlabelled_data": {"round", "client", "z", "mask", "num_terms", "attempt", "step"},
        "middle_output": {"round", "client", "z", "attempt", "step"},
        "output_multiplier": {"round", "client", "multiplier", "loss", "attempt", "step"},
        "multiplier": {"round", "client", "multiplier", "attempt", "step"},
        "projected_gradients": {
            "round", "client", "basis", "coefficients", "num_terms", "attempt", "loss", "num_examples",
        },
        "update": {field.name for field in fields(Update)},
    }  # fmt: skip
    assert {m.kind: {field.name for field in fields(m)} for m, _ in sent} == allowed
    assert tell_ids(sent) == set()
    *_, sent = fit(METHODS["forward"][0], "server", simulation="per_client")
    assert tell_ids(sent) == {"smashed_data"}  # so that they would be found


def tell_ids(sent: Sent) -> set[str]:
    """The kinds of messages in whose bytes a client's ids are, in any width."""
    texts = RandomTokens(LENGTHS)
    texts.setup("fit")
    widths = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32)
    ids = [torch.tensor(example.input_ids[1:5]) for client in texts.clients[:2] for example in client]
    patterns = [row.to(dtype).view(torch.uint8).numpy().tobytes() for row in ids for dtype in widths]
    return {m.kind for m, _ in sent for frame in [encode(m)] if any(pattern in frame for pattern in patterns)}


def test_a_loss_that_is_withheld_is_nowhere(fit: Make) -> None:
    loss, halves, sent = fit(HOSFL(2, 0.5, report_loss=False, **RULE), "client")
    assert loss is None
    assert {message.loss for message in of(sent, OutputMultiplier)} == {None}
    _, told, sent = fit(METHODS["forward"][0], "client")
    assert None not in {message.loss for message in of(sent, OutputMultiplier)}
    assert all(torch.equal(halves[name], told[name]) for name in told)


def test_z_travels_in_the_codec_of_smashed_data_and_the_multipliers_in_theirs(fit: Make) -> None:
    *_, sent = fit(METHODS["forward"][0], "client", codec=Codecs("int8", "int4"))
    assert {m.z.codec for m, _ in sent if isinstance(m, UnlabelledData | MiddleOutput)} == {"int8"}
    assert {m.multiplier.codec for m, _ in sent if isinstance(m, Multiplier | OutputMultiplier)} == {"int4"}


def test_padding_does_not_travel(fit: Make) -> None:
    *_, sent = fit(METHODS["forward"][0], "client")
    valid = {m.client: int(m.mask.sum()) for m in of(sent, UnlabelledData)}
    for message in of(sent, MiddleOutput):
        assert len(message.z.values) == valid[message.client]
    for message in of(sent, OutputMultiplier):
        assert len(message.multiplier.values) == valid[message.client]


class TestWhoDropsOut:
    """After z₂: the round is that of the others."""

    def answers(self, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
        """Of client 1."""
        output = SplitEndpoint.output

        def changed(self: Any, request: Any) -> Any:
            answer = output(self, request)
            return change(answer) if request.client == 1 else answer

        monkeypatch.setattr(SplitEndpoint, "output", changed)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda m: replace(m, multiplier=replace(m.multiplier, values=m.multiplier.values[1:])), "rows of 32"),
            (lambda m: replace(m, multiplier=replace(m.multiplier, values=m.multiplier.values * 1e20)), "beyond ±1e"),
        ],
    )
    def test_is_named(self, change: Any, reason: str, fit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers(monkeypatch, change)
        with pytest.warns(UserWarning, match=f"client 1 is refused: .*{reason}"):
            fit(METHODS["frozen"][0], "client", max_rounds=1)

    @pytest.mark.parametrize("simulation", ["batched", "per_client"])
    def test_has_no_part_in_the_weights(self, simulation: str, fit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        algorithm = METHODS["first order"][0]
        self.answers(monkeypatch, lambda answer: replace(answer, loss=None))
        with pytest.warns(UserWarning, match="client 1 is refused: it keeps its loss to itself"):
            loss, halves, sent = fit(algorithm, "client", simulation=simulation)
        assert {m.client for m in of(sent, Multiplier)} == {0, 2}
        monkeypatch.undo()
        monkeypatch.setattr("tests.algorithms.test_labels_at_the_client.LENGTHS", [LENGTHS[0], [1, 1], [1, 1]])
        alone, others, _ = fit(algorithm, "client", simulation=simulation)
        torch.testing.assert_close(loss, alone)
        close(halves, others)


def test_labels_that_are_sent_all_the_same_are_refused(fit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    smashed = Endpoint.smashed

    def telling(self: Any, *args: Any) -> Any:
        model, self.model = self.model, SimpleNamespace(labels="server")
        try:
            return smashed(self, *args)
        finally:
            self.model = model

    monkeypatch.setattr(Endpoint, "smashed", telling)
    words = "it sent its labels, and the run's are at the client"
    with pytest.warns(UserWarning, match=words), pytest.raises(TooFewClientsError):
        fit(METHODS["frozen"][0], "client")


# ---- a head that is trained


class Texts(RandomTokens):
    """One of two classes an example: whether it begins with an even token."""

    def setup(self, stage: str) -> None:
        super().setup(stage)

        def labelled(example: Example) -> Example:
            return Example(example.input_ids, example.input_ids[0] % 2)

        self.clients = [[*map(labelled, examples)] for examples in self.clients]
        self.validation_set = [*map(labelled, self.validation_set)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_pretrained(tmp_path_factory.mktemp("u") / "llama", "llama", 3, classifier=True))


@pytest.fixture
def classify(encoder: str, make_orchestrator: Make, sent: Sent) -> Make:
    """As `fit`, of a classifier."""

    def run(algorithm: Algorithm, labels: str, model: dict[str, Any] | None = None, **settings: Any) -> Any:
        sent.clear()
        lora = Lora(client=LoraHalf(r=2, target_modules=["q_proj"]), server=LoraHalf(r=2, target_modules=["q_proj"]))
        given: dict[str, Any] = {"cut": 2, "num_labels": 2, "lora": lora, "optimizer": sgd, **(model or {})}
        made = SplitSequenceClassifier(encoder, **given, labels=labels)  # type: ignore[arg-type]
        trainer = make_orchestrator(algorithm, logger=False, **{"max_rounds": 2, **settings})
        trainer.fit(made, Texts([[9, 12, 7], [6, 10]]))
        return trainer.callback_metrics["train/loss"], trained(made), [*sent]

    return run


NO_LORA = {"lora": Lora(client=None, server=LoraHalf(r=2, target_modules=["q_proj"]))}
HEADS: dict[str, tuple[Algorithm, dict[str, Any], dict[str, Any]]] = {
    "forward": (HOSFL(2, 0.5, **RULE), {}, {"kind": "shared_directions", "probes": 2, "distribution": "rademacher"}),
    "own directions": (HOSFL(2, 0.5, directions="client", **RULE), {}, {
        "kind": "client_directions", "probes": 2, "clients": [0, 1], "distribution": "rademacher",
    }),
    "local": (HOSFL(estimator="local", compression=Uncompressed(), **RULE), SIDE, {"kind": "dense"}),
    "first order": (SplitFedSGD(**RULE), {}, {"kind": "dense"}),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_a_trained_head_moves_as_at_the_server(name: str, classify: Make) -> None:
    """Its exact gradient, beside what there is of the half: with one rate for all the round is the two-way split's."""
    algorithm, model, basis = HEADS[name]
    loss, halves, _ = classify(algorithm, "server", model)
    for simulation in ("batched", "per_client"):
        mine, own, sent = classify(algorithm, "client", model, simulation=simulation)
        torch.testing.assert_close(mine, loss, rtol=1e-5, atol=1e-6)
        close(own, halves)
        heads = len([n for n in own if "score" in n])
        assert heads
        assert all(m.basis == {**basis, "beside": heads} for m in of(sent, Update))


@pytest.mark.parametrize(("algorithm", "model"), [(Frozen(**RULE), {}), (HOSFL(2, 0.5, **RULE), NO_LORA)])
def test_a_head_alone_travels_dense(algorithm: Algorithm, model: dict[str, Any], classify: Make) -> None:
    """A frozen half beside a head that is trained, as at the server; and a half of which nothing is trained."""
    loss, halves, _ = classify(Frozen(**RULE), "server", model)
    mine, own, sent = classify(algorithm, "client", model)
    torch.testing.assert_close(mine, loss, rtol=1e-5, atol=1e-6)
    close(own, halves)
    assert all(m.basis == {"kind": "dense"} for m in of(sent, Update))


def test_a_gradient_in_few_bits_carries_the_heads(classify: Make) -> None:
    _, own, sent = classify(HEADS["local"][0], "client", HEADS["local"][1], codec=Codecs(gradient="int8"))
    _, exact, _ = classify(HEADS["local"][0], "client", HEADS["local"][1])
    assert {m.kind for m, _ in sent} >= {"coded_gradient"} and not of(sent, ProjectedGradients)
    close(own, exact, 1e-2)
    for name in ("forward", "own directions"):
        with pytest.raises(ValueError, match=r"trainer.codec.gradient=int8: the 2 scalars .* leave it out"):
            classify(HEADS[name][0], "client", codec=Codecs(gradient="int8"))


# ---- what does not go together


def refusals() -> list[tuple[Algorithm, str]]:
    mixed = MixedHOSFL(clients=[ClientKind("forward_only", share=1.0)])
    return [
        (HOSL(), "labels: client keeps .* and HOSL has no round .* set it to server, or take HOSFL"),
        (mixed, "labels: client keeps .* and MixedHOSFL has no round"),
        (FedAvg(), "FedAvg"),
    ]


@pytest.mark.parametrize(("algorithm", "words"), refusals())
def test_other_methods_are_refused_by_name(
    algorithm: Algorithm, words: str, make_model: Make, make_orchestrator: Make, data: RandomTokens
) -> None:
    with pytest.raises(ValueError, match=words):
        make_orchestrator(algorithm).fit(make_model(labels="client"), data)


def test_a_loss_that_the_server_has_cannot_be_withheld(
    make_model: Make, make_orchestrator: Make, data: RandomTokens
) -> None:
    with pytest.raises(ValueError, match=r"report_loss: false keeps nothing back.*labels: client"):
        make_orchestrator(HOSFL(report_loss=False)).fit(make_model(), data)


def test_advice_needs_the_loss_at_the_server(make_model: Make, data: RandomTokens) -> None:
    with pytest.raises(ValueError, match=r"set model.init_args.labels: server"):
        Advisor(HOSFL(), max_rounds=4, logger=False).advise(make_model(labels="client"), data)


def test_what_was_away_cannot_come_back_without_a_log(make_orchestrator: Make, encoder: str) -> None:
    """Not even beside a frozen half: its head moves."""
    model = SplitSequenceClassifier(encoder, cut=2, num_labels=2, labels="client")
    trainer = make_orchestrator(Frozen(), replay_log=False, availability=Trace([[0]]))
    with pytest.raises(ValueError, match=r"set trainer.replay_log: true"):
        trainer.fit(model, Texts([[9, 12, 7]]))


def test_held_out_labels_are_not_sent(make_model: Make, make_orchestrator: Make, data: RandomTokens) -> None:
    """Nobody asks for them, and a client that is asked does not send them."""
    model = make_model(labels="client")
    with pytest.raises(ValueError, match=r"--validate: the clients keep their labels.*take server"):
        make_orchestrator(logger=False).serve(model, data, clients="none.yaml", insecure=True, validate="clients")
    endpoint = of_terms(model, model)
    endpoint.held_out = lambda clients, number: pytest.fail("it is asked for")
    with pytest.raises(EndpointError, match="keeps its labels"):
        endpoint.hold_out(HeldOutRequest(0, 1, 0))


def test_a_client_whose_model_keeps_labels_elsewhere_takes_no_part(make_model: Make) -> None:
    with pytest.raises(TermsError, match=r"labels at the client, this model at the server; set .*labels: client"):
        of_terms(make_model(labels="client"), make_model())


def of_terms(theirs: Any, mine: Any) -> Any:
    """A client with one model in a run of another."""
    terms = HOSFL().terms(theirs, 0, Codecs(), 3)
    return Endpoint.of(mine, lambda *_: pytest.fail("no batch"), terms, Fabric(accelerator="cpu", devices=1))
