"""Checks of parameters and groups. Each error says what would be right.

Those of arguments are in :mod:`sf_torch._arguments`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def dtypes(params: list[Tensor]) -> None:
    """Refuses parameters that are to move and cannot be averaged."""
    for p in params:
        if not (p.is_floating_point() or p.is_complex()):
            raise ValueError(
                f"a parameter with a gradient has dtype {p.dtype}, which cannot be "
                "averaged. Leave it out of the optimizer, or without a gradient."
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
