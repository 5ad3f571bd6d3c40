"""The registry: one :class:`Case` per optimizer and option set.

The tests and the command line are driven by :data:`CASES`. The optimizers themselves
are rows of :mod:`parity_tests.registry.optimizers`; what a package can't run is in
:data:`parity_tests.registry.case.LACKS`.
"""

from collections.abc import Iterator
from typing import Any

from parity_tests.registry.case import Case, Groups
from parity_tests.registry.family import FAMILY, FAMILY_CASES
from parity_tests.registry.gradients import NETWORK, Tree
from parity_tests.registry.optimizers import OPTIMIZERS
from parity_tests.registry.options import Linear, Options

# A matrix, a scalar and a leaf with nothing in it. Compiling takes most of the time,
# and takes longer with every leaf.
TREE: Tree = {"matrix": (6, 7), "scalar": (), "empty": (0, 3)}
RECORDED_TREE: Tree = {"a": (9, 5), "b": (7,), "c": ()}
PLAIN_TREE: Tree = {"matrix": (6, 7), "one": (1,)}


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
    "radam": {*_ONLY_ADAMW, "b1_0", "b1_schedule"},
    "wrapper": {*_ONLY_ADAMW, "b1_0", "b1_schedule"},
}
_TRIED = {  # variants of AdamW
    "adamw_paper": {"warmup", "decay_y", "together"},
    "adamw_algoperf": {"warmup", "together"},
}
# JAX compiles a program for each way of running: these are run in all ways.
_THOROUGH = {
    "sgd/together",
    "adamw/together",
    "adamw/b1_schedule",
    "adamw/bfloat16",
    "radam/together",
}


def _cases() -> Iterator[Case]:
    def case(name: str, options: dict[str, Any] | None = None, **fields: Any) -> Case:
        optimizer = name.split("/")[0]
        options = {"lr": _LR.get(optimizer, 0.0025), **(options or {})}
        plain = optimizer == "wrapper" and "dtype" not in fields
        fields = {
            "tree": PLAIN_TREE if plain else TREE,
            "thorough": name in _THOROUGH,
            **fields,
        }
        return Case(name, OPTIMIZERS[optimizer], Options(**options), **fields)

    for optimizer in OPTIMIZERS:
        seen = set()
        for label, changes in _variations():
            has = {
                k: v for k, v in changes.items() if k not in _HAS_NOT.get(optimizer, ())
            }
            new = case(f"{optimizer}/{label}", has)
            untried = _NOT_TRIED.get(optimizer, set())
            if label in _TRIED.get(optimizer, {label} - untried):
                if new.options not in seen:
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
    halves: Groups = (
        (("scalar", "empty"), {}),
        (("matrix",), {"lr": 0.003, "weight_decay": 0.0}),
    )
    late = {"scalar": frozenset(range(5)), "matrix": frozenset(range(6, 300, 7))}
    for optimizer in ("sgd", "adamw", "adamw_paper", "adamw_algoperf", "radam"):
        yield case(f"{optimizer}/float64", several, dtype="float64")
        yield case(f"{optimizer}/bfloat16", several, dtype="bfloat16")
    for optimizer in ("sgd", "adamw", "radam"):
        yield case(f"{optimizer}/network", several, tree=NETWORK, gradients="network")
    for optimizer in ("sgd", "adamw"):
        yield case(f"{optimizer}/groups", several, groups=halves)
        yield case(f"{optimizer}/missing", several, missing=late)
    yield case("adamw/complex", several, is_complex=True)
    turning = {"b1": Linear(0.7, 0.98)}
    yield case("adamw/b1_schedule_missing", turning, missing=late)
    yield case("adamw/b1_schedule_bfloat16", turning, dtype="bfloat16")
    yield case("adamw/b1_schedule_float64", turning, dtype="float64")
    yield case("wrapper/float64", {**momentum, **decay}, dtype="float64")
    yield case("wrapper/bfloat16", {**momentum, **decay}, dtype="bfloat16")

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

    for name, chosen, fields in FAMILY_CASES:
        member = FAMILY[name.split("/")[0]]
        tree = RECORDED_TREE if "recorded" in fields else TREE
        yield Case(name, member, chosen, **{"tree": tree, **fields})


CASES: tuple[Case, ...] = tuple(_cases())
