"""What all partitioners promise, what each does to labels and sizes, and what is said and refused."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from hosfl_lightning.data import IID, ByField, ByFile, Dirichlet, Examples, Partitioner, QuantitySkew, Shards
from hosfl_lightning.data.partition import deal, partition_dirichlet, spelled
from hosfl_lightning.data.partition.shares import MOST_REDRAWS, by_shares
from hosfl_lightning.rng import Domain, permutation

N, CLASSES = 240, 6
RANDOM: dict[str, Partitioner] = {
    "iid": IID(),
    "dirichlet": Dirichlet(alpha=0.3),
    "dirichlet, many to move": Dirichlet(alpha=0.01, min_examples_per_client=5),
    "dirichlet, empty ones": Dirichlet(alpha=0.01, min_examples_per_client=0),
    "shards": Shards(shards_per_client=2),
    "one shard": Shards(shards_per_client=1),
    "quantity": QuantitySkew(alpha=0.3),
    "quantity, empty ones": QuantitySkew(alpha=0.01, min_examples_per_client=0),
    "power law": QuantitySkew(power=2.0),
}
BY_NATURE: dict[str, Partitioner] = {"field": ByField("writer"), "file": ByFile()}
ALL = RANDOM | BY_NATURE


def told(n: int = N, clients: int | None = 12, classes: int = CLASSES) -> Examples:
    """Labels in random order, 12 writers, 12 files."""
    labels = random.Random(0).choices(range(classes), k=n)
    return Examples(
        n, "Some", clients, labels, [f"{i * 12 // n}.txt" for i in range(n)], lambda name: [i % 12 for i in range(n)]
    )


def parts(partitioner: Partitioner, seed: int = 0, **settings: Any) -> list[list[int]]:
    return [part.tolist() for part in deal(partitioner, told(**settings), seed)[1]]


def sizes(partitioner: Partitioner, seed: int = 0, **settings: Any) -> list[int]:
    return [len(part) for part in parts(partitioner, seed, **settings)]


def classes_held(partitioner: Partitioner, seed: int = 0, **settings: Any) -> float:
    """Mean number of classes of the clients that hold something."""
    labels = told(**settings).labels
    held = [len({labels[i] for i in part}) for part in parts(partitioner, seed, **settings) if part]
    return sum(held) / len(held)


class TestEvery:
    @pytest.mark.parametrize("seed", [0, 1, 2**63])
    @pytest.mark.parametrize("name", ALL)
    def test_deals_each_example_once_in_ascending_order(self, name: str, seed: int) -> None:
        found = parts(ALL[name], seed)
        assert sorted(index for part in found for index in part) == list(range(N))
        assert all(part == sorted(part) for part in found)
        assert len(found) == 12

    @pytest.mark.parametrize("name", ALL)
    def test_is_a_function_of_the_seed(self, name: str) -> None:
        assert parts(ALL[name], 3) == parts(ALL[name], 3)

    @pytest.mark.parametrize("name", RANDOM)
    def test_differs_under_another_seed(self, name: str) -> None:
        assert parts(RANDOM[name], 3) != parts(RANDOM[name], 4)

    def test_has_an_order_of_its_own(self) -> None:
        """Else the examples of two partitions of one seed would hang together."""
        kinds = (IID(), QuantitySkew(power=0.0), Shards(1), Dirichlet(alpha=1e9))
        found = [deal(one, Examples(40, "Some", 2, [0] * 40), 0)[1][0].tolist() for one in kinds]
        assert [len(part) for part in found] == [20] * 4
        assert len({tuple(part) for part in found}) == 4

    @pytest.mark.parametrize("name", [name for name in RANDOM if "empty" not in name])
    def test_leaves_nobody_without_an_example(self, name: str) -> None:
        assert min(min(sizes(RANDOM[name], seed)) for seed in range(20)) >= 1

    @pytest.mark.parametrize("name", [name for name in RANDOM if "empty" not in name])
    def test_serves_as_many_clients_as_examples_or_says_why_not(self, name: str) -> None:
        partitioner = RANDOM[name]
        if name in ("shards", "dirichlet, many to move"):
            with pytest.raises(ValueError, match=r"need \d+ examples.*; lower it to \d or fewer, or lower num_clients"):
                parts(partitioner, n=12)
        else:
            assert sizes(partitioner, n=12) == [1] * 12

    @pytest.mark.parametrize("name", RANDOM)
    def test_asks_for_the_number_of_clients(self, name: str) -> None:
        kind = type(RANDOM[name]).__name__
        with pytest.raises(
            ValueError, match=f"partitioner: {kind} needs the number of clients: set num_clients of Some"
        ):
            parts(RANDOM[name], clients=None)

    @pytest.mark.parametrize("name", BY_NATURE)
    def test_by_nature_finds_the_clients_and_names_them(self, name: str) -> None:
        names, found = deal(BY_NATURE[name], told(clients=None), 0)
        assert len(found) == 12
        assert sorted(names) == sorted(map(str, range(12)))

    @pytest.mark.parametrize("name", ALL)
    def test_says_what_the_data_lacks(self, name: str) -> None:
        needs = {
            Dirichlet: "the label of each",
            Shards: "the label",
            ByField: "field 'writer'",
            ByFile: "the file of each",
        }
        what = needs.get(type(ALL[name]))
        if what is None:
            assert deal(ALL[name], Examples(N, "Some", 12), 0)
            return
        with pytest.raises(ValueError, match=f"{type(ALL[name]).__name__} needs {what}.*, which Some does not have"):
            deal(ALL[name], Examples(N, "Some", 12), 0)


class TestDirichlet:
    @pytest.mark.parametrize("seed", range(6))
    def test_a_draw_that_gives_everybody_enough_is_as_it_always_was(self, seed: int) -> None:
        labels = list(told().labels)
        order = permutation(N, seed, Domain.DATA_ORDER, round=2).tolist()
        generator = np.random.default_rng(seed)
        expected: list[list[int]] = [[] for _ in range(4)]
        for label in range(CLASSES):
            members = [i for i in order if labels[i] == label]
            ends = np.rint(np.cumsum(generator.dirichlet([1.0] * 4)) * len(members)).astype(int).tolist()
            for part, start, stop in zip(expected, [0, *ends], ends):
                part += members[start:stop]
        assert [part.tolist() for part in partition_dirichlet(labels, 4, 1.0, seed)] == [sorted(p) for p in expected]

    @pytest.mark.parametrize("classes", [2, 10])
    @pytest.mark.parametrize("seed", range(3))
    def test_a_hundred_clients_at_alpha_a_tenth_on_a_thousand_examples(
        self, seed: int, classes: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        setting: dict[str, Any] = {"n": 1000, "clients": 100, "classes": classes}
        found = sizes(Dirichlet(alpha=0.1), seed, **setting)
        assert (sum(found), len(found), min(found)) == (1000, 100, 1)
        line = capsys.readouterr().out
        ways = rf"drawn again {MOST_REDRAWS} time\(s\) and (\d+) example\(s\) moved"
        said = re.fullmatch(rf"Dirichlet: {ways}, so that each of 100 clients holds at least 1\n", line)
        assert said, line
        assert int(said[1]) <= found.count(1)
        assert min(sizes(Dirichlet(alpha=0.1, min_examples_per_client=5), seed, **setting)) == 5
        empty = sizes(Dirichlet(alpha=0.1, min_examples_per_client=0), seed, **setting)
        assert 0 in empty

    def test_moved_examples_leave_the_skew(self) -> None:
        setting: dict[str, Any] = {"n": 1000, "clients": 100, "classes": 10}
        assert classes_held(Dirichlet(alpha=0.1), **setting) < classes_held(Dirichlet(alpha=1.0), **setting) / 1.5

    def test_examples_move_from_the_largest_clients_and_no_more_than_need_be(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Of one class and with alpha near 0, one client has everything."""
        found = sizes(Dirichlet(alpha=1e-8, min_examples_per_client=3), classes=1, clients=5)
        assert sorted(found) == [3, 3, 3, 3, N - 12]
        said = capsys.readouterr().out
        assert "and 12 example(s) moved" in said
        assert "far from" not in said
        sizes(Dirichlet(alpha=1e-8, min_examples_per_client=8), classes=1, clients=5)
        assert f"; {32 / N:.0%} of all, so this is far from the partition that is asked for" in capsys.readouterr().out
        two = parts(Dirichlet(alpha=1e-8, min_examples_per_client=20), classes=2, clients=12)
        assert [len(part) for part in two] == [20] * 12

    def test_moved_examples_are_of_any_class(self) -> None:
        """The last class of a donor would do for the count, and would make that class common."""
        labels = [0] * 120 + [1] * 120
        moved: list[int] = []
        for seed in range(8):
            found = partition_dirichlet(labels, 24, 1e-8, seed, 1)
            moved += [int(part[0]) >= 120 for part in found if len(part) == 1]
        assert 0.25 < sum(moved) / len(moved) < 0.75

    def test_it_is_drawn_again_before_anything_is_moved(self, capsys: pytest.CaptureFixture[str]) -> None:
        said = []
        for seed in range(20):
            found = sizes(Dirichlet(alpha=0.2), seed, clients=9)
            assert min(found) >= 1
            said.append(capsys.readouterr().out)
        again = re.compile(r"Dirichlet: drawn again \d+ time\(s\), so that each of 9 clients holds at least 1\n")
        assert any(again.fullmatch(line) for line in said)
        assert "" in said, "an accepted draw is not worth a line"

    def test_small_alpha_gives_fewer_classes(self) -> None:
        held = [sum(classes_held(Dirichlet(alpha=a), seed) for seed in range(5)) for a in (0.05, 0.5, 5.0)]
        assert held[0] * 1.3 < held[1] * 1.15 < held[2]


class TestMoving:
    """`by_shares` with shares that are written down."""

    def test_of_draws_that_will_not_do_the_one_that_lacks_fewest_is_taken(self) -> None:
        drawn = iter([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [1.0, 0, 0, 0]])
        found = by_shares([range(8)], lambda: [np.array(next(drawn))], range(8), 1, "", redraws=2)
        assert [len(part) for part in found] == [3, 3, 1, 1]

    def test_the_largest_client_gives(self) -> None:
        shares = np.array([0.3, 0.5, 0.2, 0, 0])
        found = by_shares([range(10)], lambda: [shares], range(10), 1, "", redraws=0)
        assert [len(part) for part in found] == [3, 3, 2, 1, 1]

    def test_what_it_gives_is_its_last_in_random_order_and_not_of_the_last_class(self) -> None:
        all_to_one = [np.array([1.0, 0])] * 2
        found = by_shares([[0, 1], [2, 3]], lambda: all_to_one, [2, 3, 0, 1], 1, "", redraws=0)
        assert [part.tolist() for part in found] == [[0, 2, 3], [1]]


class TestShards:
    def test_a_client_has_as_many_classes_as_shards_and_equal_size(self) -> None:
        even = Examples(240, "Some", 12, [i % 6 for i in range(240)])
        for shards in (1, 2):
            found = [part.tolist() for part in deal(Shards(shards), even, 0)[1]]
            assert [len(part) for part in found] == [20] * 12
            assert max(len({i % 6 for i in part}) for part in found) == shards

    def test_sizes_of_shards_differ_by_one(self) -> None:
        found = sizes(Shards(3), n=245, clients=7)
        assert max(found) - min(found) <= 3
        assert sum(found) == 245

    def test_many_shards_are_nearly_iid(self) -> None:
        assert classes_held(Shards(20)) > 2 * classes_held(Shards(2))

    def test_a_shard_is_no_run_of_the_file(self) -> None:
        first = deal(Shards(1), Examples(100, "Some", 2, [0] * 100), 0)[1][0].tolist()
        assert 15 < sum(i < 50 for i in first) < 35


class TestQuantitySkew:
    def test_alpha_sets_how_unequal(self) -> None:
        largest = [sum(max(sizes(QuantitySkew(alpha=a), seed)) for seed in range(5)) / 5 for a in (0.05, 1.0, 1e6)]
        assert largest[0] > 1.5 * largest[1] > 1.5 * 2 * largest[2]
        assert largest[2] == pytest.approx(N / 12, abs=1)

    def test_the_power_law(self) -> None:
        found = sizes(QuantitySkew(power=1.0), clients=3)
        assert found == [131, 65, 44]  # 240 times 6/11, 3/11, 2/11
        assert sizes(QuantitySkew(power=0.0)) == [20] * 12

    def test_a_tail_of_less_than_one_example_is_filled_without_another_draw(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = sizes(QuantitySkew(power=4.0))
        assert found == sorted(found, reverse=True)
        assert found[-1] == 1
        assert re.fullmatch(r"QuantitySkew: \d example\(s\) moved, so that .*\n", capsys.readouterr().out)

    def test_labels_stay_even(self) -> None:
        labels = told().labels
        large = max(parts(QuantitySkew(alpha=0.5)), key=len)
        share = [sum(labels[i] == c for i in large) / len(large) for c in range(CLASSES)]
        whole = [labels.count(c) / N for c in range(CLASSES)]  # type: ignore[attr-defined]
        assert share == pytest.approx(whole, abs=0.1)


class TestByFile:
    def test_clients_come_in_the_order_of_the_files_under_their_stems(self) -> None:
        names, found = deal(ByFile(), Examples(4, files=["x/b.txt", "x/b.txt", "y/a.txt.gz", "x/b.txt"]), 0)
        assert names == ["b", "a"]
        assert [part.tolist() for part in found] == [[0, 1, 3], [2]]

    def test_files_of_one_name_keep_their_paths(self) -> None:
        files = ["x/a.txt", "y/a.txt", "y/b.txt", "z/c.txt", "z/c.md", "r/s/d.txt", "q/s/d.txt"]
        names = ["x/a", "y/a", "b", "z/c.txt", "z/c.md", "r/s/d.txt", "q/s/d.txt"]
        assert deal(ByFile(), Examples(7, files=files), 0)[0] == names


class Gives(Partitioner):
    """Gives what it is told to."""

    def __init__(self, parts: Any) -> None:
        self.parts = parts

    def __call__(self, examples: Examples, seed: int) -> Any:
        return self.parts


class Some(Gives):
    complete = False


class TestTheContract:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (torch.arange(4), "returns a Tensor, no list or dictionary; a partitioner returns, for each client"),
            (None, "returns a NoneType, no list"),
            ([torch.arange(4), "abc"], "gives client 1 a str, which is no tensor; a partitioner returns"),
            ([torch.arange(4.0)], r"gives client 0 float32 of shape \(4,\); a partitioner returns"),
            ([torch.ones(4, dtype=torch.bool)], r"client 0 bool of shape \(4,\)"),
            ([torch.arange(4).view(2, 2)], r"client 0 int64 of shape \(2, 2\)"),
            ([torch.tensor(3)], r"client 0 int64 of shape \(\)"),
            ([[0, 1], [2, 4]], "client 1 index 4, and there are 4 examples"),
            ([[0, 1, 2], [3, -1]], "client 1 index -1, and there are 4 examples"),
            ([[0, 1, 2, 2], [3]], "gives index 2 2 times"),
            ([[0, 1], [1, 2, 3]], "gives index 1 2 times"),
            ([[0, 1], [2]], "leaves out 1 of 4 examples; give each to a client, or set complete = False in Gives"),
            ([[], []], "gives none of 4 examples to a client"),
            ([], "gives none of 4 examples"),
        ],
    )
    def test_is_checked_where_the_parts_come_in(self, given: Any, message: str) -> None:
        with pytest.raises(ValueError, match=rf"^partitioner: Gives .*{message}") as refused:
            deal(Gives(given), Examples(4), 0)
        assert "\n" not in str(refused.value)

    def test_more_clients_than_wanted_or_fewer(self) -> None:
        with pytest.raises(ValueError, match="num_clients=3: Gives makes 2 clients; set it to that or null"):
            deal(Gives([[0, 1], [2, 3]]), Examples(4, num_clients=3), 0)

    @pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda part: torch.tensor(part).short()])
    def test_any_integers_in_any_order_will_do(self, kind: Callable[[list[int]], Any]) -> None:
        names, found = deal(Gives([kind([3, 0]), kind([2, 1])]), Examples(4), 0)
        assert (names, [part.tolist() for part in found]) == ([], [[0, 3], [1, 2]])
        assert all(isinstance(part, Tensor) and part.dtype == torch.int64 for part in found)

    def test_a_dictionary_names_the_clients(self) -> None:
        names, found = deal(Gives({"ann": [0, 1], 7: [2, 3]}), Examples(4), 0)
        assert (names, [part.tolist() for part in found]) == (["ann", "7"], [[0, 1], [2, 3]])

    def test_empty_clients_and_examples_left_out_are_said(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = deal(Some([[0], [], [2]]), Examples(4), 0)[1]
        assert [part.tolist() for part in found] == [[0], [], [2]]
        assert capsys.readouterr().out == (
            "Some: 2 of 4 examples are with no client\nSome: 1 of 3 clients hold no example and are never sampled\n"
        )

    def test_only_one_process_says_it(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        deal(Some([[0], [], [2]]), Examples(4), 0)
        assert capsys.readouterr().out == ""


class TestSettings:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Dirichlet(alpha=0), "alpha=0: the Dirichlet concentration"),
            (lambda: Dirichlet(min_examples_per_client=-1), "min_examples_per_client=-1: must be at least 0"),
            (lambda: QuantitySkew(min_examples_per_client=-1), "min_examples_per_client=-1: must be at least 0"),
            (lambda: QuantitySkew(alpha=-1.0), "alpha=-1.0"),
            (lambda: QuantitySkew(power=-1.0), "power=-1.0: the exponent must be at least 0"),
            (lambda: QuantitySkew(power=float("nan")), "power=nan"),
            (lambda: QuantitySkew(alpha=1.0, power=1.0), "alpha=1.0, power=1.0: QuantitySkew has one of them"),
            (lambda: Shards(0), "shards_per_client=0: must be at least 1"),
        ],
    )
    def test_are_refused_at_once(self, make: Callable[[], Partitioner], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()

    def test_words_are_short_for_the_objects(self) -> None:
        settings = {"alpha": 0.2, "field": "writer", "min_examples_per_client": 3}
        for word, kind in {"iid": IID, "dirichlet": Dirichlet, "field": ByField, "by_file": ByFile}.items():
            assert type(spelled(None, word, **settings)) is kind
        found: Any = spelled(None, "dirichlet", **settings)
        assert (found.alpha, found.min_examples_per_client) == (0.2, 3)

    @pytest.mark.parametrize("setting", [{"alpha": 0.1}, {"field": "a"}, {"min_examples_per_client": 0}])
    def test_what_is_not_used_is_said(self, setting: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        """An object wins over the words, as what lies over a recipe can leave none of its keys out."""
        given, shown = Dirichlet(), ", ".join(f"{key}={value}" for key, value in setting.items())
        assert spelled(given, "iid", **setting) is given
        assert spelled(given, "by_file", **setting) is given
        assert isinstance(spelled(None, "iid", **setting), IID)
        assert capsys.readouterr().out.splitlines() == [
            f"Not used: {shown}, as partitioner=Dirichlet",
            f"Not used: partition=by_file, {shown}, as partitioner=Dirichlet",
            f"Not used: {shown}, as partition=iid",
        ]
        spelled(None, "dirichlet", alpha=0.1, min_examples_per_client=0)
        spelled(None, "field", field="a", alpha=0.5)
        assert capsys.readouterr().out == ""

    def test_what_is_no_partitioner_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"partitioner: a function is no hosfl_lightning.data.Partitioner"):
            spelled(lambda examples, seed: [], "iid")  # type: ignore[arg-type]
