"""Whether a run can be private, what its noise is, and what it says of it."""

from __future__ import annotations

from typing import Any

from hosfl_lightning.aggregation import WeightedMean
from hosfl_lightning.algorithms import Algorithm
from hosfl_lightning.callbacks import PrivacyMonitor
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.models import SplitModule
from hosfl_lightning.privacy import Privacy
from hosfl_lightning.wire import Codecs

REMEDY = "take HOSFL or SplitFedSGD, or leave trainer.privacy out"


def check_method(privacy: Privacy, algorithm: Algorithm, model: SplitModule, codecs: Codecs) -> None:
    """Refuse a method whose clients send what is not noised, or whose server does not take the mean.

    Raises:
        ValueError: Names the setting and the fix.
    """
    if algorithm.personal:
        raise ValueError(
            "trainer.privacy: with trainer.algorithm.init_args.personal a client moves its own part by what was "
            "measured, without noise; leave one of the two out"
        )
    if not algorithm.endpoint.noises:
        raise ValueError(
            f"trainer.privacy: the clients of {algorithm.name} send more than smashed data and one vector of "
            f"coefficients a round, and it would leave without noise; {REMEDY}"
        )
    if privacy.multiplier is not None and model.labels != "client":
        raise ValueError(
            "trainer.privacy.multiplier: no client sends a multiplier, since the labels are at the server; set "
            "model.init_args.labels: client, or leave it out"
        )
    if not privacy.of_answers:
        return
    if model.labels == "client" and model.client_head.trained:
        raise ValueError(
            "trainer.privacy.clip: a head that is trained at the client travels as its gradient, which is not noised; "
            "leave clip out, or freeze the head (of a causal LM, model.init_args.lora.head: 0)"
        )
    if model.labels == "client" and getattr(algorithm, "report_loss", False):
        raise ValueError(
            "trainer.privacy.clip: the clients' training loss would leave without noise; set "
            "trainer.algorithm.init_args.report_loss: false"
        )
    if not algorithm.client_trains:
        raise ValueError(f"trainer.privacy.clip: the clients of {algorithm.name} send no coefficients; {REMEDY}")
    if type(algorithm.aggregation) is not WeightedMean:
        raise ValueError(
            f"trainer.privacy: {type(algorithm.aggregation).__name__} is no mean, in which the clients' noise would "
            "average out; leave trainer.algorithm.init_args.aggregation out, trainer.privacy.clip bounds every client"
        )
    if privacy.level == "example" and "fp16" in (codecs.smashed_data, codecs.multiplier):
        raise ValueError(
            "trainer.codec: fp16 scales a message by the largest of its examples, so that one would move the vectors "
            "of all others; take bf16 or int8, or trainer.privacy.level: client"
        )


def resolve(privacy: Privacy | None, data: FederatedDataModule, max_rounds: int, simulated: bool) -> Privacy | None:
    """The run's, with σ in the place of ε, once the data is known.

    Args:
        privacy: As given.
        data: Set up.
        max_rounds: Of the run.
        simulated: Whether the clients' data is here.

    Raises:
        ValueError: δ is too large for it.
    """
    if privacy is None:
        return None
    sizes = [len(data.clients[client]) for client in data.holders] if simulated else None
    privacy.check_delta(sizes, data.num_clients)
    by_example = privacy.level == "example" and simulated
    uses = [data.most_uses(client, max_rounds) for client in data.holders] if by_example else [max_rounds]
    return privacy.resolved(max(uses))


def notice(privacy: Privacy, algorithm: Algorithm, model: SplitModule, simulated: bool) -> str:
    """What is hidden, and what is not; a line."""
    at_server = model.labels == "server"
    what = {"example": "one example's part in a client's answers", "client": "a client's answers"}[privacy.level]
    hidden = [f"{what} (C={privacy.clip:g}, σ={privacy.noise_multiplier:.4g})"] if privacy.of_answers else []
    hidden += ["each token's smashed data"] if privacy.smashed_data else []
    hidden += ["each token's λ₂"] if privacy.multiplier else []
    bare = [] if privacy.smashed_data else ["smashed data"]
    bare += ["answers to λ"] if algorithm.client_trains and not privacy.of_answers else []
    telling = [] if at_server or privacy.multiplier else ["λ₂"]
    telling += ["losses"] if not at_server and getattr(algorithm, "report_loss", False) else []
    telling += ["the gradient of the head"] if not at_server and model.client_head.trained else []
    bare += ["labels"] if at_server else telling
    left = f"; {' and '.join(bare)} travel as they are{', and tell of the labels' if telling else ''}" if bare else ""
    key = "; simulated clients draw it from the run's seed, so whoever knows that can take it away" if simulated else ""
    return f"Noise hides {' and '.join(hidden)}{left}{key}."


def summarize(privacy: Privacy | None, callbacks: list[Any]) -> dict[str, Any]:
    """Of ``summary.json``; nothing where nothing is noised."""
    if privacy is None:
        return {}
    told: dict[str, Any] = {**privacy.terms(), "epsilon": None, "releases": None}
    for monitor in (one for one in callbacks if isinstance(one, PrivacyMonitor)):
        told |= {"epsilon": privacy.spent(monitor.releases), "releases": monitor.releases}
    for name, token in (("token_epsilon", privacy.smashed_data), ("multiplier_epsilon", privacy.multiplier)):
        told[name] = token.epsilon(privacy.delta) if token is not None else None
    return {"privacy": told}
