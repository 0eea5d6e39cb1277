"""What the hook makes of a notebook and of a page; that MkDocs takes it is tried by the strict build in .ci/run."""

from __future__ import annotations

from base64 import b64encode
from types import SimpleNamespace
from typing import Any

from tools.site_pages import NOTEBOOKS, on_config, on_page_content, on_page_markdown, page


def code(source: str, *outputs: dict[str, Any]) -> dict[str, Any]:
    return {"cell_type": "code", "source": [source], "outputs": list(outputs)}


def test_a_notebook_becomes_markdown() -> None:
    table = {"data": {"text/html": ["<pre>"], "text/plain": ["\x1b[1mloss\x1b[0m\n"]}}
    picture = {"data": {"image/png": b64encode(b"png").decode(), "text/plain": ["<Figure>"]}}
    cells = [{"cell_type": "markdown", "source": ["# Title"]}, code("f()", {"text": ["1\n", "2\n"]}, table, picture)]
    text, pictures = page({"cells": cells}, "01")
    blocks = ["# Title", "```python\nf()\n```", "```text\n1\n2\n```", "```text\nloss\n```", "![output](01_0.png)\n"]
    assert text == "\n\n".join(blocks)
    assert pictures == {"01_0.png": b"png"}


def test_links_to_notebooks_lead_to_their_pages() -> None:
    assert on_page_markdown("[a](../notebooks/01_b.ipynb) [c](faq.md)") == "[a](notebooks/01_b.md) [c](faq.md)"


def test_the_colons_of_a_literal_block_go() -> None:
    assert on_page_content("<p>::</p>\n<pre></pre><p>Example::</p>") == "<pre></pre><p>Example:</p>"


def test_the_lists_that_grow_are_filled() -> None:
    config: Any = SimpleNamespace(nav=["index.md", {"Notebooks": []}, {"Results": []}, {"Other": ["faq.md"]}])
    _, notebooks, results, other = on_config(config).nav
    assert notebooks == {"Notebooks": [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]}
    assert results["Results"][0] == "results/README.md"
    assert "results/quickstart.md" in results["Results"]
    assert other == {"Other": ["faq.md"]}
