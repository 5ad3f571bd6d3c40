"""Checks of arguments. Each error quotes the value and says what would be right."""

import numbers
from collections.abc import Mapping
from typing import Any

import torch

DECAY_AT = ("y", "z", "x")


def hyperparameters(group: Mapping[str, Any]) -> None:
    """Checks whatever of the known hyperparameters a parameter group holds."""
    for name, check in _CHECKS.items():
        if name in group:
            check(name, group[name])
    for p in group.get("params", ()):
        _state_holds(p, group.get("state_dtype"))


def interpolation(name: str, value: Any) -> None:
    if not 0 <= value <= 1:
        raise ValueError(
            f"{name} must lie in [0, 1], got {value}. It is the weight of x in y "
            "(usually 0.9 to 0.98)."
        )


def decay_rate(name: str, value: Any) -> None:
    if not 0 <= value < 1:
        raise ValueError(
            f"{name} must lie in [0, 1), got {value}. It is the decay rate of a "
            "moving average (usually 0.9 to 0.999)."
        )


def betas(name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be a pair, got {value!r}. Give (0.9, 0.999).")
    interpolation(f"{name}[0]", value[0])
    decay_rate(f"{name}[1]", value[1])


def learning_rate(name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name} must hold one number, got a tensor of shape {tuple(value.shape)}. "
            "Give parameters with other step sizes a group of their own."
        )
    _non_negative("the step size; a step already goes downhill")(name, value)


def warmup_steps(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{name} must be an integer, got {value}. It counts steps; use "
            f"{round(float(value))}."
        )
    _non_negative("a number of steps; 0 turns warmup off")(name, value)


def decay_at(name: str, value: Any) -> None:
    if value not in DECAY_AT:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, DECAY_AT))}, got {value!r}."
        )


def state_dtype(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ValueError(
            f"{name} must be a floating dtype, got {value}. Leave it out to keep the "
            "state at least in float32."
        )


def _non_negative(meaning: str) -> Any:
    def check(name: str, value: Any) -> None:
        if not value >= 0:
            raise ValueError(
                f"{name} must not be negative, got {value}. It is {meaning}."
            )

    return check


def _state_holds(p: Any, dtype: torch.dtype | None) -> None:
    """The state may be wider than its parameter, never narrower."""
    # Named parameters come as pairs.
    tensor = p[1] if isinstance(p, tuple) else p
    if not isinstance(tensor, torch.Tensor):
        return
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(
            f"a parameter has dtype {tensor.dtype}, which cannot be averaged. Leave it "
            "out of the optimizer."
        )
    if dtype is not None and dtype.itemsize < tensor.dtype.to_real().itemsize:
        raise ValueError(
            f"state_dtype must be as wide as the parameters, got {dtype} for "
            f"{tensor.dtype}. Leave it out, or make the parameters {dtype}."
        )


_CHECKS: dict[str, Any] = {
    "lr": learning_rate,
    "momentum": interpolation,
    "betas": betas,
    "inner_momentum": decay_rate,
    "eps": _non_negative("added to a square root in the denominator"),
    "weight_decay": _non_negative("the pull towards zero, times the learning rate"),
    "warmup_steps": warmup_steps,
    "decay_at": decay_at,
    "state_dtype": state_dtype,
}
