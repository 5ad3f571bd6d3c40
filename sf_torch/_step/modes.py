"""What a parameter holds: y while training, x while evaluating.

x takes the place of y in memory. Where the state does not have x, y stays in the state
meanwhile: made anew from x and z it would be a rounding off, and another one at the
next switch.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sf_torch._step import fused
from sf_torch._step.batches import BLOCK, flat, local, same_layout
from sf_torch._step.eager import Scratch
from sf_torch._step.formula import recover_x, recover_y

State = dict[str, Tensor]  # of one parameter


class Modes:
    """Switches parameters between y and x.

    On a CPU the memory of the kept y stays here while training: fresh memory comes page
    by page from the operating system, which takes longer than the switch. On other
    devices PyTorch keeps memory by itself.
    """

    def __init__(self) -> None:
        self._memory: dict[int, Tensor] = {}
        self._scratch = Scratch()

    def to_x(
        self, moved: Sequence[tuple[Tensor, State]], b1: float, fuses: bool
    ) -> None:
        """Switches parameters from y to x, and keeps y in the state."""
        lean = []
        for param, state in moved:
            if "x" in state:
                param.copy_(state["x"])
            else:
                state["y"] = self._empty_like(param)
                lean.append(
                    [local(t) for t in (param.detach(), state["z"], state["y"])]
                )
        for tensors in fused.switch(lean, b1, True) if fuses else lean:
            for p, z, y in _blocks(tensors):
                y.copy_(p)
                if z.dtype == y.dtype:
                    torch.lerp(y, z, 1 - 1 / b1, out=p)
                else:
                    p.copy_(recover_x(y, z, b1))

    def to_y(
        self, moved: Sequence[tuple[Tensor, State]], b1: float, fuses: bool
    ) -> None:
        """Switches parameters from x to y.

        Restores the kept y where the parameter is still the x that was made of it, and
        computes y from the present x elsewhere.
        """
        lean = []
        for param, state in moved:
            if "x" in state or "y" not in state:
                x, z = state.get("x", param), state["z"]
                param.copy_(state["y"] if "y" in state else recover_y(x, z, b1))
            else:
                y = state.pop("y")
                if y.is_cpu:
                    self._memory[id(param)] = y
                lean.append([local(t) for t in (param.detach(), state["z"], y)])
        for tensors in fused.switch(lean, b1, False) if fuses else lean:
            for p, z, y in _blocks(tensors):
                left = self._x(y, z, b1)
                if p.is_cpu and torch.equal(left, p):  # elsewhere asking takes longer
                    p.copy_(y)
                else:
                    p.copy_(torch.where(left == p, y, recover_y(p, z, b1)))

    def _empty_like(self, param: Tensor) -> Tensor:
        memory = self._memory.pop(id(param), None)
        like = param.detach()
        if (
            memory is not None
            and (memory.shape, memory.dtype) == (like.shape, like.dtype)
            and memory.device == like.device
            and local(memory).stride() == local(like).stride()
        ):
            return memory
        return torch.empty_like(like)

    def _x(self, y: Tensor, z: Tensor, b1: float) -> Tensor:
        if y.is_cpu and y.dtype == z.dtype == torch.float32 and y.numel() <= BLOCK:
            x = self._scratch.memory(y, y.numel(), "x").view_as(y)
            return torch.lerp(y, z, 1 - 1 / b1, out=x)
        return recover_x(y, z, b1)


def _blocks(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Tensors of one shape, on a CPU in slices that stay in its cache."""
    first = tensors[0]
    if first.numel() <= BLOCK or not first.is_cpu or not same_layout(tensors):
        yield tensors
        return
    yield from zip(*(flat(t).split(BLOCK) for t in tensors), strict=True)
