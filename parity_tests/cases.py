"""The registry: what is run, and which voices can run it.

One :class:`Case` per optimizer and option set. The tests and the command line are
driven by :data:`CASES`; the optimizers themselves are rows of
:mod:`parity_tests.optimizers`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from parity_tests.gradients import (
    NETWORK,
    Network,
    Recorded,
    Stream,
    Tree,
    initial,
    recorded,
)
from parity_tests.optimizers import OPTIMIZERS, Linear, Optimizer, Options
from parity_tests.tolerances import Limit

STEPS = 300

# A matrix, a vector, a scalar and a leaf with nothing in it.
TREE: Tree = {"matrix": (6, 5), "vector": (7,), "scalar": (), "empty": (0, 3)}
RECORDED_TREE: Tree = {"a": (9, 5), "b": (7,), "c": ()}
PLAIN_TREE: Tree = {"matrix": (6, 5), "vector": (7,), "one": (1,)}


@dataclasses.dataclass(frozen=True, eq=False)  # one by one, so that runs are cached
class Case:
    """One optimizer with one set of options, on one tree of leaves."""

    name: str
    optimizer: Optimizer
    options: Options
    dtype: str = "float32"
    tree: Tree = dataclasses.field(default_factory=lambda: TREE)
    # (leaves, options that differ) for each parameter group; together all leaves
    groups: tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...] = ()
    gradients: str = "stream"  # or "network"
    recorded: str = ""  # a file of golden/, which has weights and gradients of its own
    missing: Mapping[str, frozenset[int]] | None = None  # steps without a gradient
    is_complex: bool = False
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
            decay_at: decays_elsewhere,
            f"{self.optimizer.name} {decay_at}": decays_elsewhere,
            "b1=0": o.b1 == 0,
            "b1 schedule": callable(o.b1),
            "lr schedule": callable(o.lr),
            "r": o.r != 0,
            "warmup": o.warmup_steps > 0,
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
    "meta": {
        "inner_momentum": "came after 1.4.1; see the golden trajectories",
        "decay_at=x": "decays at y or z",
        "sgd decay_at=z": "its SGD decays at y",
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


def _variations() -> Iterator[tuple[str, dict[str, Any]]]:
    """What is tried on every optimizer that has the options."""
    decay = {"weight_decay": 0.1}
    warmup = {"warmup_steps": 20}
    rising = {"lr": Linear(0.001, 0.01)}
    yield "plain", {}
    yield "warmup", warmup
    yield "decay_y", decay
    yield "decay_z", {**decay, "decay_at": "z"}
    yield "decay_x", {**decay, "decay_at": "x"}
    yield "r", {**warmup, "r": 0.75}
    yield "power_0", {**rising, "weight_lr_power": 0.0}
    yield "power_1", {**rising, "weight_lr_power": 1.0}
    yield "b1_0.98", {"b1": 0.98, "b2": 0.95}
    yield "b1_0", {"b1": 0.0}
    yield "b1_1", {"b1": 1.0}
    yield "b1_schedule", {"b1": Linear(0.7, 0.98)}
    yield "lr_schedule", {"lr": Linear(0.01, 0.001)}
    yield "together", {**warmup, **decay, "b1": 0.95, "b2": 0.99, "r": 0.5}


# Options that an optimizer hasn't: what varies nothing else makes no case for it.
_HAS_NOT = {
    "sgd": {"b2"},
    "radam": {"warmup_steps", "decay_at"},
    "wrapper": {"warmup_steps", "decay_at", "b2"},
}
_LR = {"sgd": 0.01, "wrapper": 0.01}
# What belongs to the rule, not to the base step, needs no trial on every optimizer.
_ONLY_ADAMW = {"decay_x", "power_1", "b1_1"}
_NOT_TRIED = {
    "sgd": _ONLY_ADAMW,
    "radam": _ONLY_ADAMW,
    "wrapper": {*_ONLY_ADAMW, "b1_0", "b1_schedule"},
}
_TRIED = {  # variants of AdamW
    "adamw_paper": {"warmup", "decay_y", "together"},
    "adamw_algoperf": {"warmup", "together"},
}


def _cases() -> Iterator[Case]:
    def case(name: str, options: dict[str, Any] | None = None, **fields: Any) -> Case:
        optimizer = name.split("/")[0]
        options = {"lr": _LR.get(optimizer, 0.0025), **(options or {})}
        if optimizer == "wrapper" and fields.get("dtype") != "float64":
            fields["tree"] = PLAIN_TREE
        return Case(name, OPTIMIZERS[optimizer], Options(**options), **fields)

    for optimizer in OPTIMIZERS:
        seen = set()
        for label, changes in _variations():
            has = {
                k: v for k, v in changes.items() if k not in _HAS_NOT.get(optimizer, ())
            }
            new = case(f"{optimizer}/{label}", has)
            tried = label in _TRIED.get(
                optimizer, {label} - _NOT_TRIED.get(optimizer, set())
            )
            if tried and new.options not in seen:
                yield new
            seen.add(new.options)

    decay = {"weight_decay": 0.1}
    loud = {"silent_sgd_phase": False}
    momentum = {"base_momentum": 0.5}
    yield case("adamw/inner_momentum", {"inner_momentum": 0.9})
    yield case(
        "adamw/inner_momentum_decay",
        {"inner_momentum": 0.8, "b1": 0.95, "warmup_steps": 20, **decay},
    )
    yield case("radam/loud", loud)
    yield case("radam/loud_power_0", {**loud, **decay, "weight_lr_power": 0.0})
    yield case("wrapper/momentum", momentum)
    yield case("wrapper/momentum_decay", {**momentum, **decay})

    several = {"weight_decay": 0.1, "b1": 0.95}
    halves = (
        (("matrix", "empty"), {}),
        (("vector", "scalar"), {"lr": 0.003, "weight_decay": 0.0}),
    )
    late = {"vector": frozenset(range(5)), "matrix": frozenset(range(6, 300, 7))}
    for optimizer in ("sgd", "adamw", "radam"):
        yield case(f"{optimizer}/float64", several, dtype="float64")
        yield case(f"{optimizer}/bfloat16", several, dtype="bfloat16")
        yield case(f"{optimizer}/network", several, tree=NETWORK, gradients="network")
    for optimizer in ("sgd", "adamw"):
        yield case(f"{optimizer}/groups", several, groups=halves)
        yield case(f"{optimizer}/missing", several, missing=late)
    yield case("adamw/complex", several, is_complex=True)
    turning = {"b1": Linear(0.7, 0.98)}
    yield case("adamw/b1_schedule_missing", turning, missing=late)
    yield case("adamw/b1_schedule_bfloat16", turning, dtype="bfloat16")
    yield case("adamw/b1_schedule_float64", turning, dtype="float64")
    yield case("adamw/inner_momentum_float64", {"inner_momentum": 0.9}, dtype="float64")
    yield case("adamw_algoperf/float64", several, dtype="float64")
    yield case("wrapper/float64", {**momentum, **decay}, dtype="float64")

    golden: dict[str, Any] = {"tree": RECORDED_TREE, "dtype": "float64"}
    yield case(
        "adamw/golden_0",
        {"lr": 0.01, "inner_momentum": 0.9},
        recorded="adamw_inner_momentum_0",
        **golden,
    )
    yield case(
        "adamw/golden_1",
        {
            "lr": 0.003,
            "inner_momentum": 0.8,
            "weight_decay": 0.1,
            "warmup_steps": 15,
            "b1": 0.95,
            "b2": 0.99,
            "r": 0.5,
        },
        recorded="adamw_inner_momentum_1",
        **golden,
    )
    yield case(
        "adamw_algoperf/golden_0",
        {
            "b2": 0.9955159689799007,
            "weight_decay": 0.08121616522670176,
            "warmup_steps": 20,
            "r": 0.75,
        },
        recorded="algoperf_adamw_0",
        **golden,
    )


CASES: tuple[Case, ...] = tuple(_cases())
