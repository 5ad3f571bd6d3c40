"""The whole step in one launch: a Triton kernel over all tensors of a group.

A step at the speed of memory reads each array once and writes it once. The kernel
finds the arrays of every parameter through a table of addresses, so that thousands of
small tensors cost one launch, and reads the numbers of the step from memory, so that
nothing is compiled anew as they change. The formulas are those of
:mod:`sf_torch._kernels`; arithmetic is in float32.

Parameters that share device, dtypes and the kinds of their state share a launch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sf_torch._averaging import Group
from sf_torch._kernels import BaseStep, Scalars, lean_coefficients
from sf_torch._leaves import Leaf, is_master, same_layout

try:
    import triton

    from sf_torch._triton import TYPES, kernel
except ImportError:  # PyTorch's builds for CPUs come without it
    triton = None

BLOCK = 1024  # elements that one program moves
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = ("param", "grad", "z", "x", "y", "exp_avg_sq", "exp_avg")  # of the table

Kept = dict[Any, tuple[list[int], Tensor]]
"""Integers that went to a device, and where they are there: most do not change."""


def works_on(device: torch.device) -> bool:
    """Whether the kernel runs there: CUDA, or Triton's interpreter on the CPU."""
    if triton is None:
        return False
    return device.type == "cuda" or (
        device.type == "cpu" and triton.knobs.runtime.interpret
    )


def takes(leaf: Leaf) -> bool:
    """Whether the kernel can move this leaf: dtypes that it knows, in one layout."""
    tensors = [leaf.param, *leaf.state.values()]
    return (
        works_on(leaf.param.device)
        and leaf.param.dtype in DTYPES
        and leaf.grad.dtype in DTYPES
        and all(t.dtype == torch.float32 for t in leaf.state.values())
        and same_layout(tensors)
    )


def check(group: Group) -> None:
    """Refuses ``fused`` and ``capturable`` where they cannot work."""
    if not (group["fused"] or group["capturable"]):
        return
    option = "fused" if group["fused"] else "capturable"
    if group["foreach"] or (group["capturable"] and group["fused"] is False):
        raise ValueError(
            f"{option}=True does not go with foreach={group['foreach']}, "
            f"fused={group['fused']}. Leave the latter two out."
        )
    for p in group["params"]:
        if not works_on(p.device) or p.dtype not in DTYPES:
            raise ValueError(
                f"{option}=True needs parameters in float32, bfloat16 or float16 on "
                f"CUDA, and Triton; got {p.dtype} on {p.device}. Leave it out."
            )


def refuse_others(leaves: Sequence[Leaf]) -> None:
    """With ``capturable`` there is no other way to step."""
    if leaves:
        raise RuntimeError(
            f"capturable=True needs dense parameters and float32 state, got a "
            f"parameter of strides {leaves[0].param.stride()}. Make it contiguous, or "
            "leave capturable out."
        )


def step(leaves: Sequence[Leaf], base: BaseStep, scalars: Scalars, kept: Kept) -> None:
    """Moves y, z, x and the moments of all leaves in place."""
    batches: dict[Any, list[dict[str, Tensor]]] = {}
    for leaf in leaves:
        if leaf.param.numel():
            arrays = {"param": leaf.param, "grad": leaf.grad, **leaf.state}
            if not same_layout([leaf.grad, leaf.param]):
                arrays["grad"] = torch.empty_like(leaf.param).copy_(leaf.grad)
            alike = (
                leaf.param.device,
                leaf.param.dtype,
                arrays["grad"].dtype,
                is_master(leaf.state["z"], leaf.param),
                all(t.data_ptr() % 16 == 0 for t in arrays.values()),
                *leaf.state,
            )
            batches.setdefault(alike, []).append(arrays)
    for alike, batch in batches.items():
        device, p_dtype, g_dtype, master, aligned, *_ = alike
        rows = [row for row in ROWS if row in batch[0]]
        sizes = [arrays["param"].numel() for arrays in batch]
        table = [arrays[row].data_ptr() for row in rows for arrays in batch] + sizes
        blocks = [
            value
            for which, size in enumerate(sizes)
            for start in range(0, size, BLOCK)
            for value in (which, start)
        ]
        kernel[(len(blocks) // 2,)](
            _on_device(kept, (alike, "table"), table, device),
            _on_device(kept, (alike, "blocks"), blocks, device),
            numbers_of(base, scalars, device),
            len(batch),
            *(rows.index(row) if row in rows else -1 for row in ROWS),
            SIZE_ROW=len(rows),
            PARAM=TYPES[p_dtype],
            GRAD=TYPES[g_dtype],
            MASTER=master,
            DECAY_AT=_decay_at(base),
            ALIGNED=aligned,
            BLOCK=BLOCK,
        )


def _decay_at(base: BaseStep) -> str:
    weight_decay = base.weight_decay
    decays = isinstance(weight_decay, Tensor) or weight_decay != 0
    return base.decay_at if decays else ""


def numbers_of(base: BaseStep, scalars: Scalars, device: torch.device) -> Tensor:
    """What the kernel reads by position; in float64, which no step size overflows."""
    to_z, to_step = lean_coefficients(scalars)
    b2 = 0.0 if base.b2 is None else base.b2
    numbers = [
        base.lr,
        base.weight_decay,
        1 - b2,
        base.correction,
        base.positive_eps(),
        base.divides,
        1 - base.inner_momentum,
        base.momentum_correction,
        to_z,
        to_step,
        scalars.ckp1,
        1 - scalars.b1,
        1 - scalars.next_b1,
        1 - 1 / scalars.b1 if scalars.b1 else 0.0,
    ]
    if any(isinstance(number, Tensor) for number in numbers):
        return torch.stack(
            [torch.as_tensor(n, dtype=torch.float64, device=device) for n in numbers]
        )
    return _copied(torch.tensor(numbers, dtype=torch.float64), device)


def _on_device(kept: Kept, key: Any, values: list[int], device: torch.device) -> Tensor:
    if key not in kept or kept[key][0] != values:
        kept[key] = values, _copied(torch.tensor(values), device)
    return kept[key][1]


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
