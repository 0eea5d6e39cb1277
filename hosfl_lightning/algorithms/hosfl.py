"""HO-SFL: the server backpropagates, the clients do not, scalars are aggregated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from hosfl_lightning.aggregation import MEAN
from hosfl_lightning.algorithms.personal_round import PersonalRound
from hosfl_lightning.algorithms.shared_scalars import SharedScalars
from hosfl_lightning.clients.batched_probes import Size as ProbeBatchSize
from hosfl_lightning.clients.batched_probes import check_size
from hosfl_lightning.clients.head import of_half
from hosfl_lightning.clients.local_gradient import Taps
from hosfl_lightning.models import SplitModule
from hosfl_lightning.optim import Basis, ClientDirections, Compression, Estimator, UpdateRule
from hosfl_lightning.split.personal import PersonalPart
from hosfl_lightning.split.side import of_side

Directions = Literal["shared", "client"]


class HOSFL(SharedScalars, PersonalRound):
    r"""Hybrid-order split federated learning: scalars up, scalars down, whatever the model's size.

    ::

        server   θ_s ← rule(Σ_k w_k ∂ℓ_k/∂θ_s),  λ_k = ∂ℓ_k/∂z_k
        client   v_kp = (1/μ) ⟨λ_k, f_c(x_k; θ_c + μ u_p) − z_k⟩,  p = 1..P
        all      ĝ = (1/P) Σ_p (Σ_k w_k v_kp) u_p,  θ_c ← rule(θ_c, ĝ)

    With a side adapter (``model.init_args.side``) and ``estimator: local`` the client knows its gradient ``g_k``, at
    two forwards, and ``v_kp = ⟨g_k, u_p⟩``, or what ``compression`` says, is what travels of it.

    Args:
        probes: ``P``, directions a round; the client runs ``P + 1`` forwards (``2P + 1`` when central).
        mu: ``μ``, smoothing length.
        estimator: ``forward`` (the paper's), ``central``, ``jvp`` (dual numbers: exact along each direction, with
            two of each activation), ``local`` (the side adapter's exact gradient), or an
            `hosfl_lightning.optim.Estimator` of your own by its class path.
        distribution: Of the directions: ``rademacher`` or ``gauss16``.
        first_order_optimizer: Rule of the first-order control, tuned on its own; None: the client's.
        compression: What travels of a gradient that ``estimator: local`` knows: ``Uncompressed``, ``RandomProjections``
            or ``RandomSubset``; None: projections on the round's ``P`` directions, which serve LoRA beside it too.
        taps: Of a client with ``estimator: local``, as in `LocalGradientClient`: ``recompute`` or ``keep``.
        personal: As in `PersonalRound`: true, or a word for a part, stays with its client, moved by its own ``v_kp``.
        probe_batch: Probes that a client evaluates in one forward, ``forward`` and ``central`` ones: ``auto``, by the
            shapes as many as keep it within a plain forward's peak, z and an eighth more, or a number, whatever the
            memory; 1: one by one. To the same coefficients, up to rounding.
        directions: ``shared`` by all clients of a round (the paper's), or each ``client``'s own: as many forwards and
            scalars up, ``K · P`` scalars down, and clients with like gradients see ``K`` times as much of the space.

    Like every method it also takes ``client_optimizer``, the update rule on θ_c, ``client_scheduler``, which the first
    order control has too, and ``aggregation``: ``WeightedMean``, ``Median``, ``TrimmedMean`` or ``NormClippedMean``.

    Raises:
        ValueError: For a setting out of range, or compression of what is not known.

    Warns:
        UserWarning: At setup, when ``P`` projections are less than 1 % of the values of a known gradient: the cosine
            of ``ĝ`` with it is about ``√(P/d)``, under 0.1. A ``compression`` has chosen its number, and is not asked.

    Reference: HO-SFL, arXiv 2603.14773, algorithm 1.
    """

    estimators = ("forward", "central", "jvp", "local")
    tells = frozenset({"multipliers", "answers", "update"})

    def __init__(
        self,
        probes: int = 2,
        mu: float = 1e-3,
        estimator: Estimator | str = "forward",
        distribution: str = "rademacher",
        *,
        first_order_optimizer: UpdateRule | None = None,
        compression: Compression | None = None,
        taps: Taps = "recompute",
        personal: bool | PersonalPart = False,
        probe_batch: ProbeBatchSize = "auto",
        directions: Directions = "shared",
        **kwargs: Any,
    ) -> None:
        given: Any = {"estimator": estimator, "distribution": distribution, "personal": personal}
        super().__init__(probes=probes, mu=mu, **given, **kwargs)
        self.first_order_optimizer, self.compression, self.taps = first_order_optimizer, compression, taps
        if taps not in get_args(Taps):
            raise ValueError(f"taps must be one of {', '.join(get_args(Taps))}, got {taps!r}")
        if compression is not None and estimator != "local":
            raise ValueError(f"compression={type(compression).__name__} is for a gradient that the client knows, with "
                             f"estimator: local; estimator: {estimator} measures scalars already")  # fmt: skip
        if compression is not None and isinstance(personal, str):
            raise ValueError(f"compression={type(compression).__name__} is of the whole gradient, and with "
                             f"personal={personal!r} a part of it stays at the client; set compression: null, or "
                             "personal: true")  # fmt: skip
        self.directions, self.probe_batch = directions, probe_batch
        self._check_directions()
        check_size(probe_batch)
        if probe_batch not in (1, "auto") and estimator not in ("forward", "central", "local"):
            raise ValueError(f"probe_batch={probe_batch}: where an estimator evaluates must be known beforehand; leave "
                             "it out, or set estimator: forward or central")  # fmt: skip

    def _check_directions(self) -> None:
        where = f"trainer.algorithm.init_args.directions={self.directions!r}"
        if self.directions not in get_args(Directions):
            raise ValueError(f"{where}: one of {', '.join(get_args(Directions))}")
        if self.directions == "shared":
            return
        self.sums = False
        if self.aggregation != MEAN:
            raise ValueError(f"{where}: no two coefficients are of one direction, so {type(self.aggregation).__name__} "
                             "has nothing to compare; leave aggregation out, or set directions: shared")  # fmt: skip
        for name in ("compression", "personal"):
            if getattr(self, name):
                raise ValueError(f"{where} is for an update that is summed of probes' scalars; leave {name} out, or "
                                 "set directions: shared")  # fmt: skip

    @override
    def check(self, module: SplitModule) -> None:
        """An exact gradient needs a side adapter, and one basis must serve all that is trained."""
        if self.estimator == "local" and (module.side is None or not module.side.client):
            raise ValueError(
                "estimator: local is the exact gradient of a side adapter, the one part of a client whose path to the "
                "smashed data is direct; set model.init_args.side, or estimator: central"
            )
        super().check(module)
        if self.estimator != "local":
            return
        half = of_half(module)
        beside = [name for name in half if not of_side(name)]
        if beside and self.compression is not None:
            raise ValueError(
                f"estimator: local knows no gradient of {beside[0]}, which is below the backbone, so that "
                f"compression={type(self.compression).__name__} could not carry it; set lora.client: null, or "
                "compression: null, which probes it along the directions that carry the rest"
            )
        if self.compression is not None:  # refuses more coefficients than there are values
            self.compression.basis(0, 0, [p.numel() for p in half.values()])
        else:
            self._compare_probes(sum(p.numel() for name, p in half.items() if of_side(name)))

    def _compare_probes(self, known: int) -> None:
        if self.probes < known / 100:
            rank_zero_warn(
                f"probes={self.probes}: so many numbers travel of the {known} that the client knows of its gradient, "
                f"and the cosine of the update with it is about {math.sqrt(self.probes / known):.2g}; set compression: "
                "Uncompressed (with lora.client: null), or more probes"
            )

    @override
    def client_settings(self) -> dict[str, Any]:
        kind = "local" if self.estimator == "local" else "forward_only"
        taps = {"taps": self.taps} if kind == "local" else {}
        return {"kind": kind, **super().client_settings(), **self._together, **taps, **self.settings_of_personal}

    @property
    def _together(self) -> dict[str, Any]:
        """Of the settings, which change the last bits; runs of before went one by one, and did not say it."""
        return {"probe_batch": self.probe_batch} if self.probe_batch != 1 else {}

    @override
    def settings(self) -> dict[str, Any]:
        """The compression's as well, and the taps, which change the last bits."""
        chosen = {} if self.compression is None else {
            "compression": type(self.compression).__name__,
            **{f"compression.{k}": v for k, v in asdict(self.compression).items()},
        }  # fmt: skip
        taps = {"taps": self.taps} if self.estimator == "local" else {}
        own = {"directions": self.directions} if self.directions != "shared" else {}
        return {**super().settings(), **self._together, **taps, **chosen, **own}

    @override
    def basis(self, seed: int, round: int, sizes: Sequence[int]) -> Basis:
        """Of the round: directions, or the compression's."""
        if self.directions == "client":
            return ClientDirections(seed, round, self.probes, [], self.distribution)
        if self.compression is None:
            return super().basis(seed, round, sizes)
        return self.compression.basis(seed, round, sizes)
