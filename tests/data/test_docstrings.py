from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from hosfl_lightning.data import DocstringData, Example
from hosfl_lightning.data.docstrings import DEFAULT_PACKAGES, collect_docstrings, split_documents

SMALL = {"sequence_length": 8, "validation_bytes_per_client": 200, "test_bytes_per_client": 200}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def package(site: Path, name: str, files: dict[str, str]) -> None:
    for path, source in {"__init__.py": "raise RuntimeError('imported')\n", **files}.items():
        target = site / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source, "utf-8")


def documented(tag: str, count: int) -> str:
    return "\n".join(f'def f{i}():\n    """Docstring {tag} number {i:03d}."""' for i in range(count))


def make(packages: list[str], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> DocstringData:
    data = DocstringData(packages=packages, tokenizer=tokenizer, **{**SMALL, **settings})
    data.setup("fit")
    return data


def text_of(blocks: list[Example], tokenizer: PreTrainedTokenizerBase) -> set[str]:
    ids = torch.cat([torch.as_tensor(block.input_ids) for block in blocks]).tolist()
    return set(tokenizer.decode([token if token != tokenizer.eos_token_id else 0 for token in ids]).split("<pad>"))


def test_finds_every_kind_of_docstring_without_importing(site: Path) -> None:
    source = '''
        """Module."""
        class A:
            """Class."""
            def f(self):
                """Method,

                indented.
                """
                def g():
                    """Inner."""
        try:
            async def h():
                """Coroutine."""
        except ImportError:
            def h():
                """Fallback."""
        x = "not a docstring"
        """Nor is this."""
    '''
    package(site, "finder_pkg", {"a.py": "\n".join(line[8:] for line in source.splitlines())})
    found = collect_docstrings("finder_pkg", 10**6)
    assert sorted(found) == ["Class.", "Coroutine.", "Fallback.", "Inner.", "Method,\n\nindented.", "Module."]
    assert "finder_pkg" not in sys.modules


def test_bad_files_are_passed_over(site: Path) -> None:
    files = {
        "python2.py": "print 'x'\n",
        "null.py": "'''x'''\0",
        "escape.py": "'''Escape.'''\ns = '\\d'\n",
        "surrogate.py": "'''Half \\ud800.'''",
    }
    package(site, "bad_pkg", files)
    (site / "bad_pkg" / "latin.py").write_bytes(b"'''caf\xe9'''")
    assert collect_docstrings("bad_pkg", 10**6) == ["Escape."]


def test_identical_docstrings_count_once_also_across_packages(site: Path) -> None:
    package(site, "twin_a", {"x.py": documented("same", 5), "y.py": documented("same", 6)})
    package(site, "twin_b", {"x.py": documented("same", 7)})
    seen: set[str] = set()
    assert len(collect_docstrings("twin_a", 10**6, seen)) == 6
    assert collect_docstrings("twin_b", 10**6, seen) == ["Docstring same number 006."]


def test_reading_stops_early_and_is_spread_over_subfolders(site: Path) -> None:
    folders = "abcdefgh"
    package(site, "wide_pkg", {f"{d}/{i}.py": documented(f"{d}{i}", 4) for d in folders for i in range(20)})
    found = collect_docstrings("wide_pkg", 2000)
    assert 2000 <= sum(len(text) for text in found) < 2200
    assert len({text.split()[1][0] for text in found}) >= 5
    assert found == collect_docstrings("wide_pkg", 2000)


def test_split_keeps_to_the_budgets_and_overlaps_nowhere() -> None:
    documents = [f"é document {i:03d} " * (1 + i % 3) for i in range(200)]
    parts = split_documents(documents, (300, 500, 10**6))
    assert [sum(len(text.encode()) for text in part) for part in parts[:2]] == pytest.approx([300, 500], abs=1)
    whole = [{text for text in part if text in documents} for part in parts]
    assert len(set().union(*whole)) == sum(map(len, whole)) >= 198
    assert split_documents(documents[::-1], (300, 500, 10**6)) == parts


def test_one_client_per_package_and_held_out_text_is_in_no_client(
    site: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    package(site, "first_pkg", {f"{i}.py": documented(f"A{i}", 12) for i in range(9)})
    package(site, "second_pkg", {f"{i}.py": documented(f"B{i}", 12) for i in range(9)})
    data = make(["first_pkg", "second_pkg"], tokenizer)
    assert data.client_names == ["first_pkg", "second_pkg"]
    assert data.num_clients == 2
    sets = [text_of(part, tokenizer) for part in (*data.clients, data.validation_set, data.test_set)]
    whole = [{text for text in part if text.startswith("Docstring") and text.endswith(".")} for part in sets]
    assert all(len(part) >= 5 for part in whole)
    assert len(set().union(*whole)) == sum(map(len, whole))
    assert {text[10] for text in whole[0]} == {"A"}
    assert {text[10] for text in whole[1]} == {"B"}
    assert {text[10] for text in whole[2]} == {text[10] for text in whole[3]} == {"A", "B"}


def test_the_split_does_not_depend_on_the_seed_and_the_budget_is_kept(
    site: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    package(site, "seed_pkg", {f"{i}.py": documented(f"A{i}", 12) for i in range(9)})
    a, b = (make(["seed_pkg"], tokenizer, seed=seed, max_bytes_per_client=400) for seed in (0, 1))
    for left, right in ((a.clients[0], b.clients[0]), (a.validation_set, b.validation_set)):
        assert all(torch.equal(torch.as_tensor(x.input_ids), torch.as_tensor(y.input_ids)) for x, y in zip(left, right))
    assert 400 // 8 <= len(a.clients[0]) <= 450 // 8
    assert a.client_batch(0, 0)["input_ids"].shape == (4, 8)
    assert not torch.equal(a.client_batch(0, 0)["input_ids"], b.client_batch(0, 0)["input_ids"])


def test_too_little_text_names_the_package_and_nothing_is_half_set_up(
    site: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    package(site, "rich_pkg", {f"{i}.py": documented(f"A{i}", 12) for i in range(9)})
    package(site, "poor_pkg", {"a.py": documented("B", 3)})
    data = DocstringData(packages=["rich_pkg", "poor_pkg"], tokenizer=tokenizer, **SMALL)
    for _ in range(2):
        with pytest.raises(ValueError, match="packages: 'poor_pkg' has 69 bytes of docstrings, too few"):
            data.setup("fit")


@pytest.mark.parametrize("name", ["no_such_package_at_all", "torch.nn", "", "sys"])
def test_a_package_that_is_not_there(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"packages: '{name}' is not an installed package"):
        make([name], tokenizer)


@pytest.mark.parametrize("packages", [[], ["numpy", "numpy"]])
def test_bad_package_lists(packages: list[str]) -> None:
    with pytest.raises(ValueError, match="packages="):
        DocstringData(packages=packages)


@pytest.mark.parametrize("setting", ["batch_size", "sequence_length", "max_bytes_per_client"])
def test_bad_numbers(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}=0: must be at least"):
        DocstringData(**{setting: 0})


def test_the_default_packages_have_text_enough(tokenizer: PreTrainedTokenizerBase) -> None:
    data = DocstringData(tokenizer=tokenizer, max_bytes_per_client=40_000)
    data.setup("fit")
    assert data.client_names == list(DEFAULT_PACKAGES)
    assert data.num_clients == 8
    assert all(len(client) >= 250 for client in data.clients)
    assert len(data.validation_set) >= 8 * 60
