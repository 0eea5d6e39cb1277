"""Phones that can only run forwards and laptops that backpropagate, in one federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from typing_extensions import override

from hosfl_lightning.aggregation import Median, TrimmedMean, combine
from hosfl_lightning.algorithms.split_round import SplitRound
from hosfl_lightning.clients.mixed_endpoint import MixedEndpoint, basis_of_kind
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.models import SplitModule
from hosfl_lightning.optim import Basis, Dense, Estimator
from hosfl_lightning.optim.estimators import told
from hosfl_lightning.optim.zeroth_order import check_probe_settings
from hosfl_lightning.rng import Domain, permutation
from hosfl_lightning.server import Call, Outcome, Server, TooFewClientsError
from hosfl_lightning.split.side import of_side
from hosfl_lightning.wire import Codecs, CodedGradient, ProjectedGradients, SmashedData, Terms

Kind = Literal["forward_only", "side", "first_order", "frozen"]
#: Which permutation of the generator's deals out the shares: of a round that no run has.
DEALING = (1 << 32) - 1


@dataclass(frozen=True)
class ClientKind:
    """Some of the clients, and what they can do.

    Args:
        kind: ``forward_only``: probes along ``probes`` directions. ``side``: the exact gradient of a side adapter.
            ``first_order``: backprop. ``frozen``: sends z, answers nothing, moves with the others.
        share: Of the clients that no other entry names, drawn under the run's seed.
        clients: Their numbers, in the place of a share.
        probes: ``P`` of a ``forward_only`` kind.

    Raises:
        ValueError: Settings that do not go together.
    """

    kind: Kind
    share: float | None = None
    clients: list[int] | None = None
    probes: int | None = None

    def __post_init__(self) -> None:
        where = f"trainer.algorithm: clients has kind {self.kind!r}"
        if self.kind not in get_args(Kind):
            raise ValueError(f"{where}; it must be one of {', '.join(get_args(Kind))}")
        if (self.share is None) == (self.clients is None):
            raise ValueError(f"{where}, which needs either a share or clients, their numbers")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"{where} with share {self.share}; it must be above 0 and at most 1")
        if self.kind == "forward_only" and self.probes is None:
            object.__setattr__(self, "probes", 2)
        if self.kind != "forward_only" and self.probes is not None:
            raise ValueError(f"{where} with probes={self.probes}, and only forward_only probes; leave it out")


class MixedHOSFL(SplitRound):
    r"""HO-SFL whose clients answer λ each as it can; one update for all, in the dense space of what they share.

    ::

        client k  c_k = (v_kp)_p of P forwards, or g_k = ∇⟨λ_k, f_c(x_k; θ_c)⟩ exactly, or nothing
        all       ĝ = Σ_k w_k g̃_k,  g̃_k = (1/P) Σ_p v_kp u_p or g_k,   w_k = n_k / Σ n over those who answer
                  θ_c ← rule(θ_c, ĝ)

    All clients hold the same θ_c and stay bit-identical, the frozen ones included, whose data teaches the server alone.
    What goes up is what each has: ``P`` scalars, or a dense gradient. What comes down is the dense ``ĝ`` for everybody,
    ``d_c`` values: more than scalars, where some know a gradient. A weak client's estimate has about ``d_c / P`` times
    the variance of a strong one's, and the same weight.

    Args:
        clients: The kinds; their numbers and shares cover every client once.
        mu: ``μ``, smoothing length of those that probe.
        estimator: Of those that probe: ``forward``, ``central``, or an `hosfl_lightning.optim.Estimator` by its class
            path.
        distribution: Of their directions: ``rademacher`` or ``gauss16``.
        checkpointing: Those that backpropagate keep each layer's input instead of its graph and run it twice.

    Raises:
        ValueError: Kinds that do not go together, or not with the model.

    Reference: forward-only clients, HO-SFL, arXiv 2603.14773; the others, SplitFed, arXiv 2004.12088.
    """

    endpoint = MixedEndpoint
    labels_may_stay = False
    sums = False

    def __init__(
        self,
        clients: list[ClientKind],
        *,
        mu: float = 1e-3,
        estimator: Estimator | str = "forward",
        distribution: str = "rademacher",
        checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.clients, self.mu, self.distribution = clients, mu, distribution
        self.checkpointing = checkpointing
        if not any(kind.kind != "frozen" for kind in clients):
            raise ValueError("trainer.algorithm: all clients are frozen; take Frozen, or let some of them train")
        if any(kind.kind == "forward_only" for kind in clients) and isinstance(self.aggregation, Median | TrimmedMean):
            raise ValueError(
                f"trainer.algorithm: {type(self.aggregation).__name__} drops what is far from the others, as a "
                "forward_only client's estimate is from a gradient in every coordinate; take WeightedMean or "
                "NormClippedMean"
            )
        self.estimator = check_probe_settings(1, mu, estimator, distribution)
        for kind in clients:
            if kind.probes is not None:
                check_probe_settings(kind.probes, mu, self.estimator, distribution)

    @override
    def check(self, module: SplitModule) -> None:
        """A side adapter where some know its gradient, and nothing beside it that they do not know."""
        super().check(module)
        if not any(kind.kind == "side" for kind in self.clients):
            return
        if module.side is None or not module.side.client:
            raise ValueError("trainer.algorithm: clients of kind 'side' need a side adapter; set model.init_args.side")
        beside = [name for name in module.client_parameters if not of_side(name)]
        if beside:
            raise ValueError(
                f"trainer.algorithm: clients of kind 'side' know no gradient of {beside[0]}; set lora.client: null"
            )

    @override
    def check_codecs(self, codecs: Codecs, sizes: Sequence[int]) -> None:
        """A few scalars are no gradient that ternary could make smaller."""
        super().check_codecs(codecs, sizes)
        if codecs.gradient == "ternary" and any(kind.probes for kind in self.clients):
            raise ValueError(
                "trainer.codec.gradient: the scalars of forward_only clients are not fewer bytes in ternary, and are "
                "rounded beyond use; take int8, or leave it out"
            )

    @override
    def client_settings(self) -> dict[str, Any]:
        return {
            "kinds": ["local" if one.kind == "side" else one.kind for one in self.ordered],
            "probes_of": [one.probes or 0 for one in self.ordered],
            "probes": max(one.probes or 1 for one in self.ordered),
            "mu": self.mu, **told(self.estimator), "distribution": self.distribution,
            "taps": "recompute", "checkpointing": self.checkpointing,
        }  # fmt: skip

    @property
    def ordered(self) -> list[ClientKind]:
        """The kinds, those first that move the half."""
        return sorted(self.clients, key=lambda one: one.kind == "frozen")

    @override
    def terms(self, module: SplitModule, seed: int, codecs: Codecs, clients: int) -> Terms:
        """Says of each client which kind it is as well."""
        terms = super().terms(module, seed, codecs, clients)
        dealt = deal(self.ordered, clients, seed)
        return replace(terms, settings={**terms.settings, "kind_of": dealt})

    @override
    def setup(self, server: Server) -> None:
        super().setup(server)
        self.client_terms = server.terms.settings

    @override
    def basis(self, seed: int, round: int, sizes: Sequence[int]) -> Basis:
        """The update's: dense, whatever the answers are in."""
        return Dense(sizes)

    @override
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        sizes = [p.numel() for p in server.replica.trained.values()]

        def asked(client: int) -> Basis | None:
            kind = self.client_terms["kind_of"][client]
            return basis_of_kind(self.client_terms, kind, server.seed, call.round, sizes)

        inbox = server.admit(fleet.ask(call.to_each(), SmashedData))
        if not any(asked(client) is not None for client in call.clients):
            raise TooFewClientsError(
                f"all {len(call.clients)} client(s) of the round are frozen, so nobody answers; raise "
                "trainer.clients_per_round, or set trainer.on_too_few: repeat"
            )
        loss, multipliers = server.backward(inbox)
        able = {client: message for client, message in multipliers.items() if asked(client) is not None}
        answers = server.screen(fleet.ask(able, ProjectedGradients, CodedGradient), inbox, asked)
        dense = [self.widened(answer, asked(answer.client), server) for answer in answers]
        update = server.record(combine(dense, server.client_rule, self.aggregation))
        server.step()
        fleet.tell(update, call.online)
        return Outcome(loss, inbox.num_examples)

    def widened(self, answer: ProjectedGradients, basis: Basis | None, server: Server) -> ProjectedGradients:
        """``g̃_k``, whatever it was told in."""
        if basis is None or isinstance(basis, Dense):
            return answer
        trained = [*server.replica.trained.values()]
        pieces = basis.chunks(trained, answer.coefficients.to(trained[0].device))
        flats = [torch.zeros(p.numel()) for p in trained]
        for tensor, piece, values in pieces:
            flats[tensor][piece] = values.cpu()
        described = Dense([len(flat) for flat in flats]).describe()
        return replace(answer, basis=described, coefficients=torch.cat(flats))

    @override
    def settings(self) -> dict[str, Any]:
        """The kinds as well."""
        kinds = {f"clients.{i}.{k}": v for i, one in enumerate(self.clients) for k, v in asdict(one).items()}
        return {**super().settings(), **kinds, "mu": self.mu, **told(self.estimator), "distribution": self.distribution}


def deal(kinds: Sequence[ClientKind], clients: int, seed: int) -> list[int]:
    """Which kind each client is.

    Args:
        kinds: What is dealt out: numbers first, then shares of the clients that are left.
        clients: ``N``.
        seed: Of the run.

    Raises:
        ValueError: A number that is none, or twice; shares that do not cover the others once.
    """
    dealt: dict[int, int] = {}
    for number, kind in enumerate(kinds):
        for client in kind.clients or []:
            if not 0 <= client < clients or client in dealt:
                why = "is named twice" if client in dealt else f"is not in 0..{clients - 1}"
                raise ValueError(f"trainer.algorithm: clients: client {client} {why}")
            dealt[client] = number
    order = permutation(clients, seed, Domain.CLIENT_SAMPLING, round=DEALING).tolist()
    left = [client for client in order if client not in dealt]
    # The decimals as they were written: 0.1 + 0.2 is more than 0.3.
    shares = [(number, Fraction(str(kind.share))) for number, kind in enumerate(kinds) if kind.share is not None]
    total = sum(share for _, share in shares)
    if total != 1 and (left or shares):
        raise ValueError(
            f"trainer.algorithm: clients: the shares add up to {float(total):g}, and {len(left)} client(s) have no "
            "number of theirs; let them add up to 1, or name every client"
        )
    begin = Fraction(0)
    for number, share in shares:
        first, last = round(begin * len(left)), round((begin + share) * len(left))
        dealt |= dict.fromkeys(left[first:last], number)
        begin += share
    return [dealt[client] for client in range(clients)]
