"""Is what was given the state dicts of a model and an optimizer that have run?

What is no tensor where one belongs is refused at once; numbers and arrays that no run
can have are problems that are reported together with all others.
"""

import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


def check_model(model: Any) -> None:
    """A model's state dict: names, and tensors or what modules keep besides.

    Raises:
      TypeError: naming the entry that is of another kind.
    """
    _mapping("model", model)
    for name, value in model.items():
        if not isinstance(name, str):
            raise TypeError(
                f"model has the key {name!r}, which is no name. Pass model.state_dict()"
                ", whose keys are strings."
            )
        if hasattr(value, "shape"):  # modules may keep other extra state
            _tensor(f"model[{name!r}]", value)


def check_optimizer(optimizer: Any) -> None:
    """An optimizer's state dict: groups, and tensors by parameter and key.

    Raises:
      TypeError: naming the entry that is of another kind.
      ValueError: an entry that is missing, or a parameter in two groups.
    """
    _mapping("optimizer", optimizer)
    for key in ("state", "param_groups"):
        if key not in optimizer:
            raise ValueError(
                f"optimizer has no {key!r}. Pass optimizer.state_dict(), which has "
                "'state' and 'param_groups'."
            )
    groups = optimizer["param_groups"]
    _sequence("optimizer['param_groups']", groups)
    seen: set[Any] = set()
    for i, group in enumerate(groups):
        where = f"optimizer['param_groups'][{i}]"
        _mapping(where, group)
        if "params" not in group:
            raise ValueError(f"{where} has no 'params', the numbers of its parameters.")
        _sequence(f"{where}['params']", group["params"])
        for index in group["params"]:
            if not isinstance(index, (int, str)):
                raise TypeError(
                    f"{where}['params'] has {index!r}. Each parameter has a number "
                    "there; pass optimizer.state_dict(), not the optimizer's groups."
                )
            if index in seen:
                raise ValueError(f"{where}['params'] has parameter {index} again.")
            seen.add(index)
    _mapping("optimizer['state']", optimizer["state"])
    for index, state in optimizer["state"].items():
        where = f"optimizer['state'][{index!r}]"
        if index not in seen:
            raise ValueError(f"{where} is of a parameter that is in no group.")
        _mapping(where, state)
        for key, value in state.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}, which is no name.")
            if value is None and key != "z":
                continue  # SGD's buffer where it has no momentum
            if key in ("z", "x", "y") or not isinstance(value, numbers.Number):
                _tensor(f"{where}[{key!r}]", value)


def group_problems(i: int, group: Mapping[str, Any]) -> Iterator[str]:
    """What a group counts or is told, and no run can have counted or been told."""
    found = dict(group)
    if "betas" in group:
        betas = group["betas"]
        if isinstance(betas, (tuple, list)) and len(betas) == 2:
            found |= {f"betas[{j}]": value for j, value in enumerate(betas)}
        else:
            yield f"impossible: betas of group {i} is {betas!r}, not a pair"
    for key, (fits, must) in _NUMBERS.items():
        if found.get(key) is not None and not fits(_plain(found[key])):
            yield f"impossible: {key} of group {i} is {found[key]!r}, not {must}"
    if not isinstance(group.get("train_mode", True), bool):
        yield f"impossible: train_mode of group {i} is {group['train_mode']!r}"


def array_problems(name: str, key: str, array: np.ndarray) -> Iterator[str]:
    """What is wrong with the values of a tensor of the model (no key) or the state."""
    of = f"{key} of {name}" if key else name
    if jnp.issubdtype(array.dtype, jnp.inexact):
        finite = np.isfinite(array)
        if not finite.all():
            yield f"impossible: {of} has {(~finite).sum()} values that are not finite"
    if key == "exp_avg_sq" and np.iscomplexobj(array):
        yield f"impossible: {of} is {array.dtype}, and a mean of squares is real"
    elif key == "exp_avg_sq" and (array < 0).any():
        yield f"impossible: {of} has {(array < 0).sum()} negative values"


def _number(least: float, most: float = math.inf) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        return (
            isinstance(value, numbers.Real)
            and not isinstance(value, bool)
            and least <= float(value) <= most
            and math.isfinite(value)
        )

    return fits


def _count(value: Any) -> bool:
    return _number(0)(value) and value % 1 == 0


_FINITE = _number(-math.inf), "a finite number"
_SHARE = _number(0, 1), "in [0, 1]"
_NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "k": (_count, "a whole number from 0"),
    "weight_sum": (_number(0), "a finite number from 0"),
    "lr_max": (_number(-1), "a finite number from -1"),
    "b1": _SHARE,
    "betas[0]": _SHARE,
    "betas[1]": _SHARE,
    "r": _FINITE,
    "weight_lr_power": _FINITE,
}


def _plain(value: Any) -> Any:
    """A counter of a capturable optimizer, which is a tensor, as a number."""
    return value.item() if getattr(value, "shape", None) == () else value


def _mapping(where: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{where} must be a mapping, got {value!r:.80}. Pass what state_dict() "
            "returns."
        )


def _sequence(where: str, value: Any) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(
            f"{where} must be a list, got {value!r:.80}. Pass what state_dict() "
            "returns."
        )


def _tensor(where: str, value: Any) -> None:
    dtype = getattr(value, "dtype", None)
    is_tensor = hasattr(value, "detach") and hasattr(value, "shape")
    if not is_tensor and not (dtype is not None and _is_numeric(dtype)):
        kind = f"an array of {dtype}" if dtype is not None else f"{value!r:.80}"
        raise TypeError(f"{where} must be a tensor or an array of numbers, got {kind}.")


def _is_numeric(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
