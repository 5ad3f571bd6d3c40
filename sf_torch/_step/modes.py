"""What a parameter holds: y while training, x while evaluating.

x takes the place of y in memory. Where the state does not have x, y stays in the state
meanwhile: made anew from x and z it would be a rounding off, and another one at the
next switch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sf_torch._step import batches, fused
from sf_torch._step.batches import local, same_layout
from sf_torch._step.eager import Scratch, Spare
from sf_torch._step.formula import recover_x, recover_y

State = dict[str, Tensor]  # of one parameter
Lean = dict[str, Tensor]
"""A parameter, its z and the y that is kept for it: "param", "z" and "y"."""


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
                lean.append(_lean(param, state["z"], state["y"]))
        for leaves in _lists(fused.switch(lean, b1, True) if fuses else lean):
            ps, zs, ys = (_column(leaves, row) for row in ("param", "z", "y"))
            torch._foreach_copy_(ys, ps)
            if ps[0].dtype == zs[0].dtype:
                torch._foreach_lerp_(ps, zs, 1 - 1 / b1)
            else:
                for p, z in zip(ps, zs, strict=True):
                    p.copy_(recover_x(p, z, b1))

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
                lean.append(_lean(param, state["z"], y))
        for leaves in _lists(fused.switch(lean, b1, False) if fuses else lean):
            ps, zs, ys = (_column(leaves, row) for row in ("param", "z", "y"))
            # On other devices the host would wait for the answer.
            if ps[0].is_cpu and self._are_left(ps, zs, ys, b1):
                torch._foreach_copy_(ps, ys)
                continue
            for p, z, y in zip(ps, zs, ys, strict=True):
                is_left = recover_x(y, z, b1).to(p.dtype) == p
                p.copy_(torch.where(is_left, y, recover_y(p, z, b1).to(p.dtype)))

    def _are_left(
        self, ps: list[Tensor], zs: list[Tensor], ys: list[Tensor], b1: float
    ) -> bool:
        """Whether every parameter is still the x that its kept y and z give."""
        if ps[0].dtype != zs[0].dtype:
            return False
        spare = Spare(self._scratch, ps, "x")
        torch._foreach_copy_(spare.tensors, ys)
        torch._foreach_lerp_(spare.tensors, zs, 1 - 1 / b1)
        torch._foreach_sub_(spare.tensors, ps)
        return not spare.flat.any()

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


def _lean(param: Tensor, z: Tensor, y: Tensor) -> Lean:
    return {"param": local(param.detach()), "z": local(z), "y": local(y)}


def _column(leaves: Sequence[Lean], row: str) -> list[Tensor]:
    return [leaf[row] for leaf in leaves]


def _lists(lean: Sequence[Lean]) -> list[list[Lean]]:
    """Leaves of one kind together, on a CPU in blocks that stay in its cache."""
    dense: list[Lean] = []
    others: list[Lean] = []
    for leaf in lean:
        (dense if same_layout([*leaf.values()]) else others).append(leaf)
    on_cpu = [leaf for leaf in dense if leaf["param"].is_cpu]
    elsewhere = [leaf for leaf in dense if not leaf["param"].is_cpu]
    blocks = batches.blocks(enumerate(on_cpu), together=True)
    lists = batches.whole(enumerate(elsewhere), together=True)
    alike = [[piece.leaf for piece in pieces] for pieces in (*blocks, *lists)]
    return alike + [[leaf] for leaf in others]
