"""The part below a cut: what a replay repeats and leaves alone, modules that need care."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from hosfl_lightning.callbacks.drop_in import lower_part
from hosfl_lightning.callbacks.drop_in.cut_check import CutError
from hosfl_lightning.callbacks.drop_in.lower_graph import graph_below
from hosfl_lightning.optim import together
from tests.callbacks.drop_in.plain_modules import (
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


def test_nothing_refers_to_a_batch_that_is_over() -> None:
    batches: list[Any] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batches.append(weakref.ref(batch[0]))

        def on_train_epoch_end(self, *_: Any) -> None:
            gc.collect()
            alive.extend(batch() is not None for batch in batches)

    alive: list[bool] = []
    fit(mlp(), hybrid(), Watch(), accumulate_grad_batches=2)
    assert alive == [False] * 4


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


def test_a_weight_read_outside_its_layer_is_probed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "FEW", 0)  # few weights move all at once anyway
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


def test_a_pass_without_a_graph_before_the_step_is_not_taken_for_the_cut() -> None:
    """As pseudo-labels are made: a replay stops at the second call."""

    class PseudoLabels(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            with torch.no_grad():
                self.net[2](self.net[:2](2 * x))
            return cross_entropy(self.net[2:](self.net[:2](x)), y)

    pseudo, plain = PseudoLabels(*mlp().net), mlp()
    for module in (pseudo, plain):
        fit(module, hybrid())
    assert same_bits(pseudo, plain)


@pytest.mark.parametrize("end", [4, 6])
def test_a_checkpointed_block_with_layers_on_both_sides_of_the_cut(end: int) -> None:
    class Straddling(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            hidden = checkpoint(self.net[:end], batch[0], use_reentrant=False)
            return cross_entropy(self.net[end:](hidden), batch[1])

    saving, plain = Straddling(*mlp(nn.Dropout(0.3)).net), mlp(nn.Dropout(0.3))
    for module in (saving, plain):
        torch.manual_seed(3)
        fit(module, hybrid("net.3"))
    assert same_bits(saving, plain)


@pytest.mark.parametrize("verify", [True, False])
def test_what_the_first_graph_saves_below_the_cut(verify: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []

    @contextmanager
    def watched(below: Any, keep: bool) -> Iterator[None]:
        with graph_below(below, keep):
            yield
            kept.append(keep)

    monkeypatch.setattr(lower_part, "graph_below", watched)
    fit(mlp(), hybrid(verify=verify))
    assert kept == ([True, True] if verify else [False])  # the batch's own graph, and that of the replay


def test_a_step_that_differentiates_below_the_cut_itself_is_refused() -> None:
    class Penalty(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x = batch[0].requires_grad_()
            z = self.net[1](self.net[0](x))
            slope = torch.autograd.grad(z.sum(), x, retain_graph=True)[0]
            return cross_entropy(self.net[2:](z), batch[1]) + slope.square().mean()

    with pytest.raises(CutError, match="training_step itself differentiates what is below the cut"):
        fit(Penalty(*mlp().net), hybrid(verify=False))
