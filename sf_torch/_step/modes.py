"""What a parameter holds: y while training, x while evaluating.

x takes the place of y in memory. Where the state does not have x, y stays in the state
meanwhile: made anew from x and z it would be a rounding off, and another one at the
next switch. Weights that are written over x meanwhile are x from then on, and y moves
by β times what x has moved by:

    y' = y + β (x' - x),    with x as it was made of y and z
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sf_torch._step.batches import BLOCK, flat, in_blocks, local, same_layout
from sf_torch._step.eager import Scratch
from sf_torch._step.formula import wide_lerp

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

    def to_x(self, moved: Sequence[tuple[Tensor, State]], b1: float) -> None:
        """Switches parameters from y to x, and keeps y in the state."""
        for param, state in moved:
            if "x" in state:
                param.copy_(state["x"])
                continue
            state["y"] = self._empty_like(param)
            for p, z, y in _parts(param, state["z"], state["y"]):
                y.copy_(p)
                self._lerp(y, z, 1 - 1 / b1, out=p)

    def to_y(self, moved: Sequence[tuple[Tensor, State]], b1: float) -> None:
        """Switches parameters from x to y, to the last bit where x is as it was."""
        for param, state in moved:
            if "x" in state and "y" in state:
                param.copy_(state["y"])
                continue
            if "x" in state or "y" not in state:
                for p, z, x in _parts(param, state["z"], state.get("x", param)):
                    self._lerp(x, z, 1 - b1, out=p)
                continue
            kept = state.pop("y")
            if kept.is_cpu:
                self._memory[id(param)] = kept
            for p, z, y in _parts(param, state["z"], kept):
                x = self._scratch.memory(y, y.numel(), "x").view(y.shape)
                self._lerp(y, z, 1 - 1 / b1, out=x)
                if p.dtype.itemsize < 4:
                    p.copy_(y.float() + b1 * (p.float() - x.float()))
                else:
                    torch.add(y, p.sub_(x), alpha=b1, out=p)

    def _lerp(self, a: Tensor, b: Tensor, weight: float, out: Tensor) -> None:
        """``a + weight (b - a)``: the same bits for the same a and b."""
        in_place = a.dtype == b.dtype and a.dtype.itemsize >= 4
        if in_place and a.is_contiguous() and b.is_contiguous():
            fits = out.dtype == a.dtype and out.is_contiguous()
            to = out if fits else self._scratch.memory(a, a.numel(), "").view(a.shape)
            torch.lerp(a, b, weight, out=to)
        else:
            to = wide_lerp(a, b, weight)
        if to is not out:
            out.copy_(to)

    def _empty_like(self, param: Tensor) -> Tensor:
        memory = self._memory.pop(id(param), None)
        if memory is not None and _kind(memory) == _kind(param):
            return memory
        return torch.empty_like(param.detach())


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of each: on a CPU as many as stay in its cache."""
    tensors = tuple(map(local, tensors))
    if in_blocks(tensors[0]) and tensors[0].numel() > BLOCK and same_layout(tensors):
        yield from zip(*[flat(t).split(BLOCK) for t in tensors], strict=True)
    else:
        yield tensors


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
