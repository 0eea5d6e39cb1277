"""Runs whose clients keep halves of their own: evaluation, what goes on, what is exported, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hosfl_lightning import HOSFL, Control, Orchestrator, SplitCausalLM, SplitImageClassifier
from hosfl_lightning.aggregation import Median
from hosfl_lightning.algorithms import SplitFedSGD
from hosfl_lightning.availability import Trace
from hosfl_lightning.callbacks import GradientAlignment
from hosfl_lightning.networks import ConvNet
from hosfl_lightning.optim import AdamW, Uncompressed
from hosfl_lightning.run.by_client import held_by
from hosfl_lightning.run.checkpoint import CheckpointError, load
from hosfl_lightning.run.table import cost_lines, losses_table
from hosfl_lightning.split import Lora, LoraHalf, Side, SplitError
from hosfl_lightning.wire import Codecs
from tests.faults import count_writes
from tests.models.image_runs import RandomImages, sgd
from tests.random_tokens import RandomTokens
from tests.recipe_runs import tiny_pretrained
from tests.small_run import contents

RULE = AdamW(lr=0.05)
pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe", "ignore:mu=")


@pytest.fixture(autouse=True, scope="module")
def without_waiting_for_the_disk() -> Iterator[None]:
    with count_writes():
        yield


class Images(RandomImages):
    """With a test set, and a client that takes part in no round of `Kit`'s."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.clients.append(self.clients[0][:2])
        self.test_set = [self.clients[0][i] for i in range(6)]


def image_model(**settings: Any) -> SplitImageClassifier:
    network = lambda: ConvNet(channels=1, widths=(2, 3), num_labels=2, image_size=8)  # noqa: E731
    given: dict[str, Any] = {"client_parameters": "norm"} | settings
    return SplitImageClassifier(
        cut=1, num_labels=2, image_size=8, channels=1, network=network, optimizer=sgd(0.1), **given
    )


class Kit:
    """Two clients of four, in rounds that can be stopped."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def trainer(self, algorithm: Any = None, **settings: Any) -> Orchestrator:
        given: dict[str, Any] = {
            "max_rounds": 4, "clients_per_round": 2, "val_check_interval": 2, "default_root_dir": str(self.root),
            "enable_progress_bar": False, "seed": 3,
        }  # fmt: skip
        return Orchestrator(algorithm or self.algorithm(), **given | settings)

    @staticmethod
    def algorithm(personal: Any = True) -> HOSFL:
        return HOSFL(2, 2**-6, client_optimizer=RULE, personal=personal)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Orchestrator, SplitImageClassifier]:
    """A finished run with its controls, and its model."""
    with count_writes():
        kit, model, three = Kit(tmp_path_factory.mktemp("done")), image_model(), Trace([[0, 1, 3]] * 4)
        trainer = kit.trainer(controls=["frozen", "first_order"], availability=three)
        trainer.fit(model, Images())
    return trainer, model


def by_hand(model: Any, data: Any, own: Any, examples: Any) -> dict[int, tuple[float, float]]:
    """Loss and accuracy of each client's examples, by its half."""
    found = {}
    for k in range(4):
        batch = model.prepare(data.collate(examples[k::4]))
        with torch.no_grad(), held_by(model, own, k):
            logits = model.logits(batch)
            hits = (logits.argmax(-1) == batch["labels"]).float().mean()
            found[k] = float(model.loss(logits, batch["labels"])), float(hits)
    return found


class TestEvaluation:
    def test_each_clients_examples_by_its_own_half(self, done: Any) -> None:
        trainer, model = done
        own, data = trainer.endpoint.own_parameters(), trainer.datamodule
        assert 1 < len(own) < 4
        means = by_hand(model, data, own, data.validation_set)
        losses, hits = zip(*means.values())
        metrics = trainer.run.result.last.metrics
        assert metrics["val/loss"] == pytest.approx(fmean(losses), rel=1e-5)  # two examples each
        assert metrics["val/loss_worst"] == pytest.approx(max(losses), rel=1e-5)
        assert metrics["val/loss_std"] == pytest.approx(pstdev(losses), rel=1e-4)
        assert metrics["val/accuracy"] == pytest.approx(fmean(hits))
        assert metrics["val/accuracy_worst"] == pytest.approx(min(hits))
        assert metrics["val/accuracy_std"] == pytest.approx(pstdev(hits))
        assert means != by_hand(model, data, {}, data.validation_set)

    def test_a_checkpoint_is_tested_so_as_well(self, done: Any) -> None:
        """Six examples of four clients."""
        trainer, model = done
        kit = Kit(Path(trainer.default_root_dir))
        again, fresh = kit.trainer(logger=False), image_model()
        [metrics] = again.test(fresh, Images(), str(trainer.log_dir))
        means = by_hand(model, trainer.datamodule, trainer.endpoint.own_parameters(), trainer.datamodule.test_set)
        weights = [2, 2, 1, 1]
        expected = sum(w * loss for w, (loss, _) in zip(weights, means.values())) / 6
        assert metrics["test/loss"] == pytest.approx(expected, rel=1e-5)
        assert metrics["test/loss_worst"] == pytest.approx(max(loss for loss, _ in means.values()), rel=1e-5)
        [at_hand] = trainer.test(model, Images())
        assert at_hand == pytest.approx(metrics)
        [before] = kit.trainer(logger=False).test(image_model(), Images())
        assert before["test/loss"] != metrics["test/loss"]

    def test_predictions_are_in_the_order_of_the_examples(self, done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Told by a logit, as it has a value of its own for each of them."""

        def first(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.logits(self.prepare(batch))[:, 0]

        monkeypatch.setattr(SplitImageClassifier, "predict_step", first)
        trainer, model = done
        own, data = trainer.endpoint.own_parameters(), trainer.datamodule
        kit = Kit(Path(trainer.default_root_dir)).trainer(logger=False)
        rows = kit.predict(image_model(), Images(), str(trainer.log_dir))
        expected = []
        for i, example in enumerate(data.test_set):
            with torch.no_grad(), held_by(model, own, i % 4):
                expected.append(float(first(model, data.collate([example]), 0)))
        assert [float(row) for row in rows] == pytest.approx(expected, abs=1e-6)
        assert len(set(expected)) == 6

    def test_the_rule_of_whose_an_example_is_stands_in_the_data(self, done: Any) -> None:
        assert [done[0].datamodule.client_of_held_out(i) for i in (0, 3, 4, 9)] == [0, 3, 0, 1]

    def test_the_controls_stand_beside_it(self, done: Any) -> None:
        """Client by client too; the first-order one is personal."""
        controls = done[0].summary["controls"]
        names = {"val/loss", "val/loss_worst", "val/loss_std", "val/accuracy", "val/accuracy_worst", "val/accuracy_std"}
        assert all(set(one["metrics_last"]) == names for one in controls.values())
        sent = {name: one["bytes_per_client_round"] for name, one in controls.items()}
        assert sent["first_order"]["acknowledgement"] > 0
        assert sent["first_order"]["projected_gradients"] == sent["first_order"]["update"] == 0
        assert controls["frozen"]["val_loss_last"] != controls["first_order"]["val_loss_last"]

    def test_the_table_has_a_line_for_the_spread(self, done: Any) -> None:
        summary = done[0].summary
        heads = [str(column.header) for column in losses_table(summary).columns]
        assert not any("worst" in head or "std" in head for head in heads)
        [line] = [text for label, text in cost_lines(summary) if "own half" in label]
        assert line.count("at worst") == 6
        assert f"{summary['metrics_last']['val/loss_worst']:.4f} at worst" in line


LOCAL: dict[str, Any] = {
    "dense": {"compression": Uncompressed()},
    "beside norms, in directions": {"probes": 4, "mu": 2**-6},
}


@pytest.mark.filterwarnings("ignore:probes=4")
@pytest.mark.parametrize("settings", LOCAL.values(), ids=LOCAL)
def test_a_side_adapters_own_gradient(settings: dict[str, Any], tmp_path: Path) -> None:
    """One client alone ends as one that shares, to the bit; in directions its norms are probed along with it."""
    side = {"side": Side(client=2, taps="all"), "client_parameters": None if "compression" in settings else "norm"}
    held = []
    for personal in (False, True):
        method = HOSFL(estimator="local", client_optimizer=RULE, personal=personal, **settings)
        trainer = Kit(tmp_path).trainer(method, clients_per_round=1, max_rounds=3, logger=False)
        data = Images()
        data.setup("fit")
        data.clients, data.setup = data.clients[:1], lambda stage: None  # type: ignore[method-assign]
        trainer.fit(image_model(**side), data)
        trained = {name: p.detach() for name, p in trainer.endpoint.trained.items()}
        held.append(trained | trainer.endpoint.own_parameters().get(0, {}))
    shared, own = held
    assert all(torch.equal(own[name], theta) for name, theta in shared.items())
    start = image_model(**side).client_parameters
    assert sum(not torch.equal(own[name], start[name]) for name in start) > len(start) / 2


class Interrupts(Callback):
    """In the last round."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            raise KeyboardInterrupt


class TestGoingOn:
    @pytest.mark.parametrize("personal", [True, "bias"])
    def test_killed_and_resumed_is_never_killed(self, personal: Any, tmp_path: Path) -> None:
        """From the checkpoint of round 2, interrupted in round 4; every file of the folder, bit for bit."""
        kit = Kit(tmp_path)
        whole, stopped, again = (kit.trainer(kit.algorithm(personal)) for _ in range(3))
        whole.fit(image_model(), Images())
        files = contents(Path(whole.log_dir))
        shutil.rmtree(whole.log_dir)
        stopped.callbacks.insert(0, Interrupts())
        with pytest.raises(KeyboardInterrupt):
            stopped.fit(image_model(), Images())
        again.fit(image_model(), Images(), ckpt_path=stopped.log_dir)
        assert len(files["checkpoints/last.ckpt"]["personal"]) > 1
        assert files == contents(Path(stopped.log_dir))

    def test_a_checkpoint_with_weights_only_has_the_clients_halves(self, done: Any, tmp_path: Path) -> None:
        trainer, _ = done
        trainer.lightning_module = done[1]
        held = trainer.saving.collect(True)
        assert held["personal"].keys() == trainer.endpoint.own_parameters().keys()
        assert "method" not in held

    def test_of_another_model_it_is_refused(self, done: Any, tmp_path: Path) -> None:
        checkpoint = load(Path(done[0].log_dir) / "checkpoints" / "last.ckpt")
        client = next(iter(checkpoint["personal"]))
        name = next(iter(checkpoint["personal"][client]))
        checkpoint["personal"][client][name] = torch.ones(7)
        torch.save(checkpoint, tmp_path / "bad.ckpt")
        with pytest.raises(CheckpointError, match=f"client {client} has a {name} of shape \\[7\\], the model has not"):
            Kit(tmp_path).trainer(logger=False).test(image_model(), Images(), str(tmp_path / "bad.ckpt"))


class TestExport:
    def test_exported_is_trained_without_lora(self, done: Any, tmp_path: Path) -> None:
        trainer, model = done
        Kit(tmp_path).trainer(logger=False).export(image_model(), None, trainer.log_dir, str(tmp_path / "out"))
        own = trainer.endpoint.own_parameters()
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"client_{k}" for k in sorted(own)]
        for k in own:
            other = image_model()
            other.load_trained_state(model.trained_state())
            tensors = load_file(tmp_path / "out" / f"client_{k}" / "client_half.safetensors")
            with torch.no_grad():
                for name, parameter in other.client_parameters.items():
                    parameter.copy_(tensors[name])
            batch = model.prepare(trainer.datamodule.collate(trainer.datamodule.test_set))
            with torch.no_grad(), held_by(model, own, k):
                assert torch.equal(other.logits(batch), model.logits(batch))

    def test_one_client(self, done: Any, tmp_path: Path) -> None:
        trainer, away = done[0], 2
        assert away not in trainer.endpoint.own_parameters()
        kit = Kit(tmp_path).trainer(logger=False)
        kit.export(image_model(), None, trainer.log_dir, str(tmp_path / "out"), client=away)
        tensors = load_file(tmp_path / "out" / f"client_{away}" / "client_half.safetensors")
        start = image_model().client_parameters
        assert all(torch.equal(tensors[name], start[name]) for name in start)
        with pytest.raises(CheckpointError, match=r"client: 4 is not in 0\.\.3"):
            kit.export(image_model(), None, trainer.log_dir, str(tmp_path / "out"), client=4)

    def test_one_adapter_a_client(self, tmp_path: Path) -> None:
        pretrained = tiny_pretrained(tmp_path / "llama", "llama", 2)
        half = LoraHalf(r=2, target_modules=["o_proj"])
        model = SplitCausalLM(str(pretrained), cut=1, lora=Lora(half, half), optimizer=sgd(0.1))
        trainer = Kit(tmp_path).trainer(max_rounds=2)
        trainer.fit(model, RandomTokens([[8, 12], [10, 6, 7], [9]]))
        own = trainer.endpoint.own_parameters()
        tokens = torch.arange(3, 15).view(2, 6)
        given, logits = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, []
        for k in own:
            adapter = Path(trainer.log_dir) / "adapter" / f"client_{k}"
            base = AutoModelForCausalLM.from_pretrained(pretrained)
            with torch.no_grad(), held_by(model, own, k):
                logits.append(PeftModel.from_pretrained(base, adapter).eval()(**given).logits)
                assert torch.equal(logits[-1], model(**given))
        assert not torch.equal(logits[0], logits[1])

    def test_a_shared_run_has_no_client_of_its_own(self, tmp_path: Path) -> None:
        trainer = Kit(tmp_path).trainer(Kit.algorithm(personal=False), max_rounds=1)
        trainer.fit(image_model(), Images())
        assert set(trainer.run.result.last.metrics) == {"val/loss", "val/accuracy"}
        with pytest.raises(CheckpointError, match="all hold the same half; leave it out"):
            trainer.export(image_model(), None, trainer.log_dir, str(tmp_path / "out"), client=0)


REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "another word": (lambda root: HOSFL(personal="norms"), ValueError, "personal='norms': true, false, or one of norm"),  # type: ignore[arg-type]
    "aggregation": (
        lambda root: HOSFL(personal=True, aggregation=Median()), ValueError, "aggregation=Median: .* leave it out",
    ),
    "nothing of it": (lambda root: fitted(root, "lora"), SplitError, "personal='lora': .* that is nothing of it"),
    "all of it": (lambda root: fitted(root, "norm"), SplitError, "personal='norm': .* that is all of it: say true"),
    "compression": (
        lambda root: HOSFL(estimator="local", compression=Uncompressed(), personal="side"), ValueError,
        "set compression: null, or personal: true",
    ),
    "devices": (lambda root: fitted(root, devices=2), ValueError, r"devices: the clients of HOSFL run one after"),
    "a codec": (lambda root: fitted(root, codec=Codecs(gradient="int8")), ValueError, "is no gradient in coefficients"),
    "alignment": (
        lambda root: fitted(root, callbacks=[GradientAlignment(1)]), ValueError, "with personal each takes its own",
    ),
    "a personal control": (
        lambda root: fitted(root, False, controls=[Control("own", SplitFedSGD(RULE, personal=True))]), ValueError,
        "own is personal, and the run is not",
    ),
    "serve": (
        lambda root: Kit(root).trainer().serve(image_model(), Images(), insecure=True), ValueError,
        "clients on other machines cannot keep a half of their own yet",
    ),
}  # fmt: skip


def fitted(root: Path, personal: Any = True, **settings: Any) -> None:
    Kit(root).trainer(Kit.algorithm(personal), **settings).fit(image_model(), Images())


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused(what: str, tmp_path: Path) -> None:
    make, error, says = REFUSED[what]
    with pytest.raises(error, match=says):
        make(tmp_path)
