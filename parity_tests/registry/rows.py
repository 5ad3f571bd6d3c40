"""From rows to cases, and the trees and option sets that several members are run with.

A :data:`Row` names a case and says which options and which fields of
:class:`~parity_tests.registry.case.Case` differ from the defaults.
"""

from collections.abc import Collection, Iterator
from typing import Any

from parity_tests.registry.case import Case, Groups
from parity_tests.registry.gradients import NETWORK, Tree
from parity_tests.registry.optimizer import Optimizer
from parity_tests.registry.options import Linear

Row = tuple[str, dict[str, Any], dict[str, Any]]  # label, options, fields of the case

# A matrix, a scalar and a leaf without elements. JAX's compilation takes most of the
# time of a run, and grows with the number of leaves.
TREE: Tree = {"matrix": (6, 7), "scalar": (), "empty": (0, 3)}
RECORDED_TREE: Tree = {"a": (9, 5), "b": (7,), "c": ()}  # of the files of golden/

# Options and fields of rows that several members have.
DECAY: dict[str, Any] = {"weight_decay": 0.1}
SEVERAL: dict[str, Any] = {"weight_decay": 0.1, "b1": 0.95}
FLOAT64: dict[str, Any] = {"dtype": "float64"}
BFLOAT16: dict[str, Any] = {"dtype": "bfloat16"}
ON_NETWORK: dict[str, Any] = {"tree": NETWORK, "gradients": "network"}
_HALVES: Groups = (
    (("scalar", "empty"), {}),
    (("matrix",), {"lr": 0.003, "weight_decay": 0.0}),
)
IN_GROUPS: dict[str, Any] = {"groups": _HALVES}
# The scalar's gradients begin at step 5; the matrix has none at every seventh step.
MISSING: dict[str, Any] = {
    "missing": {"scalar": frozenset(range(5)), "matrix": frozenset(range(6, 300, 7))}
}
# These vary the rule and not the base step: one optimizer shows as much as all.
OF_THE_RULE = frozenset({"decay_x", "power_1", "b1_1"})


def variations(
    *,
    lacks: Collection[str] = (),
    only: Collection[str] | None = None,
    without: Collection[str] = (),
    **fields: Any,
) -> Iterator[Row]:
    """The rows that every optimizer is tried with, one or a few options at a time.

    Args:
      lacks: options that the optimizer does not have. They are left out, and so are
        rows that become equal to an earlier one.
      only: the labels of the rows to give; all of them unless told.
      without: the labels of rows to leave out.
      fields: fields of all the cases.
    """
    seen: list[dict[str, Any]] = []
    for label, options in _variations():
        has = {name: value for name, value in options.items() if name not in lacks}
        wanted = label not in without and (only is None or label in only)
        if wanted and has not in seen:
            seen.append(has)
            yield label, has, fields


def _variations() -> Iterator[tuple[str, dict[str, Any]]]:
    warmup = {"warmup_steps": 20}
    rising = {"lr": Linear(0.001, 0.01)}
    yield "plain", {}
    yield "warmup", warmup
    yield "decay_y", DECAY
    yield "decay_z", {**DECAY, "decay_at": "z"}
    yield "decay_x", {**DECAY, "decay_at": "x"}
    yield "r", {**warmup, "r": 0.75}
    yield "power_0", {**rising, "weight_lr_power": 0.0}
    yield "power_1", {**rising, "weight_lr_power": 1.0}
    yield "b1_0.98", {"b1": 0.98, "b2": 0.95}
    yield "b1_0", {"b1": 0.0}
    yield "b1_1", {"b1": 1.0}
    yield "b1_schedule", {"b1": Linear(0.7, 0.98)}
    yield "lr_schedule", {"lr": Linear(0.01, 0.001)}
    yield "together", {**warmup, **DECAY, "b1": 0.95, "b2": 0.99, "r": 0.5}


def cases(
    optimizer: Optimizer,
    *rows: Row,
    thorough: Collection[str] = (),
    **defaults: Any,
) -> tuple[Case, ...]:
    """The rows as cases of the optimizer.

    Args:
      thorough: the labels of the cases that are run in the costly voices too.
      defaults: options that the rows don't set.
    """
    return tuple(
        Case(
            f"{optimizer.name}/{label}",
            optimizer,
            optimizer.options(**{**defaults, **options}),
            **{
                "tree": RECORDED_TREE if "recorded" in fields else TREE,
                "thorough": label in thorough,
                **fields,
            },
        )
        for label, options, fields in rows
    )
