from __future__ import annotations

import hashlib
import importlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("pretrain_tiny_lm")


@pytest.fixture
def corpus_tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("tiny_lm_corpus")


def module_text(name: str) -> str:
    prose = " ".join(f"The {name} module has a sentence with the number {i} in it." for i in range(12))
    return f'"""{prose}"""\n\nVALUE = "{name}"\n'


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    root = tmp_path / "stdlib"
    for i in range(60):
        path = root / ("package" if i % 2 else ".") / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(module_text(f"module_{i}"), encoding="utf-8")
    return root


def contents(stream: object) -> bytes:
    return bytes(int(token) for token in stream if token < 256)  # type: ignore[attr-defined]


def test_corpus_is_the_same_whatever_the_order_of_the_folder(
    corpus_tool: ModuleType, stdlib: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = corpus_tool.build_corpus(stdlib)
    rglob = Path.rglob

    def reversed_rglob(self: Path, pattern: str) -> Iterator[Path]:
        return iter(sorted(rglob(self, pattern), reverse=True))

    monkeypatch.setattr(Path, "rglob", reversed_rglob)
    second = corpus_tool.build_corpus(stdlib)
    assert first.sha256 == second.sha256
    assert (first.source == second.source).all()
    (stdlib / "module_0.py").write_text(module_text("changed"), encoding="utf-8")
    assert corpus_tool.build_corpus(stdlib).sha256 != first.sha256


@pytest.mark.parametrize(
    "place", ["site-packages/torch/a.py", "dist-packages/a.py", "json/tests/a.py", "test/a.py", "_sysconfigdata_x.py"]
)
def test_corpus_leaves_out_installed_packages_tests_and_build_files(
    corpus_tool: ModuleType, stdlib: Path, place: str
) -> None:
    before = corpus_tool.build_corpus(stdlib).sha256
    path = stdlib / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(module_text("stranger"), encoding="utf-8")
    assert corpus_tool.build_corpus(stdlib).sha256 == before


def test_files_of_this_python_hold_nothing_installed(corpus_tool: ModuleType) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = corpus_tool.corpus_files(root)
    assert len(files) > 300
    assert Path("json/decoder.py") in files
    assert not [path for path in files if "packages" in path.as_posix()]
    installed = Path(torch.__file__).resolve()
    assert installed not in {(root / path).resolve() for path in files}


def test_heldout_files_are_held_out_whole(corpus_tool: ModuleType, stdlib: Path) -> None:
    corpus = corpus_tool.build_corpus(stdlib)
    trained, heldout = contents(corpus.source) + contents(corpus.prose), contents(corpus.heldout_source)
    names = [f"The module_{i} module".encode() for i in range(60)]
    assert 0 < sum(name in heldout for name in names) < 12
    assert all((name in trained) != (name in heldout) for name in names)


def test_prose_is_docstrings_comment_blocks_and_long_strings(corpus_tool: ModuleType) -> None:
    long_string = "a string that reads like a sentence " * 10
    comment = "# one line of a block\n# another line of the same block\n# and a third line\n"
    function = 'def f():\n    """What this function does, in\n    two lines of text."""\n'
    text = f'{function}{comment}X = "{long_string}"\ny = 1  # no\n'
    assert corpus_tool.prose_of(text) == [
        "What this function does, in\ntwo lines of text.",
        long_string,
        "one line of a block\nanother line of the same block\nand a third line",
    ]


def test_a_folder_without_text_is_refused(corpus_tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--stdlib: too little text .*standard library"):
        corpus_tool.build_corpus(tmp_path)


def arguments(out: Path, stdlib: Path, *more: str) -> list[str]:
    threads = str(torch.get_num_threads())
    return [
        *("--out", str(out), "--stdlib", str(stdlib), "--hidden", "16", "--layers", "2"),
        *("--steps", "3", "--threads", threads, *more),
    ]


def test_end_to_end_gives_a_loadable_model_and_its_record(tool: ModuleType, stdlib: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    global_state = torch.get_rng_state()
    tool.main(arguments(out, stdlib))
    assert torch.equal(torch.get_rng_state(), global_state)

    record = json.loads((out / "training.json").read_text())
    assert record["steps"] == 3
    assert record["tokens_seen"] == 3 * tool.TOKENS_PER_STEP
    assert record["corpus_sha256"] == tool.build_corpus(stdlib).sha256
    assert set(record["heldout_nats_per_byte"]) == {"source", "prose"}
    assert f"{record['heldout_nats_per_byte']['prose']} of prose" in (out / "README.md").read_text()
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "training.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float32
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.float16}
    inputs = tokenizer("import os\n", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 10, tool.VOCAB_SIZE)


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_killed_and_resumed_gives_the_same_model(
    tool: ModuleType, stdlib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed, other_seed = tmp_path / "whole", tmp_path / "killed", ("--seed", "1")
    tool.main(arguments(whole, stdlib))
    monkeypatch.setattr(tool, "SAVE_SECONDS", 0.0)
    batch = tool.batch

    def batch_until_killed(corpus: object, context: int, seed: int, step: int) -> torch.Tensor:
        if step == 2:
            raise KeyboardInterrupt
        result: torch.Tensor = batch(corpus, context, seed, step)
        return result

    monkeypatch.setattr(tool, "batch", batch_until_killed)
    with pytest.raises(KeyboardInterrupt):
        tool.main(arguments(killed, stdlib))
    monkeypatch.setattr(tool, "batch", batch)

    with pytest.raises(ValueError, match=r"--out: .* other settings; delete it or give another folder"):
        tool.main(arguments(killed, stdlib, *other_seed))
    tool.main(arguments(killed, stdlib))
    assert weights(killed) == weights(whole)
    assert json.loads((killed / "training.json").read_text())["steps"] == 3
    assert not (killed / tool.STATE).exists()


@pytest.mark.parametrize("budget", [("--minutes", "0"), ("--steps", "-1")])
def test_a_budget_that_is_not_positive_is_an_error_of_usage(
    tool: ModuleType, budget: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.parse(list(budget))
    assert stopped.value.code == 2
    assert "--minutes or --steps must be above zero" in capsys.readouterr().err
