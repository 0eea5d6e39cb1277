"""HybridOrder: a plain Trainer trains the part below a cut without backprop, the rest as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.aggregation import combine
from hosfl_lightning.callbacks.communication_monitor import CommunicationMonitor
from hosfl_lightning.callbacks.dimension_free_aggregation import DimensionFreeAggregation
from hosfl_lightning.callbacks.drop_in import trainer_check
from hosfl_lightning.callbacks.drop_in.cut_check import check_cut
from hosfl_lightning.callbacks.drop_in.lower_part import LowerPart
from hosfl_lightning.callbacks.drop_in.replayed_client import ReplayedClient, ReplayedLocalClient
from hosfl_lightning.callbacks.drop_in.resumed import check_loaded, resume
from hosfl_lightning.callbacks.drop_in.schedule import Policy, Schedule, check_policy
from hosfl_lightning.callbacks.drop_in.silence import replaced
from hosfl_lightning.callbacks.lagrangian_update import LagrangianUpdate
from hosfl_lightning.callbacks.round_callback import RoundCallback
from hosfl_lightning.clients import Anchor
from hosfl_lightning.optim import SGD, Estimator, SharedDirections, UpdateRule, ZerothOrder
from hosfl_lightning.optim.estimators import told
from hosfl_lightning.optim.growth import Growth, SilentProbes
from hosfl_lightning.optim.zeroth_order import check_probe_settings
from hosfl_lightning.wire import ProjectedGradients

ESTIMATORS = ("forward", "central", "local")
C = TypeVar("C", bound=Callback)


class HybridOrder(Callback):
    r"""Backprop above a cut, forward evaluations below it, in a ``lightning.Trainer``.

    ::

        above   θ_s ← your optimizer(∂ℓ/∂θ_s),  λ = ∂ℓ/∂z
        below   v_p = (1/μ) ⟨λ, f_c(x; θ_c + μ u_p) − z⟩,  p = 1..P
                ĝ = (1/P) Σ_p v̄_p u_p,  θ_c ← rule(θ_c, ĝ),  v̄_p: mean over ranks, sum over accumulated batches

    Nothing in the module changes: its optimizer trains what is above the cut, this callback what is below. No ``.grad``
    is left below the cut, and no graph is made there after the first batch. Steps 4 and 5-6 of the round are
    `LagrangianUpdate` and `DimensionFreeAggregation`, the same as in a federated run, the Trainer's where it has them;
    ranks exchange ``P`` scalars for the lower part.

    Example::

        Trainer(callbacks=[HybridOrder(cut="model.model.layers.3", rule=AdamW(lr=1e-4))]).fit(model, data)

    Clipping, accumulation, bf16 and fp16, single-device and DDP strategies, checkpoints and resuming work as without
    it; ``gradient_clip_val`` acts above the cut only. Under a GradScaler λ is divided by the scale, the lower part
    skips what the scaler skips, and a λ that overflows makes it skip. The probes replay torch's random state, so
    dropout masks below the cut agree. Where no submodule that is called holds both θ_c and the cut, they run
    ``training_step`` up to the cut again, with ``self.log`` and metrics silenced. Manual optimization works where such
    a submodule is called, with one optimizer and one ``manual_backward`` a batch; a GAN's two optimizers are refused.

    The first batch is checked: by its graph, the loss reaches θ_c through the cut alone; by gradients, unless
    ``verify=False``, backprop agrees with λ and a replay; a replay reproduces z. This costs a dozen forwards of the
    lower part and a copy of θ_c, and to verify, its gradients and, in host memory, its graph.

    | logged key | meaning | unit |
    |---|---|---|
    | ``client/multiplier_norm`` | ``‖λ‖₂`` over the step's micro-batches, on this rank | nats per activation |
    | ``client/lagrangian_term`` | ``⟨λ, z⟩`` before the update, on this rank | nats |
    | ``client/projected_gradient_rms`` | rms of ``v̄_p``, about the gradient's norm | nats per unit of θ |
    | ``client/lr`` | learning rate of the update below | – |

    Args:
        cut: Dotted name, in the LightningModule, of the submodule whose input is the smashed data z.
        rule: Update rule below the cut. Its learning rate is that at the peak of the schedule, also when resuming.
        client: Names of θ_c, as prefixes that end at a dot or as regular expressions; or ``norm``, ``bias``,
            ``first_layer`` (the first convolution), ``ia3`` for those before the cut. None: every trainable parameter
            registered before the cut. All that is trained below the cut must be in it.
        probes: ``P``, forwards of the lower part a batch (``2P`` when central); unused when local.
        mu: ``μ``, smoothing length; unused when local.
        estimator: ``forward``, ``central``, an `hosfl_lightning.optim.Estimator` (or its class path), or ``local``:
            the exact gradient of a side adapter, which is all that is trained below the cut
            (`hosfl_lightning.split.side.attach_side`), by one more forward. Ranks then exchange that gradient.
        distribution: Of the directions: ``rademacher`` or ``gauss16``.
        seed: Of the directions; step ``t`` of the run uses those of round ``t``.
        verify: On the first batch compare θ_c's gradient by the module's own backprop with that from λ.
        schedule: ``follow`` that of the module's optimizer, of the parameter group with θ_c's first parameter, else of
            the first group (see `Schedule`), or stay ``constant`` at the rule's rate.

    Attributes:
        working: Opened around all that is done below the cut after λ has come, such as a role of a `MemoryMeter`.

    Raises:
        ValueError: A setting out of range, a cut or client that does not fit (`CutError`), a Trainer setting that would
            break the method.

    Reference: HO-SFL, arXiv 2603.14773; the side adapter: Ladder Side-Tuning, arXiv 2206.06522.
    """

    def __init__(
        self,
        cut: str,
        rule: UpdateRule | None = None,
        client: str | list[str] | None = None,
        probes: int = 2,
        mu: float = 1e-3,
        estimator: Estimator | str = "forward",
        distribution: str = "rademacher",
        seed: int = 0,
        verify: bool = True,
        schedule: Policy = "follow",
    ) -> None:
        check_cut(cut)
        estimator = check_probe_settings(probes, mu, estimator, distribution, ESTIMATORS)
        check_policy(schedule)
        SharedDirections(seed, 0, probes, distribution)  # refuses a seed out of range
        self.cut, self.client, self.verify = cut, [client] if isinstance(client, str) else client, verify
        self.rule, self.local, self.schedule = rule if rule is not None else SGD(), estimator == "local", schedule
        self.settings: dict[str, Any] = {
            "probes": probes, "mu": mu, "estimator": estimator, "distribution": distribution, "seed": seed,
        }  # fmt: skip
        self.told = {**self.settings, **told(estimator)}
        self.working: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._undo = ExitStack()
        self._client: ReplayedClient | None = None
        self._restored: dict[str, Any] = {}

    # ---- setting up and leaving

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take θ_c from backprop: after the module is complete, before the strategy and the optimizers see it."""
        if stage != "fit":
            return
        one_of_a_kind(HybridOrder, trainer)
        self.lagrangian_update = one_of_a_kind(LagrangianUpdate, trainer) or LagrangianUpdate()
        self.aggregation = one_of_a_kind(DimensionFreeAggregation, trainer) or DimensionFreeAggregation()
        self.monitor = one_of_a_kind(CommunicationMonitor, trainer)
        for step in (self.lagrangian_update, self.aggregation, self.monitor):
            if step is not None:
                self._undo.enter_context(adopted(step))
        # The one moment for that. The hook before it, `configure_model`, is called by WeightAveraging too.
        go_on = trainer.strategy.setup

        def strategy_setup(trainer: Trainer) -> None:
            trainer_check.refuse_what_would_break("HybridOrder", trainer, pl_module)
            context = trainer.precision_plugin.forward_context
            self.lower = LowerPart(pl_module, self.cut, self.client, context, self.verify)
            self._undo.callback(self.lower.detach)
            go_on(trainer)

        self._undo.enter_context(replaced(strategy_setup, (trainer.strategy, "setup")))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the client, now that its parameters are on their device."""
        trainer_check.refuse_several_optimizers(trainer)
        trainer_check.refuse_nothing_above(trainer.optimizers[0], self.cut)
        self._undo.callback(trainer.optimizers[0].register_step_post_hook(self._note_step).remove)
        self.lower.attach()
        self._client = (ReplayedLocalClient if self.local else ReplayedClient)(self.lower, self.rule, self.settings)
        resume("HybridOrder", self._client.optimizer, self.rule, self._restored, self._identity)
        self._probes = SilentProbes(Growth(self._client.optimizer.parameters), "the part below the cut", "rule.lr")
        self._rates = Schedule(trainer, pl_module, self.schedule, self._restored.get("peaks", ()))
        self._restored = {}
        self._checks = trainer.is_global_zero  # one process looks at μ, so that a warning comes once
        self._total: Tensor | None = None
        self._backwards, self._due, self._stepped = 0, False, False

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was found."""
        self._undo.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same when the run broke off, for which Trainer calls no teardown."""
        self.teardown(trainer, pl_module, "fit")

    @property
    def optimizers(self) -> list[ZerothOrder]:
        """The one below the cut, once it is made; its ``state`` is part of what the run holds."""
        return [] if self._client is None else [self._client.optimizer]

    # ---- the steps of a round

    @override
    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """What no step has used is given up above the cut, so below it too."""
        self._give_up()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The loss is there, and what it depends on."""
        self._backwards += 1
        if self._backwards > 1:
            trainer_check.refuse_a_second_backward(pl_module)
        self.lower.check(loss)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step 4: λ has arrived at the cut; answer with ``P`` scalars."""
        assert self._client is not None
        with self.working():
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            received = self._client.receive(None if scaler is None else scaler.get_scale())
            if scaler is not None and not trainer.strategy.reduce_boolean_decision(received is not None):
                _overflow(trainer.optimizers[0])
                return
            assert received is not None
            values = self._answer(trainer.global_rank, *received)
        # Trainer has divided the loss by the number of accumulated batches, so λ is a share and the scalars add up.
        self._total = values if self._total is None else self._total + values

    def _answer(self, rank: int, anchor: Anchor, multiplier: Tensor) -> Tensor:
        assert self._client is not None
        client, rows = self._client, [slice(0, len(multiplier))]
        if self._checks:
            client.check_probe({}, anchor.z, multiplier)
            self._checks = False
        self.lagrangian_update.saw(rank, multiplier.float().square().sum(), anchor.release(multiplier, rows).sum())
        return client.answer({}, anchor, multiplier, rows, client.basis())[0]

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The upper part is to take its step; a GradScaler may skip it."""
        self._due = True

    def _note_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # how a scaler tells a fused optimizer to do nothing
        self._stepped = found_inf is None or not found_inf
        assert self._client is not None
        first = self._client.optimizer.parameters[0]
        holds = [any(p is first for p in group["params"]) for group in optimizer.param_groups]
        factor = self._rates.factors(optimizer)[holds.index(True) if any(holds) else 0]  # before schedulers step
        self._client.optimizer.param_groups[0]["lr"] = self.rule.lr * factor

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Steps 5 and 6, where the upper part stepped: the mean over ranks, applied by every rank alike."""
        if self._stepped and self.lower.untaken and not pl_module.automatic_optimization:
            trainer_check.refuse_an_unheard_backward()
        self.lower.forget()
        due, stepped, self._due, self._stepped, self._backwards = self._due, self._stepped, False, False, 0
        if stepped and self._total is not None:
            with self.working():
                self._step(trainer, self._total)
            self._report(trainer, pl_module)
        if due or stepped:
            self._give_up()

    def _give_up(self) -> None:
        self._total = None
        self.lagrangian_update.forget()

    def _step(self, trainer: Trainer, total: Tensor) -> None:
        assert self._client is not None
        optimizer, basis = self._client.optimizer, self._client.basis().describe()
        rows = trainer.strategy.all_gather(total).view(trainer.world_size, -1)
        trainer_check.refuse_divergence("HybridOrder", rows, optimizer.steps)
        answers = [ProjectedGradients(optimizer.steps, k, basis, row, num_terms=1) for k, row in enumerate(rows)]
        update = combine(answers, optimizer, mu=optimizer.smoothing)
        self.aggregation.on_update(update)
        if trainer_check.waited_for(trainer, update.coefficients):
            self._probes.saw(update.coefficients, optimizer.steps)
        self._client.apply(update)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._total is not None
        self.lagrangian_update.report(trainer, pl_module)
        self.aggregation.report(trainer, pl_module)
        if self.monitor is not None:
            self.monitor.exchanged("projected_gradients", self._total.nbytes, trainer.world_size, pl_module)

    # ---- checkpoints

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Whether a run can go on from it."""
        check_loaded(self, trainer, checkpoint, {"cut": self.cut})

    @override
    def state_dict(self) -> dict[str, Any]:
        """The optimizer below the cut; its step is the number of the directions."""
        if self._client is None:
            return {}
        return {**self._identity, "optimizer": self._client.optimizer.state_dict(), "peaks": self._rates.peaks}

    @property
    def _identity(self) -> dict[str, Any]:
        assert self._client is not None
        return {**self._client.identity, "cut": self.cut, **self.told, "schedule": self.schedule}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the parameters are on their device."""
        self._restored = {"schedule": "constant", **state_dict} if state_dict else {}  # which it once was


def one_of_a_kind(kind: type[C], trainer: Trainer) -> C | None:
    """The Trainer's, if it has one.

    Raises:
        ValueError: It has several.
    """
    found = [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
    if len(found) > 1:
        raise ValueError(f"trainer.callbacks holds more than one {kind.__name__}; a model has one cut, remove the "
                         "others")  # fmt: skip
    return found[0] if found else None


@contextmanager
def adopted(step: RoundCallback) -> Iterator[None]:
    """While open, the step is run by a HybridOrder."""
    step.adopted = True
    try:
        yield
    finally:
        step.adopted = False


def _overflow(optimizer: torch.optim.Optimizer) -> None:
    """What the scaler would find had backprop gone on below the cut: it skips the step and lowers its scale."""
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    next(gradients).fill_(torch.inf)
