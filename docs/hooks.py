"""What the site needs besides MkDocs: links into the repository, and formulas.

Pages link to files outside docs/ by relative paths, which the tests check and which
work where the repository is browsed. On the site they become addresses. Formulas become
MathML when the site is built, so that a reader's browser needs no script for them.
"""

import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_PICTURES = "benchmarks/results/"
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.S
)


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """The pictures that the benchmarks left beside their results."""
    for path in sorted((ROOT / _PICTURES).rglob("*.png")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links out of docs/ lead into the repository."""
    # These two stand for files of the repository's root, and link from there.
    included = page.file.src_uri in ("contributing.md", "changelog.md")
    folder = "" if included else posixpath.join("docs", posixpath.dirname(page.url))
    if included:
        name = page.file.src_uri.removesuffix(".md").upper() + ".md"
        markdown = (ROOT / name).read_text()

    def outside(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1]))
        if target.startswith(_PICTURES) and target.endswith(".png"):
            return posixpath.relpath(target, posixpath.dirname(page.url))
        if not target.startswith("docs/"):
            return f"{config.repo_url}/blob/main/{target}"
        return target.removeprefix("docs/") if included else link[1]

    return _LINK.sub(outside, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas in MathML."""

    def formula(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        return convert(unescape(found[3]).strip(), display=display)

    return _FORMULA.sub(formula, html)
