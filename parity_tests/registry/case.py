"""A case of the registry, and what the packages lack to run it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from parity_tests.compare.tolerances import Limit
from parity_tests.registry.gradients import (
    Network,
    Recorded,
    Stream,
    Tree,
    initial,
    recorded,
)
from parity_tests.registry.optimizers import Optimizer
from parity_tests.registry.options import Options

STEPS = 300

Groups = tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...]


@dataclasses.dataclass(frozen=True, eq=False)  # one by one, so that runs are cached
class Case:
    """One optimizer with one set of options, on one tree of leaves."""

    name: str
    optimizer: Optimizer
    options: Options
    tree: Tree
    dtype: str = "float32"
    # (leaves, options that differ) for each parameter group; together all leaves
    groups: Groups = ()
    gradients: str = "stream"  # or "network"
    recorded: str = ""  # a file of golden/, which has weights and gradients of its own
    missing: Mapping[str, frozenset[int]] | None = None  # steps without a gradient
    is_complex: bool = False
    thorough: bool = False  # also in the voices that take long
    # package -> a limit of its own against the reference, with its reason
    tolerance: Mapping[str, Limit] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def group_options(self) -> list[tuple[tuple[str, ...], Options]]:
        """The leaves and options of every group; one group unless told otherwise."""
        return [
            (leaves, dataclasses.replace(self.options, **differing))
            for leaves, differing in self.groups or ((tuple(self.tree), {}),)
        ]

    @property
    def params(self) -> dict[str, Any]:
        if self.recorded:
            file = recorded(self.recorded)
            return {n: file[f"init/{n}"].astype(float) for n in self.tree}
        return initial(self.tree, self.dtype, self.is_complex)

    def source(self, steps: int) -> Stream | Network:
        if self.recorded:
            return Recorded(self.recorded, steps)
        if self.gradients == "network":
            return Network(self.dtype, steps)
        return Stream(self.tree, self.dtype, steps, self.is_complex, self.missing)

    @property
    def steps(self) -> int:
        return 120 if self.recorded else STEPS

    @property
    def features(self) -> set[str]:
        """What a package may be unable to do; the keys of :data:`LACKS`."""
        o = self.options
        decay_at = f"decay_at={o.decay_at}"
        decays_elsewhere = o.decay_at != "y" and o.weight_decay > 0
        present = {
            self.dtype: True,
            "complex": self.is_complex,
            "missing gradients": self.missing is not None,
            "groups": bool(self.groups),
            "inner_momentum": o.inner_momentum > 0,
            "nesterov": o.nesterov,
            decay_at: decays_elsewhere,
            f"{self.optimizer.name} {decay_at}": decays_elsewhere,
            f"{self.optimizer.name} missing gradients": self.missing is not None,
            "b1=0": o.b1 == 0,
            "b1 schedule": callable(o.b1),
            "lr schedule": callable(o.lr),
            "r": o.r != 0,
            "warmup": o.warmup_steps > 0,
            f"{self.optimizer.name} warmup": o.warmup_steps > 0,
            f"{self.optimizer.name} scalar": () in self.tree.values(),
            f"{self.optimizer.name} empty": any(0 in s for s in self.tree.values()),
        }
        return {feature for feature, there in present.items() if there}

    def unsupported(self, package: str) -> str | None:
        """Why ``package`` ("sf_jax", "sf_torch", "meta", "optax") can't run this."""
        own = {"sf_jax": "jax", "sf_torch": "torch"}.get(package, package)
        if getattr(self.optimizer, own) is None:
            return f"has no {self.optimizer.name}"
        lacks = LACKS.get(package, {})
        return next((why for f, why in lacks.items() if f in self.features), None)


LACKS: dict[str, dict[str, str]] = {
    "sf_jax": {
        "missing gradients": "optax gives every leaf a gradient",
    },
    "sf_torch": {
        "prodigy warmup": "the wrapper has none: a scheduler sets the base's lr",
        "nesterov": "torch's has no bias correction, which optax's has",
    },
    "meta": {
        "inner_momentum": "came after 1.4.1; see the golden trajectories",
        "decay_at=x": "decays at y or z",
        "sgd decay_at=z": "its SGD decays at y",
        "adamw missing gradients": "corrects bias by the group's count of steps",
        "wrapper scalar": "its exchange of y and z fails on a tensor of 0 dimensions",
        "wrapper empty": "its exchange of y and z fails on an empty tensor",
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
