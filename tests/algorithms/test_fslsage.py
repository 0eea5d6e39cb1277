"""FSL-SAGE beside a plain loop, and an alignment that aligns."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hosfl_lightning.algorithms import CSEFSL, FSLSAGE
from hosfl_lightning.optim import SGD
from tests.algorithms.auxiliary import Reference, WithHead, exact
from tests.algorithms.two_layers import Points, endpoint_of, orchestrator
from tests.test_round import MakeModel


@pytest.mark.parametrize(("local_steps", "upload_every", "aligned"), [(1, 1, {0}), (3, 2, {1, 2}), (3, 1, {2})])
def test_equals_a_plain_loop(tmp_path: Path, local_steps: int, upload_every: int, aligned: set[int]) -> None:
    """Of rounds 0, 2 and 4, after the last step with a z: step 2 of rounds 0 and 4 and step 1 of none, or the like."""

    def correct(head: nn.Module, z: Tensor, y: Tensor, multiplier: Tensor, round: int, step: int) -> None:
        later = [s for s in range(step + 1, local_steps) if (round * local_steps + s) % upload_every == 0]
        if round % 2 or later:
            return
        assert step in aligned
        for _ in range(2):
            [mine] = torch.autograd.grad(F.cross_entropy(head(z), y), z, create_graph=True)
            gradients = torch.autograd.grad(((mine - multiplier) ** 2).sum(), [*head.parameters()], allow_unused=True)
            with torch.no_grad():
                for p, g in zip(head.parameters(), gradients):
                    p -= 3.0 * g if g is not None else 0.0

    settings = {"local_steps": local_steps, "upload_every": upload_every}
    algorithm = FSLSAGE(SGD(lr=0.1), align_every=2, align_steps=2, align_lr=3.0, **settings)
    trainer, model = orchestrator(algorithm, tmp_path), WithHead()
    reference = Reference(model)
    trainer.fit(model, Points())
    reference.run([trainer.sample(r) for r in range(5)], exact, local_steps, upload_every, correct=correct)
    reference.assert_equal(model, trainer, 5e-6)


def test_one_multiplier_comes_down_in_a_round_of_alignment(tmp_path: Path) -> None:
    for rounds, multipliers in ((1, 3), (2, 0), (4, 3)):
        algorithm = FSLSAGE(SGD(lr=0.1), local_steps=2, align_every=3)
        trainer = orchestrator(algorithm, tmp_path, max_rounds=rounds, simulation="per_client")
        trainer.fit(WithHead(), Points())
        counts = Counter((sent.kind, sent.direction) for sent in trainer.fleet.channel.ledger)
        assert counts["multiplier", "down"] == multipliers
        assert (counts["smashed_data", "up"], counts["weights", "up"]) == (6, 3)


def test_alignment_brings_the_heads_gradient_to_the_servers(make_model: MakeModel) -> None:
    """Through attention, whose fused kernels have no second derivative; θ_c and the server stay."""
    model, algorithm = make_model(cut=1), FSLSAGE(auxiliary_blocks=2)
    tokens = torch.randint(3, 9, (4, 10), generator=torch.Generator().manual_seed(0))
    client, batch = (
        endpoint_of(algorithm, model).client,
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens},
    )
    with torch.no_grad():  # B of LoRA is 0 at the start, and so is the gradient of A
        for p in [*client.half.auxiliary.parameters(), *model.server_parameters.values()]:
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.05)
    z, _ = client.forward(batch)
    lifted = z.clone().requires_grad_()
    loss = model.loss(model.server_half(lifted, batch["attention_mask"]), batch["labels"])
    [multiplier] = torch.autograd.grad(loss, lifted)
    kept = {name: p.detach().clone() for name, p in model.trained_state().items()}
    before = client.misalignment(batch, z, multiplier).detach()
    client.align(batch, z, multiplier, steps=20, lr=0.1)
    after = client.misalignment(batch, z, multiplier).detach()
    assert after < 0.5 * before
    assert all(torch.equal(p, kept[name]) for name, p in model.trained_state().items())


def test_every_step_of_an_alignment_sees_the_one_before() -> None:
    """Within one autocast, which keeps casts of the weights, as in as many."""
    generator = torch.Generator().manual_seed(0)
    z, multiplier = (torch.randn(4, 1, 6, generator=generator) for _ in range(2))
    batch = {"attention_mask": torch.ones(4, 1), "labels": torch.tensor([0, 1, 2, 1])}
    heads = []
    for calls, steps in ((1, 3), (3, 1)):
        client = endpoint_of(FSLSAGE(), WithHead()).client
        for _ in range(calls):
            with torch.autocast("cpu", torch.bfloat16):
                client.align(batch, z, multiplier, steps, lr=2.0)
        heads.append(client.half.auxiliary.state_dict())
    together, apart = heads
    assert all(torch.equal(together[name], apart[name]) for name in together)


@pytest.mark.parametrize("local_steps", [1, 3])
def test_the_cost_of_a_round_is_the_mean_over_those_that_align_and_those_that_do_not(
    tmp_path: Path, local_steps: int
) -> None:
    """Memory is that of alignment."""

    def costs(algorithm: CSEFSL) -> tuple[float, dict[str, int]]:
        trainer = orchestrator(algorithm, tmp_path, max_rounds=1)
        trainer.fit(WithHead(), Points())
        return trainer.summary["client_forwards_per_round"], trainer.summary["memory"]

    plain, without = costs(CSEFSL(local_steps=local_steps))
    every, most = costs(FSLSAGE(local_steps=local_steps, align_every=1, align_steps=4))
    fifth, memory = costs(FSLSAGE(local_steps=local_steps, align_every=5, align_steps=4))
    assert every > plain
    assert fifth == pytest.approx((every + 4 * plain) / 5)
    assert memory == most
    assert memory["client_peak_bytes"] >= without["client_peak_bytes"]


def test_a_head_of_which_nothing_is_trained_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    trainer = orchestrator(FSLSAGE(auxiliary_blocks=0), tmp_path / "runs", logger=True)
    with pytest.raises(
        ValueError, match=r"nothing of it is trained with auxiliary_blocks=0 .*; raise .*auxiliary_blocks"
    ):
        trainer.fit(make_model(), Points())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("name", "value"), [("align_every", 0), ("align_steps", 0), ("align_lr", 0.0)])
def test_settings_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"trainer.algorithm: {name} must be"):
        FSLSAGE(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("local_steps", "upload_every", "align_every", "sound"),
    [(1, 2, 5, False), (1, 2, 4, True), (2, 3, 1, False), (2, 3, 3, True), (3, 4, 2, True), (3, 2, 1, True)],
)
def test_rounds_of_alignment_without_a_z_are_refused(
    local_steps: int, upload_every: int, align_every: int, sound: bool
) -> None:
    settings = {"local_steps": local_steps, "upload_every": upload_every, "align_every": align_every}
    if sound:
        algorithm = FSLSAGE(**settings)  # type: ignore[arg-type]
        rounds = [r for r in range(40) if any(algorithm.replied(r, step) for step in range(local_steps))]
        assert rounds == [*range(0, 40, align_every)]
        return
    with pytest.raises(ValueError, match=f"local_steps={local_steps} and upload_every={upload_every} .*align_every"):
        FSLSAGE(**settings)  # type: ignore[arg-type]
