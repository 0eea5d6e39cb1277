"""Cuts and modules that do not fit, and what they are told."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import OPTConfig, OPTForCausalLM

import hosfl_lightning
from hosfl_lightning.callbacks.drop_in.cut_check import CutError, check_gradient, client_parameters
from hosfl_lightning.callbacks.drop_in.hybrid_order import HybridOrder
from tests.callbacks.drop_in.plain_modules import CLASSES, FEATURES, LIGHTNING_WARNINGS, Sequential, fit, hybrid, mlp

pytestmark = LIGHTNING_WARNINGS


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


class Elsewhere(Sequential):
    """Never goes there."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net[4](self.net[:2](batch[0])), batch[1])


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


class Closures(Sequential):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(p for p in self.parameters() if p.requires_grad)


class Blocks(Sequential):
    """Its blocks are in lists, whose entries it calls."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Identity()]), nn.Linear(8, CLASSES)])
        self.by_name, self.empty = nn.ModuleDict({"last": nn.Linear(8, CLASSES)}), nn.ModuleList()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.blocks[1](self.blocks[0][0](self.net[:2](batch[0]))), batch[1])


class LossModule(Sequential):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.loss, self.spare = nn.CrossEntropyLoss(), nn.Linear(1, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])


class Unspared(LossModule):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        del self.spare


class FrozenHead(Sequential):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.net[2:].requires_grad_(False)


class LowerOnly(Sequential):
    """Gives its optimizer what is below the cut."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1)


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
        (Sequential, hybrid(client=["net.0", "nett"]), r"client: 'nett' matches no trainable .* names are net\.\d"),
        (Sequential, hybrid("net.9"), r"no submodule 'net.9'; the nearest names are net\.\d, net\.\d"),
        (Sequential, hybrid("net.0"), r"no trainable parameter is registered before 'net.0'"),
        (Twice, hybrid(), r"called 'net.2' 2 times, not once"),
        (Elsewhere, hybrid(), r"called 'net.2' 0 times with a graph"),
        (Detached, hybrid(), r"the loss does not depend on the input of 'net.2'"),
        (Noisy, hybrid(), r"again, its output changes"),
        (Swallows, hybrid(), r"'net.2' is not reached when the same batch runs again"),
        (Closures, hybrid(), r"closure more than once"),
        (Iterates, hybrid(), r"dataloader_iter"),
        (Blocks, hybrid("blocks"), r"'blocks' is a ModuleList, which is not called; take 'blocks\.0\.0'$"),
        (Blocks, hybrid("blocks.0"), r"'blocks\.0' is a ModuleList, which is not called; take 'blocks\.0\.0'$"),
        (Blocks, hybrid("by_name"), r"'by_name' is a ModuleDict, which is not called; take 'by_name\.last'$"),
        (Blocks, hybrid("empty"), r"'empty' is a ModuleList, which is not called; take a module that is$"),
        (
            Unspared,
            hybrid("loss"),
            r"nothing is trained at 'loss' or after it.*an earlier cut, or .* ZerothOrderTraining",
        ),
        (LossModule, hybrid("loss", client="net"), r"nothing is trained at 'loss' or after it"),  # as the graph shows
        (FrozenHead, hybrid(), r"nothing is trained at 'net\.2' or after it"),
        (LowerOnly, hybrid(), r"configure_optimizers names nothing that is trained at 'net\.2' or after it"),
    ],
)
def test_modules_and_cuts_that_do_not_fit(kind: type[Sequential], order: HybridOrder, message: str) -> None:
    module = kind(*mlp().net)
    asking = [p.requires_grad for p in module.parameters()]
    with pytest.raises(ValueError, match=message):
        fit(module, order)
    assert [p.requires_grad for p in module.parameters()] == asking


def test_an_unused_parameter_is_not_moved_by_noise() -> None:
    module = mlp()
    module.net[0].register_parameter("spare", nn.Parameter(torch.zeros(3)))
    with pytest.raises(CutError, match=r"net.0.spare are not used before 'net.2'"):
        fit(module, hybrid())


class Opt(L.LightningModule):
    """Registers its last norm before its layers, so that what comes before the cut by name does not do so by graph."""

    def __init__(self) -> None:
        super().__init__()
        self.model = OPTForCausalLM(OPTConfig(
            vocab_size=16, hidden_size=8, num_hidden_layers=3, ffn_dim=8, num_attention_heads=1, word_embed_proj_dim=8,
            max_position_embeddings=16, tie_word_embeddings=False,
        ))  # fmt: skip

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0], use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_error_names_the_client_that_fits() -> None:
    data = DataLoader(TensorDataset(torch.randint(0, 16, (4, 6))), batch_size=2)
    module, cut = Opt(), "model.model.decoder.layers.2"
    with pytest.raises(CutError, match=r"final_layer_norm.weight.* are used at or after .*client=\[") as refused:
        fit(module, hybrid(cut), data=data)
    client = ast.literal_eval(str(refused.value).rpartition("client=")[2])
    decoder = "model.model.decoder"
    inside = ["embed_tokens", "embed_positions", "layers.0", "layers.1"]
    assert client == [f"{decoder}.{name}" for name in inside]
    before = module.model.model.decoder.layers[0].fc1.weight.clone()
    fit(module, hybrid(cut, client=client), data=data)
    assert not torch.equal(before, module.model.model.decoder.layers[0].fc1.weight)


def test_a_cut_that_is_never_called() -> None:
    module = mlp()
    module.register_module("spare", nn.Linear(2, 2))
    with pytest.raises(CutError, match="called 'spare' 0 times"):
        fit(module, hybrid("spare", client="net.0"))


# ---- names


def test_the_nearest_names_begin_with_the_one_that_lacks_a_prefix() -> None:
    backbone = nn.ModuleDict({"layers": nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))), "norm": nn.LayerNorm(2)})
    model = nn.ModuleDict({"norms": nn.LayerNorm(2), "backbone": backbone})
    for cut, near in (("norm", "backbone.norm, norms, "), ("backbone.layer.3", "backbone.layers.3, ")):
        with pytest.raises(CutError, match=rf"no submodule {cut!r}; the nearest names are {near}"):
            client_parameters(model, cut, None)


def test_nothing_trainable_below_the_cut() -> None:
    module = mlp()
    module.net[0].requires_grad_(False)
    with pytest.raises(CutError, match=r"no trainable parameter is registered before 'net\.2'"):
        fit(module, hybrid())


def test_a_weight_on_both_sides_is_named_by_both_names() -> None:
    class Autoencoder(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return (self.net(batch[0]) - batch[0]).square().mean()

    module = Autoencoder(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))
    module.net[2].weight = module.net[0].weight
    with pytest.raises(CutError, match=r"net\.0\.weight \(tied to net\.2\.weight\) by a path around 'net\.1'"):
        fit(module, hybrid("net.1"))


# ---- gradients


class Caches(Sequential):
    """Computes the features of a batch once."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.features: dict[int, Tensor] = {}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx not in self.features:
            self.features[batch_idx] = self.net[:2](batch[0])
        z, self.features[batch_idx] = self.features[batch_idx], self.features[batch_idx].detach()
        return cross_entropy(self.net[2:](z), batch[1])


def test_a_replay_that_does_not_compute_again_is_found_by_its_gradient() -> None:
    with pytest.raises(
        CutError, match=r"verify: below 'net\.2' the gradient from λ differs by 100%.* net\.0\.weight; a"
    ):
        fit(Caches(*mlp().net), hybrid())
    with pytest.warns(UserWarning, match="changes only 0%"):  # what is left without it
        fit(Caches(*mlp().net), hybrid(verify=False))


def test_verifying_leaves_no_trace() -> None:
    verified, plain = mlp(nn.BatchNorm1d(8), nn.Dropout(0.3)), mlp(nn.BatchNorm1d(8), nn.Dropout(0.3))
    gradients: list[bool] = []
    verified.net[4].register_full_backward_hook(lambda *_: gradients.append(verified.net[0].weight.grad is not None))
    for module, verify in ((verified, True), (plain, False)):
        torch.manual_seed(1)
        fit(module, hybrid("net.4", verify=verify), gradient_clip_val=0.1)
    assert all(torch.equal(p, q) for p, q in zip(verified.state_dict().values(), plain.state_dict().values()))
    assert all(p.grad is None for p in verified.net[:4].parameters())
    assert not any(p._post_accumulate_grad_hooks for p in verified.parameters())


@pytest.mark.parametrize(("scale", "agrees"), [(1.0, True), (1.04, True), (1.06, False), (torch.nan, False)])
def test_gradients_agree_to_a_twentieth_of_their_norm(scale: float, agrees: bool) -> None:
    exact = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    ours = [scale * g for g in exact]
    if agrees:
        check_gradient("cut", ["a", "b"], exact, ours, "hint")
    else:
        with pytest.raises(CutError, match=r"differs by (6|nan)%.*most in (a|b); hint"):
            check_gradient("cut", ["a", "b"], exact, ours, "hint")


def test_gradients_that_vanish_agree() -> None:
    check_gradient("cut", ["a"], [torch.zeros(2)], [torch.zeros(2)], "hint")


def test_a_parameter_unfrozen_below_the_cut_during_the_run_is_refused() -> None:
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[0].bias.requires_grad_(trainer.current_epoch > 0)

    module = mlp()
    module.net[0].bias.requires_grad_(False)
    with pytest.raises(CutError, match=r"net\.0\.bias was unfrozen during the run and is used before 'net\.2'"):
        fit(module, hybrid(), Unfreeze(), max_epochs=2)


def test_a_prefix_may_be_written_with_its_dot() -> None:
    assert list(client_parameters(mlp(), "net.2", ["net.0."])) == ["net.0.weight", "net.0.bias"]


def test_an_input_that_requires_a_gradient_is_no_parameter() -> None:
    module = mlp()
    module.net.register_forward_pre_hook(lambda m, args: (args[0].clone().requires_grad_(),))
    assert fit(module, hybrid()).global_step == 4


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_is_called_that(value: float) -> None:
    exact = [torch.ones(2), torch.tensor([1.0, value])]
    with pytest.raises(CutError, match="the gradient of b is not finite"):
        check_gradient("cut", ["a", "b"], exact, [torch.ones(2)] * 2, "hint")


def test_a_loss_that_is_not_a_number_is_not_blamed_on_the_cut() -> None:
    class Diverges(Sequential):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * torch.nan

    with pytest.raises(
        ValueError, match=r"at step 0 the loss or its gradient at the cut is not finite; lower rule\.lr"
    ):
        fit(Diverges(*mlp().net), hybrid())


def normed(*frozen: int) -> Sequential:
    module = Sequential(
        nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, CLASSES), nn.LayerNorm(CLASSES)
    )
    for layer in frozen:
        module.net[layer].requires_grad_(False)
    return module


def test_a_word_names_what_is_before_the_cut() -> None:
    module = normed(0)
    norms = client_parameters(module, "net.3", ["norm"])
    assert [*norms] == ["net.1.weight", "net.1.bias"]
    assert [*client_parameters(normed(), "net.3", ["bias", "net.0"])] == ["net.0.weight", "net.0.bias", "net.1.bias"]
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, hybrid("net.3", client="norm"))
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before) - {"net.0.weight", "net.0.bias"}
    with pytest.raises(CutError, match=r"net.0.weight, net.0.bias are trained and used before 'net.3'"):
        fit(normed(), hybrid("net.3", client="norm"))
    with pytest.raises(CutError, match="'first_layer' matches no trainable parameter"):
        client_parameters(module, "net.3", ["first_layer"])


def test_a_name_goes_before_a_word() -> None:
    module = nn.ModuleDict({"norm": nn.Linear(2, 2), "other": nn.LayerNorm(2), "head": nn.Linear(2, 2)})
    assert [*client_parameters(module, "head", ["norm"])] == ["norm.weight", "norm.bias"]


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (2, "give the submodule's name as a string.*got int"),
        (nn.Linear(1, 1), "give the submodule's name as a string.*got Linear"),
        (None, "as a string.*got NoneType"),
        ("", "'' is the whole module.*give the name of a submodule"),
    ],
)
def test_a_cut_that_is_no_name_is_refused_when_it_is_given(cut: Any, message: str) -> None:
    with pytest.raises(CutError, match=message):
        hosfl_lightning.HybridOrder(cut)
