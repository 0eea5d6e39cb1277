"""How much is installed: of the client in an environment of its own, of one in PyTorch by what it requires here."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

#: What every environment has, and a client does not need.
EMPTY = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth")
#: Required by the client's own requirements, and never imported by it: by tokenizers alone.
OF_THE_HUB = (
    "huggingface_hub", "hf_xet", "fsspec", "filelock", "httpx2", "httpcore2", "anyio", "h11", "idna", "click", "tqdm",
    "yaml", "truststore", "sniffio", "certifi", "shellingham", "typer", "requests",
)  # fmt: skip


def environment(folder: Path, root: Path) -> str:
    """A fresh one with the client; its interpreter."""
    own = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", own], check=True)
    pip = [str(own / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(root / "constraints.txt"), str(root / "client")], check=True)
    return str(own / "bin/python")


def installed(python: str) -> dict[str, Any]:
    """Bytes of an environment's packages, but for those that an empty one has."""
    told = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", told], capture_output=True, check=True, text=True).stdout.strip())
    by_package: Counter[str] = Counter()
    bytecode = 0
    for path in site.rglob("*"):
        top = path.relative_to(site).parts[0].split("-")[0]
        if path.is_file() and not path.is_symlink() and top not in EMPTY:
            by_package[top.removesuffix(".libs")] += path.stat().st_size
            bytecode += path.stat().st_size if path.suffix == ".pyc" else 0
    return {
        "bytes": by_package.total(), "bytecode": bytecode, "packages": dict(by_package.most_common(6)),
        "hub": sum(by_package[name] for name in OF_THE_HUB),
    }  # fmt: skip


def size_of_torch_client() -> dict[str, Any]:
    """Bytes of what ``pip install hosfl_lightning[remote]`` installs, as it is in this environment."""
    root = Path(__file__).resolve().parents[1]
    own = [path for part in ("hosfl_lightning", "client/hosfl_client") for path in (root / part).rglob("*")]
    by_package = Counter({"hosfl_lightning": sum(path.stat().st_size for path in own if path.is_file())})
    left, seen = [("hosfl_lightning", "remote")], set()
    while left:
        name, extra = left.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if name != "hosfl_lightning":
            by_package[name] = _bytes(found)
        for line in found.requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                left += [(needed.name, one) for one in ["", *needed.extras]]
    return {"bytes": by_package.total(), "packages": dict(by_package.most_common(6))}


def _bytes(found: Distribution) -> int:
    return sum(path.stat().st_size for file in found.files or [] if (path := Path(str(file.locate()))).is_file())
