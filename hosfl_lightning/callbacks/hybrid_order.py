"""HybridOrder: a plain Trainer trains the part below a cut without backprop, the rest as before."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from typing_extensions import override

from hosfl_lightning.callbacks.cut_check import CutError
from hosfl_lightning.callbacks.dimension_free_aggregation import DimensionFreeAggregation
from hosfl_lightning.callbacks.lagrangian_update import LagrangianUpdate
from hosfl_lightning.callbacks.lower_part import LowerPart, replaced
from hosfl_lightning.clients import Anchor, Cohort, ForwardOnlyClient
from hosfl_lightning.optim import SGD, SharedDirections, UpdateRule, ZerothOrder
from hosfl_lightning.optim.zeroth_order import check_probe_settings
from hosfl_lightning.wire import ProjectedGradients


class HybridOrder(Callback):
    r"""Backprop above a cut, forward evaluations below it, in a ``lightning.Trainer`` with automatic optimization.

    ::

        above   θ_s ← your optimizer(∂ℓ/∂θ_s),  λ = ∂ℓ/∂z
        below   v_p = (1/μ) ⟨λ, f_c(x; θ_c + μ u_p) − z⟩,  p = 1..P
                ĝ = (1/P) Σ_p v̄_p u_p,  θ_c ← rule(θ_c, ĝ),  v̄_p: mean over ranks, sum over accumulated batches

    Nothing in the module changes: its optimizer trains what is above the cut, this callback what is below. No ``.grad``
    is made below the cut, and no graph after the first batch. Steps 4 and 5-6 of the round are `LagrangianUpdate` and
    `DimensionFreeAggregation`, the same as in a federated run; ranks exchange ``P`` scalars for the lower part.

    Example::

        Trainer(callbacks=[HybridOrder(cut="model.model.layers.3", rule=AdamW(lr=1e-4))]).fit(model, data)

    Clipping, accumulation, bf16, single-device and DDP strategies, checkpoints and resuming work as without it;
    ``gradient_clip_val`` acts above the cut only. The probes replay torch's random state, so dropout masks below the
    cut agree. Where no submodule that is called holds both θ_c and the cut, they run ``training_step`` up to the cut
    again, with ``self.log`` and metrics silenced. The first batch costs a dozen more forwards of the lower part, a copy
    of θ_c and, in host memory, the lower part's graph: it is checked that the loss reaches θ_c through the cut alone,
    and that a replay reproduces z.

    | logged key | meaning | unit |
    |---|---|---|
    | ``client/multiplier_norm`` | ``‖λ‖₂`` over the step's micro-batches, on this rank | nats per activation |
    | ``client/lagrangian_term`` | ``⟨λ, z⟩`` before the update, on this rank | nats |
    | ``client/projected_gradient_rms`` | rms of ``v̄_p``, about the gradient's norm | nats per unit of θ |
    | ``client/lr`` | learning rate of the update below | – |

    Args:
        cut: Dotted name, in the LightningModule, of the submodule whose input is the smashed data z.
        rule: Update rule below the cut; its learning rate is constant.
        client: Names of θ_c, as prefixes that end at a dot or as regular expressions. None: every trainable parameter
            registered before the cut. All that is trained below the cut must be in it.
        probes: ``P``, forwards of the lower part a batch (``2P`` when central).
        mu: ``μ``, smoothing length.
        estimator: ``forward`` or ``central``.
        distribution: Of the directions: ``rademacher`` or ``gauss16``.
        seed: Of the directions; step ``t`` of the run uses those of round ``t``.

    Raises:
        ValueError: A setting out of range, a cut or client that does not fit (`CutError`), a Trainer setting that would
            break the method.

    Reference: HO-SFL, arXiv 2603.14773.
    """

    def __init__(
        self,
        cut: str,
        rule: UpdateRule | None = None,
        client: str | list[str] | None = None,
        probes: int = 2,
        mu: float = 1e-3,
        estimator: str = "forward",
        distribution: str = "rademacher",
        seed: int = 0,
    ) -> None:
        check_probe_settings(probes, mu, estimator, distribution)
        SharedDirections(seed, 0, probes, distribution)  # refuses a seed out of range
        self.cut, self.client = cut, [client] if isinstance(client, str) else client
        self.rule = rule if rule is not None else SGD()
        self.settings: dict[str, Any] = {
            "probes": probes, "mu": mu, "estimator": estimator, "distribution": distribution, "seed": seed,
        }  # fmt: skip
        self._undo = ExitStack()
        self._client: ReplayedClient | None = None
        self._restored: dict[str, Any] = {}

    # ---- setting up and leaving

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take θ_c from backprop: after the module is complete, before the strategy and the optimizers see it."""
        if stage != "fit":
            return
        # The one moment for that is the hook `configure_model`, which Trainer calls on the module only.
        complete = pl_module.configure_model

        def configure_model() -> None:
            complete()
            refuse_what_would_break(trainer, pl_module)
            self.lower = LowerPart(pl_module, self.cut, self.client, trainer.precision_plugin.forward_context)
            self._undo.callback(self.lower.detach)

        self._undo.enter_context(replaced(configure_model, (pl_module, "configure_model")))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the client, now that its parameters are on their device."""
        self.lower.attach()
        self._client = ReplayedClient(self.lower, self.rule, self.settings)
        self._restore(self._client)
        self.lagrangian_update, self.aggregation = LagrangianUpdate(), DimensionFreeAggregation()
        self._total: Tensor | None = None
        self._stepped = False

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was found."""
        self._undo.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same when the run broke off, for which Trainer calls no teardown."""
        self.teardown(trainer, pl_module, "fit")

    # ---- the steps of a round

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step 4: λ has arrived at the cut; answer with ``P`` scalars."""
        assert self._client is not None
        if self._stepped:
            raise ValueError("HybridOrder: the optimizer evaluates its closure more than once a step (LBFGS does); use "
                             "one that needs a single gradient")  # fmt: skip
        anchor, multiplier = self._client.receive()
        cohort = Cohort(clients=[trainer.global_rank], batch={}, rows=[slice(None)], widths=[], num_terms=[1])
        basis = self._client.optimizer.basis(self._client.optimizer.steps)
        values = self.lagrangian_update.answer(self._client, {}, anchor, multiplier, cohort, basis)[0]
        # Trainer has divided the loss by the number of accumulated batches, so λ is a share and the scalars add up.
        self._total = values if self._total is None else self._total + values

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The upper part takes its step, so the lower one is due."""
        self._stepped = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Steps 5 and 6: the mean over ranks, applied by every rank alike."""
        stepped, self._stepped = self._stepped, False
        if not stepped or self._total is None:
            return
        assert self._client is not None
        optimizer = self._client.optimizer
        basis = optimizer.basis(optimizer.steps)
        # The sum of matrices that are zero but for one's own row: an all-gather, in rank order.
        rows = self._total.new_zeros(trainer.world_size, basis.size)
        rows[trainer.global_rank] = self._total
        rows = trainer.strategy.reduce(rows, reduce_op="sum")
        answers = [
            ProjectedGradients(optimizer.steps, rank, basis.describe(), row, num_terms=1)
            for rank, row in enumerate(rows)
        ]
        update = self.aggregation.aggregate(answers, optimizer)
        self._client.apply(update)
        self._total = None
        self.lagrangian_update.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.aggregation.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    # ---- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """The optimizer below the cut; its step is the number of the directions."""
        if self._client is None:
            return {}
        return {**self._client.identity, "optimizer": self._client.optimizer.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the parameters are on their device."""
        self._restored = dict(state_dict)

    def _restore(self, client: ReplayedClient) -> None:
        state, self._restored = self._restored, {}
        if not state:
            return
        for name, value in client.identity.items():
            if state[name] != value:
                raise ValueError(f"ckpt_path: HybridOrder was saved with {name}={state[name]}, now it is {value}")
        client.optimizer.load_state_dict(state["optimizer"])


class ReplayedClient(ForwardOnlyClient):
    """The forward-only client whose half is the lower part of somebody else's module.

    Freezes nothing and changes no mode, unlike its base: the module is the user's.

    Args:
        lower: Runs ``f_c`` again.
        rule: Update rule on θ_c.
        settings: Further arguments of `ZerothOrder`.
    """

    def __init__(self, lower: LowerPart, rule: UpdateRule, settings: dict[str, Any]) -> None:
        self.lower = lower
        module: nn.Module = ([lower.module, *lower.holders])[-1]
        self.optimizer = ZerothOrder(lower.parameters.items(), rule, module=module, **settings)
        self.identity = {"client": list(lower.parameters), "rule": type(rule).__name__}
        self._checked = False

    @torch.no_grad()
    def receive(self) -> tuple[Anchor, Tensor]:
        """``z`` and ``λ`` of the last backward, ``(B, S, h)``."""
        z, multiplier = (_three_dimensional(t) for t in self.lower.take())
        if not self._checked:
            self._check_replay(z)
            self._checked = True
        return Anchor(z), multiplier

    def evaluate(self, batch: dict[str, Tensor]) -> Tensor:
        """The lower part again, whatever the batch."""
        return _three_dimensional(self.lower.again())

    def _check_replay(self, z: Tensor) -> None:
        """A replay gives z again, and layer-wise probes give what perturbing all of θ_c at once gives."""
        optimizer = self.optimizer
        basis = optimizer.basis(0)
        unmoved = self.evaluate({})
        with optimizer.perturbed(basis, 0, optimizer.mu):
            layerwise = self.evaluate({})
        module, optimizer.module = optimizer.module, None
        with optimizer.perturbed(basis, 0, optimizer.mu):
            moved = self.evaluate({})
        drift, effect = (float((other.float() - z.float()).norm()) for other in (unmoved, moved))
        if drift > 0.1 * effect:
            raise CutError(
                f"cut: running the part below {self.lower.cut!r} again changes its output by {drift:.1e}, a probe by "
                f"{effect:.1e}; it must depend on nothing but the batch and torch's random state (no numpy or random, "
                "no work in place on the batch, no state of its own)"
            )
        if torch.equal(layerwise, moved):
            optimizer.module = module
        else:
            size = sum(p.numel() * p.element_size() for p in optimizer.parameters)
            warnings.warn(
                "a parameter below the cut is used outside the forward of the module that owns it, so probes perturb "
                f"all of them at once and keep a copy ({size} bytes)",
                stacklevel=2,
            )


def refuse_what_would_break(trainer: Trainer, pl_module: LightningModule) -> None:
    """Settings under which the method is not what it says.

    Raises:
        ValueError: Names the setting and what to use instead.
    """
    if sum(isinstance(callback, HybridOrder) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise ValueError("trainer.callbacks holds more than one HybridOrder; a model has one cut, remove the others")
    if not pl_module.automatic_optimization:
        raise ValueError("HybridOrder needs automatic_optimization=True; a module that steps by itself can use "
                         "hosfl_lightning.optim.ZerothOrder directly")  # fmt: skip
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(f"trainer.precision={trainer.precision}: a GradScaler scales λ, and skips steps; use "
                         "bf16-mixed or 32-true")  # fmt: skip
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(f"trainer.strategy={type(trainer.strategy).__name__}: probes need whole parameters; use a "
                         "single device or ddp")  # fmt: skip
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise ValueError("HybridOrder: a training_step that takes dataloader_iter cannot run a batch twice; take "
                         "(batch, batch_idx)")  # fmt: skip
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        raise ValueError("HybridOrder: a compiled LightningModule has no hooks at the cut; compile the upper part only")


def _three_dimensional(tensor: Tensor) -> Tensor:
    """``(B, …, h)`` as ``(B, S, h)``, the shape of a round's messages."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1] if tensor.dim() > 1 else 1)
