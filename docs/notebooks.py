"""Each tutorial as a notebook: its text and its code, cell by cell.

A hook of MkDocs. The site offers the notebook beside the page, and
`tests/test_readme.py` runs its cells in their order, so that what is downloaded is what
is tested. The format is Jupyter's 4.5, https://nbformat.readthedocs.io.
"""

import json
import re
from typing import Any

SITE = "https://schedulefree-jax.github.io/schedulefree-jax/"
_CODE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\]\(\.\./([\w/-]+)\.md")


def is_tutorial(src_uri: str) -> bool:
    return src_uri.startswith("tutorials/")


def notebook(page: str) -> dict[str, Any]:
    """The notebook of a page: blocks marked python are code, the rest is text."""
    cells = []
    # Text and code take turns, text first.
    for place, source in enumerate(_CODE.split(page)):
        source = source.strip()
        if not source:
            continue
        cell = {"id": f"cell-{place}", "metadata": {}, "source": source}
        if place % 2:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        else:
            # Pages beside the notebook are not where it is downloaded to.
            source = _LINK.sub(rf"]({SITE}\1.html", source)
            cell |= {"cell_type": "markdown", "source": source}
        cells.append(cell)
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": python, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def on_files(files: Any, config: Any, **_: Any) -> Any:
    from mkdocs.structure.files import File

    for page in list(files.documentation_pages()):
        if is_tutorial(page.src_uri):
            content = json.dumps(notebook(page.content_string), indent=1)
            name = page.src_uri.removesuffix(".md") + ".ipynb"
            files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if not is_tutorial(page.file.src_uri):
        return markdown
    name = page.file.src_uri.rpartition("/")[2].removesuffix(".md")
    title, _, rest = markdown.partition("\n")
    return f"{title}\n\n[Download this page as a notebook]({name}.ipynb)\n{rest}"
