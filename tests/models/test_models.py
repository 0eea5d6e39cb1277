from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM, SplitSequenceClassifier
from hosfl_lightning.algorithms import Frozen
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.data.tokenization import Example
from hosfl_lightning.models import PretrainedError
from hosfl_lightning.optim import SGD
from hosfl_lightning.run.checkpoint import load
from hosfl_lightning.run.rebuild import rebuild
from hosfl_lightning.server.configured import configured
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.split import Lora, LoraHalf, Side, SplitError
from hosfl_lightning.wire import SmashedData
from tests.conftest import sgd
from tests.small_run import SmallRun, adamw, halved

IDS = torch.tensor([[5, 6, 7, 8, 9], [5, 7, 6, 0, 0]])  # 0 is pad in the model's config
MASK = (IDS != 0).long()


def test_loss_is_hugging_faces(tiny_folder: Path) -> None:
    model = SplitCausalLM(str(tiny_folder), cut=2)
    labels = IDS.masked_fill(MASK == 0, -100)
    whole = AutoModelForCausalLM.from_pretrained(tiny_folder)
    expected = whole(IDS, attention_mask=MASK, labels=labels)
    assert torch.equal(model(IDS, MASK), expected.logits)
    torch.testing.assert_close(model.loss(model(IDS, MASK), labels), expected.loss)
    assert model.count(labels) == 6


def test_without_lora_every_weight_is_trained_and_there_is_no_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    model = SplitCausalLM(str(tiny_folder), cut=2)
    trained = sum(t.numel() for t in model.trained_state().values())
    assert trained == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_folder).parameters())
    with pytest.raises(SplitError, match="without LoRA"):
        model.export(str(tmp_path / "adapter"))


def test_full_fine_tuning_runs_and_moves_the_embeddings(
    tiny_folder: Path, make_orchestrator: Callable[..., Orchestrator], data: FederatedDataModule
) -> None:
    model = SplitCausalLM(str(tiny_folder), cut=2)
    before = model.client_half.get_parameter("model.embed_tokens.weight").clone()
    make_orchestrator(HOSFL(mu=1e-4, client_optimizer=SGD(lr=1e-4))).fit(model, data)
    after = model.client_half.get_parameter("model.embed_tokens.weight")
    assert not torch.equal(before, after)


@pytest.mark.filterwarnings("ignore:the two sides of a probe")
def test_exported_adapter_gives_the_split_models_logits(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator], data: FederatedDataModule,
    tiny_folder: Path,
) -> None:  # fmt: skip
    model, trainer = make_model(), make_orchestrator()
    trainer.fit(model, data)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    untrained = base(IDS, attention_mask=MASK).logits
    exported = PeftModel.from_pretrained(base, Path(trainer.log_dir) / "adapter").eval()
    assert torch.equal(exported(IDS, attention_mask=MASK).logits, model(IDS, MASK))
    assert not torch.equal(untrained, model(IDS, MASK))
    assert exported.peft_config["default"].base_model_name_or_path == str(tiny_folder)


def test_with_a_side_adapter_and_no_lora_the_client_trains_it_alone(
    tiny_folder: Path, make_orchestrator: Callable[..., Orchestrator], data: FederatedDataModule, tmp_path: Path
) -> None:
    model, plain = (SplitCausalLM(str(tiny_folder), cut=2, optimizer=sgd, side=s) for s in (Side(4, server=3), None))
    assert torch.equal(model(IDS, MASK), plain(IDS, MASK))
    assert list(model.client_parameters) == [f"model.layers.0.lora_side.default.{n}.weight" for n in ("down", "up")]
    assert model.server_parameters.keys() - plain.server_parameters.keys() == {
        f"model.layers.2.lora_side.default.{n}.weight" for n in ("down", "up")
    }
    assert plain.fingerprint() == "all trained" != model.fingerprint()
    before = {n: p.clone() for n, p in model.client_half.named_parameters()}
    trainer = make_orchestrator(HOSFL(estimator="local", probes=8, client_optimizer=SGD(lr=0.1)))
    trainer.fit(model, data)
    moved = [n for n, p in model.client_half.named_parameters() if not torch.equal(p, before[n])]
    assert moved == list(model.client_parameters)
    assert trainer.summary["val_loss_last"] < trainer.summary["val_loss_first"]
    with pytest.raises(SplitError, match="trained without LoRA, so there is no adapter"):
        model.export(str(tmp_path / "adapter"))


def test_halves_may_be_compiled_by_hand(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator], data: FederatedDataModule
) -> None:
    plain, fast = make_model(), make_model()
    with pytest.raises(TypeError, match=r"got OptimizedModule \(set model\.init_args\.compile\)"):
        make_orchestrator().fit(torch.compile(plain, backend="eager"), data)  # type: ignore[arg-type]
    fast.client_half.layers[0].compile(backend="eager")
    fast.server_half.compile(backend="eager")
    for each in (plain, fast):
        make_orchestrator(max_rounds=1).fit(each, data)
    states = plain.trained_state(), fast.trained_state()
    assert all(torch.allclose(states[0][name], tensor, atol=1e-5) for name, tensor in states[1].items())


def test_a_weight_of_the_backbone_is_not_taken_for_the_side_adapters_by_its_name(tiny_folder: Path) -> None:
    class Named(SplitCausalLM):
        def load_whole(self, dtype: str, seed: int, **model_kwargs: Any) -> Any:
            whole = super().load_whole(dtype, seed, **model_kwargs)
            whole.model.layers[0].register_parameter("lora_gain", torch.nn.Parameter(torch.ones(1)))
            return whole

    model = Named(str(tiny_folder), cut=2, side=Side(4))
    assert list(model.client_parameters) == [f"model.layers.0.lora_side.default.{n}.weight" for n in ("down", "up")]


class SideRun(SmallRun):
    """The small run with a side adapter, whose exact gradient is projected, beside LoRA that is probed."""

    def model(self) -> SplitCausalLM:
        model = super().model()
        return SplitCausalLM(model.pretrained, 1, model.lora, adamw, halved, side=Side(4, taps="all", server=3))

    def trainer(self, *callbacks: Callback, **settings: Any) -> Orchestrator:
        trainer = super().trainer(*callbacks, **settings)
        trainer.algorithm.estimator = "local"
        return trainer


@pytest.mark.filterwarnings("ignore:the two sides of a probe", "ignore:probes=")
def test_a_run_with_a_side_adapter_is_resumed_replayed_and_exported(tmp_path: Path) -> None:
    """With clients that miss rounds, schedules, optimizer states and dropout at the server."""
    run = SideRun(tmp_path, keep=True)
    run.fit()
    state = load(run.folder / "checkpoints" / "step=4.ckpt")["state_dict"]
    assert sum("lora_side" in name for name in state) == 4
    log = ReplayLog.read(run.folder / "updates.log")

    resumed = run.model()
    run.trainer().fit(resumed, run.data(), ckpt_path=str(run.folder / "checkpoints" / "step=2.ckpt"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in resumed.trained_state().items())
    replayed = run.model()
    rebuild(replayed, replayed.client_parameters, log, 4, run.trainer().algorithm)
    for name, parameter in replayed.client_parameters.items():
        assert torch.equal(parameter, state[f"client_half.{name}"]), name
    exported = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(resumed.pretrained), run.folder / "adapter"
    )
    assert torch.equal(exported(IDS, attention_mask=MASK).logits, resumed(IDS, MASK))


class Labelled(FederatedDataModule):
    """Two clients of four labelled examples; the first token is the label."""

    def setup(self, stage: str) -> None:
        def example(label: int, length: int) -> Example:
            return Example([5 + label] + [9] * length, label)

        self.clients = [[example(i % 3, 3 + i) for i in range(4)] for _ in range(2)]
        self.validation_set = [example(i % 3, 4) for i in range(8)]


@pytest.mark.filterwarnings("ignore:the two sides of a probe")
def test_a_classifier_trains_its_head_at_the_server(
    tiny_folder: Path, make_orchestrator: Callable[..., Orchestrator]
) -> None:
    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-2)

    lora = Lora(client=LoraHalf(r=2), server=LoraHalf(r=2))
    model = SplitSequenceClassifier(str(tiny_folder), cut=2, num_labels=3, lora=lora, optimizer=adam)
    assert any("score" in name for name in model.server_parameters)
    assert not any("score" in name for name in model.client_parameters)
    trainer = make_orchestrator(max_rounds=30)
    trainer.fit(model, Labelled(batch_size=4))
    first, last = trainer.summary["metrics_first"], trainer.summary["metrics_last"]
    assert last["val/loss"] < first["val/loss"] - 0.1
    assert last["val/accuracy"] >= first["val/accuracy"]
    base = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=3)
    exported = PeftModel.from_pretrained(base, Path(trainer.log_dir) / "adapter").eval()
    assert torch.equal(exported(IDS, attention_mask=MASK).logits, model(IDS, MASK))


def test_a_classifier_objects_to_what_are_no_classes(tiny_folder: Path) -> None:
    model = SplitSequenceClassifier(str(tiny_folder), cut=2, num_labels=200)

    def objection(labels: list[int] | torch.Tensor, width: int = 32) -> str | None:
        z = torch.zeros(*MASK.shape, width)
        return model.objection(SmashedData.pack(0, 0, z, torch.as_tensor(labels), MASK.bool()))

    assert objection([0, 199]) is None
    assert objection([0, 1]) is None
    assert objection([0, 200]) == "its label 200 is not in 0..199"
    assert objection([-100, 0]) == "its label -100 is not in 0..199"
    assert objection([0, 1], 31) == "its smashed data have 31 columns, the cut has 32"
    assert objection(IDS) == "it sent one label a token, a classifier has one a sequence"


def test_the_start_follows_from_the_seed_and_leaves_the_random_state(tiny_folder: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        return next(iter(SplitSequenceClassifier(str(tiny_folder), 2, 3, Lora(), seed=seed).trained_state().values()))

    before = torch.random.get_rng_state()
    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_model_that_is_not_there_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PretrainedError, match=r"model.init_args.pretrained: no model at .*nowhere"):
        SplitCausalLM(str(tmp_path / "nowhere"), cut=2)


def test_loading_anothers_state_is_refused(make_model: Callable[..., SplitCausalLM]) -> None:
    with pytest.raises(SplitError, match="another model, cut or LoRA setting"):
        make_model(cut=1).load_trained_state(make_model(cut=2).trained_state())


@pytest.mark.parametrize(
    ("ids", "message"),
    [([5, 260], r"client 'numpy': token id 260, .* embeds 260 tokens"), ([5] * 65, "a row of 65 tokens, .* 64 pos")],
)
def test_data_the_model_cannot_take_names_the_setting(
    make_model: Callable[..., SplitCausalLM], ids: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_model().check_examples([Example([5], [5]), Example(ids, ids)], "client 'numpy'")


@pytest.mark.parametrize("where", ["clients", "validation_set"])
def test_a_label_beyond_the_head_is_found_before_the_first_round(
    tiny_folder: Path, make_orchestrator: Callable[..., Orchestrator], tmp_path: Path, where: str
) -> None:
    class Wrong(Labelled):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            examples = self.clients[1] if where == "clients" else self.validation_set
            examples.append(Example([5], 3))

    model = SplitSequenceClassifier(str(tiny_folder), cut=2, num_labels=3, lora=Lora())
    with pytest.raises(ValueError, match=r"label 3 is not in 0\.\.2; set model.init_args.num_labels"):
        make_orchestrator().fit(model, Wrong(batch_size=1))
    assert not (tmp_path / "runs").exists()


class Configured(SplitCausalLM):
    """Returns what a test gives it."""

    returns: Any = None

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.server_parameters.values())
        return self.returns(optimizer)


def step_lr(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


@pytest.mark.parametrize(
    "returns",
    [
        lambda o: o,
        lambda o: ([o], [step_lr(o)]),
        lambda o: {"optimizer": o, "lr_scheduler": step_lr(o)},
        lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": step_lr(o), "interval": "step"}},
    ],
)
def test_configure_optimizers_may_return_what_lightning_takes(tiny_folder: Path, returns: Any) -> None:
    model = Configured(str(tiny_folder), cut=2)
    model.returns = returns
    optimizer, scheduler = configured(model)
    assert isinstance(optimizer, torch.optim.SGD)
    assert scheduler is None or scheduler.optimizer is optimizer


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (lambda o: ([o, o], []), "one optimizer"),
        (lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": step_lr(o), "frequency": 5}}, "stepped once a round"),
        (lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": step_lr(o), "interval": "epoch"}}, "once a round"),
        (lambda o: ([o], [torch.optim.lr_scheduler.ReduceLROnPlateau(o)]), "without a metric"),
    ],
)
def test_a_schedule_that_would_be_ignored_is_refused(tiny_folder: Path, returns: Any, message: str) -> None:
    model = Configured(str(tiny_folder), cut=2)
    model.returns = returns
    with pytest.raises(ValueError, match=message):
        configured(model)


class Sharpness(torch.optim.SGD):
    """As SAM's are written: the closure is asked for once it steps."""

    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "Sharpness Aware Minimization requires closure, but it was not provided"
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Sharpness])
def test_an_optimizer_that_evaluates_the_loss_again_is_refused(
    tiny_folder: Path, make_orchestrator: Callable[..., Orchestrator], data: FederatedDataModule, kind: Any
) -> None:
    model = SplitCausalLM(str(tiny_folder), cut=2, optimizer=lambda parameters: kind(parameters, lr=0.1))
    with pytest.raises(ValueError, match=rf"init_args\.optimizer: {kind.__name__} evaluates the loss .* take one"):
        make_orchestrator().fit(model, data)
    own = Configured(str(tiny_folder), cut=2)
    own.returns = lambda o: torch.optim.LBFGS(o.param_groups[0]["params"])
    with pytest.raises(ValueError, match="LBFGS evaluates the loss several times a step"):
        configured(own)


def test_no_cuda_generator_is_reseeded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a CUDA generator was reseeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    SplitCausalLM(str(tiny_folder), cut=2, lora=Lora())


def test_a_training_step_may_return_a_dictionary(
    tiny_folder: Path, make_orchestrator: Callable[..., Orchestrator], data: FederatedDataModule
) -> None:
    class Dictionary(SplitCausalLM):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx)}

    results = []
    for kind in (SplitCausalLM, Dictionary):
        trainer = make_orchestrator(Frozen())
        trainer.fit(kind(str(tiny_folder), cut=2, optimizer=sgd), data)
        results.append(trainer.summary["val_loss_last"])
    assert results[0] == results[1]
