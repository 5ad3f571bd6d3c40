"""One case of the registry, and what whole packages can't run."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple

from parity_tests.registry.gradients import (
    Network,
    Recorded,
    Stream,
    Tree,
    initial,
    recorded,
)
from parity_tests.registry.optimizer import Optimizer
from parity_tests.registry.options import Options

STEPS = 300


class Limit(NamedTuple):
    """How far two trajectories may be apart, in ulps, and why as much.

    Where ``differs`` is set they must be further apart: a known difference.
    """

    ulps: float
    reason: str
    differs: bool = False


# For every parameter group its leaves and the options in which it differs.
Groups = tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...]


# Cases are compared by identity, so that they can be keys of a cache.
@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One optimizer with one set of options, on one tree of leaves."""

    name: str
    optimizer: Optimizer
    options: Options
    tree: Tree
    dtype: str = "float32"
    groups: Groups = ()  # of all leaves together; one group where empty
    gradients: str = "stream"  # or "network"
    recorded: str = ""  # a file of golden/ with the initial weights and gradients
    # leaf -> the steps at which it has no gradient
    missing: Mapping[str, frozenset[int]] | None = None
    losses: Mapping[int, float] | None = None  # step -> a loss that the step gets
    is_complex: bool = False
    thorough: bool = False  # whether the costly voices run it too
    # package -> its limit against the reference, where the table's does not hold
    tolerance: Mapping[str, Limit] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def group_options(self) -> list[tuple[tuple[str, ...], Options]]:
        """The names of the leaves and the options of every parameter group."""
        return [
            (leaves, dataclasses.replace(self.options, **differing))
            for leaves, differing in self.groups or ((tuple(self.tree), {}),)
        ]

    @property
    def params(self) -> dict[str, Any]:
        """The initial weights by leaf, as NumPy arrays that hold them exactly."""
        if self.recorded:
            file = recorded(self.recorded)
            return {n: file[f"init/{n}"].astype(float) for n in self.tree}
        return initial(self.tree, self.dtype, self.is_complex)

    def source(self, steps: int) -> Stream | Network:
        """Where the gradients of the first ``steps`` steps come from."""
        if self.recorded:
            return Recorded(self.recorded, steps)
        if self.gradients == "network":
            return Network(self.dtype, steps)
        return Stream(
            self.tree, self.dtype, steps, self.is_complex, self.missing, self.losses
        )

    @property
    def steps(self) -> int:
        """The number of steps of a whole run."""
        return 120 if self.recorded else STEPS

    @property
    def features(self) -> set[str]:
        """What of this case a package or an optimizer may lack."""
        o = self.options
        present = {
            self.dtype: True,
            "complex": self.is_complex,
            "missing gradients": self.missing is not None,
            "groups": bool(self.groups),
            "inner_momentum": o.inner_momentum > 0,
            "nesterov": o.nesterov,
            f"decay_at={o.decay_at}": o.decay_at != "y" and o.weight_decay > 0,
            "b1=0": o.b1 == 0,
            "b1 schedule": callable(o.b1),
            "lr schedule": callable(o.lr),
            "r": o.r != 0,
            "warmup": o.warmup_steps > 0,
            "scalar": () in self.tree.values(),
            "empty": any(0 in shape for shape in self.tree.values()),
        }
        return {feature for feature, there in present.items() if there}

    def unsupported(self, package: str) -> str | None:
        """Why ``package`` ("sf_jax", "sf_torch", "meta", "optax") can't run this."""
        own = {"sf_jax": "jax", "sf_torch": "torch"}.get(package, package)
        if getattr(self.optimizer, own) is None:
            return f"has no {self.optimizer.name}"
        for needs in (self.optimizer.needs, NEEDS):
            needed = needs.get(package)
            if needed and importlib.util.find_spec(needed) is None:
                return f"needs {needed}, which is not installed"
        for lacks in (self.optimizer.lacks, LACKS):
            for feature, why in lacks.get(package, {}).items():
                if feature in self.features:
                    return why
        return None


# package -> what must be installed for it. sf_jax and sf_torch are always there.
NEEDS: dict[str, str] = {"meta": "schedulefree"}

# package -> feature of a case -> why the package can't run it with any optimizer.
LACKS: dict[str, dict[str, str]] = {
    "sf_jax": {
        "missing gradients": "optax gives every leaf a gradient",
    },
    "meta": {
        "inner_momentum": "came after 1.4.1; see the golden trajectories",
        "decay_at=x": "decays at y or z",
        "b1 schedule": "its fast form takes β to be constant",
        "bfloat16": "keeps its state in bfloat16 too",
        "complex": "real parameters only",
    },
    "optax": {
        "r": "weighs by the step size only",
        "decay_at=z": "decays at y",
        "decay_at=x": "decays at y",
        "inner_momentum": "has none",
        "b1=0": "divides by b1",
        "lr schedule": "its average sees the schedule a step ahead; see warmup",
        "b1 schedule": "takes b1 to be a number",
        "missing gradients": "gives every leaf a gradient",
        "groups": "left out: the same as without",
        "float64": "left out: the same as in float32",
        "bfloat16": "keeps its state in bfloat16 too",
        "complex": "left out",
    },
}
