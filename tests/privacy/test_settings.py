"""What may be set, and what is refused by name."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from hosfl_lightning import HOSFL
from hosfl_lightning.aggregation import Median, NormClippedMean, TrimmedMean
from hosfl_lightning.algorithms import HOSL, Algorithm, FedAvg, Frozen, MixedHOSFL, SplitFedSGD
from hosfl_lightning.privacy import Privacy, TokenNoise
from hosfl_lightning.run.privacy import check_method, notice
from hosfl_lightning.wire import Codecs

NOISE = Privacy(clip=1.0, noise_multiplier=2.0)
AT_THE_SERVER: Any = SimpleNamespace(labels="server")
TOKENS = Privacy(smashed_data=TokenNoise(2.0, 0.5))


@pytest.mark.parametrize(("given", "reason"), [
    ({"noise_multiplier": 1.0}, "trainer.privacy.noise_multiplier without trainer.privacy.clip"),
    ({"epsilon": 1.0}, "trainer.privacy.epsilon without trainer.privacy.clip"),
    ({"clip": 1.0}, "needs noise_multiplier or epsilon, one of the two"),
    ({"clip": 1.0, "noise_multiplier": 1.0, "epsilon": 1.0}, "one of the two"),
    ({"clip": 0.0, "epsilon": 1.0}, "trainer.privacy.clip must be > 0"),
    ({"clip": 1.0, "epsilon": math.inf}, "trainer.privacy.epsilon must be > 0 and finite"),
    ({"clip": 1.0, "epsilon": 1.0, "delta": 0.0}, "trainer.privacy.delta must be between 0 and 1"),
    ({"clip": 1.0, "epsilon": 1.0, "level": "token"}, "must be example or client"),
    ({}, "nothing is noised"),
])  # fmt: skip
def test_settings_that_say_nothing_are_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Privacy(**given)


@pytest.mark.parametrize("values", [(0.0, 1.0), (1.0, -1.0)])
def test_tokens_need_a_clip_and_noise(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"privacy.smashed_data\.(\w+) or multiplier\.\1 must be > 0"):
        TokenNoise(*values)


def test_delta_may_not_lose_an_example_or_a_client() -> None:
    with pytest.raises(ValueError, match=r"above 1/200 of the 200 examples of the smallest client.*below 0.005"):
        Privacy(clip=1.0, epsilon=1.0, delta=0.01).check_delta([300, 200], 1000)
    with pytest.raises(ValueError, match="above 1/1000 of the 1000 clients"):
        Privacy("client", 1.0, 1.0, delta=0.01).check_delta([300, 200], 1000)
    Privacy(clip=1.0, epsilon=1.0, delta=0.01).check_delta(None, 1000)  # each client looks at its own
    TOKENS.check_delta([1], 1)


@pytest.mark.parametrize(("algorithm", "privacy", "codec", "reason"), [
    (HOSFL(aggregation=Median()), NOISE, Codecs(), "Median is no mean"),
    (HOSFL(aggregation=TrimmedMean()), NOISE, Codecs(), "TrimmedMean is no mean"),
    (HOSFL(aggregation=NormClippedMean()), NOISE, Codecs(), "NormClippedMean is no mean"),
    (HOSFL(personal=True), NOISE, Codecs(), "personal a client moves its own part"),
    (HOSFL(), NOISE, Codecs("fp16"), "fp16 scales a message"),
    (HOSFL(), NOISE, Codecs("fp32", "fp16"), "fp16 scales a message"),
    (Frozen(), NOISE, Codecs(), "the clients of Frozen send no coefficients"),
    (FedAvg(), TOKENS, Codecs(), "FedAvg send more than smashed data"),
    (HOSL(), NOISE, Codecs(), "HOSL send more than smashed data"),
    (MixedHOSFL.__new__(MixedHOSFL), NOISE, Codecs(), "MixedHOSFL send more than smashed data"),
])  # fmt: skip
def test_what_cannot_be_private_is_refused_by_name(
    algorithm: Algorithm, privacy: Privacy, codec: Codecs, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        check_method(privacy, algorithm, AT_THE_SERVER, codec)


@pytest.mark.parametrize(("algorithm", "privacy", "codec"), [
    (HOSFL(), NOISE, Codecs("int8", "int4")),
    (SplitFedSGD(), Privacy("client", 1.0, 2.0), Codecs("fp16", "fp16", "int8")),
    (HOSFL(aggregation=Median()), TOKENS, Codecs("fp16")),
    (Frozen(), TOKENS, Codecs()),
])  # fmt: skip
def test_what_can_be_is_not(algorithm: Algorithm, privacy: Privacy, codec: Codecs) -> None:
    check_method(privacy, algorithm, AT_THE_SERVER, codec)


def test_epsilon_becomes_the_noise_that_spends_it() -> None:
    for level, distance in (("example", 1), ("client", 2)):
        given = Privacy(level, clip=0.5, epsilon=3.0, delta=1e-4)  # type: ignore[arg-type]
        found = given.resolved(30)
        assert found.spent(30) == pytest.approx(3.0, rel=1e-6) and found.spent(15) < 2.5
        assert found.noise_multiplier == pytest.approx(distance * Privacy(clip=1, epsilon=3.0, delta=1e-4).resolved(
            30).noise_multiplier)  # type: ignore[operator]  # fmt: skip
    assert NOISE.resolved(30) is NOISE


def test_a_token_may_be_exchanged_for_any_other() -> None:
    """2 C_z apart, so that the noise is half of its multiplier."""
    assert TokenNoise(3.0, 4.0).epsilon(1e-5) == pytest.approx(Privacy(clip=1, noise_multiplier=2.0).spent(1))


def test_a_line_says_what_is_hidden_and_what_is_not() -> None:
    both = Privacy(clip=1.0, noise_multiplier=2.0, smashed_data=TokenNoise(1.0, 1.0))
    noise = notice(NOISE, "server", True)
    assert "smashed data and labels travel as they are" in noise and "run's seed" in noise
    told = notice(both, "server", False)
    assert "; labels travel as they are." in told and "each token's" in told
    assert notice(TOKENS, "server", False).startswith("Noise hides each token's smashed data;")
    assert "; smashed data and λ₂, which tells them travel as they are." in notice(NOISE, "client", False)
    everything = Privacy(smashed_data=TokenNoise(1.0, 1.0), multiplier=TokenNoise(1.0, 1.0))
    assert notice(everything, "client", False) == "Noise hides each token's smashed data and each token's λ₂."


def test_where_the_labels_stay() -> None:
    """λ₂ is noised where there is one; what else would leave bare is refused."""
    frozen, trained = (SimpleNamespace(labels="client", client_head=SimpleNamespace(trained=t)) for t in ({}, {"w": 1}))
    of_multiplier = Privacy(multiplier=TokenNoise(1.0, 1.0))
    check_method(of_multiplier, HOSFL(), frozen, Codecs())  # type: ignore[arg-type]
    check_method(NOISE, HOSFL(report_loss=False), frozen, Codecs())  # type: ignore[arg-type]
    refused = [(of_multiplier, AT_THE_SERVER, "set model.init_args.labels: client"),
               (NOISE, frozen, "report_loss: false"), (NOISE, trained, "freeze the head")]  # fmt: skip
    for privacy, model, said in refused:
        with pytest.raises(ValueError, match=said):
            check_method(privacy, HOSFL(), model, Codecs())  # type: ignore[arg-type]
