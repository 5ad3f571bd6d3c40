"""What the measuring programs of this folder share: arguments, and a table."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def arguments(description: str | None) -> tuple[str, Path]:
    """The device in PyTorch's name for it, "cuda" or "cpu", and where to write."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options.out.mkdir(parents=True, exist_ok=True)
    return options.device, options.out


def table(out: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows, and writes them to table.json and table.md."""
    (out / "table.json").write_text(json.dumps(list(rows), indent=1) + "\n")
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([_cell(r[h]) for h in heads] for r in rows)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    (out / "table.md").write_text(f"{title}\n\n{text}\n")
    print(text)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
