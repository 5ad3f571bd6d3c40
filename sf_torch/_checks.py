"""Checks of options. Each error quotes the value and says what would be right."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

DECAY_AT = ("y", "z", "x")
ROUNDINGS = ("nearest", "stochastic")


def options(group: Mapping[str, Any]) -> None:
    """Refuses what a parameter group cannot mean."""
    for name, check in _CHECKS.items():
        if name in group:
            check(name, group[name])
    random_rounding(group)


def dtypes(params: list[Tensor]) -> None:
    """Refuses parameters that are to move and cannot be averaged."""
    for p in params:
        if not (p.is_floating_point() or p.is_complex()):
            raise ValueError(
                f"a parameter with a gradient has dtype {p.dtype}, which cannot be "
                "averaged. Leave it out of the optimizer, or without a gradient."
            )


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
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name} must hold one number, got a tensor of shape {tuple(value.shape)}. "
            "Give parameters with other step sizes a group of their own."
        )
    non_negative(name, value)


def non_negative(name: str, value: Any) -> None:
    if not value >= 0 or math.isinf(value):
        raise ValueError(
            f"{name} must not be negative, got {value}. Give its magnitude, a finite "
            "number."
        )


def warmup_steps(name: str, value: Any) -> None:
    # Trainers that read their arguments from a command line pass 100.0.
    if not isinstance(value, numbers.Real) or value % 1 != 0:
        raise TypeError(
            f"{name} must be a whole number, got {value}. It counts steps; for a share "
            "of the run, give that share times the number of its steps."
        )
    if value < 0:
        raise ValueError(
            f"{name} must not be negative, got {value}. It counts steps; 0 turns it "
            "off."
        )


def choice(choices: tuple[str, ...]) -> Callable[[str, Any], None]:
    """The check that a value is one of these."""

    def check(name: str, value: Any) -> None:
        if value not in choices:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}."
            )

    return check


def state_dtype(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ValueError(
            f"{name} must be a floating dtype, got {value}. Leave it out to keep the "
            "state at least in float32."
        )


def seed(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise ValueError(
            f"{name} must be a whole number from 0 to 2**32 - 1, got {value!r}. It is "
            "the key of the random bits."
        )


def random_rounding(group: Mapping[str, Any]) -> None:
    """Refuses random rounding where it cannot be."""
    if group.get("rounding") != "stochastic":
        return
    if "seed" not in group:
        raise ValueError(
            'rounding="stochastic" is an option of SGD, AdamW, RAdam and GPA, and of '
            "no other optimizer. Leave rounding out."
        )
    if group["state_dtype"] != torch.bfloat16:
        raise ValueError(
            'rounding="stochastic" is to bfloat16, got state_dtype='
            f"{group['state_dtype']}. Pass state_dtype=torch.bfloat16, or leave "
            "rounding out."
        )
    for option in ("fused", "capturable"):
        if group[option]:
            raise ValueError(
                f'rounding="stochastic" does not go with {option}=True: the kernel '
                f"rounds to nearest. Leave {option} out."
            )
    for p in group["params"]:
        if hasattr(p, "to_local"):
            raise ValueError(
                'rounding="stochastic" needs whole parameters, got a distributed one '
                f"of shape {tuple(p.shape)}: the random bits go by the place of an "
                "element in the whole. Leave rounding out."
            )


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(
            f"{name} must be True or False, got {value!r}. If this number was meant "
            "for another argument, give both by name: the order of arguments may "
            "differ between versions of schedulefree."
        )


def optional_boolean(name: str, value: Any) -> None:
    if value is not None:
        boolean(name, value)


def finite(name: str, value: Any) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}. Leave it out for 0.")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "lr": learning_rate,
    "momentum": interpolation,
    "betas": betas,
    "inner_momentum": decay_rate,
    "eps": non_negative,
    "weight_decay": non_negative,
    "warmup_steps": warmup_steps,
    "c_warmup": warmup_steps,
    "sf_beta1_anneal_steps": warmup_steps,
    "sf_beta1": interpolation,
    "sf_beta1_max": decay_rate,
    "polyak_beta": decay_rate,
    "loss_floor": finite,
    "mu_y": interpolation,
    "mu_x": interpolation,
    "refined_c": non_negative,
    "decay_at": choice(DECAY_AT),
    "state_dtype": state_dtype,
    "moment_dtype": state_dtype,
    "rounding": choice(ROUNDINGS),
    "seed": seed,
    "foreach": optional_boolean,
    "fused": optional_boolean,
    "capturable": boolean,
    "store_x": boolean,
    "silent_sgd_phase": boolean,
    "upstream_compatible": boolean,
    "skip_nonfinite": boolean,
}
