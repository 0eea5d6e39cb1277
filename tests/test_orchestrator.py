"""The loop with Trainer's face: stock callbacks, sampling, controls, resume, and what it leaves as it found it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.core.hooks import ModelHooks
from torch import Tensor

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import Frozen, SplitFedSGD
from hosfl_lightning.callbacks import LagrangianUpdate
from hosfl_lightning.clients import FirstOrderClient
from hosfl_lightning.optim import SGD, AdamW
from hosfl_lightning.run.checkpoint import CheckpointError, load
from hosfl_lightning.run.hooks import FIRED, REFUSED_MODULE_HOOKS, HookError
from hosfl_lightning.split import Lora, LoraHalf
from hosfl_lightning.wire import Codecs
from tests.random_tokens import RandomTokens

MakeModel = Callable[..., SplitCausalLM]
MakeOrchestrator = Callable[..., Orchestrator]


def state_of(model: SplitCausalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.trained_state().items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


class TestStockCallbacks:
    def test_model_checkpoint_keeps_the_best_and_the_last(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        checkpoint = ModelCheckpoint(monitor="val/loss", save_top_k=2, save_last=True, filename="{step}")
        trainer = make_orchestrator(callbacks=[checkpoint], max_rounds=6, val_check_interval=1)
        trainer.fit(make_model(), data)
        folder = Path(trainer.log_dir) / "checkpoints"
        assert len(list(folder.glob("step=*.ckpt"))) == 2
        losses = {int(r["step"]): float(r["val/loss"]) for r in rows(Path(trainer.log_dir)) if r["val/loss"]}
        steps = sorted(losses)[1:]
        saved = [s for s in steps if sorted([t for t in steps if t <= s], key=losses.__getitem__).index(s) < 2]
        assert load(folder / "last.ckpt")["global_step"] == saved[-1]  # Lightning's "last" is the last that was saved
        best = min(list(losses)[1:], key=losses.__getitem__)
        assert Path(checkpoint.best_model_path).name == f"step={best}.ckpt"

    def test_early_stopping_ends_the_run(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        stop = EarlyStopping("val/loss", patience=1, min_delta=10.0)
        trainer = make_orchestrator(callbacks=[stop], max_rounds=50, val_check_interval=1)
        trainer.fit(make_model(), data)
        assert trainer.global_step == 1 == stop.wait_count

    def test_controls_stop_where_the_method_stopped(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        stop = EarlyStopping("val/loss", patience=1, min_delta=10.0)
        trainer = make_orchestrator(callbacks=[stop], max_rounds=50, val_check_interval=1, controls=["frozen"])
        trainer.fit(make_model(), data)
        by_hand = make_orchestrator(Frozen(), max_rounds=1)
        by_hand.fit(make_model(), data)
        assert trainer.summary["controls"]["frozen"]["val_loss_last"] == by_hand.summary["val_loss_last"]

    def test_learning_rate_monitor_logs_the_servers_schedule(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        model = make_model(lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5))
        trainer = make_orchestrator(callbacks=[LearningRateMonitor()], max_rounds=3)
        trainer.fit(model, data)
        rates = [float(r["lr-SGD"]) for r in rows(Path(trainer.log_dir)) if r.get("lr-SGD")]
        assert rates == [0.1, 0.05, 0.025]

    @pytest.mark.parametrize("bar", [TQDMProgressBar, None])
    def test_progress_bar_counts_rounds(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, bar: Any,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        trainer = make_orchestrator(callbacks=[bar()] if bar else [], enable_progress_bar=True)
        trainer.fit(make_model(), data)
        assert "3/3" in "".join(capsys.readouterr())

    def test_hooks_come_in_trainers_order_once_a_round(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        calls: list[str] = []

        class Recorder(Callback):
            def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
                calls.append(f"setup:{stage}")

            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                calls.append(f"start:{batch_idx}:{trainer.global_step}")

            def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                calls.append("zero_grad")

            def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
                calls.append("backward")

            def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                calls.append("step")

            def on_train_batch_end(
                self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                calls.append(f"end:{batch_idx}:{trainer.global_step}:{outputs['loss'].dim()}")

            def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
                calls.append(f"validated:{'val/loss' in trainer.callback_metrics}")

            def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
                calls.append("teardown")

        make_orchestrator(callbacks=[Recorder()], max_rounds=2).fit(make_model(), data)
        once = ["zero_grad", "backward", "step"]
        assert calls == [
            "setup:fit", "validated:True", "start:0:0", *once, "end:0:1:0", "start:1:1", *once, "end:1:2:0",
            "validated:True", "teardown",
        ]  # fmt: skip

    def test_a_hook_that_is_never_called_is_refused_by_name(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        class Waits(Callback):
            def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
                raise AssertionError

        with pytest.raises(HookError, match="Waits overrides on_sanity_check_start"):
            make_orchestrator(callbacks=[Waits()]).fit(make_model(), data)

    @pytest.mark.parametrize(
        "hook",
        ["optimizer_step", "lr_scheduler_step", "backward", "configure_model", "prepare_data", "train_dataloader",
         "configure_callbacks", "on_validation_model_eval", "on_validation_model_zero_grad", "on_predict_model_eval"],
    )  # fmt: skip
    def test_a_module_hook_that_is_never_called_is_refused(
        self, tiny_folder: Path, make_orchestrator: MakeOrchestrator, data: RandomTokens, hook: str
    ) -> None:
        overriding = type("Overriding", (SplitCausalLM,), {hook: lambda self, *args, **kwargs: None})
        with pytest.raises(HookError, match=f"Overriding overrides {hook}"):
            make_orchestrator().fit(overriding(str(tiny_folder), cut=2), data)

    def test_every_module_hook_is_called_or_refused(self) -> None:
        """So that a hook which a later Lightning adds cannot be ignored in silence."""
        hooks = {name for name in dir(ModelHooks) if name.startswith("on_")}
        assert hooks - FIRED - set(REFUSED_MODULE_HOOKS) == set()

    def test_a_data_hook_that_is_never_called_is_refused(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        class Moves(RandomTokens):
            def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any: ...

        with pytest.raises(HookError, match="Moves overrides on_before_batch_transfer"):
            make_orchestrator().fit(make_model(), Moves(data.lengths))

    def test_module_and_data_hooks_are_called_and_callbacks_by_position(
        self, tiny_folder: Path, make_orchestrator: MakeOrchestrator
    ) -> None:
        calls: list[str] = []

        class Module(SplitCausalLM):
            def setup(self, stage: str) -> None:
                calls.append(f"module setup {stage}")

            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                calls.append(f"module batch {batch_idx}")

            def teardown(self, stage: str) -> None:
                calls.append(f"module teardown {stage}")

        class Data(RandomTokens):
            def prepare_data(self) -> None:
                calls.append("prepare_data")

            def teardown(self, stage: str) -> None:
                calls.append(f"data teardown {stage}")

        class OtherNames(Callback):
            def on_train_start(self, runner: Any, module: Any) -> None:
                calls.append(f"callback {type(module).__name__}")

            def on_train_batch_end(self, *args: Any) -> None:
                calls.append(f"callback end {len(args)}")

        trainer = make_orchestrator(max_rounds=1, callbacks=[OtherNames()])
        trainer.fit(Module(str(tiny_folder), cut=2, lora=Lora()), Data([[5, 6]]))
        assert calls == [
            "prepare_data", "module setup fit", "callback Module", "module batch 0", "callback end 5",
            "module teardown fit", "data teardown fit",
        ]  # fmt: skip

    def test_a_step_the_method_does_not_have_is_refused(self, make_orchestrator: MakeOrchestrator) -> None:
        with pytest.raises(ValueError, match="Frozen has no step for LagrangianUpdate"):
            make_orchestrator(Frozen(), callbacks=[LagrangianUpdate()])

    def test_a_client_put_into_train_mode_is_noticed(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        class Trains(Callback):
            def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
                pl_module.train()

        with pytest.raises(RuntimeError, match="client half is in train mode"):
            make_orchestrator(callbacks=[Trains()]).fit(make_model(), data)

    def test_a_trainer_attribute_that_is_missing_names_itself_and_the_callback(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        class Curious(Callback):
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                trainer.accumulate_grad_batches  # noqa: B018

        with pytest.raises(AttributeError, match=r"'accumulate_grad_batches' \(asked for by Curious\)"):
            make_orchestrator(callbacks=[Curious()]).fit(make_model(), data)

    def test_there_are_no_optimizers_before_training_is_set_up(self, make_orchestrator: MakeOrchestrator) -> None:
        trainer = make_orchestrator()
        assert (trainer.optimizers, trainer.lr_scheduler_configs) == ([], [])

    def test_two_steps_of_a_kind_are_refused(self, make_orchestrator: MakeOrchestrator) -> None:
        with pytest.raises(ValueError, match="2 LagrangianUpdate"):
            make_orchestrator(callbacks=[LagrangianUpdate(), LagrangianUpdate()])


class TestRounds:
    def test_sampling_is_reproducible_ascending_and_covers_all_clients(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        trainer = make_orchestrator(clients_per_round=2, max_rounds=1)
        trainer.fit(make_model(), data)
        samples = [trainer.sample(r) for r in range(30)]
        assert samples == [trainer.sample(r) for r in range(30)]
        assert all(s == sorted(set(s)) and len(s) == 2 for s in samples)
        assert {k for s in samples for k in s} == {0, 1, 2}
        assert len({tuple(s) for s in samples}) == 3

    def test_the_servers_loss_falls_and_the_summary_says_so(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        def fast(params: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(params, lr=3e-2)

        trainer = make_orchestrator(max_rounds=30, val_check_interval=30)
        trainer.fit(make_model(optimizer=fast), data)
        summary = json.loads((Path(trainer.log_dir) / "summary.json").read_text())
        assert summary["val_loss_last"] < summary["val_loss_first"] - 0.3
        assert summary["rounds"] == 30
        assert summary["d_client"] == 768

    def test_controls_run_the_same_rounds_and_leave_the_model_trained(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        alone, beside = make_model(), make_model()
        make_orchestrator().fit(alone, data)
        trainer = make_orchestrator(controls=["frozen", "first_order"])
        trainer.fit(beside, data)
        assert_same_bits(state_of(alone), state_of(beside))
        for name, algorithm in (("frozen", Frozen()), ("first_order", SplitFedSGD(SGD(lr=0.1)))):
            model = make_model()
            by_hand = make_orchestrator(algorithm)
            by_hand.fit(model, data)
            assert trainer.summary["controls"][name]["val_loss_last"] == by_hand.summary["val_loss_last"]

    def test_a_frozen_client_does_not_move_and_a_first_order_one_descends_its_gradient(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        model = make_model()
        start = state_of(model)
        make_orchestrator(Frozen()).fit(model, data)
        moved = {n for n, t in model.trained_state().items() if not torch.equal(t, start[n])}
        assert moved and all(n.startswith("server_half") for n in moved)

        model = make_model()
        batches = [data.client_batch(k, 0) for k in range(3)]
        total = sum(model.count(b["labels"]) for b in batches)
        for b in batches:
            loss = model.loss(model(b["input_ids"], b["attention_mask"]), b["labels"])
            (loss * model.count(b["labels"]) / total).backward()
        expected = {n: p.detach() - 0.1 * p.grad for n, p in model.client_parameters.items() if p.grad is not None}
        model.zero_grad()
        make_orchestrator(SplitFedSGD(SGD(lr=0.1)), max_rounds=1).fit(model, data)
        for name, tensor in model.client_parameters.items():
            torch.testing.assert_close(tensor.detach(), expected[name], rtol=1e-4, atol=1e-7)

    def test_the_first_order_control_has_its_own_rule(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        algorithm = HOSFL(client_optimizer=SGD(lr=0.1), first_order_optimizer=SGD(lr=0.3))
        trainer = make_orchestrator(algorithm, controls=["first_order"])
        trainer.fit(make_model(), data)
        by_hand = make_orchestrator(SplitFedSGD(SGD(lr=0.3)))
        by_hand.fit(make_model(), data)
        assert trainer.summary["controls"]["first_order"]["val_loss_last"] == by_hand.summary["val_loss_last"]

    def test_what_rounding_a_gradient_costs_is_the_methods_not_the_controls(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        method = SplitFedSGD(SGD(lr=0.1))
        rounded = make_orchestrator(method, controls=["first_order"], codec=Codecs(gradient="int4"))
        rounded.fit(make_model(), data)
        exact = make_orchestrator(SplitFedSGD(SGD(lr=0.1)))
        exact.fit(make_model(), data)
        assert rounded.summary["controls"]["first_order"]["val_loss_last"] == exact.summary["val_loss_last"]
        assert rounded.summary["val_loss_last"] != exact.summary["val_loss_last"]

    def test_a_control_that_fails_leaves_the_summary_of_the_rest(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        def fails(*_: Any) -> None:
            raise MemoryError("no graph fits")

        monkeypatch.setattr(FirstOrderClient, "answer", fails)
        trainer = make_orchestrator(controls=["frozen", "first_order"])
        with pytest.raises(MemoryError):
            trainer.fit(make_model(), data)
        summary = json.loads((Path(trainer.log_dir) / "summary.json").read_text())
        assert set(summary["controls"]) == {"frozen"}

    def test_a_client_without_a_loss_term_counts_for_nothing(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator
    ) -> None:
        data = RandomTokens([[1, 1], [6, 9]])  # a single token predicts nothing
        for simulation in ("batched", "per_client"):
            trainer = make_orchestrator(simulation=simulation)
            trainer.fit(make_model(), data)
            losses = [float(r["train/loss"]) for r in rows(Path(trainer.log_dir)) if r["train/loss"]]
            assert all(math.isfinite(loss) for loss in losses)
            assert len(losses) == 3

    @pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
    def test_clients_and_server_train_in_the_precision_they_are_validated_in(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, precision: str,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        model, seen = make_model(), []
        for half in (model.client_half, model.server_half):
            linear = next(m for n, m in half.named_modules() if n.endswith(("gate_proj.base_layer", "o_proj")))
            linear.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
        algorithm = HOSFL(probes=2, mu=2**-4, estimator="central", client_optimizer=SGD(lr=0.1))
        make_orchestrator(algorithm, precision=precision).fit(model, data)
        assert set(seen) == {dtype}

    @pytest.mark.filterwarnings("ignore:mu=")
    def test_bf16_true_trains(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        model = make_model()
        start = state_of(model)
        algorithm = HOSFL(probes=2, mu=2**-4, estimator="central", client_optimizer=SGD(lr=0.5))
        make_orchestrator(algorithm, precision="bf16-true").fit(model, data)
        assert any((t.float() != start[n]).any() for n, t in model.trained_state().items() if "client" in n)
        assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in model.trained_state().values())

    def test_gradient_clipping_bounds_the_servers_step(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        model = make_model()
        start = state_of(model)
        make_orchestrator(max_rounds=1, gradient_clip_val=1e-3).fit(model, data)
        steps = [t - start[n] for n, t in model.trained_state().items() if n.startswith("server_half")]
        norm = torch.cat([s.flatten() for s in steps]).norm()
        torch.testing.assert_close(norm, torch.tensor(0.1 * 1e-3), rtol=1e-2, atol=0)

    def test_the_servers_adapter_dropout_is_on_in_training_and_off_in_validation(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        states, losses = [], []
        for dropout in (0.0, 0.5, 0.5):
            model = make_model(lora=Lora(server=LoraHalf(dropout=dropout)))
            trainer = make_orchestrator()
            trainer.fit(model, data)
            states.append(state_of(model))
            [metrics] = make_orchestrator().validate(model, data)
            losses.append((trainer.summary["val_loss_last"], metrics["val/loss"]))
        assert any(not torch.equal(states[0][n], states[1][n]) for n in states[0])
        assert_same_bits(states[1], states[2])
        assert all(a == b for a, b in losses)

    def test_bf16_mixed_trains(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        model = make_model()
        start = state_of(model)
        algorithm = HOSFL(probes=2, mu=2**-5, estimator="central", client_optimizer=SGD(lr=0.1))
        make_orchestrator(algorithm, precision="bf16-mixed").fit(model, data)
        assert any(not torch.equal(t, start[n]) for n, t in model.trained_state().items() if "client" in n)
        assert all(t.dtype == torch.float32 and t.isfinite().all() for t in model.trained_state().values())


class TestResume:
    @pytest.mark.parametrize("rule", [SGD(lr=0.1, momentum=0.9), AdamW(lr=1e-2)])
    def test_a_resumed_run_continues_bit_for_bit(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, tmp_path: Path, rule: Any
    ) -> None:
        def adam(params: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(params, lr=1e-2)

        def schedule(o: Any) -> Any:
            return torch.optim.lr_scheduler.StepLR(o, 3, gamma=0.5)  # falls after the interruption

        lora = Lora(client=LoraHalf(r=2), server=LoraHalf(r=2, dropout=0.2))
        settings = {"optimizer": adam, "lr_scheduler": schedule, "lora": lora}
        whole = make_model(**settings)
        uninterrupted = make_orchestrator(HOSFL(client_optimizer=rule), max_rounds=4, clients_per_round=2)
        uninterrupted.fit(whole, data)

        trainer = make_orchestrator(HOSFL(client_optimizer=rule), max_rounds=2, clients_per_round=2)
        first = make_model(**settings)
        trainer.fit(first, data)
        trainer.save_checkpoint(str(tmp_path / "two.ckpt"))
        second = make_model(**settings)
        resumed = make_orchestrator(HOSFL(client_optimizer=rule), max_rounds=4, clients_per_round=2)
        resumed.fit(second, data, ckpt_path=str(tmp_path / "two.ckpt"))
        assert resumed.global_step == 4
        assert_same_bits(state_of(whole), state_of(second))
        for key in ("val_loss_first", "val_loss_last", "bytes_per_client_round", "rounds"):
            assert resumed.summary[key] == uninterrupted.summary[key]

    def test_a_checkpoint_of_another_model_or_method_is_refused(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, tmp_path: Path
    ) -> None:
        trainer = make_orchestrator()
        trainer.fit(make_model(), data)
        path = str(tmp_path / "a.ckpt")
        trainer.save_checkpoint(path)
        with pytest.raises(CheckpointError, match=r"model\.init_args\.cut is 3, the run was made with 2"):
            make_orchestrator().fit(make_model(cut=3), data, ckpt_path=path)
        with pytest.raises(CheckpointError, match=r"trainer\.algorithm is Frozen, .* with HOSFL"):
            make_orchestrator(Frozen()).fit(make_model(), data, ckpt_path=path)
        trainer.save_checkpoint(path, weights_only=True)
        with pytest.raises(CheckpointError, match="weights only"):
            make_orchestrator().fit(make_model(), data, ckpt_path=path)
        with pytest.raises(CheckpointError, match="no file"):
            make_orchestrator().fit(make_model(), data, ckpt_path=str(tmp_path / "b.ckpt"))

    @pytest.mark.parametrize(
        ("algorithm", "settings", "message"),
        [
            (HOSFL(probes=3, client_optimizer=SGD(lr=0.1)), {}, "init_args.probes is 3, the run was made with 2"),
            (HOSFL(client_optimizer=SGD(lr=0.2)), {}, "client_optimizer.lr is 0.2, the run was made with 0.1"),
            (HOSFL(client_optimizer=AdamW(lr=0.1)), {}, "client_optimizer is AdamW, the run was made with SGD"),
            (HOSFL(client_optimizer=SGD(lr=0.1)), {"seed": 7}, "trainer.seed is 7, the run was made with 0"),
            (
                HOSFL(client_optimizer=SGD(lr=0.1)),
                {"clients_per_round": 2},
                "per_round is 2, the run was made with 3",
            ),
        ],
    )
    def test_a_resumed_run_keeps_its_settings(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, tmp_path: Path,
        algorithm: HOSFL, settings: dict[str, Any], message: str,
    ) -> None:  # fmt: skip
        trainer = make_orchestrator(max_rounds=1)
        trainer.fit(make_model(), data)
        trainer.save_checkpoint(str(tmp_path / "a.ckpt"))
        with pytest.raises(CheckpointError, match=message):
            make_orchestrator(algorithm, **settings).fit(make_model(), data, ckpt_path=str(tmp_path / "a.ckpt"))

    def test_another_backbone_of_the_same_shape_is_refused(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, tmp_path: Path
    ) -> None:
        trainer = make_orchestrator(max_rounds=1)
        trainer.fit(make_model(), data)
        path = str(tmp_path / "a.ckpt")
        trainer.save_checkpoint(path)
        other = make_model()
        for parameter in other.server_half.parameters():
            parameter.data.add_(0.5)
        for run in (
            lambda: make_orchestrator().fit(other, data, ckpt_path=path),
            lambda: make_orchestrator().validate(other, data, ckpt_path=path),
            lambda: make_orchestrator().export(other, None, path, str(tmp_path / "adapter")),
        ):
            with pytest.raises(CheckpointError, match="trained on other weights"):
                run()

    def test_resuming_at_the_end_reports_the_end(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, tmp_path: Path
    ) -> None:
        trainer = make_orchestrator()
        trainer.fit(make_model(), data)
        trainer.save_checkpoint(str(tmp_path / "a.ckpt"))
        again = make_orchestrator()
        again.fit(make_model(), data, ckpt_path=str(tmp_path / "a.ckpt"))
        for key in ("val_loss_first", "val_loss_last", "rounds"):
            assert again.summary[key] == trainer.summary[key]

    def test_a_second_fit_is_a_run_of_its_own(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        trainer = make_orchestrator()
        first, second = make_model(), make_model()
        trainer.fit(first, data)
        trainer.fit(second, data)
        assert_same_bits(state_of(first), state_of(second))

    def test_data_tokenized_for_another_model_is_refused(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        make_orchestrator(max_rounds=1).fit(make_model(), data)
        with pytest.raises(ValueError, match=r"tokenized for .*tiny_llama"):
            make_orchestrator(max_rounds=1).fit(SplitCausalLM("tiny_lm", cut=2, lora=Lora()), data)

    def test_a_checkpoint_holds_what_is_trained_and_nothing_else(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, tmp_path: Path
    ) -> None:
        trainer = make_orchestrator()
        model = make_model()
        trainer.fit(model, data)
        trainer.save_checkpoint(str(tmp_path / "a.ckpt"))
        assert set(load(tmp_path / "a.ckpt")["state_dict"]) == set(model.trained_state())
        assert all("lora_" in name for name in model.trained_state())


class TestLeavesThingsAsFound:
    @pytest.mark.parametrize("controls", [[], ["frozen", "first_order"]])
    def test_random_state_modes_and_requires_grad(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, controls: list[str]
    ) -> None:
        model = make_model(lora=Lora(server=LoraHalf(dropout=0.5)))
        model.server_half.train()
        wanted = {n: p.requires_grad for n, p in model.named_parameters()}
        modes = {n: m.training for n, m in model.named_modules()}
        before = torch.random.get_rng_state()
        make_orchestrator(controls=controls).fit(model, data)
        assert torch.equal(before, torch.random.get_rng_state())
        assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
        assert {n: m.training for n, m in model.named_modules()} == modes
        assert all(p.grad is None for p in model.parameters())

    def test_a_failing_round_reaches_the_callbacks_and_closes_the_run(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        seen: list[str] = []

        class Fails(Callback):
            def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
                raise RuntimeError("boom")

            def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
                seen.append(str(exception))

            def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
                seen.append("teardown")

        with pytest.raises(RuntimeError, match="boom"):
            make_orchestrator(callbacks=[Fails()]).fit(make_model(), data)
        assert seen == ["boom", "teardown"]


class TestEvaluation:
    def test_validate_test_and_predict(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, tmp_path: Path
    ) -> None:
        model, trainer = make_model(), make_orchestrator()
        trainer.fit(model, data)
        trainer.save_checkpoint(str(tmp_path / "a.ckpt"))
        fresh = make_model()
        [metrics] = make_orchestrator().validate(fresh, data, ckpt_path=str(tmp_path / "a.ckpt"))
        assert metrics["val/loss"] == trainer.summary["val_loss_last"]
        assert metrics["val/perplexity"] == pytest.approx(torch.tensor(metrics["val/loss"]).exp().item())
        data.test_set = data.validation_set
        [tested] = make_orchestrator().test(model, data)
        assert tested["test/loss"] == metrics["val/loss"]
        assert set(tested) == {"test/loss", "test/token_accuracy", "test/perplexity"}
        assert set(trainer.validate(model, data)[0]) == {"val/loss", "val/token_accuracy", "val/perplexity"}
        predicted = make_orchestrator().predict(model, data)
        assert [p.shape for p in predicted] == [(4, 12), (4, 12)]

    def test_a_run_folder_has_its_parts(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        trainer = make_orchestrator(enable_checkpointing=True)
        trainer.fit(make_model(), data)
        names = {p.name for p in Path(trainer.log_dir).iterdir()}
        assert {"metrics.csv", "checkpoints", "adapter", "summary.json"} <= names
        table = rows(Path(trainer.log_dir))
        assert [r["round"] for r in table] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_rounds": 0}, "trainer.max_rounds must be >= 1"),
        ({"clients_per_round": 0}, "trainer.clients_per_round must be >= 1"),
        ({"precision": "16-mixed"}, "GradScaler"),
        ({"devices": 0}, "trainer.devices must be a number of processes >= 1"),
        ({"devices": 2, "simulation": "batched"}, "with trainer.devices > 1 leave it out"),
        ({"min_clients": 0}, "trainer.min_clients must be >= 1"),
        ({"on_too_few": "wait"}, "trainer.on_too_few must be repeat or stop"),
        ({"simulation": "Batched"}, "trainer.simulation"),
        ({"controls": ["ice"]}, "'ice' is not one of frozen, first_order"),
        ({"seed": -1}, "trainer.seed"),
    ],
)
def test_bad_settings_are_named(make_orchestrator: MakeOrchestrator, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_orchestrator(**settings)


def test_evaluation_that_fails_leaves_the_model_as_found(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
) -> None:
    model = make_model().train()
    with pytest.raises(ValueError, match="has no test examples"):
        make_orchestrator().test(model, data)
    assert model.training
    assert model._fabric is None


def test_more_clients_than_there_are(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
) -> None:
    with pytest.raises(ValueError, match="clients_per_round is 4, but the data has 3"):
        make_orchestrator(clients_per_round=4).fit(make_model(), data)
