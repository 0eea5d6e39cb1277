"""What somebody's own part must keep is checked where it comes in: one line names the class and the contract."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback
from torch import Tensor, nn

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM, cli, join
from hosfl_lightning.aggregation import AggregationRule, WeightedMean, aggregated
from hosfl_lightning.algorithms import ZOFL, Algorithm, ClientKind, MixedHOSFL
from hosfl_lightning.callbacks import HybridOrder, ZerothOrderTraining
from hosfl_lightning.clients import Endpoint, SplitEndpoint, TermsError
from hosfl_lightning.clients.cohort import Minibatches
from hosfl_lightning.models import PretrainedError, SplitImageClassifier
from hosfl_lightning.optim import SGD, CentralDifference, Estimator, UpdateRule, ZerothOrder, estimator_of
from hosfl_lightning.optim.estimators import told
from hosfl_lightning.optim.rules import check_rule
from hosfl_lightning.parts import PartError
from hosfl_lightning.server import Outcome
from hosfl_lightning.wire import Codec, Codecs
from hosfl_lightning.wire.codec import codec_of
from tests.callbacks.drop_in.plain_modules import LIGHTNING_WARNINGS, fit, hybrid, mlp, same_bits
from tests.random_tokens import RandomTokens
from tests.recipe_runs import ROOT, command_line

HERE = __name__
MakeModel = Callable[..., SplitCausalLM]
MakeOrchestrator = Callable[..., Orchestrator]
pytestmark = [*LIGHTNING_WARNINGS, pytest.mark.filterwarnings("ignore:the two sides of a probe")]


@dataclass(frozen=True)
class Scaled(Estimator):
    """The central difference, longer by a factor."""

    factor: float = 1.0
    symmetric = True

    def __call__(self, objective: Any, probes: Any, base: Tensor | None = None) -> Tensor:
        return self.factor * CentralDifference()(objective, probes, base)


def estimator(values: Any) -> Estimator:
    @dataclass(frozen=True)
    class Wrong(Estimator):
        def __call__(self, objective: Any, probes: Any, base: Tensor | None = None) -> Any:
            objective()
            return values

    return Wrong()


class TestEstimators:
    def test_one_of_somebodys_own_makes_the_update(self) -> None:
        def stepped(estimator: Any) -> nn.Module:
            module = nn.Linear(2, 1)
            with torch.no_grad():
                module.weight.fill_(0.5)
            zo = ZerothOrder(module.parameters(), SGD(lr=0.1), module=module, estimator=estimator)
            zo.step(lambda: module(torch.ones(3, 2)).square().mean())
            return module

        with torch.random.fork_rng():
            torch.manual_seed(0)
            shipped = stepped("central")
            torch.manual_seed(0)
            own = stepped(Scaled())
            torch.manual_seed(0)
            longer = stepped(Scaled(2.0))
        assert same_bits(shipped, own)
        assert not same_bits(shipped, longer)

    @pytest.mark.parametrize(
        ("values", "given"),
        [
            (torch.zeros(3).double(), r"\(3,\) torch.float64"),
            (torch.zeros(2), r"\(2,\) torch.float32"),
            (torch.zeros(2, 1).double(), r"\(2, 1\)"),
            ([0.0, 0.0], "list"),
        ],
    )
    def test_what_it_returns_is_checked(self, values: Any, given: str) -> None:
        module = nn.Linear(2, 1)
        zo = ZerothOrder(module.parameters(), module=module, estimator=estimator(values), probes=2)
        with pytest.raises(PartError, match=f"estimator Wrong returned {given}.*one float64 a direction, .2,. torch"):
            zo.project(lambda: module(torch.ones(3, 2)).mean())

    def test_one_that_returns_nan_is_named_unless_the_objective_does(self) -> None:
        module = nn.Linear(2, 1)
        nan = estimator(torch.tensor([0, torch.nan]).double())
        own = ZerothOrder(module.parameters(), module=module, estimator=nan, probes=2)
        with pytest.raises(PartError, match=r"estimator Wrong returned NaN or infinity, .*finite.*\(P, K\) where it"):
            own.project(lambda: module(torch.ones(3, 2)).mean())
        assert own.project(lambda: module(torch.ones(3, 2)).mean() * torch.nan)[1].isnan()

    @pytest.mark.parametrize("given", [f"{HERE}.Scaled", Scaled()], ids=["class path", "instance"])
    @pytest.mark.parametrize(
        "take",
        [
            lambda e: HOSFL(estimator=e).estimator,
            lambda e: ZOFL(estimator=e).estimator,
            lambda e: MixedHOSFL([ClientKind("forward_only", share=1.0)], estimator=e).estimator,
            lambda e: HybridOrder("net.1", estimator=e).settings["estimator"],
            lambda e: ZerothOrderTraining(estimator=e).settings["estimator"],
            lambda e: ZerothOrder([nn.Parameter(torch.ones(1))], estimator=e).estimator,
        ],
        ids=["HOSFL", "ZOFL", "MixedHOSFL", "HybridOrder", "ZerothOrderTraining", "ZerothOrder"],
    )
    def test_is_taken_by_its_class_path_and_as_an_instance(
        self, take: Any, given: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, HERE, SimpleNamespace(Scaled=Scaled))
        assert take(given) == Scaled()

    def test_one_that_ships_is_the_same_by_name_and_by_class(self) -> None:
        assert HOSFL(estimator=CentralDifference()).settings() == HOSFL(estimator="central").settings()

    def test_settings_and_terms_tell_of_it_and_the_client_makes_the_same(self) -> None:
        method = HOSFL(estimator=Scaled(2.0))
        for told_of in (method.settings(), method.client_settings()):
            assert estimator_of(told_of) == Scaled(2.0)
        assert method.settings() != HOSFL(estimator=Scaled(3.0)).settings()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"estimator": "Missing"}, "no estimator 'Missing' is known here, only .*CentralDifference.*--imports"),
            ({"estimator": "Scaled", "estimator.size": 2}, "estimator Scaled: .*size"),
            ({"estimator": "Twin"}, "classes of that name in a and b; rename one"),
        ],
    )
    def test_a_client_that_lacks_the_class_says_so(self, settings: dict[str, Any], message: str) -> None:
        twins = [type("Twin", (Estimator,), {"__module__": name}) for name in "ab"]
        with pytest.raises(PartError, match=message):
            estimator_of(settings)
        del twins

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("centrl", "must be one of forward, central, jvp, local.*did you mean central"),
            ("nowhere.Scaled", r"estimator: nowhere.Scaled cannot be made \(No module"),
            (Scaled, "Scaled is no hosfl_lightning.optim.Estimator; give a subclass of it, made"),
            (SGD(), "SGD is no hosfl_lightning.optim.Estimator"),
        ],
        ids=["mistyped", "no module", "class", "another kind"],
    )
    def test_what_is_none_is_named(self, given: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HOSFL(estimator=given)

    def test_settings_that_nobody_could_be_told_are_refused(self) -> None:
        class Own(Scaled):
            def __init__(self, order: int) -> None:
                super().__init__()

        with pytest.raises(PartError, match=r"estimator: Own takes order.*put @dataclass"):
            HOSFL(estimator=Own(4))

    def test_dual_numbers_are_for_whoever_serves_them(self) -> None:
        class Dual(Scaled):
            dual = True

        HOSFL(estimator=Dual())
        with pytest.raises(ValueError, match="forward, central, or of your own without dual numbers, got Dual"):
            ZOFL(estimator=Dual())

    def test_in_a_round_as_what_it_is(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        def run(estimator: Any) -> SplitCausalLM:
            model = make_model()
            make_orchestrator(HOSFL(estimator=estimator, client_optimizer=SGD(lr=0.1)), max_rounds=1).fit(model, data)
            return model

        central, own, longer = run("central"), run(Scaled()), run(Scaled(2.0))
        assert same_bits(central.client_half, own.client_half)
        assert not same_bits(central.client_half, longer.client_half)

    @pytest.mark.parametrize("kind", [hybrid, ZerothOrderTraining])
    def test_in_a_plain_trainer(self, kind: Any) -> None:
        def trained(estimator: Any) -> nn.Module:
            module, callback = mlp(), kind(estimator=estimator)
            fit(module, callback)
            assert callback.state_dict()["estimator"] in ("Scaled", "central")
            return module

        assert same_bits(trained("central"), trained(Scaled()))
        assert not same_bits(trained("central"), trained(Scaled(2.0)))


class TestAggregation:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda c: c.sum(), r"\(\) torch.float32; of coefficients \(3, 2\).* one row, \(2,\) torch.float32"),
            (lambda c: c.mean(0).double(), r"\(2,\) torch.float64"),
            (lambda c: c.mean(0).tolist(), "list"),
            (lambda c: c.mean(0) / 0, "not finite"),
        ],
        ids=["shape", "dtype", "type", "finite"],
    )
    def test_what_it_returns_is_checked(self, make: Any, message: str) -> None:
        @dataclass(frozen=True)
        class Wrong(AggregationRule):
            def __call__(self, coefficients: Tensor, weights: Any) -> Any:
                return make(coefficients)

        with pytest.raises(PartError, match=f"aggregation Wrong returned .*{message}"):
            aggregated(Wrong(), torch.ones(3, 2), [0.2, 0.3, 0.5])

    def test_every_method_checks(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        @dataclass(frozen=True)
        class Wrong(WeightedMean):
            def __call__(self, coefficients: Tensor, weights: Any) -> Tensor:
                return coefficients[:, 0]

        from hosfl_lightning.algorithms import SplitFedV1

        for method in (HOSFL(aggregation=Wrong()), SplitFedV1(aggregation=Wrong())):
            with pytest.raises(PartError, match="aggregation Wrong returned"):
                make_orchestrator(method, max_rounds=1).fit(make_model(), data)

    def test_what_is_none_is_named(self) -> None:
        with pytest.raises(PartError, match=r"trainer.algorithm.aggregation: function is no .*AggregationRule"):
            HOSFL(aggregation=lambda c, w: c.mean(0))  # type: ignore[arg-type]


class TestUpdateRules:
    @pytest.mark.parametrize(
        ("update", "message"),
        [
            (lambda p: p - 1, "return nothing"),
            (lambda p: None, "left its chunk as it was"),
            (lambda p: (p.sub_(torch.inf), None)[1], "elementwise and finite"),
        ],
        ids=["returns", "does nothing", "finite"],
    )
    def test_what_it_does_is_checked(self, update: Any, message: str) -> None:
        @dataclass(frozen=True)
        class Wrong(UpdateRule):
            def update_(self, param: Tensor, grad: Tensor, state: Any, step: int, group: Any) -> None:
                return update(param)

        with pytest.raises(PartError, match=f"client_optimizer: Wrong.update_ .*{message}"):
            HOSFL(client_optimizer=Wrong())

    def test_slots_are_names(self) -> None:
        @dataclass(frozen=True)
        class Wrong(SGD):
            def slots(self, group: Any) -> Any:
                return "mean", 3

        with pytest.raises(PartError, match=r"rule: Wrong.slots must return the names"):
            ZerothOrder([nn.Parameter(torch.ones(2))], Wrong())

    def test_torchs_are_none(self) -> None:
        with pytest.raises(PartError, match=r"Adam is no hosfl_lightning.optim.UpdateRule"):
            HOSFL(client_optimizer=torch.optim.Adam([nn.Parameter(torch.ones(1))]))  # type: ignore[arg-type]

    @pytest.mark.parametrize("lr", [0.0, 1e-12, 1.0])
    def test_a_sound_one_is_taken(self, lr: float) -> None:
        @dataclass(frozen=True)
        class Own(SGD):
            pass

        check_rule(Own(lr=lr), "rule")


class TestCodecs:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (
                {"encode": lambda s, x, u: (x.half(), None)},
                r"encode made \(3, 8\) torch.float16 of .*torch.int8",
            ),
            ({"encode": lambda s, x, u: (x[:, :2].to(torch.int8), None)}, r"encode made \(3, 2\) torch.int8"),
            ({"scales": lambda s, n: n}, r"encode made the scale NoneType; by its scales it is \(3,\) torch.bfloat16"),
            ({"decode": lambda s, v, c, w: v}, r"decode made \(3, 8\) torch.int8; it is \(3, 8\) torch.float32"),
            ({"decode": lambda s, v, c, w: v.float() / 0}, "decode made what is not finite"),
        ],
        ids=["dtype", "shape", "scale", "back", "finite"],
    )
    def test_what_it_makes_is_checked(
        self, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str
    ) -> None:
        base = {
            "name": "whole", "form": torch.int8, "encode": lambda s, x, u: (x.to(torch.int8), None),
            "decode": lambda s, v, c, w: v.float(),
        }  # fmt: skip
        monkeypatch.setattr(Codec, "known", {**Codec.known})
        wrong = type("Wrong", (Codec,), {**base, **changed})
        monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(Wrong=wrong))
        with pytest.raises(PartError, match=f"trainer.codec.multiplier: codec Wrong.{message}"):
            Codecs(multiplier="mine.Wrong")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("int7", "must be one of fp32, .*, or the class path of a hosfl_lightning.wire.Codec"),
            ("nowhere.Codec", "cannot be made"),
            ("hosfl_lightning.optim.SGD", "is no hosfl_lightning.wire.Codec with a name"),
        ],
    )
    def test_what_is_none_is_named(self, given: str, message: str) -> None:
        with pytest.raises(PartError, match=f"trainer.codec.gradient.*{message}"):
            codec_of(given, "trainer.codec.gradient")

    def test_a_name_is_taken_once(self) -> None:
        with pytest.raises(PartError, match=r"a codec 'int8' is in hosfl_lightning.wire.codecs already"):
            type("Own", (Codec,), {"name": "int8", "encode": None, "decode": None})

    def test_a_client_that_lacks_it_or_another_part_cannot_join(
        self, make_model: MakeModel, data: RandomTokens
    ) -> None:
        model, method = make_model(), HOSFL()
        terms = method.terms(model, 0, Codecs(), 3)
        terms = replace(terms, codecs={**terms.codecs, "multiplier": "theirs"})
        fabric = Fabric(accelerator="cpu", devices=1)
        with pytest.raises(TermsError, match=r"in the codec 'theirs', which is not known here, only fp32.*--imports"):
            Endpoint.of(model, Minibatches(data, model), terms, fabric)
        with pytest.raises(TermsError, match=r"by 'theirs', this client's by 'hosfl-rules/1', to other bits; use the"):
            Endpoint.of(model, Minibatches(data, model), replace(terms, rules="theirs"), fabric)
        for change in ({"settings": {**terms.settings, "estimator": "Theirs"}}, {"rule": {"name": "Theirs"}}):
            lacking = replace(terms, codecs=method.terms(model, 0, Codecs(), 3).codecs, **change)
            with pytest.raises(TermsError, match=r"'Theirs' is known here, only .*import its class"):
                Endpoint.of(model, Minibatches(data, model), lacking, fabric)


class Mean(SplitCausalLM):
    """As it is."""


class TestModels:
    @pytest.mark.parametrize(
        ("method", "change", "message"),
        [
            ("loss", lambda loss: loss[None], r"Mean.training_step \(loss\) returned a tensor of shape \(1,\)"),
            ("loss", lambda loss: loss.detach(), r"tensor of shape \(\), torch.float32; it returns the mean"),
            ("loss", lambda loss: loss.item(), r"returned float .*; it returns the mean"),
            ("loss", lambda loss: torch.ones((), requires_grad=True), r"does not depend on batch\['z'\]"),
            ("count", torch.tensor, r"Mean.count returned a tensor of shape \(\), torch.int64; .* an int >= 0"),
        ],
        ids=["shape", "graph", "type", "z", "count"],
    )
    def test_loss_and_count_are_checked(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens,
        monkeypatch: pytest.MonkeyPatch, method: str, change: Any, message: str,
    ) -> None:  # fmt: skip
        model = make_model()
        model.__class__ = Mean
        own = getattr(SplitCausalLM, method)

        def changed(self: Any, *args: Any) -> Any:
            whole = own(self, *args)
            return change(whole) if method == "count" or torch.is_grad_enabled() else whole

        monkeypatch.setattr(Mean, method, changed, raising=False)
        with pytest.raises(PartError, match=message):
            make_orchestrator(max_rounds=1, val_check_interval=9).fit(model, data)

    def test_a_network_is_a_module(self) -> None:
        with pytest.raises(PretrainedError, match=r"network: it made a list; it is a class or function of an nn.Seq"):
            SplitImageClassifier(cut=1, num_labels=2, image_size=4, network=lambda: [1])  # type: ignore[arg-type, return-value]


class Plain(HOSFL):
    """As it is."""


class TestMethodsAndCallbacks:
    @pytest.mark.parametrize(
        ("outcome", "given"),
        [
            (lambda o: None, "NoneType None"),
            (lambda o: replace(o, loss=torch.ones(2)), r"a loss of a tensor of shape \(2,\)"),
            (lambda o: replace(o, num_examples=None), "a loss of"),
        ],
    )
    def test_the_outcome_of_a_round_is_checked(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens,
        monkeypatch: pytest.MonkeyPatch, outcome: Any, given: str,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(
            Plain, "server_round", lambda self, *args: outcome(HOSFL.server_round(self, *args)), raising=False
        )
        with pytest.raises(PartError, match=f"Plain.server_round returned {given}.*server.Outcome"):
            make_orchestrator(Plain(), max_rounds=1).fit(make_model(), data)

    def test_what_is_no_method_is_named(self) -> None:
        class Without(Algorithm):
            endpoint = SplitEndpoint

            def __init__(self) -> None:
                pass

            def server_round(self, *_: Any) -> Outcome:
                return Outcome(0.0, 0)

        class Nobody(Without):
            endpoint: ClassVar[Any] = None

            def __init__(self) -> None:
                Algorithm.__init__(self)

        class Unplain(Nobody):
            endpoint = SplitEndpoint

            def settings(self) -> dict[str, Any]:
                return {"size": torch.ones(1)}

        for given, message in (
            (HOSFL, "HOSFL is no hosfl_lightning.algorithms.Algorithm"),
            (Without(), r"Without.__init__ must call super\(\).__init__"),
            (Nobody(), "Nobody.endpoint must be what its clients run"),
            (Unplain(), "Unplain: settings.size must be a plain value.*saved, compared and sent"),
        ):
            with pytest.raises(PartError, match=message):
                Orchestrator(given)  # type: ignore[arg-type]

    @pytest.mark.parametrize("given", [Callback, object()])
    def test_what_is_no_callback_is_named(self, given: Any, tmp_path: Path) -> None:
        with pytest.raises(PartError, match=r"trainer.callbacks: (Callback|object) is no .*Callback, made"):
            Orchestrator(callbacks=[given], default_root_dir=str(tmp_path))


def test_told_of_a_tuple_is_a_list() -> None:
    @dataclass(frozen=True)
    class Pair(Scaled):
        sides: tuple[int, ...] = (1, 2)

    assert told(Pair()) == {"estimator": "Pair", "estimator.factor": 1.0, "estimator.sides": [1, 2]}
    assert estimator_of(told(Pair())) == Pair()


def test_a_client_imports_what_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def joined(*_: Any, **__: Any) -> str:
        return " ".join(sorted(name for name in sys.modules if name == "their_parts"))

    (tmp_path / "their_parts.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(join, "join", wraps(join.join)(joined))
    recipe = ROOT / "examples" / "remote" / "client.yaml"
    with command_line():
        for imports, said in (([], ""), (["--imports=[their_parts]"], "their_parts")):
            cli.main(["join", "--server=127.0.0.1:1", "--insecure", f"--config={recipe}", *imports])
            assert capsys.readouterr().out == f"{said}\n"
        with pytest.raises(SystemExit):
            cli.main(["join", "--server=127.0.0.1:1", "--insecure", f"--config={recipe}", "--imports=[nowhere]"])
    assert capsys.readouterr().err == "hosfl: error: No module named 'nowhere'\n"


def test_parts_may_lie_where_the_command_is_started_and_hide_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["certs", "inti"])
    assert sys.path[-1] == str(tmp_path)
