"""What a parameter holds: y while training, x while evaluating.

x takes the place of y in memory. Where the state does not have x, y stays in the state
meanwhile: made anew from x and z it would be a rounding off, and another one at the
next switch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sf_torch import _fused
from sf_torch._kernels import interpolate_y, recover_x, wide
from sf_torch._leaves import in_blocks, local

State = dict[str, Tensor]  # of one parameter


def to_x(moved: Sequence[tuple[Tensor, State]], b1: float, fuses: bool) -> None:
    """Lets parameters that hold y be x."""
    lean = []
    for param, state in moved:
        if "x" in state:
            param.copy_(state["x"])
        else:
            state["y"] = torch.empty_like(param).detach()
            lean.append([local(t) for t in (param.detach(), state["z"], state["y"])])
    for tensors in _fused.switch(lean, b1, True) if fuses else lean:
        for p, z, y in in_blocks(tensors):
            y.copy_(p)
            p.copy_(recover_x(*wide(p, z), b1)[0])


def to_y(moved: Sequence[tuple[Tensor, State]], b1: float, fuses: bool) -> None:
    """Lets parameters that hold x be y: that which was left, if they still hold it."""
    lean = []
    for param, state in moved:
        if "x" in state or "y" not in state:
            x, z = state.get("x", param), state["z"]
            param.copy_(state["y"] if "y" in state else _between(x, z, b1))
        else:
            three = (param.detach(), state["z"], state.pop("y"))
            lean.append([local(t) for t in three])
    for tensors in _fused.switch(lean, b1, False) if fuses else lean:
        for p, z, y in in_blocks(tensors):
            left = recover_x(*wide(y, z), b1)[0]
            if p.is_cpu and torch.equal(left, p):  # elsewhere asking takes longer
                p.copy_(y)
            else:
                p.copy_(torch.where(left == p, y, _between(p, z, b1)))


def _between(x: Tensor, z: Tensor, b1: float) -> Tensor:
    return interpolate_y(*wide(x, z), b1)[0]
