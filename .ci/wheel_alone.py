"""Installs a wheel alone, with each extra in a fresh environment, and imports it.

    python .ci/wheel_alone.py dist/schedulefree_jax-0.1.0-py3-none-any.whl

Tests do not ship. The trajectories of golden/ do, since sf-parity compares with them.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
# By extra: what imports then, and what must not have come with it.
EXTRAS = {
    "jax": ("import sf_jax", ("torch", "flax")),
    "flax": ("import sf_jax.flax", ("torch",)),
    "torch": ("import sf_torch", ("jax", "optax", "scipy", "flax")),
    "record": ("import parity_tests.cli.replay", ("schedulefree", "flax")),
}


def main(wheel: Path) -> int:
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if "test_" in n or n.startswith(("tests/", "docs/"))]
    assert [n for n in names if n.startswith("parity_tests/golden/")]
    wrong = 0
    for extra, (code, absent) in EXTRAS.items():
        with tempfile.TemporaryDirectory() as folder:
            python = Path(folder) / "bin" / "python"
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            install = [python, "-m", "pip", "install", "--quiet"]
            subprocess.run(
                [*install, "-c", CONSTRAINTS, f"{wheel.resolve()}[{extra}]"], check=True
            )
            code += "; import importlib.util as u; "
            code += f"print([n for n in {absent!r} if u.find_spec(n)])"
            done = subprocess.run(
                [python, "-c", code], cwd=folder, capture_output=True, text=True
            )
            ok = done.stdout.strip() == "[]"
            print(f"[{extra}]", "holds" if ok else done.stdout + done.stderr)
            wrong += not ok
    return wrong


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
