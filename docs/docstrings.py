"""What a docstring's markup becomes in the API reference: formulas and links.

Docstrings have formulas and references in the markup of Sphinx, which editors and
``help()`` show as it stands. The site's pages are Markdown, so that before a page is
made of them

    .. math::                becomes  \\[ ... \\], over several lines aligned at each &
    :math:`...`              becomes  \\( ... \\)
    :func:`~package.name`    becomes  a link, where the reference has that name
    ``name``                 stays

:class:`Docstrings` is an extension of Griffe, which reads the packages.
"""

import re
import textwrap
from pathlib import Path
from typing import Any

from griffe import Extension, Object

HERE = Path(__file__).parent
_BLOCK = re.compile(r"^([ ]*)\.\. math::\n\n((?:\1[ ]+\S.*\n?|[ ]*\n)+)", re.M)
_INLINE = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([^`]+)`")


def names_in_the_reference() -> dict[str, str]:
    """The full name of every public name that has an entry, by its last part."""
    pages = sorted((HERE / "reference").glob("*.md"))
    found = re.findall(
        r"^::: ([\w.]+)$", "\n".join(page.read_text() for page in pages), re.M
    )
    return {name.rpartition(".")[2]: name for name in found}


def in_markdown(text: str, names: dict[str, str], package: str) -> str:
    """The text of a docstring of this package, for Markdown with arithmatex."""

    def block(found: re.Match[str]) -> str:
        indent, formula = found[1], textwrap.dedent(found[2]).strip()
        if "&" in formula:
            # "aligned" is not among what latex2mathml knows.
            formula = f"\\begin{{split}}\n{formula}\n\\end{{split}}"
        return textwrap.indent(f"\\[\n{formula}\n\\]\n\n", indent)

    def link(found: re.Match[str]) -> str:
        name = found[1].rpartition(".")[2]
        full = names.get(name, "")
        if full.partition(".")[0] != package:
            return f"`{name}`"
        return f"[`{name}`][{full}]"

    text = _BLOCK.sub(block, text)
    text = _INLINE.sub(lambda found: rf"\({found[1].strip()}\)", text)
    return _ROLE.sub(link, text)


class Docstrings(Extension):
    """Rewrites the docstring of each object as it is read."""

    def __init__(self) -> None:
        self.names = names_in_the_reference()

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            package = obj.path.partition(".")[0]
            obj.docstring.value = in_markdown(obj.docstring.value, self.names, package)
