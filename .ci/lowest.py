"""Prints the lower bounds of pyproject.toml as constraints for pip.

    python .ci/lowest.py >constraints-oldest.txt

torch is held at the version of constraints.txt: the package index has no CPU build of
older releases.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("flax", "torch", "record", "parity", "jax")  # what `make oldest` installs
BOUND = re.compile(r"([\w.-]+)>=([\w.]+)")

project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
requirements = project["dependencies"] + [
    requirement
    for extra in EXTRAS
    for requirement in project["optional-dependencies"][extra]
]
for requirement in requirements:
    bound = BOUND.match(requirement)
    if bound and bound[1] != "torch":
        print(f"{bound[1]}=={bound[2]}")
print(re.search("^torch==.*$", (ROOT / "constraints.txt").read_text(), re.M)[0])
