"""The part below a cut: what a replay repeats and leaves alone, modules that need care, cuts that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from hosfl_lightning.callbacks.cut_check import CutError
from hosfl_lightning.callbacks.hybrid_order import HybridOrder
from tests.callbacks.plain_modules import (
    CLASSES,
    FEATURES,
    LIGHTNING_WARNINGS,
    Parts,
    Sequential,
    fit,
    hybrid,
    mlp,
    same_bits,
)

pytestmark = LIGHTNING_WARNINGS


# ---- it leaves no trace


def test_random_state_and_module_are_left_as_found() -> None:
    states = []
    for callbacks in ([hybrid("net.3")], []):
        torch.manual_seed(3)
        module = mlp(nn.Dropout(0.3))
        if not callbacks:
            module.net[0].requires_grad_(False)
        attributes = set(vars(module))
        fit(module, *callbacks)
        states.append(torch.get_rng_state())
        assert set(vars(module)) - attributes <= {"_hparams"}  # Trainer's
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    assert torch.equal(*states)


def test_a_run_that_breaks_off_leaves_the_module_as_found() -> None:
    class Breaks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyError("stop")

    module = mlp()
    attributes = set(vars(module))
    with pytest.raises(KeyError):
        fit(module, hybrid(), Breaks())
    assert set(vars(module)) - attributes <= {"_hparams"}  # Trainer's
    assert all(p.requires_grad for p in module.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())


def test_gradients_taken_between_the_steps_pass_the_cut() -> None:
    slopes: list[float] = []

    class Saliency(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            x = batch[0].clone().requires_grad_()
            with torch.enable_grad():
                slopes.append(float(torch.autograd.grad(pl_module.net(x).sum(), x)[0].abs().sum()))

    fit(mlp(), hybrid(), Saliency())
    assert len(slopes) == 4
    assert all(slopes)


@pytest.mark.parametrize("parts", [False, True])
def test_probes_see_the_dropout_masks_of_the_batch(parts: bool) -> None:
    module = Parts() if parts else mlp(nn.Dropout(0.3))
    masks: list[Tensor] = []
    dropout = next(m for m in module.modules() if isinstance(m, nn.Dropout))
    dropout.register_forward_hook(lambda m, args, out: masks.append(out.detach() == 0))
    fit(module, hybrid("head" if parts else "net.3", probes=3))
    # A batch is a forward and its probes; the checks of the first one belong to it.
    first = len(masks) - 3 * (1 + 3)
    batches = [masks[:first], *(masks[i : i + 4] for i in range(first, len(masks), 4))]
    assert len(batches) == 4
    for batch in batches:
        assert all(torch.equal(mask, batch[0]) for mask in batch)
    assert not torch.equal(batches[0][0], batches[1][0])


def test_norm_statistics_do_not_see_the_probes() -> None:
    module, frozen = mlp(nn.BatchNorm1d(8)), mlp(nn.BatchNorm1d(8))
    fit(module, hybrid("net.3"), max_steps=1)
    for p in frozen.net[:3].parameters():
        p.requires_grad_(False)
    fit(frozen, max_steps=1)
    assert int(module.net[2].num_batches_tracked) == 1
    assert torch.equal(module.net[2].running_mean, frozen.net[2].running_mean)


def test_a_training_step_that_runs_again_counts_its_batch_once() -> None:
    module = Parts()
    logged: list[float] = []
    log = module.log

    class Watch(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            logged.append(float(module.seen.weight))

    trainer = fit(module, hybrid("head"), Watch())
    assert logged == [1, 2, 3, 4]
    # User code does run again, two probes a batch and the checks of the first, but what it reports is counted once.
    assert module.calls > 4 * (1 + 2)
    assert trainer.callback_metrics["calls"] == module.calls - 2
    assert module.log == log


# ---- modules that need care


def test_a_cut_that_works_in_place() -> None:
    torch.manual_seed(0)
    inplace, plain = (
        Sequential(nn.Linear(FEATURES, 8), nn.ReLU(inplace=i), nn.Linear(8, CLASSES)) for i in (True, False)
    )
    inplace.load_state_dict(plain.state_dict())
    for module in (inplace, plain):
        fit(module, hybrid("net.1"))
    assert same_bits(inplace, plain)


class Functional(Sequential):
    """Reads a layer's weight without calling the layer."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        hidden = nn.functional.linear(x, self.net[0].weight, self.net[0].bias).tanh()
        return cross_entropy(self.net[2:](hidden), y)


def test_a_weight_read_outside_its_layer_is_probed_all_the_same() -> None:
    functional, plain = Functional(*mlp().net), mlp()
    with pytest.warns(UserWarning, match="perturb all of them at once"):
        fit(functional, hybrid())
    fit(plain, hybrid())
    assert same_bits(functional, plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_the_upper_part_may_be_compiled() -> None:
    compiled, plain = mlp(), mlp()
    compiled.net[4].compile(backend="eager")
    for module in (compiled, plain):
        fit(module, hybrid(), max_steps=2)
    assert same_bits(compiled, plain)


def test_smashed_data_given_by_keyword_after_a_float_mask() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, mask: Tensor, hidden: Tensor) -> Tensor:
            return self.linear(hidden * mask)

    class Keyword(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            hidden = self.net[1](self.net[0](batch[0]))
            return cross_entropy(self.net[3:](self.net[2](mask=torch.ones(8), hidden=hidden)), batch[1])

    keyword, plain = Keyword(*mlp().net), mlp()
    keyword.net[2], keyword.net[2].linear = Masked(), keyword.net[2]
    for module in (keyword, plain):
        fit(module, hybrid())
    for p, q in zip(keyword.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_checkpointed_block_around_the_cut() -> None:
    class Checkpointed(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            hidden = checkpoint(self.net[2:4], self.net[:2](batch[0]), use_reentrant=False)
            return cross_entropy(self.net[4](hidden), batch[1])

    saving, plain = Checkpointed(*mlp().net), mlp()
    for module in (saving, plain):
        fit(module, hybrid())
    assert same_bits(saving, plain)


def test_hooks_of_the_user_run_once_in_a_replay() -> None:
    hooked, plain = mlp(), mlp()
    hooked.net.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    plain.net[0].register_forward_pre_hook(lambda m, args: (2 * args[0],))
    for module in (hooked, plain):
        fit(module, hybrid())
    assert same_bits(hooked, plain)


def test_the_smallest_call_is_replayed() -> None:
    class Counts(Sequential):
        steps = 0

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.steps += 1
            return super().training_step(batch, batch_idx)

    module = Counts(*mlp().net)
    fit(module, hybrid())
    assert module.steps == 4


def test_a_call_that_ended_before_the_cut_is_not_replayed() -> None:
    class Short(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)

    class Aside(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.net(batch[0])
            z = self.net[1](self.net[0](batch[0]))
            return cross_entropy(self.net[4](self.net[3](self.net[2](z))), batch[1])

    aside, plain = Aside(), mlp()
    aside.net = Short(*mlp().net)
    for module in (aside, plain):
        fit(module, hybrid())
    assert same_bits(aside, plain)


# ---- what is refused


class Skip(Sequential):
    """A gated path around the cut, the gate still at zero."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.gate = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        z = self.net[:2](batch[0])
        return cross_entropy(self.net[4](self.net[2:4](z) + self.gate * z), batch[1])


class Tied(Sequential):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0 * self.net[0].weight.sum()


class Twice(Sequential):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)


class Detached(Sequential):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net[4](self.net[2:4](self.net[:2](batch[0])).detach()), batch[1])


class Noisy(Sequential):
    """Draws where no replay of torch's random state reaches."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.generator = np.random.default_rng(0)
        self.net[1].register_forward_hook(lambda m, x, out: out + float(self.generator.normal()))


class Swallows(Sequential):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        z = self.net[:2](x)
        try:
            z = self.net[2](z)
        except Exception:
            z = torch.zeros_like(z)
        return cross_entropy(self.net[3:](z), y)


class Manual(Sequential):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.automatic_optimization = False


class Closures(Sequential):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(p for p in self.parameters() if p.requires_grad)


class Iterates(Sequential):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


@pytest.mark.parametrize(
    ("kind", "order", "message"),
    [
        (Skip, hybrid(), r"net.0.weight, net.0.bias by a path around 'net.2'"),
        (Tied, hybrid(), r"net.0.weight by a path around"),
        (
            Sequential,
            hybrid(client=["net.0", "net.4"]),
            r"client: net.4.weight, net.4.bias are used at or after 'net.2'",
        ),
        (Sequential, hybrid("net.4", client="net.0"), r"net.2.weight, net.2.bias are trained and used before 'net.4'"),
        (Sequential, hybrid(client="net.2"), r"client: net.2.weight is in 'net.2'"),
        (Sequential, hybrid(client=["net.0", "nett"]), r"client: 'nett' matches no trainable parameter"),
        (Sequential, hybrid("net.9"), r"cut: the module has no submodule 'net.9'"),
        (Sequential, hybrid("net.0"), r"no trainable parameter is registered before 'net.0'"),
        (Twice, hybrid(), r"'net.2' is called more than once"),
        (Detached, hybrid(), r"the loss does not depend on the input of 'net.2'"),
        (Noisy, hybrid(), r"again changes its output"),
        (Swallows, hybrid(), r"'net.2' is not reached when the same batch runs again"),
        (Manual, hybrid(), r"automatic_optimization=True"),
        (Closures, hybrid(), r"closure more than once"),
        (Iterates, hybrid(), r"dataloader_iter"),
    ],
)
def test_modules_and_cuts_that_do_not_fit(kind: type[Sequential], order: HybridOrder, message: str) -> None:
    module = kind(*mlp().net)
    with pytest.raises(ValueError, match=message):
        fit(module, order)
    assert all(p.requires_grad for p in module.parameters())


def test_an_unused_parameter_is_not_moved_by_noise() -> None:
    module = mlp()
    module.net[0].register_parameter("spare", nn.Parameter(torch.zeros(3)))
    with pytest.raises(CutError, match=r"net.0.spare are not used before 'net.2'"):
        fit(module, hybrid())


def test_a_cut_that_is_never_called() -> None:
    module = mlp()
    module.register_module("spare", nn.Linear(2, 2))
    with pytest.raises(CutError, match="never called 'spare'"):
        fit(module, hybrid("spare", client="net.0"))
