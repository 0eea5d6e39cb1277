"""What may be set of the privacy of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from hosfl_lightning.privacy.accountant import epsilon_of, noise_for

Level = Literal["example", "client"]
#: Whose part of a client's answers is hidden: one example's, or all of it. Sensitivities in units of the clip: an
#: example is exchanged for one that adds nothing, an answer for any other.
SENSITIVITY = {"example": 1.0, "client": 2.0}


@dataclass(frozen=True)
class TokenNoise:
    """``z̃_t = z_t min(1, C_z/‖z_t‖₂) + σ_z C_z n_t``: each token's row of a message, before its codec.

    Args:
        clip: ``C_z``, longest a token may be.
        noise_multiplier: ``σ_z``.

    Raises:
        ValueError: A setting out of range.
    """

    clip: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        _check_positive("smashed_data.clip or multiplier.clip", self.clip)
        _check_positive("smashed_data.noise_multiplier or multiplier.noise_multiplier", self.noise_multiplier)

    def epsilon(self, delta: float) -> float:
        """Of one release of one token, whatever other token might stand there."""
        return epsilon_of(self.noise_multiplier / 2, delta)


@dataclass(frozen=True)
class Privacy:
    """Clipping and Gaussian noise at the client, on its answers to λ and on its smashed data.

    Attributes:
        level: ``example``: each example's vector of coefficients is clipped, their sum is noised. ``client``: the whole
            answer is (local differential privacy).
        clip: ``C``, longest an example's vector, or an answer, may be; null: answers leave as they are.
        noise_multiplier: ``σ``; the noise of the sum has the standard deviation ``σ C``.
        epsilon: In the place of ``noise_multiplier``: what all rounds together may cost; σ is found for
            ``trainer.max_rounds``.
        delta: ``δ``, at most 1/N, of N examples of the smallest client or of N clients.
        smashed_data: Of z; null: it leaves as it is.
        multiplier: Of λ₂ where the labels stay at the client (``model.init_args.labels``), of each token's own loss, so
            that a clip does not depend on the batch; null: it leaves as it is, and whoever knows the head reads labels.

    Raises:
        ValueError: Noise without clipping, or another setting that says nothing.
    """

    level: Level = "example"
    clip: float | None = None
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    smashed_data: TokenNoise | None = None
    multiplier: TokenNoise | None = None

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ValueError(f"trainer.privacy.level must be example or client, got {self.level!r}")
        if not 0 < self.delta < 1:
            raise ValueError(f"trainer.privacy.delta must be between 0 and 1, got {self.delta}")
        for name in ("clip", "noise_multiplier", "epsilon"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        given = [name for name in ("noise_multiplier", "epsilon") if getattr(self, name) is not None]
        if given and self.clip is None:
            raise ValueError(
                f"trainer.privacy.{given[0]} without trainer.privacy.clip: an answer of any length cannot be hidden; "
                "set clip, the longest that a vector may be"
            )
        if self.clip is not None and len(given) != 1:
            raise ValueError(
                "trainer.privacy.clip needs noise_multiplier or epsilon, one of the two; clipping alone is "
                "aggregation: NormClippedMean"
            )
        if self.clip is None and self.smashed_data is None and self.multiplier is None:
            raise ValueError(
                "trainer.privacy: nothing is noised; set clip and noise_multiplier, smashed_data, multiplier, or null"
            )

    @property
    def of_answers(self) -> bool:
        """Whether a client's answers are noised."""
        return self.clip is not None

    def check_delta(self, examples: Sequence[int] | None, clients: int) -> None:
        """Refuse a δ that allows to publish somebody whole.

        Args:
            examples: Of each client that holds any; None: they are elsewhere, and each client looks at its own.
            clients: Of the run.

        Raises:
            ValueError: It does.
        """
        if not self.of_answers:
            return
        by_example = self.level == "example"
        count, what = (min(examples or [1]), "examples of the smallest client") if by_example else (clients, "clients")
        if self.delta > 1 / count:
            raise ValueError(
                f"trainer.privacy.delta is {self.delta:g}, above 1/{count} of the {count} {what}: it would allow to "
                f"publish one of them as it is; set it below {1 / count:.2g}"
            )

    def resolved(self, releases: int) -> Privacy:
        """With σ in the place of ε.

        Args:
            releases: In how many answers of the run an example has a part at most, or a client.
        """
        if self.epsilon is None:
            return self
        noise = noise_for(self.epsilon, releases, self.delta) * SENSITIVITY[self.level]
        return replace(self, noise_multiplier=noise, epsilon=None)

    def spent(self, releases: int) -> float:
        """ε after so many answers in which an example has a part, or a client."""
        assert self.noise_multiplier is not None
        return epsilon_of(self.noise_multiplier / SENSITIVITY[self.level], self.delta, releases)

    def terms(self) -> dict[str, Any]:
        """As `hosfl_client.privacy.Mechanism` takes it."""
        token, multiplier = self.smashed_data, self.multiplier
        return {
            "level": self.level if self.of_answers else None,
            "clip": self.clip,
            "noise_multiplier": self.noise_multiplier,
            "delta": self.delta,
            "token_clip": token.clip if token else None,
            "token_noise_multiplier": token.noise_multiplier if token else None,
            "multiplier_clip": multiplier.clip if multiplier else None,
            "multiplier_noise_multiplier": multiplier.noise_multiplier if multiplier else None,
        }

    def of_control(self) -> Privacy | None:
        """Of a control: z and λ₂ leave as in the run: what the server can make of them is the comparison's ground."""
        if self.smashed_data is None and self.multiplier is None:
            return None
        return replace(self, clip=None, noise_multiplier=None, epsilon=None)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"trainer.privacy.{name} must be > 0 and finite, got {value}")
