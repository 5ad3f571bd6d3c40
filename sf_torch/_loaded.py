"""Loading: does a state fit, and do the parameters hold what its mode says?

Model and optimizer are saved and loaded apart: often the model at x, to be served, and
the optimizer in train mode, and in either order. The state tells x from y, so that
parameters that hold the one in place of the other can be seen and set right.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sf_torch._step.batches import local
from sf_torch._step.formula import recover_x, recover_y

Group = dict[str, Any]
States = Mapping[Tensor, dict[str, Tensor]]


def check_fits(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Before a state dict is loaded.

    Raises:
      ValueError: its shapes are not those of the parameters, or it is the state of an
        optimizer that is not Schedule-Free or does not count its steps in its groups.
    """
    for index, _, saved in saved_states(optimizer, state_dict):
        if saved and "z" not in saved:
            raise ValueError(
                f"the state of parameter {index} has {', '.join(saved)} and no z: "
                "it is not that of a Schedule-Free optimizer. Load the model "
                "alone, and let the optimizer begin at its weights."
            )
    misfits = [
        f"parameter {index}: {key} {tuple(value.shape)} for {tuple(p.shape)}"
        for index, p, saved in saved_states(optimizer, state_dict)
        for key, value in saved.items()
        if isinstance(value, Tensor) and value.dim() and value.shape != p.shape
    ]
    if misfits:
        raise ValueError(
            "the state dict does not fit the parameters: "
            + "; ".join(misfits)
            + ". Build the optimizer over the model that it was saved with."
        )
    for group in state_dict["param_groups"]:
        states = [state_dict["state"].get(index, {}) for index in group["params"]]
        if "k" not in group and any("z" in state for state in states):
            raise ValueError(
                "a group of the state dict has no k, the number of steps taken, "
                f"only {sorted(group)}. It is of another package, such as GPAAdamW "
                "of facebookresearch/optimizers: set k, weight_sum, lr_max, "
                "train_mode and the options in its groups by the names used here."
            )


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
