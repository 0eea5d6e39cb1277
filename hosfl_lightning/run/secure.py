"""What secure aggregation can stand beside: everything that needs no single answer."""

from __future__ import annotations

from typing import Any

from hosfl_client.secure.extra import missing
from hosfl_lightning.aggregation import WeightedMean
from hosfl_lightning.algorithms import Algorithm

#: Clients of a round, at least: of two, each knows the other's answer.
LEAST = 3


def check_secure(settings: Any, algorithm: Algorithm) -> None:
    """Refuse what needs more than the sum.

    Args:
        settings: `hosfl_lightning.run.settings.RunSettings`.
        algorithm: The method.

    Raises:
        ValueError: Names the setting and the fix.
    """
    what = "trainer.secure_aggregation: "
    if not 0.5 < settings.secure_threshold <= 1:
        raise ValueError(f"trainer.secure_threshold is {settings.secure_threshold}; it must be above 0.5, at most 1")
    if (library := missing()) is not None:
        raise ValueError(f"{what}it needs {library}; install the extra secure: pip install 'hosfl_lightning[secure]'")
    if algorithm.personal:
        raise ValueError(f"{what}with personal: {algorithm.personal} a client moves what is its own by its own "
                         "answer, and that is not tried with sums; leave one of the two out")  # fmt: skip
    if not algorithm.sums:
        raise ValueError(f"{what}what the clients of {algorithm.name} send is not summed in one basis; take HOSFL "
                         "with directions: shared, or SplitFedSGD, or leave it out")  # fmt: skip
    if not isinstance(algorithm.aggregation, WeightedMean):
        raise ValueError(f"{what}{type(algorithm.aggregation).__name__} needs every client's own answer, and "
                         "the server sees their sum alone; take WeightedMean, or leave it out")  # fmt: skip
    if settings.codec.gradient != "fp32":
        raise ValueError(f"{what}masked answers travel in fixed point, not in {settings.codec.gradient}; leave "
                         "trainer.codec.gradient out")  # fmt: skip
    if settings.world_size > 1:
        raise ValueError(f"{what}it is for clients in one process or on machines of their own, and trainer.devices or "
                         "trainer.num_nodes asks for several processes; set both to 1")  # fmt: skip


def check_sample(sampled: int) -> None:
    """Refuse sums of too few.

    Raises:
        ValueError: Names the setting and the fix.
    """
    if sampled < LEAST:
        raise ValueError(f"trainer.secure_aggregation: a round has {sampled} client(s), and a sum of fewer than "
                         f"{LEAST} tells single answers; raise trainer.clients_per_round")  # fmt: skip
