"""The protocol itself: the sum is exact whoever drops out, and nothing but the sum can be had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from hosfl_client.bfloat16 import Array
from hosfl_client.refusals import EndpointError, TermsError
from hosfl_client.secure import extra
from hosfl_client.secure.fixed_point import FRACTION, LARGEST, MOST_CLIENTS, RangeError, decode_mean, encode
from hosfl_client.secure.masks import combine, pair_mask, private_key, self_mask
from hosfl_client.secure.participants import Participants
from hosfl_client.secure.summation import MaskedSum, UnmaskError, threshold_of
from hosfl_client.wire import ProjectedGradients, SecurePeers, SecureShares, UnmaskRequest
from hosfl_lightning.aggregation import weighted_mean, weights
from tests.secure.sums import ITSELF, Sum, answers_of

CLIENTS = (0, 3, 4, 7, 9, 12)


def plain(answers: dict[int, ProjectedGradients], clients: Sequence[int]) -> Array:
    encoded = [encode(answers[k].coefficients, answers[k].num_terms) for k in clients]
    return np.add.reduce(np.stack(encoded))


@pytest.mark.parametrize(
    "lost",
    [((), (), ()), ((3,), (), ()), ((), (0,), ()), ((), (12, 7), ()), ((4,), (9,), ()), ((), (), (0, 4))],
    ids=str,
)  # fmt: skip
def test_the_sum_is_exact_whoever_drops_out(lost: tuple[tuple[int, ...], ...]) -> None:
    """Before its shares, before its masked answer, and before it reveals any."""
    answers = answers_of(CLIENTS, 33)
    one = Sum(answers)
    total = one.run(*lost)
    assert one.total.survivors == [k for k in CLIENTS if k not in (*lost[0], *lost[1])]
    assert np.array_equal(total, plain(answers, one.total.survivors))


@pytest.mark.parametrize("tensor", [ITSELF, torch.from_numpy], ids=["numpy", "torch"])
def test_the_mean_is_the_weighted_mean_to_fixed_point(tensor: Callable[[Array], Any]) -> None:
    answers = answers_of(CLIENTS, 500)
    held = {k: ProjectedGradients(0, k, {}, tensor(a.coefficients), a.num_terms) for k, a in answers.items()}
    num_terms = [answer.num_terms for answer in answers.values()]
    mean = decode_mean(Sum(held, clients=Participants(tensor)).run(), sum(num_terms))
    wanted = weighted_mean(torch.from_numpy(np.stack([a.coefficients for a in answers.values()])), weights(num_terms))
    bound = len(CLIENTS) / sum(num_terms) * 2.0 ** -(FRACTION + 1)
    assert mean.dtype == np.float32
    assert np.abs(mean.astype(float) - wanted.double().numpy()).max() <= bound + 2.0**-23 * np.abs(mean).max()
    assert bound <= 2.0**-25


def test_fixed_point_rounds_to_nearest_and_never_wraps_around() -> None:
    exact = np.array([0.0, 1.5, -1.5, 2.0**-24, -(2.0**-24), 2.0**-26, 3 * 2.0**-25], np.float32)
    assert encode(exact, 1).view(np.int64).tolist() == [0, 3 << 23, -(3 << 23), 1, -1, 0, 2]
    largest = np.nextafter(np.float32(LARGEST), np.float32(0))
    for sign in (1, -1):
        total = encode(np.array([sign * largest]), 1) * np.uint64(MOST_CLIENTS)
        assert decode_mean(total, MOST_CLIENTS) == sign * largest


@pytest.mark.parametrize(("value", "terms"), [(np.nan, 0), (np.inf, 0), (-np.inf, 3), (2.0**29, 1), (-(2.0**20), 512)])
def test_what_fixed_point_does_not_hold_is_refused(value: float, terms: int) -> None:
    with pytest.raises(RangeError, match="coefficient 1 times its"):
        encode(np.array([0, value], np.float32), terms)
    message = Participants(ITSELF).keep(ProjectedGradients(0, 2, {}, np.array([0, value], np.float32), terms))
    assert "coefficient 1" in message.reason and not message.keys.any()


# ---- what the server has of one client


def bits(masked: Array) -> Array:
    return np.unpackbits(masked).reshape(-1, 64)


def test_masked_answers_look_uniform_and_differ_between_rounds() -> None:
    zeros = {k: ProjectedGradients(0, k, {}, np.zeros(2048, np.float32), 5) for k in CLIENTS}
    seen = []
    for _ in range(2):
        one = Sum(zeros)
        assert not one.run().any()
        seen += [*one.masked.values()]
    for masked in seen:  # 2048 coins for each of the 64 bits: six standard deviations
        assert np.abs(bits(masked).mean(0) - 0.5).max() < 6 * 0.5 / np.sqrt(2048)
    for i, first in enumerate(seen):
        for other in seen[:i]:
            assert abs((bits(first) ^ bits(other)).mean() - 0.5) < 6 * 0.5 / np.sqrt(64 * 2048)


def test_one_answer_stays_masked_by_either_secret_alone() -> None:
    """What the shares open is one of a client's two layers, and the other one is on it still."""
    answers = answers_of(CLIENTS, 64)
    one = Sum(answers)
    one.keys()
    one.share()
    one.mask(lost=(4,))
    revealed = one.reveal()

    def secret(client: int) -> bytes:
        row, givers = one.peers.index(client), [*revealed][: one.threshold]
        return combine([(one.peers.index(k), revealed[k][row].tobytes()) for k in givers])

    x, y = encode(answers[3].coefficients, answers[3].num_terms), one.masked[3].view("<u8")
    known = private_key(secret(4))  # whose masks with client 3 the server can compute
    pair = pair_mask(4, known, 3, one.public[3][32:].tobytes(), 64)
    left = y - self_mask(secret(3), 64) + pair
    assert (np.abs(x.view(np.int64)) < 2**40).all()
    assert np.median(np.abs((left - x).view(np.int64))) > 2**60, "masks with the other survivors are on it"
    mine = one.clients.held[3]._masking  # what the server would learn of client 3, were it taken for a drop-out
    pairs = [pair_mask(3, mine, j, one.public[j][32:].tobytes(), 64) for j in CLIENTS if j != 3]
    left = y - np.add.reduce(np.stack(pairs))
    assert np.median(np.abs((left - x).view(np.int64))) > 2**60, "its own mask is on it"
    assert np.array_equal(left - self_mask(secret(3), 64), x)


def test_the_servers_object_holds_a_sum_and_opens_no_single_answer() -> None:
    answers = answers_of(CLIENTS, 8)
    one = Sum(answers)
    one.run()
    assert {name for name in dir(MaskedSum) if name[0] != "_"} == {"add", "open"}
    held = [value for value in vars(one.total).values() if isinstance(value, np.ndarray)]
    assert [array.shape for array in held] == [(8,)], "one array, whoever was added"
    assert np.array_equal(held[0], np.add.reduce([masked.view("<u8") for masked in one.masked.values()]))


@pytest.mark.parametrize(("survivors", "givers"), [(3, 4), (2, 6), (6, 3)])
def test_too_few_open_no_sum(survivors: int, givers: int) -> None:
    one = Sum(answers_of(CLIENTS, 4))
    one.keys()
    one.share()
    one.mask()
    revealed = one.reveal()
    total = MaskedSum({k: row.tobytes() for k, row in one.public.items()}, CLIENTS, one.threshold, 4)
    for k in CLIENTS[:survivors]:
        total.add(k, one.masked[k])
    with pytest.raises(UnmaskError, match=f"{survivors} answers and {givers} shares of each secret: it takes 4"):
        total.open(dict([*revealed.items()][:givers]))


def test_shares_that_do_not_give_the_key_of_a_drop_out_open_nothing() -> None:
    one = Sum(answers_of(CLIENTS, 4))
    one.keys()
    one.share()
    one.mask(lost=(7,))
    revealed = one.reveal()
    revealed[0] = revealed[0].copy()
    revealed[0][one.peers.index(7), 0] ^= 1
    with pytest.raises(UnmaskError, match="client 7's key"):
        one.total.open(revealed)
    with pytest.raises(UnmaskError, match="has 24 bytes, the round has 32"):
        one.total.add(7, np.zeros(24, np.uint8))


@pytest.mark.parametrize(
    ("fraction", "clients", "wanted"), [(2 / 3, 3, 2), (2 / 3, 64, 43), (0.5 + 1e-12, 4, 3), (0.6, 5, 3)]
)  # fmt: skip
def test_the_threshold_is_the_share_and_more_than_half(fraction: float, clients: int, wanted: int) -> None:
    assert threshold_of(fraction, clients) == wanted > clients / 2


# ---- what a client refuses


def test_shares_are_revealed_once_so_never_both_of_one_peer() -> None:
    one = Sum(answers_of(CLIENTS, 4))
    one.run()
    without = [k for k in CLIENTS if k != 3]
    for survivors in (without, one.total.survivors):
        with pytest.raises(EndpointError, match=r"client 0 takes no part .* is asked to reveal, and has"):
            one.clients.respond(UnmaskRequest(0, 0, survivors))


def test_a_client_gives_one_kind_of_share_a_peer() -> None:
    """Of who answered the self-mask's, of who did not the key's: what was sealed for it, half of each."""
    one = Sum(answers_of(CLIENTS, 4))
    one.keys()
    one.share()
    one.mask(lost=(7,))
    pairs = dict(one.clients.held[0]._shares)
    rows = dict(zip(CLIENTS, one.reveal()[0]))
    for j, pair in pairs.items():
        assert rows[j].tobytes() == (pair[16:] if j == 7 else pair[:16])
    assert not hasattr(one.clients.held[0], "_shares")


@pytest.mark.parametrize(
    ("survivors", "words"),
    [([0, 3, 4], "3 clients have answered, and it must be 4"),
     ([3, 4, 7, 9], "or not of its own"),
     ([0, 3, 4, 7, 8], "that have not shared"),
     ([0, 3, 3, 4, 7], "that have not shared")],
    ids=str,
)  # fmt: skip
def test_survivors_that_are_too_few_or_others_are_refused(survivors: list[int], words: str) -> None:
    one = Sum(answers_of(CLIENTS, 4))
    one.keys()
    one.share()
    one.mask()
    with pytest.raises(EndpointError, match=words):
        one.clients.respond(UnmaskRequest(0, 0, survivors))
    with pytest.raises(EndpointError, match="is asked to reveal, and has"):  # nor a better list after that
        one.clients.respond(UnmaskRequest(0, 0, [*CLIENTS]))


def test_two_survivors_are_too_few_whatever_the_threshold() -> None:
    one = Sum(answers_of((0, 1, 2), 4))
    one.keys()
    one.share()
    assert one.threshold == 2
    one.mask(lost=(2,))
    with pytest.raises(EndpointError, match="2 clients have answered, and it must be 3"):
        one.reveal()


def peers(**changes: Any) -> Callable[[Sum], SecurePeers]:
    return lambda one: SecurePeers(**{**vars(one.request(0)), **changes})


def other_key(one: Sum) -> SecurePeers:
    keys = np.stack([*one.public.values()])
    keys[0, 40] ^= 1
    return SecurePeers(0, 0, one.peers, keys, one.threshold)


@pytest.mark.parametrize(
    ("request_", "words"),
    [(peers(threshold=3), "3 shares of 6 are to open a secret, and it must be more than half"),
     (peers(threshold=7), "7 shares of 6"),
     (lambda one: SecurePeers(0, 0, [0, 3], np.stack([one.public[0], one.public[3]]), 2), "2 clients take part"),
     (peers(peers=[3, 0, 4, 7, 9, 12]), "in ascending order"),
     (peers(peers=[1, 3, 4, 7, 9, 12]), "no place for its own"),
     (other_key, "another one in its name")],
)  # fmt: skip
def test_a_list_of_peers_that_would_not_keep_its_answer_is_refused(
    request_: Callable[[Sum], SecurePeers], words: str
) -> None:
    one = Sum(answers_of(CLIENTS, 4))
    one.keys()
    with pytest.raises(EndpointError, match=words):
        one.clients.respond(request_(one))


def test_shares_that_were_changed_or_handed_to_another_do_not_open() -> None:
    for spoil in ("changed", "another's"):
        one = Sum(answers_of(CLIENTS, 4))
        one.keys()
        one.share()
        mine = one.handed(0)
        rows = np.array(mine.shares) if spoil == "changed" else np.asarray(one.handed(3).shares)
        rows[0, 5] ^= spoil == "changed"
        with pytest.raises(EndpointError, match="the shares that client 3 sealed were changed on the way"):
            one.clients.respond(SecureShares(0, 0, mine.peers, rows))


def test_steps_come_in_their_order_and_after_an_answer() -> None:
    one = Sum(answers_of(CLIENTS, 4))
    one.keys()
    with pytest.raises(EndpointError, match="is asked to reveal, and to share is next"):
        one.clients.respond(UnmaskRequest(0, 0, [*CLIENTS]))
    one.clients.forget()
    with pytest.raises(EndpointError, match="client 3 is sent a secure_peers, and holds no answer"):
        one.clients.respond(one.request(3))


def test_without_a_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda module: None if module == "Crypto" else True)
    with pytest.raises(TermsError, match=r"needs pycryptodome; install the extra secure: pip install 'hosfl-client\["):
        extra.participants(ITSELF)
