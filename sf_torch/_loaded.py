"""Loading: does a state fit, and do the parameters hold what its mode says?

Model and optimizer are saved and loaded apart: often the model at x, to be served, and
the optimizer in train mode, and in either order. The state tells x from y, so that
parameters that hold the one in place of the other can be seen and set right.
"""

import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sf_torch import _arguments
from sf_torch._step.batches import MISSED, local
from sf_torch._step.formula import recover_x, recover_y
from sf_torch._step.schedule import has_begun

Group = dict[str, Any]
States = Mapping[Tensor, dict[str, Tensor]]


def check_fits(optimizer: Any, state_dict: Mapping[str, Any]) -> None:
    """Before a state dict is loaded: would the optimizer be one that can be built?

    Raises:
      ValueError: everything that speaks against it, in one message: groups of other
        numbers of parameters, counters and options out of their range, options that
        are missing, arrays that are missing, left over, or not the parameters' in kind
        or shape, or the state of an optimizer that is not Schedule-Free.
    """
    check_structure(optimizer, state_dict)
    problems: list[str] = []
    groups = [optimizer.defaults | group for group in state_dict["param_groups"]]
    for i, (saved, own) in enumerate(
        zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    ):
        states = [state_dict["state"].get(index) or {} for index in saved["params"]]
        if any("z" in state for state in states):
            lacks = [key for key in optimizer._needed(own) if key not in saved]
            if lacks:
                problems.append(
                    f"group {i} has no {', '.join(lacks)}, only "
                    f"{sorted(map(str, saved))}: it is of another optimizer or "
                    "package, such as GPAAdamW of facebookresearch/optimizers. Set "
                    "what is missing in its groups, by the names used here"
                )
                continue
        # Without its parameters: what their device allows is not the file's matter.
        problems += _group_problems(
            optimizer, i, {**groups[i], "params": []}, groups[0]
        )
    if not problems:
        modes = {group.get("train_mode") for group in state_dict["param_groups"]}
        if {True, False} <= modes:
            problems.append("some groups are in train mode and others in eval mode")
        for group, own in zip(groups, optimizer.param_groups, strict=True):
            for index, p in zip(group["params"], own["params"], strict=True):
                saved = state_dict["state"].get(index) or {}
                problems += _state_problems(optimizer, index, p, saved, group)
    if problems:
        raise ValueError(
            "the state dict does not fit the optimizer:\n  "
            + "\n  ".join(problems)
            + "\nBuild the optimizer as it was when the state was saved."
        )


def check_structure(optimizer: Any, state_dict: Any) -> None:
    """Raises ValueError for what is no optimizer's state dict over such groups."""
    try:
        groups, states = state_dict["param_groups"], state_dict["state"]
        sizes = [len(group["params"]) for group in groups]
        indices = [index for group in groups for index in group["params"]]
        unknown = sorted(map(str, states.keys() - set(indices)))
        no_states = [i for i, s in states.items() if not isinstance(s, Mapping)]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            "this is no optimizer's state dict, which has state, by parameter, and "
            f"param_groups, each with params ({type(error).__name__}: {error}). Pass "
            "what state_dict() returned."
        ) from error
    own = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != own:
        raise ValueError(
            f"the state dict has parameter groups of {sizes} parameters, the optimizer "
            f"of {own}. Build the optimizer as it was when the state was saved."
        )
    if unknown or no_states or len(set(indices)) < len(indices):
        raise ValueError(
            f"the parameters of the groups are {indices}, and the state has "
            f"{list(states)}: each needs a number of its own, and a mapping for its "
            "state. Pass what state_dict() returned."
        )


def _group_problems(
    optimizer: Any, i: int, group: Group, first: Group
) -> Iterator[str]:
    checks = [partial(optimizer._check_group, group, first)]
    checks += [
        partial(check, key, group[key])
        for key, check in _COUNTERS.items()
        if key in group
    ]
    for check in checks:
        try:
            check()
        except (ValueError, TypeError) as error:
            yield f"group {i}: {error}"
        except KeyError as error:
            yield f"group {i} has no {error}"


def _state_problems(
    optimizer: Any, index: Any, p: Tensor, saved: Mapping[str, Any], group: Group
) -> Iterator[str]:
    named = f"the state of parameter {index}"
    if not saved:
        return
    if "z" not in saved:
        yield (
            f"{named} has {', '.join(map(str, saved))} and no z: it is not that of a "
            "Schedule-Free optimizer. Load the model alone, and let the optimizer "
            "begin at its weights"
        )
        return
    known = optimizer._arrays(group)
    moments = optimizer._moments(group)
    lacks = [key for key in moments if key not in saved]
    if group["train_mode"] and not group.get("b1", 1) and "x" not in saved:
        lacks.append("x")
    kind = type(optimizer).__name__
    if lacks:
        yield f"{named} has no {', '.join(lacks)}, which {kind} keeps"
    for key, value in saved.items():
        if key == MISSED:
            try:
                _number(0, group.get("k", 0), whole=True)(key, value)
            except ValueError as error:
                yield f"{named}: {error}"
        elif key not in known:
            if isinstance(value, Tensor) and value.dim():
                yield f"{named} has {key}, which {kind} does not keep"
        elif not isinstance(value, Tensor):
            yield f"{named}: {key} must be a tensor, got {value!r}"
        elif value.shape != p.shape:
            yield f"parameter {index}: {key} {tuple(value.shape)} for {tuple(p.shape)}"
        elif value.is_complex() != (p.is_complex() and key != "exp_avg_sq"):
            yield f"parameter {index}: {key} is {value.dtype}, the parameter {p.dtype}"


def _number(
    least: float, most: float = math.inf, whole: bool = False
) -> Callable[[str, Any], None]:
    """The check that a value is a finite number in [least, most]."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()  # a counter of a capturable optimizer
        if (
            isinstance(value, bool)
            or not isinstance(value, numbers.Real)
            or not least <= float(value) <= most
            or math.isinf(value)
            or (whole and value % 1)
        ):
            kind = "a whole number" if whole else "a finite number"
            raise ValueError(f"{name} must be {kind} from {least}, got {value!r}")

    return check


# What a run has counted up. Options are the optimizer's own to check.
_COUNTERS: dict[str, Callable[[str, Any], None]] = {
    "k": _number(0, whole=True),
    "weight_sum": _number(0),
    "lr_max": _number(-1),
    "scheduled_lr": _number(0),
    "grad_l1_ema": _number(0),
    "b1": _number(0, 1),
    "train_mode": partial(_arguments.check, kind=_arguments.BOOLEAN),
}


def saved_states(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Index, parameter and saved state of each parameter that has one."""
    pairs = zip(state_dict["param_groups"], optimizer.param_groups, strict=False)
    for saved, group in pairs:
        for index, p in zip(saved["params"], group["params"], strict=False):
            if index in state_dict["state"]:
                yield index, p, state_dict["state"][index]


def restore_dtypes(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> None:
    """Undoes torch's cast of loaded state to the parameters' dtype."""
    for _, p, saved in saved_states(optimizer, state_dict):
        for key, value in saved.items():
            if (
                isinstance(value, Tensor)
                and value.dtype != optimizer.state[p][key].dtype
            ):
                optimizer.state[p][key] = value.detach().to(p.device, copy=True)


@torch.no_grad()
def place(groups: list[Group], states: States, strict: bool = True) -> None:
    """Writes into parameters that hold the wrong one of x and y that of their mode.

    Raises:
      RuntimeError: a parameter in train mode holds neither x nor y, and ``strict``.
    """
    swapped, foreign = _misplaced(groups, states)
    if strict:
        _refuse(foreign)
    for held, wanted in swapped:
        held.copy_(wanted)


@torch.no_grad()
def check(groups: list[Group], states: States) -> None:
    """Refuses a step whose gradients were taken at anything but y.

    Raises:
      RuntimeError: a parameter in train mode does not hold y.
    """
    swapped, foreign = _misplaced(groups, states)
    _refuse(foreign)
    if swapped:
        raise RuntimeError(
            f"step() after loading: {len(swapped)} parameters hold x, and gradients "
            "belong to y. Call optimizer.train() once model and optimizer are loaded, "
            "before the forward pass."
        )


def _refuse(foreign: list[str]) -> None:
    if foreign:
        raise RuntimeError(
            "the loaded optimizer state belongs to other weights: neither its x nor "
            f"its y is in {', '.join(foreign)}. Load the model that was saved with it. "
            "To go on from weights of your own, write them in eval mode: "
            "optimizer.eval() once both are loaded, then the weights."
        )


def _misplaced(
    groups: list[Group], states: States
) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """The parameters that do not hold the iterate of their group's mode.

    Returns:
      Pairs (parameter, what it should hold) of those that hold the other iterate; and
      the names of those in train mode that hold neither. In eval mode a parameter may
      hold neither: weights that are written then are the new x.
    """
    swapped, foreign = [], []
    for i, group in enumerate(groups):
        if not has_begun(group):
            continue
        for j, p in enumerate(group["params"]):
            iterates = _iterates(states.get(p) or {}, group["b1"])
            if iterates is None or p.is_meta:
                continue
            x, y = (iterate.to(p.dtype) for iterate in iterates)
            wanted, other = (y, x) if group["train_mode"] else (x, y)
            held = local(p.detach())
            if torch.equal(held, wanted):
                continue
            if _near(held, other, wanted):
                swapped.append((held, wanted))
            elif (
                group["train_mode"]
                and "y" in states[p]  # as it was, and not worked out
                and not _near(held, wanted, other)
            ):
                names = group.get("param_names") or {j: f"{i}.{j}"}
                foreign.append(f"{names[j]} of shape {tuple(p.shape)}")
    return swapped, foreign


def _iterates(state: Mapping[str, Tensor], b1: float) -> tuple[Tensor, Tensor] | None:
    """x and y, where the state has either beside z."""
    if "z" not in state or not state.keys() & {"x", "y"}:
        return None
    known = {key: local(state[key]) for key in ("x", "y", "z") if key in state}
    z = known["z"]
    x = known["x"] if "x" in known else recover_x(known["y"], z, b1)
    y = known["y"] if "y" in known else recover_y(x, z, b1)
    return x, y


def _near(held: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether ``held`` is ``a``, but for the rounding of another device."""
    rounding = 4 * torch.finfo(a.dtype).eps * (a.abs() + b.abs())
    equal = (held == a) | (held.isnan() & a.isnan())
    return bool((equal | ((held - a).abs() <= rounding)).all())
