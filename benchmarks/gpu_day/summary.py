"""The folder's first page: which parts are done, and their tables and pictures."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_day.run import DONE


def write(out: Path, about: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """summary.json, and README.md to read."""
    content = {"about": about, "parts": list(results)}
    (out / "summary.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "README.md").write_text("\n".join(_page(out, about, results)) + "\n")


def _page(
    out: Path, about: dict[str, Any], results: Sequence[dict[str, Any]]
) -> Iterator[str]:
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v)
    yield f"# {about['machine']}"
    yield f"\nAt {about['commit']}, Python {about['python']}; {versions}."
    yield "Float32 products are exact to float32 in the parity parts: JAX computes them"
    yield "at precision `highest`, PyTorch without TF32.\n"
    yield "| part | | seconds | |"
    yield "|---|---|--:|---|"
    for result in results:
        said = f": {result['reason']}" if result["reason"] else ""
        said = f"{result['status']}{said}".replace("|", "/")
        seconds = result.get("seconds", "")
        yield f"| {result['part']} | {result['what']} | {seconds} | {said} |"
    for result in results:
        folder = out / result["part"]
        if result["status"] == DONE and folder.is_dir():
            yield f"\n## {result['part']}\n"
            for file in sorted(folder.iterdir()):
                yield from _shown(file, out)


def _shown(file: Path, out: Path) -> Iterator[str]:
    at = file.relative_to(out).as_posix()
    if file.suffix == ".md":
        yield file.read_text()
    elif file.suffix == ".png":
        yield f"![{file.stem}]({at})\n"
    elif file.is_file():
        yield f"[{file.name}]({at})\n"
