"""MkDocs hook: the notebooks become pages as they are stored, and every page of results is in the navigation."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the two lists of the navigation that grow by files."""
    results = sorted(path.name for path in (ROOT / "docs" / "results").glob("*.md") if path.name != "README.md")
    grown = {
        "Notebooks": [f"notebooks/{path.stem}.md" for path in NOTEBOOKS],
        "Results": [f"results/{name}" for name in ["README.md", *results]],
    }
    for entry in config.nav or []:
        if isinstance(entry, dict):
            entry.update({title: pages for title, pages in grown.items() if title in entry})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks' pages and pictures."""
    from mkdocs.structure.files import File

    for path in NOTEBOOKS:
        text, pictures = page(json.loads(path.read_text()), path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, png in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=png))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to notebooks, which lead to the files in the repository, lead to their pages on the site."""
    return re.sub(r"\]\(\.\./notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """The colons that announce a literal block in a docstring are none of Markdown's."""
    return re.sub(r"::</p>", ":</p>", re.sub(r"<p>::</p>\n?", "", html))


def page(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![output]({name})")
            else:
                printed = COLOURS.sub("", "".join(output.get("text") or data.get("text/plain", "")))
                parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures
